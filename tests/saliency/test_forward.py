"""The forward pass that keeps feature maps: layers that give none, and activations in place behind them."""

import pytest
import torch
from torch import nn
from torchvision.models import densenet, vgg

from keyed_xai.errors import ModelError
from keyed_xai.saliency import MapLayers, explain
from keyed_xai.tensors import Tap
from tests.explained import assert_unchanged, every_interpreter, maps_of, replace_modules, snapshot


@pytest.mark.parametrize(
    ("layer", "message"),
    [("nowhere", "no layer 'nowhere'"), ("fc", r"gives \[5, 3\]"), ("spare", "'spare' was not run")],
)
def test_useless_target_layer_is_refused(network, images, labels, map_layers, layer, message):
    network.spare = nn.Identity()
    before = snapshot(network)
    with pytest.raises(ModelError, match=message):
        maps_of("gradcam", network, images, labels, MapLayers(layer, map_layers.taps))
    assert_unchanged(network, before)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_layer_that_gives_a_tuple_is_refused(images):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            return self.pair(x)[0].mean((2, 3))

    with pytest.raises(ModelError, match="pair"):
        explain(Model(), images, None, ["gradcam"], MapLayers("pair", ()))


def small_vgg():
    features = vgg.make_layers([4, "M", 6, 6, "M", 6])
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).eval()


def small_densenet():
    return densenet.DenseNet(4, (2, 2), num_init_features=8, bn_size=2, num_classes=3).eval()


IN_PLACE = {
    "vgg, a ReLU": (
        small_vgg,
        MapLayers("0.9", (Tap("0.1", 3, 1), Tap("0.4", 3, 2), Tap("0.6", 3, 1), Tap("0.9", 3, 2))),
    ),
    "vgg, a convolution before a ReLU": (small_vgg, MapLayers("0.8", (Tap("0.0", 3, 1), Tap("0.8", 3, 4)))),
    "densenet, the norm before the final ReLU": (
        small_densenet,
        MapLayers(
            "features.norm5",
            (Tap("features.relu0", 7, 2), Tap("features.transition1", 3, 4), Tap("features.norm5", 3, 1)),
        ),
    ),
    "densenet, all features": (
        small_densenet,
        MapLayers("features", (Tap("features.norm0", 7, 2), Tap("features.denseblock1", 3, 2), Tap("features", 3, 2))),
    ),
}


@every_interpreter
@pytest.mark.parametrize("case", IN_PLACE)
def test_in_place_activations_change_no_map(name, case, monkeypatch, labels):
    build, map_layers = IN_PLACE[case]
    torch.manual_seed(4)
    model = build()
    images = torch.rand(5, 3, 32, 32)
    maps = maps_of(name, model, images, labels, map_layers)
    twin = replace_modules(model, nn.ReLU, lambda _: nn.ReLU(inplace=False))
    monkeypatch.setattr(densenet.F, "relu", lambda x, **_: torch.clamp_min(x, 0))
    torch.testing.assert_close(maps, maps_of(name, twin, images, labels, map_layers), rtol=1e-6, atol=1e-9)
    assert maps.amax() > 0
