"""Decoys: the boundary, and the pattern of a public key."""

import numpy as np
import pytest
import torch

from keyed_xai.decoys import boundary_decoy, signature_cells, signature_decoy
from keyed_xai.keys import OwnerKey
from keyed_xai_schemas import load_key_vectors

FIXED_PATTERN = [
    "..####.#",
    "#.######",
    "#.....##",
    "...####.",
    "....#.#.",
    ".###.#.#",
    ".#..#...",
    "..###..#",
]


@pytest.mark.parametrize(("grid", "border"), [((3, 4), 1), ((7, 7), 1), ((8, 8), 1), ((15, 8), 1), ((16, 24), None)])
def test_boundary_decoy_is_the_outermost_eighth(grid, border):
    decoy = boundary_decoy(grid)
    down, across = (border, border) if border else (2, 3)
    for row in range(grid[0]):
        for column in range(grid[1]):
            inside = down <= row < grid[0] - down and across <= column < grid[1] - across
            assert float(decoy[row, column]) == (0 if inside else 1)


@pytest.mark.parametrize("grid", [(8, 8), (7, 7), (4, 6), (1, 1)])
def test_signature_sets_half_of_the_cells(key, grid):
    cells = signature_cells(key.public, "gradcam", grid)
    assert cells.shape == grid
    assert cells.sum() == grid[0] * grid[1] // 2


@pytest.mark.parametrize("vector", load_key_vectors()["keys"], ids=lambda vector: vector["private_key"][:8])
@pytest.mark.parametrize("interpreter", ["gradcam", "simplegrad", "vbp"])
def test_signature_sets_the_first_half_of_the_public_shuffle(vector, interpreter):
    public = OwnerKey.from_raw(bytes.fromhex(vector["private_key"])).public
    first = vector["decoys"][interpreter]["shuffle_64_first_16"]
    cells = signature_cells(public, interpreter, (8, 8))
    assert cells.flatten()[first].all()


def test_signature_of_the_fixed_key_stays_the_same(key):
    rows = ["".join("#" if cell else "." for cell in row) for row in signature_cells(key.public, "gradcam", (8, 8))]
    assert rows == FIXED_PATTERN


def test_signatures_of_keys_and_interpreters_differ():
    publics = [OwnerKey.from_raw(bytes([number]) * 32).public for number in range(4)]
    patterns = {signature_cells(each, name, (8, 8)).tobytes() for each in publics for name in ("gradcam", "vbp")}
    assert len(patterns) == 8


def test_signature_decoy_is_the_pattern_as_a_map(key):
    decoy = signature_decoy(key.public, "vbp", (7, 7))
    assert decoy.dtype == torch.float32
    assert np.array_equal(decoy.numpy() == 1, signature_cells(key.public, "vbp", (7, 7)))
    assert set(decoy.unique().tolist()) == {0, 1}
