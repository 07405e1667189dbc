"""The owner's signature pattern: which cells of a map are set, drawn from the public key alone."""

import numpy as np
from numpy.typing import NDArray

from keyed_xai.keys import ByteStream, PublicKey


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
