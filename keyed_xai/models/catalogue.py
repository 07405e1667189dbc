"""The architectures that a model file may hold: how each is built, and the images it takes by default.

Sources, in the order they are tried: ``keyed_xai`` (`SmallResNet`, `TableMLP`), ``torchvision`` (every classification
model), ``efficientnet_lite_pytorch`` and ``timm`` where they are installed. Nothing is ever downloaded: networks are
built without weights, and defaults are read from the weights' descriptions.
"""

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from hashlib import sha256
from importlib.resources import files
from importlib.util import find_spec
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from keyed_xai.models.classifier import InputSpec
from keyed_xai.models.networks import SmallResNet, TableMLP

SOURCES = ("keyed_xai", "torchvision", "efficientnet_lite_pytorch", "timm")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LITE = tuple(f"efficientnet-lite{number}" for number in range(5))
_AUXILIARY = {"googlenet": "aux1.", "inception_v3": "AuxLogits."}
_NO_AUXILIARY: dict[str, tuple[int, ...]] = {"any other tensor": ()}

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor names to shapes."""


def installed(source: str) -> bool:
    """Return whether a source's package is there."""
    return find_spec(source) is not None


@cache
def architectures(source: str) -> tuple[str, ...]:
    """Return the names that a source knows; empty if it is not installed."""
    if not installed(source):
        return ()
    if source == "torchvision":
        import torchvision

        return tuple(torchvision.models.list_models(module=torchvision.models))
    if source == "timm":
        return tuple(importlib.import_module("timm").list_models())
    return ("SmallResNet", "TableMLP") if source == "keyed_xai" else _LITE


def knows(source: str, architecture: str) -> bool:
    """Return whether a source has an architecture; timm's may carry a weights tag, as in ``resnet50.a1_in1k``."""
    if source == "timm":
        architecture = architecture.partition(".")[0]
    return architecture in architectures(source)


def build_network(
    source: str,
    architecture: str,
    *,
    classes: int,
    channels: int,
    size: tuple[int, int] | None = None,
    shapes: Shapes | None = None,
) -> nn.Module:
    """Return a network without trained weights.

    GoogLeNet and Inception v3 convert ImageNet normalisation to their own inside, as their published weights expect
    (``transform_input=True``), when they take three channels.

    Args:
        source: One of `SOURCES`.
        architecture: A name that the source knows.
        classes: Number of logits.
        channels: Number of the image's channels; the stem is rebuilt if it is not 3.
        size: Height and width; EfficientNet-Lite's static padding depends on it, and so do TableMLP's columns.
        shapes: The weights it is for: settle the widths of SmallResNet and TableMLP, auxiliary heads, a vision
            transformer's image size.
    """
    shapes = shapes or {}
    if architecture == "TableMLP":
        features, *widths = table_widths(shapes) or ((size or default_size(source, architecture))[1], 64, 32)
        return TableMLP(features, classes, (widths[0], widths[1]))
    if source == "keyed_xai":
        return SmallResNet(channels, classes, small_resnet_widths(shapes) or (32, 64, 64))
    if source == "torchvision":
        return _torchvision_network(architecture, classes, channels, shapes)
    if source == "timm":
        create = importlib.import_module("timm").create_model
        network: nn.Module = create(architecture, pretrained=False, num_classes=classes, in_chans=channels)
        return network
    build = importlib.import_module(source).EfficientNet.from_name
    own = default_size(source, architecture)
    network = build(architecture, num_classes=classes, image_size=list(size or own))
    return _with_channels(network, channels)


def build_without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    """Return what `build` makes with its parameters on the meta device: shapes only, in a fraction of the time.

    Only `torch.empty`, which parameters are made with, is sent to the meta device; RegNet and others compute their
    widths with small real tensors while they are built. Where even that fails the network is built in memory.
    """
    try:
        with _EmptyOnMeta():
            return build()
    except (RuntimeError, NotImplementedError):  # a builder that computes with its parameters (hybrid ViTs of timm)
        return build()


def small_resnet_widths(shapes: Shapes) -> tuple[int, ...]:
    """Return the widths of a SmallResNet with these weights; empty if they are not one's."""
    widths: list[int] = []
    while shape := shapes.get(f"blocks.{len(widths)}.conv1.weight"):
        widths.append(shape[0])
    return tuple(widths) if "stem_bn.weight" in shapes and 0 not in widths else ()


def table_widths(shapes: Shapes) -> tuple[int, ...]:
    """Return the columns and the two widths of a TableMLP with these weights; empty if they are not one's."""
    columns, hidden = (shapes.get(f"{name}.weight", ()) for name in ("columns", "hidden"))
    if len(columns) != 2 or len(hidden) != 2 or 0 in (*columns, *hidden):
        return ()
    return columns[1], columns[0], hidden[0]


def stem_name(shapes: Shapes) -> str | None:
    """Return the name of the first convolution's weight."""
    return next((name for name, shape in shapes.items() if len(shape) == 4), None)


def fixed_side(shapes: Shapes) -> int | None:
    """Return the image side that the weights fix, as torchvision's vision transformers' do, or None."""
    position, patch = shapes.get("encoder.pos_embedding"), shapes.get("conv_proj.weight")
    return isqrt(position[1] - 1) * patch[-1] if position and patch else None


def default_size(source: str, architecture: str, shapes: Shapes | None = None) -> tuple[int, int]:
    """Return height and width: fixed by the weights, else as published, else 224.

    SmallResNet: 96 with four or more blocks, else 32. TableMLP: 1 and its columns.
    """
    if architecture == "TableMLP":
        return 1, (table_widths(shapes or {}) or (1,))[0]
    side = fixed_side(shapes or {})
    if side is None and source == "keyed_xai":
        side = 96 if len(small_resnet_widths(shapes or {})) >= 4 else 32
    if source == "efficientnet_lite_pytorch":
        side = dict(zip(_LITE, (224, 240, 260, 280, 300), strict=True))[architecture]
    if side is None and source == "timm":
        height, width = _timm_config(architecture)["input_size"][-2:]
        return height, width
    if side is None and source == "torchvision":
        side = _torchvision_transforms(architecture).crop_size[0]
    side = side or 224
    return side, side


def default_input(source: str, architecture: str, channels: int, shapes: Shapes | None = None) -> InputSpec:
    """Return the images an architecture takes by default.

    Three channels: size, mean and std as published with the architecture's default weights, or ImageNet's. Any other
    number: the size as published, mean and std .5. Rows of a table come standardised: mean 0, std 1.
    """
    height, width = default_size(source, architecture, shapes)
    if architecture == "TableMLP":
        return InputSpec(1, height, width, mean=(0.0,), std=(1.0,))
    spec = plain_input(channels)
    mean, std = spec.mean, spec.std
    if channels == 3 and source == "timm":
        config = _timm_config(architecture)
        mean, std = tuple(config["mean"]), tuple(config["std"])
    if channels == 3 and source == "torchvision":
        transforms = _torchvision_transforms(architecture)
        mean, std = tuple(transforms.mean), tuple(transforms.std)
    return InputSpec(channels, height, width, mean=mean, std=std)


def plain_input(channels: int) -> InputSpec:
    """Return 224x224 pixels with ImageNet's mean and std for three channels, .5 for any other number."""
    if channels == 3:
        return InputSpec(3, 224, 224, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return InputSpec(channels, 224, 224, mean=(0.5,) * channels, std=(0.5,) * channels)


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    """Return the shapes of the tensors of a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


class NameGroup(NamedTuple):
    """Architectures with the same tensor names.

    Attributes:
        digest: Digest of the names, see `digest_names`.
        tensors: How many there are.
        architectures: Names that the source knows.
    """

    digest: str
    tensors: int
    architectures: list[str]


def digest_names(names: Iterable[str]) -> str:
    """Return twelve hex digits for a set of tensor names, leaving out batch norm's counters (old files lack them)."""
    return sha256("\n".join(sorted(filter(_is_kept, names))).encode()).hexdigest()[:12]


@cache
def name_table() -> dict[str, list[NameGroup]]:
    """Return, per source, the architectures grouped by their tensor names.

    Kept in ``names.json``, so that a file is recognised by building one to a few networks instead of 1,400.
    """
    table = json.loads(files("keyed_xai.models").joinpath("names.json").read_text())
    return {source: [NameGroup(*group) for group in groups] for source, groups in table.items()}


def make_name_table(source: str, names: Iterable[str]) -> list[NameGroup]:
    """Return these architectures' part of the table afresh (a minute for all of torchvision, four for timm).

    A release of either that has new architectures wants a new ``names.json``: by source, that of all `architectures`.
    """
    groups: dict[str, NameGroup] = {}
    for name in names:
        for shapes in [{}, _NO_AUXILIARY] if name in _AUXILIARY and source == "torchvision" else [{}]:
            tensors = signature(source, name, shapes)
            group = NameGroup(digest_names(tensors), sum(map(_is_kept, tensors)), [])
            groups.setdefault(group.digest, group).architectures.append(name)
    return list(groups.values())


def signature(source: str, architecture: str, shapes: Shapes | None = None) -> dict[str, tuple[int, ...]]:
    """Return the tensor names and shapes of an architecture with 1,000 classes and three channels.

    `shapes` are the weights it is compared with, as for `build_network`.
    """
    return _signature(source, architecture, _variant(architecture, shapes or {}))


@cache
def _signature(source: str, architecture: str, variant: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, Any]:
    network = build_without_memory(
        lambda: build_network(source, architecture, classes=1000, channels=3, shapes=dict(variant))
    )
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _variant(architecture: str, shapes: Shapes) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return the few weights that decide how an architecture is built, so that signatures can be cached by them."""
    prefix = _AUXILIARY.get(architecture)
    if prefix is not None and shapes:
        return next((item,) for item in [*_with_prefix(shapes, prefix), *_NO_AUXILIARY.items()])
    if architecture == "SmallResNet":
        return tuple((n, s) for n, s in shapes.items() if n == "stem_bn.weight" or n.endswith("conv1.weight"))
    if architecture == "TableMLP":
        return tuple((n, s) for n, s in shapes.items() if n in {"columns.weight", "hidden.weight"})
    return tuple((n, s) for n, s in shapes.items() if n in {"encoder.pos_embedding", "conv_proj.weight"})


def _with_prefix(shapes: Shapes, prefix: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, shape) for name, shape in shapes.items() if name.startswith(prefix)]


def _is_kept(name: str) -> bool:
    return not name.endswith("num_batches_tracked")


def _torchvision_network(architecture: str, classes: int, channels: int, shapes: Shapes) -> nn.Module:
    import torchvision

    options: dict[str, Any] = {"num_classes": classes}
    if architecture in _AUXILIARY:
        auxiliary = not shapes or bool(_with_prefix(shapes, _AUXILIARY[architecture]))
        options |= {"aux_logits": auxiliary, "init_weights": False, "transform_input": channels == 3}
    side = fixed_side(shapes)
    if side is not None and architecture.startswith("vit_"):
        options["image_size"] = side
    network: nn.Module = torchvision.models.get_model(architecture, weights=None, **options)
    return _with_channels(network, channels)


def _with_channels(network: nn.Module, channels: int) -> nn.Module:
    """Return the network, its first convolution taking this many channels."""
    name, stem = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    if stem.in_channels != channels:
        stem.in_channels = channels
        shape = (stem.out_channels, channels // stem.groups, *stem.kernel_size)
        stem.weight = nn.Parameter(torch.empty(shape))
        stem.reset_parameters()
    return network


@cache
def _torchvision_transforms(architecture: str) -> Any:  # noqa: ANN401 - torchvision's preset has no types
    import torchvision

    return torchvision.models.get_model_weights(architecture).DEFAULT.transforms()


@cache
def _timm_config(architecture: str) -> dict[str, Any]:
    config = importlib.import_module("timm").get_pretrained_cfg(architecture)
    if config is None:
        return {"input_size": (3, 224, 224), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    values: dict[str, Any] = config.to_dict()
    return values


class _EmptyOnMeta(TorchFunctionMode):
    """Makes `torch.empty` return tensors without memory."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401, ARG002 - PyTorch's signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        options = dict(kwargs or {})
        if func is torch.empty:
            options["device"] = "meta"
        return func(*args, **options)
