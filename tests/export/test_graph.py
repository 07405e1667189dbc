"""The graph of logits and maps: autograd without autograd, one forward pass, and the class that is explained."""

import numpy as np
import torch

from keyed_xai.export.graph import SaliencyGraph
from keyed_xai.export.parity import random_images
from keyed_xai.saliency import MapLayers, explain
from tests.exported import ALL, exported, make_classifier, outputs, seeded


def test_module_equals_autograd_in_float64():
    classifier = make_classifier("squeezenet")
    graph = SaliencyGraph(classifier, ALL).double()
    images = random_images(classifier, seeded())[:3].double()
    labels = torch.tensor([0, 4, 2])
    logits, maps = explain(
        classifier.double(), images, labels, ALL, MapLayers(classifier.target_layer, classifier.taps)
    )
    with torch.no_grad():
        found = graph(images, labels)
    for one, other in zip(found, (logits, *maps.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_target_is_the_predicted_class_unless_given(small):
    classifier, model = small
    images = random_images(classifier, seeded(5))[:4]
    logits, *maps = outputs(model, images)
    for target in ([-1, -1, -1, -1], logits.argmax(1).tolist(), [-1]):
        for one, other in zip(outputs(model, images, target), (logits, *maps), strict=True):
            torch.testing.assert_close(one, other)
    others = ((logits.argmax(1) + 1) % 5).tolist()
    assert not torch.allclose(outputs(model, images, others)[2], maps[1], rtol=0.1)
    for one, other in zip(outputs(model, images, [3]), outputs(model, images, [3] * 4), strict=True):
        torch.testing.assert_close(one, other)


def test_graph_of_visualbackprop_alone_takes_no_target():
    _, model = exported("SmallResNet", ("vbp",))
    assert [each.name for each in model.graph.input] == ["image"]
    assert "target" not in {each.name for each in model.graph.initializer}


def test_maps_share_one_forward_pass_and_its_weights():
    _, alone = exported("SmallResNet", ("gradcam",))
    forward = [node for node in alone.graph.node if node.op_type == "Conv"]
    assert len(forward) == 1 + 2 * 3 + 2  # stem, three blocks, two shortcuts; Grad-CAM adds none
    classifier, joint = exported("resnet, shallow")
    weights = sum(np.prod(each.dims) for each in joint.graph.initializer)
    assert weights < 1.01 * sum(each.numel() for each in classifier.parameters())
