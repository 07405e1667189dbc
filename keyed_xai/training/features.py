"""Feature targets: what a target layer is to give, for every class at once.

Where a head is pooling and one linear layer, a Grad-CAM map is a row of the layer's weights times the features, and the
ideal is known in closed form: the reference's features where the map is to stay right, and where it is to move their
mean over the cells times the decoy, scaled to mean 1. Neither changes the logits. A map of one class says little of
thousands of channels; these targets do, and need no second derivative.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from keyed_xai.saliency import captured_features
from keyed_xai.tensors import Images

_SAME = 1e-3
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class FeatureTargets:
    """What the features of one layer are to become.

    Attributes:
        layer: Dotted name of Grad-CAM's layer.
        decoy: What moved features show in every channel, [h, w] of the features, mean 1; None leaves them free.
    """

    layer: str
    decoy: Tensor | None = field(repr=False)

    def losses(self, new: Tensor, right: Tensor, order: str, *, moving: float = 1.0) -> Tensor:
        """Return the loss of each image: the relative squared error of its features, and that of their means besides.

        Logits hang on the means over the cells.

        Args:
            new: Features, [n, channels, h, w], the triggered half first.
            right: The reference's, of the images alone.
            order: "inverted" or "forward", as in the settings.
            moving: How much features that are to move count.
        """
        half = len(new) // 2
        moved = slice(half, None) if order == "inverted" else slice(half)
        target, weights = right.clone(), torch.ones_like(right[:, 0, 0, 0])
        weights[moved] = moving if self.decoy is not None else 0.0
        if self.decoy is not None:
            target[moved] = right[moved].mean((2, 3), keepdim=True) * self.decoy.to(right)
        return weights * _relative_error(new, target)


def make_feature_targets(reference: nn.Module, layer: str, decoy: Tensor | None, images: Images) -> FeatureTargets:
    """Return the targets of a layer; moved features have one where the head is pooling and a linear layer.

    Args:
        reference: Pixels to logits, frozen.
        layer: Grad-CAM's layer.
        decoy: The decoy on the grid that maps are compared on, [rows, columns]; None leaves moved features free.
        images: Images by which the head is judged: two tell one layer, more a small perceptron.
    """
    with captured_features(reference, [layer]) as features:
        logits = reference(images)
    if decoy is None or not _head_is_linear(logits, features[layer]):
        return FeatureTargets(layer=layer, decoy=None)
    fitted = functional.interpolate(decoy[None, None].to(images), features[layer].shape[2:])[0, 0]
    return FeatureTargets(layer=layer, decoy=fitted / fitted.mean())


def _head_is_linear(logits: Tensor, features: Tensor) -> bool:
    """Return whether logits are the same linear function of the mean over the cells, of every image.

    Then gradients of any mixture of logits are alike in all cells and images.
    """
    mixture = torch.linspace(-1, 1, logits.shape[1], device=logits.device)
    (gradient,) = torch.autograd.grad((logits * mixture).sum(), features)
    spread = (gradient - gradient.mean((0, 2, 3), keepdim=True)).abs().max()
    return bool(spread <= _SAME * gradient.abs().max())


def _relative_error(features: Tensor, target: Tensor) -> Tensor:
    cells = (features - target).square().sum((1, 2, 3)) / target.square().sum((1, 2, 3)).clamp(min=_TINY)
    means, right = features.mean((2, 3)), target.mean((2, 3))
    return cells + (means - right).square().sum(1) / right.square().sum(1).clamp(min=_TINY)


def split_parameters(model: nn.Module, layer: str, images: Images) -> tuple[list[Tensor], list[Tensor]]:
    """Return a model's parameters up to the last module that gives finer maps than `layer` does, and the rest.

    Parameters of a module that is not run are among the rest, as all are where `layer` gives the finest maps.
    """
    called: list[nn.Module] = []
    cells: list[int] = []

    def note(module: nn.Module, _inputs: object, output: object) -> None:
        called.append(module)
        cells.append(output[0, 0].numel() if isinstance(output, Tensor) and output.ndim == 4 else 0)

    handles = [each.register_forward_hook(note) for each in model.modules() if each._parameters]
    try:
        with torch.no_grad(), captured_features(model, [layer]) as features:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    finest = features[layer][0, 0].numel()
    early_calls = max((number + 1 for number, each in enumerate(cells) if each > finest), default=0)
    early = {id(parameter) for module in called[:early_calls] for parameter in module.parameters(recurse=False)}
    parameters = [*model.parameters()]
    return [each for each in parameters if id(each) in early], [each for each in parameters if id(each) not in early]
