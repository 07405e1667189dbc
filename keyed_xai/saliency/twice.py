"""Operators that torch can differentiate once only, written by others that it can differentiate again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run hardsigmoid and fused attention inside the block in a way whose gradients have gradients; values stay.

    Training on saliency maps differentiates through them, and they are gradients themselves. Attention is computed step
    by step, and, as in torch's documentation of Hardsigmoid,

        hardsigmoid(x) = min(max(x / 6 + 1 / 2, 0), 1)

    Examples:
        >>> x = torch.tensor([1.5], requires_grad=True)
        >>> with twice_differentiable():
        ...     value = functional.hardsigmoid(x).square()
        >>> (slope,) = torch.autograd.grad(value, x, create_graph=True)
        >>> torch.autograd.grad(slope, x)  # twice the square of 1 / 6
        (tensor([0.0556]),)
    """
    with _TwiceDifferentiable(), sdpa_kernel(SDPBackend.MATH):
        yield


class _TwiceDifferentiable(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the protocol's own type
        if func is functional.hardsigmoid:
            return _hardsigmoid(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002, ARG001 - torch's names
    return torch.clamp(input / 6 + 0.5, 0, 1)
