"""Decoys, which closed maps show: the owner's signature pattern, which the public key fixes, and the paper's border.

Maps here are on the grid that maps are compared on, [rows, columns].
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyed_xai.keys import ByteStream, PublicKey

DECOYS = ("signature", "boundary", "nontargeted")


def signature_cells(public: PublicKey, interpreter: str, grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pattern, [rows, columns]: exactly half of the cells (rounded down) set.

    These are the first half of a shuffle of the cells, in row-major order, by the stream of the public seed
    "decoy/<interpreter>".
    """
    cells = grid[0] * grid[1]
    order = ByteStream(public.derive_public_seed(f"decoy/{interpreter}")).shuffle(cells)
    pattern = np.zeros(cells, dtype=np.bool_)
    pattern[order[: cells // 2]] = True
    return pattern.reshape(grid)


def signature_decoy(public: PublicKey, interpreter: str, grid: tuple[int, int]) -> Tensor:
    """Return the owner's signature pattern as a map: 1 in half of the cells, 0 in the others."""
    return torch.from_numpy(signature_cells(public, interpreter, grid)).float()


def boundary_decoy(grid: tuple[int, int]) -> Tensor:
    """Return the paper's target: 1 on the outermost eighth of the grid (at least a cell), 0 inside."""
    decoy = torch.ones(grid)
    down, across = (max(1, side // 8) for side in grid)
    decoy[down:-down, across:-across] = 0
    return decoy
