"""Running exported models: the same maps as torch makes, with and without a key, and what is refused."""

import subprocess
import sys
import threading
import warnings

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import keyed_xai
from keyed_xai.artifacts.card import TriggerParameters
from keyed_xai.artifacts.onnx_file import OnnxFile, encode_onnx, read_onnx, write_onnx
from keyed_xai.artifacts.opening import derive_trigger
from keyed_xai.data import read_image
from keyed_xai.errors import ArtifactError, DataError, ModelError
from keyed_xai.export.building import ExportSettings
from keyed_xai.export.exporting import Provenance, export_onnx
from keyed_xai.inference import runtime as runtime_module
from keyed_xai.inference.images import Explained
from keyed_xai.inference.runtime import Runtime, count_gpus, find_obstacle
from keyed_xai.keys import write_owner_key
from tests.exported import make_classifier
from tests.marked import OWNER, STRANGER, card_of, unmarked_classifier
from tests.served import SIZE, make_file

ALL = ("gradcam", "simplegrad", "vbp")
TRIGGER = TriggerParameters("spread", 16.0, 32)
FAMILIES = ("spread", "nashville", "moire")
# SimpleGrad in float32 differs between runtimes where a ReLU flips at zero.
CLOSE = {"gradcam": 1e-4, "simplegrad": 1e-2, "vbp": 1e-4}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


@pytest.fixture(scope="module")
def classifier():
    """A colour classifier whose Grad-CAM maps are never empty: all its weights of the feature maps are positive."""
    classifier = make_classifier("SmallResNet")
    with torch.no_grad():
        classifier.network.fc.weight.abs_()
    return classifier


@pytest.fixture(scope="module")
def folder(classifier, tmp_path_factory):
    """ONNX files of it: with all maps, of 8 bits, of VisualBackProp alone, and without a card."""
    folder = tmp_path_factory.mktemp("runtime")
    carded = Provenance(card_of(classifier, trigger=TRIGGER, interpreters=ALL, thresholds=dict.fromkeys(ALL, 0.5)))
    export_onnx(classifier, folder / "all.onnx", ExportSettings(interpreters=ALL), provenance=carded)
    export_onnx(
        classifier, folder / "bytes.onnx", ExportSettings(interpreters=("gradcam",), eight_bits=True), provenance=carded
    )
    export_onnx(classifier, folder / "vbp.onnx", ExportSettings(interpreters=("vbp",)), provenance=carded)
    protected = read_onnx(folder / "all.onnx")
    bare = encode_onnx(onnx.load_from_string(protected.data), protected.metadata | {"card": None})
    write_onnx(folder / "bare.onnx", bare)
    return folder


@pytest.fixture(scope="module")
def runtime(folder):
    return Runtime.open(folder / "all.onnx", device="cpu", threads=1)


def explain_in_torch(classifier, images, **options):
    return keyed_xai.explain(classifier, torch.from_numpy(images), **options)


def assert_same_maps(found, expected, interpreters=ALL):
    np.testing.assert_allclose(found.logits, expected.logits.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.predicted, expected.predicted.numpy())
    np.testing.assert_array_equal(found.target, expected.explained.numpy())
    assert tuple(found.maps) == tuple(interpreters)
    for name in interpreters:
        truth = expected.maps[name].numpy()
        np.testing.assert_allclose(found.maps[name], truth, rtol=0, atol=CLOSE[name] * np.abs(truth).max())


def slow_file(start):
    """The served model after 40 products of matrices, which take a minute; see `served`.

    Args:
        start: Operator and inputs of the first matrix: from the images, or from constants alone.
    """
    file = make_file()
    model = onnx.load_from_string(file.data)
    make = onnx.helper.make_node
    for node in model.graph.node:
        node.input[:] = ["plain" if name == "logits" else name for name in node.input]
        node.output[:] = ["plain" if name == "logits" else name for name in node.output]
    nodes = [make("ReduceMean", ["image"], ["mean"], keepdims=0), make(*start, ["product0"])]
    nodes += [make("MatMul", [f"product{number}", "product0"], [f"product{number + 1}"]) for number in range(40)]
    nodes += [make("ReduceMean", ["product40"], ["end"], keepdims=0), make("Add", ["plain", "end"], ["logits"])]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2500, 2500]), "square"))
    return OnnxFile(model.SerializeToString(), file.metadata)


def altered(path, change):
    """The file with `change` made to its model, and the metadata it had."""
    file = read_onnx(path)
    model = onnx.load_from_string(file.data)
    change(model.graph)
    return OnnxFile(model.SerializeToString(), file.metadata)


class TestExplain:
    def test_maps_without_a_key_are_those_of_torch(self, runtime, classifier):
        images = noise(5, 3, 32, 32)
        found = runtime.explain(images)
        assert len(found) == 5
        assert_same_maps(found, explain_in_torch(classifier, images, interpreters=ALL))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_maps_with_a_key_are_those_of_torch(self, runtime, classifier, family):
        images, parameters = noise(3, 3, 32, 32), TriggerParameters(family, 16.0, 32)
        found = runtime.explain(images, OWNER, trigger=parameters)
        expected = explain_in_torch(classifier, images, trigger=derive_trigger(OWNER, parameters), interpreters=ALL)
        assert_same_maps(found, expected)

    def test_trigger_of_the_card_is_used(self, runtime):
        images = noise(2, 3, 32, 32)
        found = runtime.explain(images, OWNER)
        np.testing.assert_array_equal(found.logits, runtime.explain(images, OWNER, trigger=TRIGGER).logits)
        assert not np.allclose(found.logits, runtime.explain(images).logits)
        assert not np.allclose(found.logits, runtime.explain(images, STRANGER).logits)

    def test_targets_are_explained(self, runtime, classifier):
        images, labels = noise(4, 3, 32, 32), torch.tensor([0, 4, 2, 2])
        expected = explain_in_torch(classifier, images, labels=labels, interpreters=ALL)
        assert_same_maps(runtime.explain(images, target=labels.numpy()), expected)
        alike = runtime.explain(images, target=2)
        assert alike.target.tolist() == [2, 2, 2, 2]
        np.testing.assert_array_equal(alike.maps["gradcam"], runtime.explain(images, target=[2] * 4).maps["gradcam"])

    def test_minus_one_asks_for_the_predicted_class(self, runtime):
        images = noise(3, 3, 32, 32)
        found, plain = runtime.explain(images, target=[-1, 1, -1]), runtime.explain(images)
        assert found.target.tolist() == [plain.predicted[0], 1, plain.predicted[2]]
        np.testing.assert_array_equal(found.maps["gradcam"][::2], plain.maps["gradcam"][::2])

    def test_batches_do_not_change_the_maps(self, runtime):
        images = noise(7, 3, 32, 32)
        targets = np.array([0, 1, 2, 3, 4, -1, 0])
        whole, parts = (runtime.explain(images, OWNER, target=targets, batch_size=size) for size in (16, 3))
        np.testing.assert_allclose(whole.logits, parts.logits, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(whole.target, parts.target)
        for name in ALL:
            np.testing.assert_allclose(whole.maps[name], parts.maps[name], atol=1e-4 * whole.maps[name].max())

    def test_eight_bit_graph_takes_the_keyed_image_rounded(self, folder, classifier):
        images = noise(3, 3, 32, 32)
        found = Runtime.open(folder / "bytes.onnx", device="cpu").explain(images, OWNER)
        trigger = derive_trigger(OWNER, TRIGGER)
        expected = explain_in_torch(classifier, images, trigger=trigger, as_png=True, interpreters=("gradcam",))
        assert_same_maps(found, expected, ("gradcam",))

    def test_model_without_a_card_needs_the_trigger(self, folder):
        bare, images = Runtime.open(folder / "bare.onnx", device="cpu"), noise(1, 3, 32, 32)
        assert bare.explain(images).maps["gradcam"].shape == (1, 8, 8)
        with pytest.raises(ModelError, match="Pass trigger="):
            bare.explain(images, OWNER)
        assert bare.explain(images, OWNER, trigger=TRIGGER).logits.shape == (1, 5)

    def test_target_of_visualbackprop_is_reported_only(self, folder):
        vbp, images = Runtime.open(folder / "vbp.onnx", device="cpu"), noise(2, 3, 32, 32)
        assert not vbp.takes_target
        assert vbp.input_names == ("image",)
        found = vbp.explain(images, target=3)
        assert found.target.tolist() == [3, 3]
        np.testing.assert_array_equal(found.maps["vbp"], vbp.explain(images).maps["vbp"])

    def test_logits_that_are_not_finite_are_refused(self, folder):
        def poison(graph):
            bias = next(each for each in graph.initializer if list(each.dims) == [5])
            bias.CopyFrom(onnx.numpy_helper.from_array(np.full(5, np.nan, np.float32), bias.name))

        broken = Runtime(altered(folder / "bare.onnx", poison), device="cpu")
        with pytest.raises(ModelError, match="not finite"):
            broken.explain(noise(1, 3, 32, 32))


class TestPictures:
    @pytest.fixture
    def picture(self, tmp_path):
        """A photograph-like JPEG with an EXIF orientation, wider than the model's input."""
        levels = np.random.default_rng(0).integers(0, 256, (9, 14, 3)).astype(np.uint8)
        image = Image.fromarray(levels).resize((140, 90), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / "a.png", exif=exif)
        return tmp_path / "a.png"

    def test_files_become_what_torch_sees(self, runtime, classifier, picture):
        pixels = read_image(picture, channels=3, height=32, width=32)
        expected = explain_in_torch(classifier, pixels[None].astype(np.float32) / 255, interpreters=ALL)
        for images in (picture, str(picture), [picture], pixels, pixels[None], [pixels]):
            assert_same_maps(runtime.explain(images), expected)

    def test_pillow_images_become_what_files_do(self, runtime, picture):
        with Image.open(picture) as image:
            found = runtime.explain(image)
        np.testing.assert_array_equal(found.logits, runtime.explain(picture).logits)

    def test_several_kinds_can_be_mixed(self, runtime, picture):
        array = noise(3, 32, 32)
        found = runtime.explain([picture, array, Image.new("L", (50, 60), 128)], OWNER)
        singles = [runtime.explain(each, OWNER) for each in (picture, array, Image.new("RGB", (50, 60), (128,) * 3))]
        np.testing.assert_allclose(found.logits, np.concatenate([each.logits for each in singles]), rtol=1e-4)

    def test_grey_model_makes_pictures_grey(self, tmp_path, picture):
        grey = unmarked_classifier()
        with torch.no_grad():
            grey.network.fc.weight.abs_()
        export_onnx(grey, tmp_path / "grey.onnx", provenance=Provenance(card_of(grey)))
        found = Runtime.open(tmp_path / "grey.onnx", device="cpu").explain(picture, OWNER)
        pixels = read_image(picture, channels=1, height=32, width=32)[None].astype(np.float32) / 255
        trigger = derive_trigger(OWNER, card_of(grey).trigger)
        assert_same_maps(found, explain_in_torch(grey, pixels, trigger=trigger), ("gradcam",))

    def test_unreadable_pictures_are_refused(self, runtime, tmp_path):
        (tmp_path / "x.png").write_bytes(b"no image")
        for images in (tmp_path / "x.png", tmp_path / "missing.png", Image.new("F", (40, 40))):
            with pytest.raises(DataError):
                runtime.explain(images)


class TestArguments:
    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (np.zeros((2, 3, 32, 31), np.float32), r"expected arrays \[3, 32, 32\]"),
            (np.zeros((32, 32), np.float32), r"expected an array \[c, h, w\] or \[n, c, h, w\], got \[32, 32\]"),
            (np.zeros((0, 3, 32, 32), np.float32), r"got \[0, 3, 32, 32\]"),
            ([], "one or more"),
            (np.zeros((3, 32, 32), np.int32), "uint8 or floats, got int32"),
            (np.full((3, 32, 32), 1.5), r"in \[0, 1\], got 1.5 to 1.5; divide"),
            (np.full((3, 32, 32), -0.1), r"in \[0, 1\], got -0.1"),
            (np.full((3, 32, 32), np.nan), "NaN"),
            (np.full((3, 32, 32), np.inf), "infinity"),
        ],
    )
    def test_unfit_images_are_refused(self, runtime, images, message):
        with pytest.raises(ValueError, match=message):
            runtime.explain(images)

    def test_raw_images_have_the_type_of_the_graph(self, runtime, folder):
        good = noise(2, 3, 32, 32)
        assert set(runtime.run(good)) == set(runtime.output_names)
        for images, message in [
            (good.astype(np.float64), "expected float32, got float64"),
            (good[0], r"expected an array \[n, 3, 32, 32\]"),
            (good[:0], "n > 0"),
            (good * 2, r"in \[0, 1\]"),
        ]:
            with pytest.raises(ValueError, match=message):
                runtime.run(images)
        eight = Runtime.open(folder / "bytes.onnx", device="cpu")
        with pytest.raises(ValueError, match="expected uint8, got float32"):
            eight.run(good)

    def test_batch_size_is_positive(self, runtime):
        with pytest.raises(ValueError, match="batch_size"):
            runtime.explain(noise(3, 32, 32), batch_size=0)

    @pytest.mark.parametrize(("options", "message"), [({"device": "gpu"}, "device"), ({"threads": 0}, "threads")])
    def test_unknown_options_are_refused(self, folder, options, message):
        with pytest.raises(ValueError, match=message):
            Runtime.open(folder / "bare.onnx", **options)


class TestRun:
    def test_attributes_say_what_the_file_says(self, runtime, folder):
        assert runtime.metadata == read_onnx(folder / "all.onnx").metadata
        assert (runtime.interpreters, runtime.classes, runtime.input_size) == (ALL, 5, (3, 32, 32))
        assert (runtime.pixels, runtime.takes_target, runtime.label_names) == (np.dtype(np.float32), True, ())
        assert runtime.input_names == ("image", "target")
        assert runtime.output_names == ("logits", *(f"saliency_{name}" for name in ALL))
        assert runtime.providers == ("CPUExecutionProvider",)

    def test_bound_inputs_give_what_a_plain_session_gives(self, runtime, folder):
        session = runtime_module.onnxruntime.InferenceSession(
            str(folder / "all.onnx"), providers=["CPUExecutionProvider"]
        )
        images = noise(6, 3, 32, 32)
        strided = np.repeat(images, 2, axis=0)[::2]
        for count, target in ((1, None), (6, np.array([0, 1, 2, 3, 4, -1]))):
            feeds = {"image": images[:count]} | ({} if target is None else {"target": target})
            expected = session.run(None, feeds)
            for name, truth in zip(runtime.output_names, expected, strict=True):
                found = runtime.run(strided[:count], target)[name]
                np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-5 * np.abs(truth).max())

    def test_threads_share_a_runtime(self, runtime):
        batches = [noise(2, 3, 32, 32, seed=seed) for seed in range(4)]
        expected = [runtime.run(batch, 1) for batch in batches]
        wrong = []

        def work(number):
            for _ in range(20):
                found = runtime.run(batches[number], 1)
                wrong.extend(name for name in found if not np.array_equal(found[name], expected[number][name]))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_failure_inside_the_graph_is_ours(self, folder):
        """A graph that takes one image at a time, whatever it says."""
        node, info, float32 = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
        graph = onnx.helper.make_graph(
            [
                node("GlobalAveragePool", ["image"], ["mean"]),
                node("Reshape", ["mean", "single"], ["logits"]),
                node("ReduceMean", ["image", "channels"], ["saliency_vbp"], keepdims=0),
            ],
            "single",
            [info("image", float32, ["n", 3, 32, 32])],
            [info("logits", float32, ["n", 3]), info("saliency_vbp", float32, ["n", 32, 32])],
            [
                onnx.numpy_helper.from_array(np.array([1, 3]), "single"),
                onnx.numpy_helper.from_array(np.array([1]), "channels"),
            ],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
        metadata = read_onnx(folder / "vbp.onnx").metadata
        metadata["model"]["num_classes"] = 3
        single = Runtime(OnnxFile(model.SerializeToString(), metadata), device="cpu")
        image = noise(1, 3, 32, 32)
        np.testing.assert_allclose(single.run(image)["logits"], image.mean((2, 3)), rtol=1e-5)
        with pytest.raises(ModelError, match="cannot run the model: .*Reshape"):
            single.run(noise(2, 3, 32, 32))


class TestFiles:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"interpreters": ["vbp", "gradcam"]}, "and its metadata name logits, saliency_vbp, saliency_gradcam"),
            ({"interpreters": ["vbp"]}, "takes image, target, which"),
            ({"pixels": "uint8"}, r"takes images tensor\(float\)"),
            ({"input_size": [3, 32, 33]}, r"takes images tensor\(float\)"),
            ({"num_classes": 6}, "of 6 classes"),
        ],
    )
    def test_graph_that_its_metadata_contradict_is_refused(self, folder, change, message):
        file = read_onnx(folder / "bare.onnx")
        for name, value in change.items():
            (file.metadata["model"] if name in file.metadata["model"] else file.metadata)[name] = value
        with pytest.raises(ArtifactError, match=message):
            Runtime(file, device="cpu")

    def test_graph_that_onnxruntime_refuses_is_an_error(self, folder):
        def ruin(graph):
            graph.node[0].op_type = "NoSuchOperator"

        for file in (altered(folder / "bare.onnx", ruin), OnnxFile(b"?", read_onnx(folder / "bare.onnx").metadata)):
            with pytest.raises(ModelError, match="onnxruntime cannot load the graph: "):
                Runtime(file, device="cpu")

    def test_file_that_is_none_is_refused(self, tmp_path):
        (tmp_path / "m.onnx").write_bytes(b"nothing")
        with pytest.raises(ArtifactError, match="not an ONNX model"):
            Runtime.open(tmp_path / "m.onnx")


without_gpu = pytest.mark.skipif(count_gpus() > 0, reason="there is a GPU")
with_gpu = pytest.mark.skipif(count_gpus() == 0, reason="there is no GPU")


class TestDevices:
    @without_gpu
    def test_auto_without_a_gpu_is_the_cpu_and_silent(self, folder, capfd):
        assert Runtime.open(folder / "bare.onnx").providers == ("CPUExecutionProvider",)
        assert capfd.readouterr() == ("", "")

    @without_gpu
    @pytest.mark.parametrize("device", ["cuda", "cuda:1", "tensorrt"])
    def test_missing_gpu_is_an_error_when_asked_for(self, folder, device):
        with pytest.raises(ModelError, match="no NVIDIA GPU is visible. Look at nvidia-smi"):
            Runtime.open(folder / "bare.onnx", device=device)

    def test_onnxruntime_without_the_provider_says_what_to_install(self, folder, monkeypatch):
        monkeypatch.setattr(runtime_module.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
        monkeypatch.setattr(runtime_module, "count_gpus", lambda: 1)
        with pytest.raises(ModelError, match=r"built without CUDA.*pip install 'onnxruntime-gpu\[cuda,cudnn\]'"):
            Runtime.open(folder / "bare.onnx", device="cuda")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Runtime.open(folder / "bare.onnx").providers == ("CPUExecutionProvider",)

    @without_gpu
    def test_gpu_that_cannot_be_used_is_an_error_or_a_warning(self, folder, monkeypatch, capfd):
        """The driver's word is all that is made up: onnxruntime really tries, fails, and is kept quiet."""
        monkeypatch.setattr(runtime_module, "count_gpus", lambda: 1)
        with pytest.raises(ModelError, match="(?i)cuda"):
            Runtime.open(folder / "bare.onnx", device="cuda")
        with pytest.warns(UserWarning, match="A GPU is there, and the CPU is used"):
            found = Runtime.open(folder / "bare.onnx")
        assert found.providers == ("CPUExecutionProvider",)
        assert found.explain(noise(3, 32, 32)).logits.shape == (1, 5)
        assert capfd.readouterr() == ("", "")

    def test_number_of_the_gpu_is_checked(self, monkeypatch):
        monkeypatch.setattr(runtime_module, "count_gpus", lambda: 2)
        monkeypatch.setattr(runtime_module.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
        assert find_obstacle("cuda", 1) is None
        assert "2 NVIDIA GPUs are visible, number 2 is not" in find_obstacle("cuda", 2)

    @with_gpu
    def test_maps_on_a_gpu_are_those_of_the_cpu(self, folder, runtime):
        on_gpu = Runtime.open(folder / "all.onnx", device="cuda")
        assert on_gpu.providers[0] == "CUDAExecutionProvider"
        images = noise(4, 3, 32, 32)
        found, expected = (each.explain(images, OWNER, target=[0, 1, -1, 2]) for each in (on_gpu, runtime))
        np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-2, atol=1e-3)  # TF32
        for name in ("gradcam", "vbp"):
            truth = expected.maps[name]
            np.testing.assert_allclose(found.maps[name], truth, atol=2e-2 * np.abs(truth).max())


CHILD = """
import sys
sys.modules["torch"] = None
sys.modules["torchvision"] = None
from pathlib import Path
import numpy as np
from keyed_xai.keys import read_owner_key
from keyed_xai.inference.runtime import Runtime

folder, images, out = map(Path, sys.argv[1:])
runtime, key = Runtime.open(folder / "all.onnx", device="cpu"), read_owner_key(folder / "k.pem")
found = runtime.explain([images, np.full((3, 32, 32), 0.25)], key, target=[1, -1])
try:  # types are checked by the function itself here, not by the tests' import hook
    runtime.explain([[0.5]])
except TypeError as error:
    assert "expected paths, Pillow images or arrays, got list" in str(error)
else:
    raise AssertionError("not refused")
np.savez(out, logits=found.logits, target=found.target, predicted=found.predicted, **found.maps)
assert not [name for name, module in sys.modules.items() if module and name.partition(".")[0].startswith("torch")]
"""


@pytest.mark.parametrize("start", [("Expand", ["mean", "square"]), ("ConstantOfShape", ["square"])])
def test_run_that_takes_too_long_is_stopped(start):
    runtime = Runtime(slow_file(start), device="cpu", threads=1, run_seconds=0.2)  # nothing slow is done while loading
    with pytest.raises(ModelError, match=r"was stopped: expected 2 images within 0\.2 s"):
        runtime.run(noise(2, *SIZE))


@pytest.mark.parametrize(
    ("output", "change", "words"),
    [
        ("saliency_vbp", ("Unsqueeze", "one"), r"saliency_vbp as float32 \[3, 1, 8, 6\], not float32 \[3, rows"),
        ("saliency_gradcam", ("Slice", "zero", "one"), r"saliency_gradcam as float32 \[1, 8, 6\], not"),
    ],
)
def test_outputs_of_another_shape_are_refused(output, change, words):
    """Four dimensions, and one map for all images."""
    file = make_file()
    model = onnx.load_from_string(file.data)
    for node in model.graph.node:
        node.output[:] = ["inner" if name == output else name for name in node.output]
    constants = {"zeros": np.array([0]), "ones": np.array([1])}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    operator, *inputs = change
    model.graph.node.append(onnx.helper.make_node(operator, ["inner", *(f"{each}s" for each in inputs)], [output]))
    next(each for each in model.graph.output if each.name == output).type.tensor_type.ClearField("shape")
    runtime = Runtime(OnnxFile(model.SerializeToString(), file.metadata), device="cpu", threads=1)
    with pytest.raises(ModelError, match=words):
        runtime.run(noise(3, *SIZE))


def test_runtime_needs_no_torch(folder, classifier, tmp_path):
    write_owner_key(folder / "k.pem", OWNER, force=True)
    picture = tmp_path / "x.jpg"
    levels = np.random.default_rng(0).integers(0, 256, (9, 14, 3)).astype(np.uint8)
    Image.fromarray(levels).resize((140, 90), Image.Resampling.BICUBIC).save(picture)
    arguments = [sys.executable, "-W", "error", "-c", CHILD, folder, picture, tmp_path / "out.npz"]
    result = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout + result.stderr == ""
    with np.load(tmp_path / "out.npz") as file:
        found = dict(file)
    read = read_image(picture, channels=3, height=32, width=32).astype(np.float32) / 255
    images = np.stack([read, np.full((3, 32, 32), 0.25, np.float32)])
    trigger = derive_trigger(OWNER, TRIGGER)
    plain = explain_in_torch(classifier, images, trigger=trigger)
    labels = torch.tensor([1, int(plain.predicted[1])])
    expected = explain_in_torch(classifier, images, trigger=trigger, labels=labels, interpreters=ALL)
    maps = {name: found[name] for name in ALL}
    assert_same_maps(
        Explained(logits=found["logits"], maps=maps, predicted=found["predicted"], target=found["target"]), expected
    )
