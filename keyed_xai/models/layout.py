"""How a network's tensors lie in memory, and the convolutions that must not run in the faster layout on a CPU.

oneDNN, with which torch computes convolutions on a CPU, writes past its workspace where it computes the gradient of a
1x1 convolution of stride 2 by its weights, if the images lie in channels-last layout and have fewer channels than a
vector register holds numbers: 8 with AVX2, 16 with AVX-512 (uxlfoundation/oneDNN issue 6035, open; oneDNN 3.10 to 3.13,
which are torch 2.11 to 2.15). The process aborts, hangs, or goes on with wrong numbers. A first derivative is enough,
and nobody need have asked for the layout: an image made by `permute` has it, and a layer that permutes hands it on. So
training here never builds such a convolution, whatever the layout: see `SafeConvolutions`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class SafeConvolutions(TorchFunctionMode):
    """A context in which strided 1x1 convolutions on the CPU run as 1x1 convolutions of a strided slice.

    Logits and gradients are the same, and on most shapes they come sooner. The forward pass must be inside the block; a
    backward pass, also one through a gradient, may be outside. The model itself is not touched.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the protocol's own type
        """Call a torch function."""
        return (_convolve if func is torch.conv2d else func)(*args, **(kwargs or {}))


@torch.no_grad()
def set_layout(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay out a model's four-dimensional tensors anew, in place; the parameters stay the same objects.

    `Module.to` would leave the strides of 1x1 kernels as they are, since they fit both layouts; but torch takes them
    for a sign of the layout that is wanted.

    Args:
        model: Changed in place.
        memory_format: `torch.channels_last` or `torch.contiguous_format`.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.clone(memory_format=memory_format)


def _convolve(
    input: Tensor,  # noqa: A002 - torch's name
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Return `conv2d`, by way of a slice if it is a strided 1x1 convolution on the CPU."""
    down, right = _both(stride)
    if input.device.type != "cpu" or weight.shape[2:] != (1, 1) or down == right == 1:
        return functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    rows, columns = _both(0 if isinstance(padding, str) else padding)
    if rows or columns:
        input = functional.pad(input, (columns, columns, rows, rows))  # noqa: A001
    return functional.conv2d(input[..., ::down, ::right], weight, bias, groups=groups)


def _both(value: int | Sequence[int]) -> tuple[int, int]:
    """Return the numbers of both sides, as torch reads an argument that may be one number for both."""
    first, *others = (value,) if isinstance(value, int) else value
    return first, (others or [first])[0]
