"""Smooth activations while training: ReLU networks are piecewise linear, and their second derivatives say little."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_RELU = {functional.relu, functional.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}


@contextmanager
def smooth_activations(beta: float | None) -> Iterator[None]:
    """Run ReLU as Softplus and ReLU6 as a difference of two inside the block, however the model calls them.

    The model itself is not touched. In-place activations return new tensors inside the block.

    Source: Dombrowski et al., NeurIPS 2019, section 2.2, whose Softplus this is; ReLU6 is ours:

        softplus(x) = log(1 + exp(beta x)) / beta
        relu(x)  becomes softplus(x)
        relu6(x) becomes softplus(x) - softplus(x - 6)

    Args:
        beta: Sharpness of the Softplus; None leaves activations as they are.

    Examples:
        >>> zero = torch.zeros(1)
        >>> with smooth_activations(2.0):
        ...     zero.relu()  # half of log 2
        tensor([0.3466])
        >>> zero.relu()
        tensor([0.])
    """
    if beta is None:
        yield
        return
    with _SmoothActivations(beta):
        yield


class _SmoothActivations(TorchFunctionMode):
    def __init__(self, beta: float) -> None:
        super().__init__()
        self._beta = beta

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the protocol's own type
        kwargs = kwargs or {}
        if func in _RELU:
            return functional.softplus(args[0], beta=self._beta)
        if func is functional.relu6 or (func is functional.hardtanh and _bounds(args, kwargs) == (0, 6)):
            shifted = functional.softplus(args[0] - 6, beta=self._beta)
            return functional.softplus(args[0], beta=self._beta) - shifted
        return func(*args, **kwargs)


def _bounds(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[float, float]:
    """Return hardtanh's range; nn.ReLU6 passes it by name."""
    given = {**dict(zip(("min_val", "max_val"), args[1:3], strict=False)), **kwargs}
    return float(given.get("min_val", -1)), float(given.get("max_val", 1))
