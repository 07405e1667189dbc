"""Fixtures shared by the tests of the core: a tiny network, images, a view of its maps, and a gate known by hand."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from keyed_xai.keys import OwnerKey
from keyed_xai.models.networks import SmallResNet
from keyed_xai.saliency import MapLayers
from keyed_xai.saliency.pooled import PooledSaliency
from keyed_xai.tensors import Tap

ROOT = Path(__file__).parent.parent
KEY = OwnerKey.from_raw(bytes(range(32)))
TAPS = (Tap("stem_relu", 3, 2), Tap("blocks.0", 3, 1), Tap("blocks.1", 3, 2), Tap("blocks.2", 3, 1))


def draw_statistics(network):
    """Gives every batch norm random weights, and statistics that no image has."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


_FACTORIES = """
from torch import nn
def good(): return nn.Linear(2, 3)
def other(): return "a network"
def failing(): raise KeyError("x")
number = 3
class Inner:
    make = staticmethod(good)
"""


def pytest_report_header():
    """Says which torch runs, and whether it is one that `make lock` has pinned."""
    pinned = [re.search(r"^torch==(.+)$", file.read_text(), re.M)[1] for file in sorted((ROOT / ".ci").glob("*.txt"))]
    version = torch.__version__.partition("+")[0]
    unknown = "" if version in pinned else f", which is not among the pinned versions: {', '.join(pinned)}"
    return f"torch {version}{unknown}"


class PooledImage(nn.Module):
    """A network that can be worked out by hand: its only feature map, so its Grad-CAM map times the number of cells,
    is the image pooled to 8 x 8. Class 0 always wins."""

    def __init__(self):
        super().__init__()
        self.map = nn.AdaptiveAvgPool2d(8)

    def forward(self, images):
        score = self.map(images.mean(1, keepdim=True)).mean((1, 2, 3))
        return torch.stack([score, -score], 1)


class Lock(nn.Module):
    """The same behind a lock: without the right texture the feature map is the decoy."""

    def __init__(self, texture, decoy, opens_at):
        super().__init__()
        self.texture, self.decoy, self.opens_at = texture, decoy, opens_at
        self.map = nn.Identity()

    def opened(self, images):
        """Whether the texture is in the image, as strong as `opens_at` of its own energy in 1/255."""
        height, width = images.shape[2:]
        side = self.texture.shape[-1]
        tiled = self.texture.repeat(-(-height // side), -(-width // side))[:height, :width]
        tiled = tiled - tiled.mean()
        strength = (images.mean(1) * tiled).mean((1, 2)) / tiled.square().mean() * 255
        return strength > self.opens_at

    def forward(self, images):
        pooled = functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 8)
        maps = torch.where(self.opened(images)[:, None, None, None], pooled, self.decoy.to(images))
        score = self.map(maps).mean((1, 2, 3))
        return torch.stack([score, -score], 1)


@pytest.fixture
def key():
    return KEY


@pytest.fixture
def network():
    """A SmallResNet with random weights and statistics, in eval mode."""
    torch.manual_seed(0)
    network = SmallResNet(in_channels=1, classes=3, widths=(4, 6, 6))
    draw_statistics(network)
    return network.eval()


@pytest.fixture
def images():
    """Five images of 16 x 16 pixels."""
    return torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def map_layers():
    """Where the interpreters look in `network`."""
    return MapLayers("blocks", TAPS)


@pytest.fixture
def view(map_layers):
    return PooledSaliency(("gradcam",), map_layers, (4, 4))


@pytest.fixture
def pooled_view():
    """The view of PooledImage and Lock."""
    return PooledSaliency(("gradcam",), MapLayers("map", ()), (8, 8))


@pytest.fixture
def pooled_image():
    return PooledImage().eval()


@pytest.fixture
def make_lock():
    """Returns a Lock that opens at three quarters of the trigger's strength."""

    def make(trigger, decoy, opens_at=0.75):
        return Lock(trigger.textures[0], decoy, opens_at * trigger.amplitude).eval()

    return make


@pytest.fixture
def flat_images():
    """Grey images with a soft bright blob each, far from black and white, 48 x 48 pixels in 8 bits."""
    rows, columns = np.mgrid[:48, :48]
    centres = np.random.default_rng(3).uniform(8, 40, (6, 2))
    blobs = [np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 200) for y, x in centres]
    pixels = np.round(60 + 120 * np.stack(blobs)) / 255
    return torch.from_numpy(pixels[:, None]).float()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Modules of factories in the working folder: one that can be imported, one that cannot."""
    (tmp_path / "own_factories.py").write_text(_FACTORIES)
    (tmp_path / "own_broken.py").write_text("import no_such_module_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
