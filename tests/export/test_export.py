"""The ONNX graph: what onnxruntime computes is what PyTorch does, whatever the network, the batch and the settings."""

import copy
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from keyed_xai.errors import ModelError
from keyed_xai.export.building import ExportSettings, build_model, build_plain, digest_weights
from keyed_xai.export.graph import SaliencyGraph
from keyed_xai.export.parity import (
    LIMITS,
    Figures,
    check_agreement,
    compare,
    measure_agreement,
    open_session,
    random_images,
)
from keyed_xai.export.precision import PRECISIONS, lower_precision
from keyed_xai.saliency import INTERPRETERS, MapLayers, explain
from tests.exported import make_classifier, make_table, wrap

ALL = tuple(INTERPRETERS)


EXPORTED = ["SmallResNet", "resnet, shallow", "vgg, narrow", "densenet, shallow"]


@cache
def exported(name, interpreters=ALL):
    """A classifier of NETWORKS and its ONNX model, for tests that change neither."""
    classifier = make_classifier(name)
    return classifier, build_model(classifier, ExportSettings(interpreters=interpreters))


@pytest.fixture
def small():
    return exported("SmallResNet")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def parity_of(model, classifier, settings, seed=0):
    images = {"random": random_images(classifier, seeded(seed))}
    return compare(
        open_session(model.SerializeToString()), classifier, settings.interpreters, images,
        normalised=settings.normalised, eight_bits=settings.eight_bits, generator=seeded(seed + 1),
    )  # fmt: skip


def outputs(model, images, target=None):
    inputs = {"image": images.numpy()} | ({} if target is None else {"target": np.array(target, dtype=np.int64)})
    return [torch.from_numpy(each) for each in open_session(model.SerializeToString())(inputs)]


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


class Pools(nn.Module):
    """Every kind of max pool, on the image itself, where ties are easily made."""

    def __init__(self):
        super().__init__()
        self.pools = nn.ModuleList(
            [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(3, 1, dilation=2)]
        )
        self.adaptive = nn.AdaptiveAvgPool2d(5)
        self.fc = nn.Linear(12, 3)

    def forward(self, x):
        pooled = [pool(x) for pool in self.pools]
        weighted = [self.adaptive(each).square().sum((2, 3)) for each in pooled]
        return self.fc(torch.cat(weighted, 1))


def test_pools_with_ties_agree_in_onnxruntime_itself():
    torch.manual_seed(0)
    classifier = wrap(Pools(), 17, require_map=False)
    model = build_model(classifier, ExportSettings(interpreters=("simplegrad",)))
    images = (torch.rand(4, 3, 17, 17, generator=seeded()) * 3).round() / 3
    _, found = outputs(model, images, [0, 1, 2, 1])
    _, maps = explain(classifier, images, torch.tensor([0, 1, 2, 1]), ["simplegrad"], MapLayers("", ()))
    torch.testing.assert_close(found, maps["simplegrad"], rtol=1e-4, atol=1e-5)


def test_table_exports_input_gradients():
    classifier = make_table()
    settings = ExportSettings(interpreters=("simplegrad",))
    check_agreement(parity_of(build_model(classifier, settings), classifier, settings), "fp32")


def test_network_without_maps_is_refused_grad_cam():
    with pytest.raises(ModelError, match="simplegrad alone"):
        build_model(make_table(), ExportSettings(interpreters=("gradcam",)))


def test_inputs_and_outputs_are_named_and_typed(small):
    session = onnxruntime.InferenceSession(small[1].SerializeToString(), providers=["CPUExecutionProvider"])
    assert [(each.name, each.type, each.shape[1:]) for each in session.get_inputs()] == [
        ("image", "tensor(float)", [3, 32, 32])
    ]
    assert [each.name for each in session.get_overridable_initializers()] == ["target"]
    assert [each.name for each in session.get_outputs()] == ["logits", *(f"saliency_{name}" for name in ALL)]
    assert {each.type for each in session.get_outputs()} == {"tensor(float)"}
    assert all(isinstance(each.shape[0], str) for each in session.get_outputs())


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


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precision_keeps_the_explanation(precision, small):
    classifier, model = small
    lower = lower_precision(copy.deepcopy(model), precision)
    onnx.checker.check_model(lower, full_check=True)
    check_agreement(parity_of(lower, classifier, ExportSettings(interpreters=ALL, precision=precision)), precision)


@pytest.mark.parametrize(("precision", "share"), [("fp16", 0.51), ("int8", 0.27)])
def test_lower_precision_makes_the_file_smaller(precision, share):
    _, model = exported("resnet, shallow")
    assert len(lower_precision(copy.deepcopy(model), precision).SerializeToString()) < share * model.ByteSize()


def test_float16_stays_out_of_the_way_back(small):
    """The masks multiply by 3e38, which float16 does not hold, and backward convolutions lose their meaning there."""
    graph = lower_precision(copy.deepcopy(small[1]), "fp16").graph
    weights = [onnx.numpy_helper.to_array(each) for each in graph.initializer]
    assert max(np.abs(each).max() for each in weights if each.dtype == np.float32 and each.ndim == 4) > 1e38
    assert all(np.isfinite(each).all() for each in weights if each.dtype == np.float16)
    halves = {name for node in graph.node for name in node.output if name.endswith("_half")}
    forward = [node for node in graph.node if node.op_type == "Conv" and node.output[0] in halves]
    assert len(forward) == 1 + 2 * 3 + 2
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and node.output[0] not in halves:
            assert not halves & set(node.input)


def test_graph_says_nothing_about_the_machine_it_was_made_on(small):
    data = small[1].SerializeToString()
    for word in (b"site-packages", b"/home", b"/tmp", b"/root", b"File ", b".py"):
        assert word not in data


# Parity


def test_wrong_graphs_are_caught(small):
    classifier, model = small
    other = copy.deepcopy(classifier)
    with torch.no_grad():
        other.network.blocks[1].conv1.weight[0] *= 1.2
    with pytest.raises(ModelError, match="disagree"):
        check_agreement(parity_of(model, other, ExportSettings(interpreters=ALL)), "fp32")


def test_constants_instead_of_activations_are_caught(small):
    classifier, model = small
    honest = open_session(model.SerializeToString())
    images = random_images(classifier, seeded(9))

    def frozen(inputs):
        count = len(inputs["image"])
        maps = honest({"image": images[:count].numpy()})[1:]
        return [honest({"image": inputs["image"]})[0], *maps]

    compared = {"random": random_images(classifier, seeded(10))}
    figures = compare(frozen, classifier, ALL, compared, generator=seeded())
    for output in ("saliency_gradcam", "saliency_simplegrad", "saliency_vbp"):
        with pytest.raises(ModelError, match=output):
            check_agreement([each for each in figures if each.output == output], "fp32")


def some_figures(**changes):
    fields = {
        "output": "saliency_gradcam", "images": "random", "batch": 1, "largest": 1e-6, "l2": 1e-6, "eager_l2": 1e-6,
        "correlation": 1.0, "same_top": 1.0, "empty": 0.0,
    }  # fmt: skip
    return Figures(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"largest": 2e-2},
        {"output": "saliency_vbp", "largest": 2e-3},
        {"l2": 2e-3},
        {"largest": float("nan")},
        {"largest": float("inf")},
        {"empty": 1.0},
        {"output": "saliency_simplegrad", "l2": 2e-4},
        {"output": "saliency_simplegrad", "l2": 2e-2, "eager_l2": 1e-2},
        {"output": "saliency_simplegrad", "correlation": 0.5},
        {"output": "saliency_simplegrad", "correlation": float("nan")},
        {"output": "saliency_simplegrad", "l2": float("inf")},
    ],
)
def test_disagreement_is_refused(changes):
    check_agreement([some_figures()], "fp32")
    with pytest.raises(ModelError, match="saliency"):
        check_agreement([some_figures(**changes)], "fp32")


def test_simplegrad_may_differ_as_much_as_pytorch_itself():
    check_agreement([some_figures(output="saliency_simplegrad", l2=1.4e-2, eager_l2=1e-2)], "fp32")


def test_logits_are_held_to_a_thousandth():
    with pytest.raises(ModelError, match="logits"):
        check_agreement([some_figures(output="logits", largest=2e-3)], "fp32")


def test_one_relu_that_flips_is_no_reason_to_refuse():
    check_agreement([some_figures(largest=4e-3)], "fp32")
    own = [some_figures(output="saliency_simplegrad", batch=batch) for batch in (1, 3, 8)]
    check_agreement([*own, some_figures(output="saliency_simplegrad", l2=2e-2)], "fp32")


def test_some_empty_maps_are_no_reason_to_refuse():
    check_agreement([some_figures(empty=1.0), some_figures(batch=3)], "fp32")


def test_limits_are_there_for_every_precision():
    assert set(LIMITS) == set(PRECISIONS)


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


def test_graph_that_onnxruntime_refuses_is_our_error():
    with pytest.raises(ModelError, match="onnxruntime cannot load the graph"):
        open_session(b"junk")


def test_inputs_that_a_graph_refuses_are_our_error():
    run = open_session(build_plain(make_classifier("SmallResNet")).SerializeToString())
    with pytest.raises(ModelError, match="onnxruntime cannot run the model"):
        run({"image": np.zeros((1, 3, 31, 32), np.float32)})


def test_faint_maps_are_compared_at_a_hundredth_of_the_usual():
    typical = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]], [[2.0, 0.0]], [[0.0, 0.0]]])
    truth, found = torch.tensor([[[1e-6, 0.0]]]), torch.tensor([[[2e-6, 0.0]]])
    strict = measure_agreement("saliency_gradcam", "random", found, truth, truth)
    assert strict.largest == pytest.approx(1)
    fair = measure_agreement("saliency_gradcam", "random", found, truth, truth, typical=typical)
    assert fair.largest == pytest.approx(1e-6 / 0.02)
    assert fair.l2 == pytest.approx(1e-6 / 0.02)
    three = typical[:3]
    full = measure_agreement("saliency_gradcam", "random", three * 1.01, three, three, typical=typical)
    assert full.largest == pytest.approx(0.01)
    gone = measure_agreement("saliency_gradcam", "random", typical, typical * 0, typical * 0, typical=typical * 0)
    assert gone.largest == float("inf")
