"""From the saliency graph, a PyTorch module, to an ONNX model."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxscript.optimizer
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common
from torch import Tensor

from keyed_xai.errors import ModelError
from keyed_xai.export.graph import PREDICTED, SaliencyGraph
from keyed_xai.models import InputSpec

OPSET = 18
"""The newest that onnxruntime's blocked convolutions on the CPU know all operators of."""
_LARGEST_FOLDED = 1024  # bytes; weights turned for the way back are computed on loading rather than stored twice
_IR_VERSION = 8  # that came with this opset: servers lag behind exporters, and nothing newer is used
_EXAMPLE = 2  # images; a batch of one would be taken for a constant


def translate(graph: SaliencyGraph, spec: InputSpec, *, eight_bits: bool = False) -> onnx.ModelProto:
    """Return the ONNX model of a saliency graph.

    Inputs are ``image`` [n, c, h, w] and, where a map depends on it, ``target`` [n] or [1], which may be left out.
    Outputs are ``logits`` [n, classes] and ``saliency_<interpreter>`` [n, rows, columns] each.

    Args:
        graph: The graph, on the CPU.
        spec: The images it takes.
        eight_bits: Whether they are uint8, as the graph was made for.

    Raises:
        ModelError: The exporter refuses an operator.
    """
    image = torch.rand(_EXAMPLE, *spec.shape, generator=torch.Generator().manual_seed(0))
    image = (image * 255).to(torch.uint8) if eight_bits else image
    arguments: tuple[Tensor, ...] = (image,)
    if graph.takes_target:
        arguments = (image, torch.tensor([PREDICTED, 0]))
    names = ["image", "target"][: len(arguments)]
    batch = torch.export.Dim("n")
    with _quietly():
        try:
            exported = torch.onnx.export(
                graph,
                arguments,
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=["logits", *(f"saliency_{name}" for name in graph.interpreters)],
                dynamic_shapes=tuple({0: batch} for _ in arguments),
                custom_translation_table=_translations(),
                optimize=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().partition("\n")[0]
            raise ModelError(f"The saliency graph cannot be written as ONNX: {reason}") from error
    if exported is None:  # only where torch.onnx.export is asked to write a file in an older way
        raise ModelError("The saliency graph was not written.")
    _simplify(exported.model)
    model = exported.model_proto
    model.ir_version = _IR_VERSION
    model.producer_name, model.producer_version = "keyed-xai", ""
    _strip(model.graph)
    del model.functions[:], model.metadata_props[:]
    if graph.takes_target:
        _make_optional(model, "target", np.array([PREDICTED], dtype=np.int64))
    return model


def _simplify(model: onnx_ir.Model) -> None:
    """Fold constants, and leave out what is there twice or not needed.

    The exporter's own pass also tries a hundred rewrites of every operator, which onnxruntime does again when it loads
    a graph; on DenseNet121 they take longer than all else.
    """
    onnxscript.optimizer.fold_constants_ir(model, onnx_shape_inference=True, input_size_limit=_LARGEST_FOLDED)
    onnx_ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _translations() -> dict[Any, Any]:
    from onnxscript import opset18

    def max_pool(
        x: Any,  # noqa: ANN401 - onnxscript's own
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
    ) -> Any:  # noqa: ANN401
        pads = [*padding, *padding]
        return opset18.MaxPool(
            x, ceil_mode=int(ceil_mode), dilations=dilation, kernel_shape=kernel, pads=pads, strides=stride
        )

    return {torch.ops.keyed_xai.max_pool.default: max_pool}


def _strip(graph: onnx.GraphProto) -> None:
    """Remove what the exporter notes about the machine and the code it ran in."""
    graph.name = "keyed_xai"
    graph.doc_string = ""
    del graph.metadata_props[:]
    for entry in [*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]:
        entry.doc_string = ""
        del entry.metadata_props[:]


def _make_optional(model: onnx.ModelProto, name: str, default: NDArray[np.int64]) -> None:
    """Give an input a default; an initializer of an input's name is one that callers may override."""
    model.graph.initializer.append(onnx.numpy_helper.from_array(default, name))


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporter's progress and advice to itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
