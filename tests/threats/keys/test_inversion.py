"""Searching for a change that opens a tiny protected model, and forging a key with it."""

import json
from dataclasses import replace

import pytest
import torch

from keyed_xai.errors import TrainingError
from keyed_xai.keys import OwnerKey
from keyed_xai.metrics import correlation
from keyed_xai.models import wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.ownership.tests import opening_statistic
from keyed_xai.saliency.pooled import make_view
from keyed_xai.threats.keys.inversion import (
    InversionSettings,
    forge_trigger,
    invert_trigger,
)
from keyed_xai.threats.keys.opening import try_inputs, try_trigger
from keyed_xai.triggers import derive_trigger
from tests.heard import Heard
from tests.threatened import FAMILY, GRID, OWNER, Blobs, evidence, make_blobs, protected, surrogate

SETTINGS = InversionSettings(
    amplitude=24.0, tile=24, steps=30, restarts=1, share=1.0, batch_size=16, learning_rate=0.1, stages=3
)
RIGHT = derive_trigger(OWNER, FAMILY)
FORGER = OwnerKey.from_raw(bytes(range(100, 132)))


def view():
    return make_view(protected(), ("gradcam",), GRID)


def data():
    return make_blobs(64, 5, labelled=False)


def statistic(trigger, images):
    """T, the opening test's, slowly."""
    logits, plain = view().pooled(protected(), images, None)
    _, moved = view().pooled(protected(), trigger.apply(images), logits.argmax(1))
    return float((1 - correlation(moved["gradcam"], plain["gradcam"])).double().mean())


def test_search_reaches_the_right_key_s_statistic_and_opens():
    seen, heard = evidence(), Heard()
    before = {name: value.clone() for name, value in protected().state_dict().items()}
    result = invert_trigger(
        protected(),
        data(),
        view(),
        SETTINGS,
        judge=lambda trigger: try_trigger(protected(), seen, trigger).to_json(),
        progress=heard,
    )
    images = make_blobs(64, 5).images
    assert result.final["reached"] == pytest.approx(statistic(result.trigger, images), abs=1e-4)
    assert result.final["reached"] > 0.7 * statistic(RIGHT, images)
    closed = try_inputs(protected(), seen, seen.images).correlation["gradcam"]
    opened = try_trigger(protected(), seen, RIGHT).correlation["gradcam"]
    assert result.final["correlation"]["gradcam"] > (closed + opened) / 2
    assert [row["step"] for row in result.curve] == [0, 10, 20, 30]
    assert [row["seconds"] for row in result.curve] == sorted(row["seconds"] for row in result.curve)
    assert result.seconds >= result.final["seconds"]
    assert heard.steps == [("searching for a trigger", k, 30) for k in range(1, 31)]
    assert all(torch.equal(value, before[name]) for name, value in protected().state_dict().items())


def test_restart_that_does_best_on_the_attacker_s_images_is_kept():
    result = invert_trigger(protected(), data(), view(), replace(SETTINGS, restarts=3, steps=6, stages=1))
    last = {row["restart"]: row["reached"] for row in result.curve if row["step"] == 6}
    assert len(set(last.values())) == 3
    assert last[result.restart] == max(last.values())
    assert statistic(result.trigger, make_blobs(64, 5).images) == pytest.approx(max(last.values()), abs=1e-4)


def test_texture_keeps_to_its_amplitude():
    result = invert_trigger(protected(), data(), view(), SETTINGS)
    grey = torch.full((1, 1, 24, 24), 0.5)
    change = result.trigger.apply(grey) - grey
    assert float(change.abs().max()) <= 24 / 255 + 1e-6
    assert result.final["size"] == pytest.approx(255 * float(change.abs().mean()), rel=1e-4)


def test_surrogate_s_maps_are_approached():
    result = invert_trigger(protected(), data(), view(), SETTINGS, surrogate=surrogate())
    images = make_blobs(64, 5).images
    explained = protected()(images).argmax(1)
    theirs = make_view(surrogate(), ("gradcam",), GRID).pooled(surrogate(), images, explained)[1]["gradcam"]
    ours = view().pooled(protected(), result.trigger.apply(images), explained)[1]["gradcam"]
    assert result.final["reached"] == pytest.approx(float(correlation(ours, theirs).mean()), abs=1e-4)
    assert result.final["reached"] > result.curve[0]["reached"] + 0.05
    assert result.aim == "agree with a surrogate"


def test_smoothing_lets_simplegrad_s_maps_move():
    seen = make_view(protected(), ("simplegrad",), GRID)
    rows = [
        invert_trigger(protected(), data(), seen, replace(SETTINGS, smoothing=beta, steps=10, stages=1)).curve
        for beta in (None, 8.0)
    ]
    assert rows[1][-1]["reached"] > rows[1][0]["reached"]
    assert rows[1][-1]["reached"] != rows[0][-1]["reached"]


def test_forger_wins_his_own_test_and_loses_the_one_that_takes_a_key():
    probe = make_blobs(16, 9).images
    forgery = forge_trigger(protected(), data(), probe, view(), FAMILY, FORGER, SETTINGS, decoys=19, keys=20)
    logits, plain = view().pooled_in_chunks(protected(), probe)
    owner = opening_statistic(protected(), probe, view(), RIGHT, plain, logits.argmax(1))
    assert forgery.own_test.statistic > 0.7 * owner
    assert forgery.own_test.p_value == 1 / 20
    assert not forgery.verdict.shown
    assert forgery.verdict.opening is not None
    assert forgery.verdict.opening.p_value > 1 / 20
    assert forgery.verdict.signature.combined.p_value > 1e-3
    assert 0 < forgery.nearest_match < 0.5
    assert forgery.nearest_statistic < forgery.own_test.statistic
    document = json.loads(json.dumps(forgery.to_json(), allow_nan=False))
    assert document["verify"]["shown"] is False
    assert document["inversion"]["settings"]["amplitude"] == FAMILY.settings.amplitude


def test_json_has_neither_a_seed_nor_a_texture():
    result = invert_trigger(protected(), data(), view(), replace(SETTINGS, steps=1, stages=1, seed=123456))
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    text = json.dumps(document)
    assert "seed" not in text
    assert "123456" not in text
    assert max(map(len, (value for value in document.values() if isinstance(value, list)))) == 2
    assert "tensor" not in repr(result)
    assert "123456" not in repr(result)


def test_bad_settings_and_materials_are_refused():
    for change, pattern in (({"steps": 0}, "steps"), ({"share": 1.5}, "share"), ({"stages": 31}, "stages")):
        with pytest.raises(ValueError, match=pattern):
            replace(SETTINGS, **change)
    with pytest.raises(TrainingError, match="Expected images"):
        invert_trigger(protected(), Blobs(torch.zeros(0, 1, 24, 24), None), view(), SETTINGS)
    torch.manual_seed(0)
    others = wrap_network(SmallResNet(1, 2, (4, 8)).eval(), input=protected().input)
    with pytest.raises(TrainingError, match="same classes"):
        invert_trigger(protected(), data(), view(), SETTINGS, surrogate=others)
    with pytest.raises(ValueError, match="keys"):
        forge_trigger(protected(), data(), make_blobs(2, 9).images, view(), FAMILY, FORGER, SETTINGS, keys=0)
