"""What an attacker has: a share of the images."""

import pytest

from keyed_xai.errors import TrainingError
from keyed_xai.threats.attempt import draw_share
from tests.threatened import Blobs, make_blobs


def test_share_is_drawn_without_repetition_and_never_empty():
    data = make_blobs(24, 0)
    some = draw_share(data, 0.25, 0)
    assert len(set(some.tolist())) == len(some) == 6
    assert len(draw_share(data, 1e-6, 0)) == 1
    assert draw_share(data, 0.25, 1).tolist() != some.tolist()
    with pytest.raises(TrainingError, match="Expected images"):
        draw_share(Blobs(data.images[:0], None), 0.5, 0)
