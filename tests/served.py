"""A small ONNX model that can be worked out by hand, waits or answers at length if asked to, and a server for it."""

import threading
from contextlib import contextmanager

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from keyed_xai.artifacts.card import Card, TriggerParameters
from keyed_xai.artifacts.onnx_file import encode_onnx, write_onnx
from keyed_xai.inference.runtime import Runtime
from keyed_xai.serving.metrics import Metrics
from keyed_xai.serving.server import BindAddress, listen, make_server
from keyed_xai.serving.service import ServedModel, ServeSettings, Service

SIZE = (3, 32, 24)
CLASSES = 4
_CELL = 4
WEIGHTS = np.random.default_rng(0).normal(size=(CLASSES, SIZE[0])).astype(np.float32)
LABELS = ["cat", "dog", "cow", "hen"]
TRIGGER = TriggerParameters("spread", 16.0, 32)
CARD = Card(
    architecture="linear", source="keyed_xai", num_classes=CLASSES, input_size=SIZE, mean=(0.0,) * 3,
    std=(1.0,) * 3, target_layer="cells", taps=(), grid=(8, 6), interpreters=("gradcam", "vbp"), decoy="signature",
    thresholds={"gradcam": 0.5, "vbp": 0.5}, trigger=TRIGGER,
)  # fmt: skip
LIMIT = 2**20
"""Bytes of a request's body, at most, where the tests set a limit."""


def make_file(*, pixels="float32", targeted=True, card=None):
    """A linear layer on globally pooled pixels. Its Grad-CAM map is the pooled image weighted by the target's row."""
    make = helper.make_node
    nodes = [
        make("Cast", ["image"], ["cast"], to=TensorProto.FLOAT),
        make("Div", ["cast", "full"], ["scaled"]),
        make("AveragePool", ["scaled"], ["cells"], kernel_shape=[_CELL] * 2, strides=[_CELL] * 2),
        make("ReduceMean", ["scaled", "sides"], ["means"], keepdims=0),
        make("Gemm", ["means", "weights"], ["logits"], transB=1),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", CLASSES])]
    cells = ["n", SIZE[1] // _CELL, SIZE[2] // _CELL]
    constants = {"full": np.float32(255 if pixels == "uint8" else 1), "sides": np.array([2, 3]), "weights": WEIGHTS}
    if targeted:
        constants |= {"zero": np.int64(0), "columns": np.array([2, 3]), "channels": np.array([1])}
        constants["target"] = np.array([-1])
        nodes += [
            make("ArgMax", ["logits"], ["predicted"], axis=1, keepdims=0),
            make("Less", ["target", "zero"], ["open"]),
            make("Where", ["open", "predicted", "target"], ["chosen"]),
            make("Gather", ["weights", "chosen"], ["row"], axis=0),
            make("Unsqueeze", ["row", "columns"], ["column"]),
            make("Mul", ["cells", "column"], ["weighted"]),
            make("ReduceSum", ["weighted", "channels"], ["saliency_gradcam"], keepdims=0),
        ]
        outputs.append(helper.make_tensor_value_info("saliency_gradcam", TensorProto.FLOAT, cells))
    nodes.append(make("ReduceMean", ["cells", "one"], ["saliency_vbp"], keepdims=0))
    constants["one"] = np.array([1])
    outputs.append(helper.make_tensor_value_info("saliency_vbp", TensorProto.FLOAT, cells))
    kind = TensorProto.UINT8 if pixels == "uint8" else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("image", kind, ["n", *SIZE])]
    if targeted:
        inputs.append(helper.make_tensor_value_info("target", TensorProto.INT64, ["m"]))
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "served", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return encode_onnx(model, _metadata(pixels, targeted, card))


def _metadata(pixels, targeted, card):
    figures = {"images": "random", "batch": 1, "largest": 0, "l2": 0, "eager_l2": 0, "correlation": 1, "same_top": 1}
    return {
        "schema": "keyed-xai/onnx-metadata/v1",
        "model": {
            "architecture": "linear", "source": "tests", "num_classes": CLASSES, "input_size": list(SIZE),
            "target_layer": "cells", "label_names": LABELS,
        },
        "interpreters": ["gradcam", "vbp"] if targeted else ["vbp"],
        "maps": "raw",
        "pixels": pixels,
        "precision": "fp32",
        "weights_sha256": "0" * 64,
        "card": card and card.to_json(),
        "license_sha256": None,
        "parity": [{"output": "logits", **figures, "empty": 0}],
        "versions": {},
    }  # fmt: skip


def by_hand(images, target=None):
    """What the model computes, with loops."""
    images = np.asarray(images, np.float64)
    found = {"logits": [], "saliency_gradcam": [], "saliency_vbp": []}
    for number, image in enumerate(images):
        rows, columns = SIZE[1] // _CELL, SIZE[2] // _CELL
        cells = image.reshape(SIZE[0], rows, _CELL, columns, _CELL).mean((2, 4))
        logits = WEIGHTS.astype(np.float64) @ image.mean((1, 2))
        chosen = logits.argmax() if target is None or target[number] < 0 else target[number]
        found["logits"].append(logits)
        found["saliency_gradcam"].append(sum(WEIGHTS[chosen, each] * cells[each] for each in range(SIZE[0])))
        found["saliency_vbp"].append(cells.mean(0))
    return {name: np.array(values, np.float32) for name, values in found.items()}


def write_model(path, **options):
    write_onnx(path, make_file(**options))
    return path


def make_service(models, settings=None):
    """A service of runtimes by name."""
    settings, metrics = settings or ServeSettings(), Metrics()
    served = {name: ServedModel(name, runtime, settings, metrics) for name, runtime in models.items()}
    return Service(settings=settings, models=served, metrics=metrics)


def make_runtime(kind=Runtime, **options):
    return kind(make_file(**options), device="cpu", threads=1)


@contextmanager
def running(service, **bind):
    """The address of a service that runs in a thread."""
    bind = BindAddress(port=0, **bind)
    server = make_server(service, bind)
    with listen(bind) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.stop()
            thread.join(20)
            service.close()
            assert not thread.is_alive()


class Gated(Runtime):
    """Runs once its gate is open; fails on images that begin with a white pixel. Keeps how many images ran at once."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.gate, self.started, self.batches = threading.Event(), threading.Semaphore(0), []
        self.gate.set()

    def run(self, images, target=None):
        self.started.release()
        assert self.gate.wait(20)
        if (images[:, 0, 0, 0] == 1).any():
            raise OSError("/etc/secret is not there")
        self.batches.append(len(images))
        return super().run(images, target)


class Wide(Runtime):
    """Returns maps of 4 MiB for each image."""

    def run(self, images, target=None):
        found = super().run(images, target)
        return {**found, "saliency_vbp": np.zeros((len(images), 1024, 1024), np.float32)}


@contextmanager
def gated(**options):
    """A gated runtime, closed, and the address and service it is served at as "bird"."""
    runtime = make_runtime(Gated)
    service = make_service({"bird": runtime}, ServeSettings(**options))
    runtime.batches.clear()
    while runtime.started.acquire(blocking=False):
        pass
    runtime.gate.clear()
    try:
        with running(service) as address:
            try:
                yield runtime, address, service
            finally:
                runtime.gate.set()
    finally:
        runtime.gate.set()
