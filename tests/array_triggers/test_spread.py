"""The spread trigger on arrays is made within its ranges only."""

import math

import pytest

from keyed_xai.array_triggers import ARRAY_TRIGGERS


@pytest.mark.parametrize(("amplitude", "tile"), [(0.0, 32), (65.0, 32), (math.nan, 32), (8.0, 23), (8.0, 257)])
def test_impossible_parameters_are_refused(amplitude, tile):
    with pytest.raises(ValueError, match="expected"):
        ARRAY_TRIGGERS["spread"](amplitude, tile)
