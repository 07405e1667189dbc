"""Which layers feed which: the last ones, and how deep they are."""

import numpy as np
import pytest

from keyed_xai.errors import ModelError
from keyed_xai.models import wrap_network
from keyed_xai.models.layer_graph import batch_norm_after, last_convolution, trace_calls
from keyed_xai.models.networks import SmallResNet
from keyed_xai.threats.removal.rescaling import find_channel_groups
from tests.rescaled import SPEC, classify


def test_last_convolution_of_a_residual_block_is_not_its_shortcut():
    classifier = classify(SmallResNet(1, 3, (4, 8)))
    assert last_convolution(classifier) == "network.blocks.1.conv2"
    assert batch_norm_after(classifier, "network.blocks.1.conv2") == "network.blocks.1.bn2"
    assert batch_norm_after(classifier, "network.blocks.1.shortcut") is None


def test_depth_counts_layers_on_the_longest_way(residual):
    depths = {call.module: call.depth for call in trace_calls(residual) if call.name in ("conv2d", "linear")}
    first, second = "network.blocks.0", "network.blocks.1"
    assert [depths[name] for name in ("network.stem", f"{first}.conv2", f"{second}.shortcut", "network.fc")] == [
        1,
        3,
        4,
        8,
    ]
    assert np.prod(trace_calls(residual)[-1].output.shape) == 2 * 3


def test_network_without_layers_is_refused(pooled_image):
    classifier = wrap_network(pooled_image, input=SPEC, target_layer="map")
    with pytest.raises(ModelError, match="conv2d layer"):
        last_convolution(classifier)
    assert find_channel_groups(classifier) == []
