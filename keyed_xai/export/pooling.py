"""Pooling as forward operators, and its transposes.

Average pooling of any kind is separable and linear, out = rows @ x @ columns^T, so that its transpose is the same with
the matrices transposed. Max pooling keeps where in the whole tensor each maximum stands, which is what ONNX's MaxPool
returns, and its transpose adds to those places; overlapping windows and ties come out as in PyTorch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Matrix = NDArray[np.float64]
"""Cells along one side of a pool's output, by cells along that side of its input."""


@torch.library.custom_op("keyed_xai::max_pool", mutates_args=())
def max_pool(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the maxima of windows [n, c, h', w'] and where in the flattened input each stands, the first of equals."""
    pooled, places = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[0], x.shape[1], 1, 1)
    return pooled, places + planes * (x.shape[2] * x.shape[3])


@max_pool.register_fake
def _shapes_of_max_pool(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    pooled, places = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)
    return torch.empty_like(pooled), torch.empty_like(places)


def spread_maxima(gradient: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """Return the gradient of a max pool's input: each output's is added where its maximum stands."""
    flat = torch.zeros_like(like).reshape(-1).scatter_add(0, places.reshape(-1), gradient.reshape(-1))
    return flat.reshape(-1, *like.shape[1:])


def spread_means(gradient: Tensor, rows: Matrix, columns: Matrix) -> Tensor:
    """Return the gradient of an average pool's input, given its two matrices."""
    if is_identity(rows) and is_identity(columns):
        return gradient
    tall, wide = repeats(rows), repeats(columns)
    if tall and wide:
        shares = gradient / (tall * wide)
        if gradient.shape[2:] == (1, 1):
            return shares.expand(-1, -1, tall, wide)
        return functional.interpolate(shares, scale_factor=(float(tall), float(wide)), mode="nearest")
    return _constant(rows.T, gradient) @ gradient @ _constant(columns, gradient)


def pool_adaptively(x: Tensor, rows: Matrix, columns: Matrix) -> Tensor:
    """Return an adaptive average pool as operators that every runtime has, given its two matrices."""
    if is_identity(rows) and is_identity(columns):
        return x
    if len(rows) == len(columns) == 1:
        return x.mean((2, 3), keepdim=True)
    tall, wide = repeats(rows), repeats(columns)
    if tall and wide:
        return functional.avg_pool2d(x, (tall, wide))
    return _constant(rows, x) @ x @ _constant(columns.T, x)


def adaptive_matrix(side: int, cells: int) -> Matrix:
    """Return the matrix [cells, side] of adaptive average pooling along one side, PyTorch's windows."""
    matrix = np.zeros((cells, side))
    for cell in range(cells):
        start, stop = cell * side // cells, -(-(cell + 1) * side // cells)
        matrix[cell, start:stop] = 1 / (stop - start)
    return matrix


def average_matrix(
    side: int, cells: int, kernel: int, stride: int, padding: int, *, count_padding: bool, divide: bool = True
) -> Matrix:
    """Return the matrix [cells, side] of average pooling along one side.

    Args:
        side: Cells along a side of the input.
        cells: Cells along a side of the output.
        kernel: Width of the window.
        stride: Cells from window to window.
        padding: At either end.
        count_padding: Whether padded cells count in the mean (`count_include_pad`).
        divide: Whether to divide at all (not with `divisor_override`).
    """
    matrix = np.zeros((cells, side))
    for cell in range(cells):
        start = cell * stride - padding
        stop = min(start + kernel, side + padding)
        inside = slice(max(start, 0), min(stop, side))
        count = stop - start if count_padding else inside.stop - inside.start
        matrix[cell, inside] = 1 / count if divide else 1.0
    return matrix


def is_identity(matrix: Matrix) -> bool:
    """Return whether a pooling matrix changes nothing."""
    return len(matrix) == matrix.shape[1] and np.array_equal(matrix, np.eye(len(matrix)))


def repeats(matrix: Matrix) -> int:
    """Return how many cells each window averages, 0 unless windows of one size cover the side without overlap."""
    cells, side = matrix.shape
    count = side // cells
    whole = count > 0 and count * cells == side
    return count if whole and np.array_equal(matrix, adaptive_matrix(side, cells)) else 0


def _constant(matrix: Matrix, like: Tensor) -> Tensor:
    return torch.tensor(matrix.tolist(), dtype=like.dtype, device=like.device)
