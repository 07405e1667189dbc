"""The ONNX model: it agrees with PyTorch whatever the network, the batch, the interpreters and the settings."""

import copy

import onnx
import pytest
import torch

from keyed_xai.errors import ModelError
from keyed_xai.export.building import ExportSettings, build_model, build_plain, digest_weights
from keyed_xai.export.parity import check_agreement, random_images
from tests.exported import ALL, exported, make_classifier, make_table, outputs, parity_of, seeded

EXPORTED = ["SmallResNet", "resnet, shallow", "vgg, narrow", "densenet, shallow"]


def check_parity(classifier, model, interpreters):
    onnx.checker.check_model(model, full_check=True)
    figures = parity_of(model, classifier, ExportSettings(interpreters=interpreters))
    check_agreement(figures, "fp32")
    assert {(each.output, each.batch) for each in figures} == {
        (output, batch) for output in ("logits", *(f"saliency_{name}" for name in interpreters)) for batch in (1, 3, 8)
    }
    for each in figures:
        if each.output != "saliency_simplegrad":
            assert each.largest < 1e-4
            assert each.same_top == 1


@pytest.mark.parametrize("name", EXPORTED)
def test_graph_agrees_with_pytorch(name):
    check_parity(*exported(name), ALL)


@pytest.mark.parametrize("interpreter", ALL)
def test_graph_of_one_interpreter_agrees_with_pytorch(interpreter):
    check_parity(*exported("SmallResNet", (interpreter,)), (interpreter,))


def test_graph_of_a_network_of_full_size_agrees_with_pytorch():
    check_parity(*exported("resnet50", ("gradcam",)), ("gradcam",))


def test_table_exports_input_gradients():
    classifier = make_table()
    settings = ExportSettings(interpreters=("simplegrad",))
    check_agreement(parity_of(build_model(classifier, settings), classifier, settings), "fp32")


def test_network_without_maps_is_refused_grad_cam():
    with pytest.raises(ModelError, match="simplegrad alone"):
        build_model(make_table(), ExportSettings(interpreters=("gradcam",)))


def test_settings_reach_the_graph():
    classifier = make_classifier("SmallResNet")
    settings = ExportSettings(interpreters=("gradcam",), normalised=True, eight_bits=True)
    model = build_model(classifier, settings)
    check_agreement(parity_of(model, classifier, settings), "fp32")
    images = random_images(classifier, seeded(3))[:2]
    maps = outputs(model, (images * 255).round().to(torch.uint8))[1]
    torch.testing.assert_close(maps.amin((1, 2)), torch.zeros(2))
    torch.testing.assert_close(maps.amax((1, 2)), torch.ones(2))


def test_plain_graph_gives_the_same_logits_and_no_more(small):
    classifier, model = small
    plain = build_plain(classifier)
    assert [each.name for each in (*plain.graph.input, *plain.graph.output)] == ["image", "logits"]
    images = random_images(classifier, seeded())[:3]
    torch.testing.assert_close(outputs(plain, images)[0], outputs(model, images)[0])


@pytest.mark.parametrize(
    "changes", [{"interpreters": ()}, {"interpreters": ("lime",)}, {"interpreters": ("vbp", "vbp")}, {"precision": "8"}]
)
def test_bad_settings_are_refused(changes):
    with pytest.raises(ValueError, match="expected"):
        ExportSettings(**changes)


def test_digest_tells_weights_apart(small):
    classifier, _ = small
    other = copy.deepcopy(classifier)
    assert digest_weights(other) == digest_weights(classifier)
    with torch.no_grad():
        other.network.fc.bias[0] += 1e-3
    assert digest_weights(other) != digest_weights(classifier)
