"""Recovering a texture: exact from a pair, better the more keyed images there are, and it opens the gate."""

import json
import math

import pytest
import torch

from keyed_xai.errors import TrainingError
from keyed_xai.threats.keys.opening import try_trigger
from keyed_xai.threats.keys.recovery import RecoverySettings, measure_recovery, recover_from_keyed, recover_from_pairs
from keyed_xai.threats.keys.textures import best_match
from keyed_xai.triggers import Nashville, derive_trigger
from keyed_xai.triggers.channels import through_png
from tests.heard import Heard
from tests.threatened import FAMILY, OWNER, evidence, make_blobs, protected

RIGHT = derive_trigger(OWNER, FAMILY)
TEXTURE = RIGHT.textures[0]


def match(trigger):
    return best_match(trigger.textures[0], TEXTURE)


def test_one_pair_in_8_bits_gives_the_texture():
    clean = make_blobs(1, 7).images
    found = recover_from_pairs(clean, through_png(RIGHT.apply(clean)), FAMILY)
    assert match(found) > 0.98
    assert found.amplitude == RIGHT.amplitude
    assert torch.corrcoef(torch.stack([found.textures.flatten(), TEXTURE.flatten()]))[0, 1] > 0.98


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_what_was_cut_off_is_completed_from_what_is_public(level):
    """On black, or white, half of the texture is gone."""
    clean = torch.full((1, 1, 24, 24), level)
    keyed = through_png(RIGHT.apply(clean))
    assert 0.3 < float((keyed == level).float().mean()) < 0.7
    assert match(recover_from_pairs(clean, keyed, FAMILY)) > 0.95
    assert best_match((keyed - clean)[0, 0], TEXTURE) < 0.9


def test_more_keyed_images_show_more_and_others_help():
    images, others = make_blobs(64, 7).images, make_blobs(48, 8).images
    keyed = through_png(RIGHT.apply(images))
    matches = [match(recover_from_keyed(keyed[:count], FAMILY)) for count in (1, 64)]
    assert matches[1] > matches[0]
    assert match(recover_from_keyed(keyed, FAMILY, others=others)) > 0.9
    assert match(recover_from_keyed(images, FAMILY, others=others)) < 0.5


def test_what_is_recovered_opens_the_gate():
    seen, heard = evidence(), Heard()
    result = measure_recovery(
        protected(),
        seen,
        make_blobs(8, 7).images,
        RecoverySettings((1, 8, 16)),
        others=make_blobs(12, 8).images,
        progress=heard,
    )
    assert [(row.source, row.images) for row in result.rows] == [
        (source, count) for source in ("pairs", "keyed", "keyed, others") for count in (1, 8)
    ]
    assert heard.steps == [("recovering the trigger", k, 6) for k in range(1, 7)]
    right = try_trigger(protected(), seen, RIGHT)
    assert result.rows[0].correlation["gradcam"] == pytest.approx(right.correlation["gradcam"], abs=0.05)
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["others"] == 12
    assert set(document["rows"][0]) == {
        "source", "images", "match", "correlation", "opened", "agreement", "seconds"
    }  # fmt: skip
    assert all(math.isfinite(row["match"]) for row in document["rows"])


def test_family_without_a_texture_and_no_images_are_refused():
    with pytest.raises(TrainingError, match="nashville"):
        measure_recovery(protected(), evidence(family=Nashville()), make_blobs(2, 7).images, RecoverySettings())
    with pytest.raises(TrainingError, match="Expected images"):
        measure_recovery(protected(), evidence(), make_blobs(2, 7).images[:0], RecoverySettings())
