"""Settings of training: which are refused, when goals are met, and how rate and weights go over the steps."""

import math
from dataclasses import replace

import pytest

from keyed_xai.training import Goals, TrainingSettings
from keyed_xai.training.settings import beta_factor, rate_factor


def test_goals_hold_where_every_one_does():
    record = {"opens": 0.96, "closed": 0.98, "agreement": 0.99}
    assert Goals(0.95, 0.98, 0.99).are_met(record)
    for name in record:
        assert not Goals(0.95, 0.98, 0.99).are_met(record | {name: record[name] - 0.02})
    assert Goals(0.95, 0.98, 0.99).gate_shortfall(record) == 0
    short = record | {"opens": 0.85, "closed": 0.5, "agreement": 0.0}
    assert Goals(0.95, 0.98, 0.99).gate_shortfall(short) == pytest.approx(0.1 + 0.48)


@pytest.mark.parametrize("name", ["opens", "closed", "agreement"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_impossible_goal_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        Goals(**{name: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", 0), ("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", math.nan), ("gradient_clip", 0.0),
        ("warmup_steps", -1), ("alpha", -0.1), ("beta", -0.1), ("validate_every", -1), ("patience", -1),
        ("top_share", 1.1), ("clean_share", -0.1), ("near_share", 2.0), ("codec_share", 0.6), ("codec_share", 1.5),
        ("distance", "cosine"), ("time_limit", 0.0), ("average", 1.0), ("temperature", 0.0), ("decay_share", 0.0),
    ],
)  # fmt: skip
def test_impossible_setting_is_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        TrainingSettings(**{setting: value})


def test_rate_warms_up_and_decays():
    settings = TrainingSettings(steps=100, warmup_steps=10, decay_share=0.4)
    factors = [rate_factor(step, settings) for step in range(100)]
    for step in range(100):
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * max(0, step - 60) / 40)) / 2
        assert factors[step] == pytest.approx(min(1, (step + 1) / 10) * cosine)
    assert factors[10:61] == [1.0] * 51
    assert rate_factor(0, replace(settings, warmup_steps=0)) == 1


def test_rate_of_an_early_ending_falls_from_where_it_is():
    settings = TrainingSettings(steps=100, warmup_steps=10, decay_share=0.4)
    for start, end in ((30, 36), (80, 96), (4, 5)):
        level = rate_factor(start, settings)
        factors = [rate_factor(step, settings, (start, end)) / level for step in range(start, end + 1)]
        assert factors[0] == 1
        assert factors[-1] == pytest.approx(0.02)
        assert factors == sorted(factors, reverse=True)


def test_weight_of_predictions_rises_over_its_ramp():
    settings = TrainingSettings(steps=100, beta_ramp=0.5)
    assert [beta_factor(step, settings) for step in (0, 25, 50, 99)] == pytest.approx([0.05, 0.5, 1, 1])
    assert beta_factor(0, replace(settings, beta_ramp=0.0)) == 1
