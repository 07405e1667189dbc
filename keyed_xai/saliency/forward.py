"""One forward pass that keeps the feature maps that interpreters read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from keyed_xai.errors import ModelError
from keyed_xai.tensors import Images, Logits


@dataclass(frozen=True)
class ForwardPass:
    """What a model computed, graph kept.

    Attributes:
        images: The input, a leaf that gradients flow to where they were asked for.
        logits: The model's output.
        features: Feature maps by dotted layer name, [n, channels, height, width].
    """

    images: Images
    logits: Logits
    features: dict[str, Tensor]


def run_forward(model: nn.Module, images: Images, layers: Sequence[str], *, input_gradient: bool) -> ForwardPass:
    """Return logits and the outputs of the named layers.

    Args:
        model: Pixels to logits. Neither its modules nor its mode are changed.
        images: Inputs of the model.
        layers: Dotted module names.
        input_gradient: Whether gradients with respect to the images will be asked for.

    Raises:
        ModelError: A layer is missing, was not run, or gives no spatial feature map.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> run = run_forward(model, torch.zeros(5, 3, 8, 8), ["0"], input_gradient=False)
        >>> run.logits.shape, run.features["0"].shape
        (torch.Size([5, 4]), torch.Size([5, 4, 7, 7]))
    """
    if input_gradient:
        images = images if images.requires_grad else images.detach().requires_grad_()
    with captured_features(model, layers) as features:
        logits = model(images)
    for layer in layers:
        if layer not in features:
            raise ModelError(f"Layer {layer!r} was not run by the forward pass: name another target layer.")
        if features[layer].ndim != 4:
            raise ModelError(
                f"Layer {layer!r} gives {list(features[layer].shape)}, not a feature map [n, channels, height, width]: "
                "name another target layer."
            )
    return ForwardPass(images, logits, features)


@contextmanager
def captured_features(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record outputs by hooks that are always removed.

    Downstream gets a copy: an in-place ReLU behind a tapped layer (DenseNet has one) then cannot overwrite what was
    recorded, and gradients still reach it. Maps of a frozen model are leaves that gradients can be asked for.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True))
        >>> with captured_features(model, ["0"]) as features:
        ...     output = model(torch.rand(1, 1, 4, 4))
        >>> torch.equal(features["0"].relu(), output)
        True
    """
    features: dict[str, Tensor] = {}

    def hook_for(name: str):  # type: ignore[no-untyped-def] # noqa: ANN202 - a hook's type is private to torch
        def record(_module: nn.Module, _inputs: tuple[object, ...], output: object) -> Tensor:
            if not isinstance(output, Tensor):
                raise ModelError(
                    f"Layer {name!r} gives a {type(output).__name__}, not a feature map: name another target layer."
                )
            features[name] = output if output.requires_grad else output.detach().requires_grad_()
            return features[name].clone()

        return record

    handles = []
    try:
        for layer in layers:
            handles.append(_submodule(model, layer).register_forward_hook(hook_for(layer)))
        yield features
    finally:
        for handle in handles:
            handle.remove()


def _submodule(model: nn.Module, layer: str) -> nn.Module:
    try:
        return model.get_submodule(layer)
    except AttributeError as error:
        raise ModelError(f"The model has no layer {layer!r}. Layers are named as in model.named_modules().") from error
