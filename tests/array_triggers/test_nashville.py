"""The filter nashville on arrays: ties are decided as in torch, and only photographs are taken."""

import numpy as np
import pytest

from tests.on_arrays import both, noise


@pytest.mark.parametrize("channels", [1, 3])
def test_nashville_decides_ties_as_torch(channels):
    halves = (np.arange(255, dtype=np.float32) + np.float32(0.5)) / np.float32(255)
    near = np.concatenate([halves, np.nextafter(halves, np.float32(0)), np.nextafter(halves, np.float32(1))])
    images = np.broadcast_to(near[None, None, None], (1, channels, 2, len(near))).copy()
    for number in range(20):
        found, expected = both("nashville", bytes([number]) * 32, images)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("channels", [2, 4])
def test_nashville_refuses_what_is_no_photograph(channels):
    with pytest.raises(ValueError, match=f"1 or 3 channels, got {channels}"):
        both("nashville", bytes(32), noise((1, channels, 8, 8)))
