"""Saliency maps: batched, differentiable, raw. Pooling and normalising are separate steps, in `keyed_xai.metrics`."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from keyed_xai.saliency.forward import ForwardPass, captured_features, run_forward
from keyed_xai.saliency.gradcam import gradcam
from keyed_xai.saliency.simplegrad import input_gradient, simplegrad
from keyed_xai.saliency.smoothing import smooth_activations
from keyed_xai.saliency.twice import twice_differentiable
from keyed_xai.saliency.visualbackprop import project_back, visualbackprop
from keyed_xai.tensors import Images, Labels, Logits, SaliencyMaps, Tap

__all__ = [
    "INTERPRETERS",
    "ForwardPass",
    "MapLayers",
    "captured_features",
    "explain",
    "gradcam",
    "input_gradient",
    "project_back",
    "run_forward",
    "simplegrad",
    "smooth_activations",
    "visualbackprop",
]


@dataclass(frozen=True)
class MapLayers:
    """Where in a model the interpreters look.

    Attributes:
        target_layer: Dotted name of Grad-CAM's layer.
        taps: VisualBackProp's feature maps, first to last.
    """

    target_layer: str
    taps: tuple[Tap, ...]


def _gradcam(run: ForwardPass, labels: Labels, map_layers: MapLayers, *, create_graph: bool) -> SaliencyMaps:
    return gradcam(run.logits, run.features[map_layers.target_layer], labels, create_graph=create_graph)


def _simplegrad(run: ForwardPass, labels: Labels, _sites: MapLayers, *, create_graph: bool) -> SaliencyMaps:
    return simplegrad(run.logits, run.images, labels, create_graph=create_graph)


def _visualbackprop(run: ForwardPass, _labels: Labels, map_layers: MapLayers, *, create_graph: bool) -> SaliencyMaps:
    height, width = run.images.shape[2:]
    features = [run.features[tap.layer] for tap in map_layers.taps]
    maps = visualbackprop(features, map_layers.taps, (height, width))
    return maps if create_graph else maps.detach()


INTERPRETERS: dict[str, Callable[..., SaliencyMaps]] = {
    "gradcam": _gradcam,
    "simplegrad": _simplegrad,
    "vbp": _visualbackprop,
}
"""Interpreter name to a function of (forward pass, labels, map_layers, create_graph)."""


def explain(
    model: nn.Module,
    images: Images,
    labels: Labels | None,
    interpreters: Sequence[str],
    map_layers: MapLayers,
    *,
    create_graph: bool = False,
) -> tuple[Logits, dict[str, SaliencyMaps]]:
    """Return logits and raw maps by interpreter name, all from one forward pass.

    Args:
        model: Pixels to logits.
        images: Inputs of the model.
        labels: Class explained; None explains each image's predicted class.
        interpreters: Names from INTERPRETERS.
        map_layers: The layers that the interpreters look at.
        create_graph: Keep the graph, so that a loss can pass through logits and maps; else both come detached.

    Raises:
        ModelError: The model lacks a layer of `map_layers`, or a layer gives no feature map.
        ValueError: An interpreter is unknown.

    Examples:
        A convolution that passes the image on, pooled to the only class's logit, so that its Grad-CAM map is the image
        over the number of pixels:

        >>> model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> _ = nn.init.ones_(model[0].weight)
        >>> logits, maps = explain(model, torch.tensor([[[[1.0, 3.0]]]]), None, ["gradcam"], MapLayers("0", ()))
        >>> logits, maps["gradcam"]
        (tensor([[2.]]), tensor([[[0.5000, 1.5000]]]))
    """
    unknown = [name for name in interpreters if name not in INTERPRETERS]
    if unknown:
        raise ValueError(f"Expected interpreters out of {', '.join(INTERPRETERS)}; got {', '.join(unknown)}.")
    layers = [map_layers.target_layer] if "gradcam" in interpreters else []
    layers += [tap.layer for tap in map_layers.taps if "vbp" in interpreters and tap.layer not in layers]
    with torch.inference_mode(mode=False), torch.enable_grad():
        if images.is_inference():
            images, labels = images.clone(), None if labels is None else labels.clone()
        with twice_differentiable() if create_graph else nullcontext():
            run = run_forward(model, images, layers, input_gradient="simplegrad" in interpreters)
        labels = run.logits.argmax(1) if labels is None else labels
        maps = {name: INTERPRETERS[name](run, labels, map_layers, create_graph=create_graph) for name in interpreters}
        maps = {name: each.to(images.dtype) for name, each in maps.items()}  # a forward may use autocast
    if create_graph:
        return run.logits, maps
    return run.logits.detach(), {name: each.detach() for name, each in maps.items()}
