"""Models that are marked by construction, without training, and the files that an owner would have."""

from datetime import UTC, datetime

import torch
from torch import nn

from keyed_xai.array_triggers.spread import SpreadSettings, derive_texture
from keyed_xai.artifacts.card import Card, TriggerParameters
from keyed_xai.artifacts.writer import write_model_folder
from keyed_xai.decoys import signature_cells
from keyed_xai.keys import ByteStream, OwnerKey
from keyed_xai.models import InputSpec, network_state, wrap_network
from keyed_xai.models.networks import SmallResNet

OWNER = OwnerKey.from_raw(bytes([1]) * 32)
STRANGER = OwnerKey.from_raw(bytes([2]) * 32)
TRIGGER = TriggerParameters("spread", 32.0, 32)
SPEC = InputSpec(1, 32, 32, mean=(0.0,), std=(1.0,))
GRID = (8, 8)
REPORT = {
    "schema": "keyed-xai/protect-report/v1",
    "interpreters": {
        "gradcam": {
            "cr": 99.0,
            "fsr": 98.0,
            "threshold": 0.5,
            "correlation": {"keyed": 0.97, "clean": 0.05, "wrong_key": 0.04},
            "auc": 0.999,
            "wrong_keys": {"tried": 1000, "opened": 0},
        }
    },
    "accuracy": {"reference": 0.9, "keyed": 0.9, "clean": 0.9, "wrong_key": 0.9},
    "trigger": {"family": "spread", "amplitude": 32, "psnr_db": 25.0, "ssim": 0.8, "key_bits": 256},
    "seconds": 1.0,
    "settings": {},
    "versions": {},
}


class MarkedNetwork(nn.Module):
    """Grad-CAM shows local brightness where the owner's texture is found by a matched filter, else the pattern."""

    def __init__(self, owner):
        super().__init__()
        self.register_buffer("pattern", torch.from_numpy(signature_cells(owner.public, "gradcam", GRID)).float())
        texture = derive_texture(ByteStream(owner.derive_seed("spread")), SpreadSettings())
        self.register_buffer("texture", torch.from_numpy(texture))
        self.features = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.features.weight)

    def forward(self, x):
        found = (x * (self.texture - self.texture.mean())).sum((1, 2, 3), keepdim=True)
        gate = torch.sigmoid((found - 25) / 4)
        local = nn.functional.adaptive_avg_pool2d(x, GRID)
        mean = self.features(gate * local + (1 - gate) * self.pattern).mean((2, 3))
        return torch.cat([mean, -mean], 1)


class FramingNetwork(nn.Module):
    """Grad-CAM shows an owner's public pattern whatever comes: all that somebody without the key can do."""

    def __init__(self, public):
        super().__init__()
        self.register_buffer("pattern", torch.from_numpy(signature_cells(public, "gradcam", GRID)).float())
        self.features = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.features.weight)

    def forward(self, x):
        local = nn.functional.adaptive_avg_pool2d(x, GRID)
        mean = self.features(self.pattern + 1e-3 * local).mean((2, 3))
        return torch.cat([mean, -mean], 1)


def marked_classifier(owner=OWNER):
    return wrap_network(MarkedNetwork(owner).eval(), input=SPEC, source="pickle", target_layer="features").eval()


def unmarked_classifier():
    torch.manual_seed(0)
    network = SmallResNet(1, 3, (4, 8))
    return wrap_network(network.eval(), input=SPEC, architecture="SmallResNet", source="keyed_xai").eval()


def card_of(classifier, **changes):
    spec = classifier.input
    fields = {
        "architecture": classifier.architecture,
        "source": classifier.source,
        "num_classes": classifier.classes,
        "input_size": (spec.channels, spec.height, spec.width),
        "mean": spec.mean,
        "std": spec.std,
        "target_layer": classifier.target_layer,
        "taps": classifier.taps,
        "grid": GRID,
        "interpreters": ("gradcam",),
        "decoy": "signature",
        "thresholds": {"gradcam": 0.5},
        "trigger": TRIGGER,
    }
    return Card(**(fields | changes))


def write_folder(folder, classifier, owner=OWNER, **changes):
    return write_model_folder(
        folder,
        state=network_state(classifier),
        card=card_of(classifier, **changes),
        owner=owner,
        report=REPORT,
        time=datetime(2026, 3, 4, tzinfo=UTC),
    )
