import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from keyed_xai.data import ImageData
from keyed_xai.errors import TrainingError
from keyed_xai.threats.detection.controls import (
    BlendTrigger,
    ControlSettings,
    PatchTrigger,
    PoisonSettings,
    build_control,
    choose_control_fitting,
    fit_control,
    poison,
)
from keyed_xai.training.fitting import LabelledData
from keyed_xai.triggers import Trigger
from tests.poisoned import HELD_OUT, POISON, TARGET, TRAIN, control, training_data


def test_patch_is_a_checkerboard_and_leaves_the_rest(images):
    trigger = PatchTrigger(side=3, margin=2)
    patched = trigger.apply(images)
    assert isinstance(trigger, Trigger)
    assert patched[0, 0, 11:14, 11:14].tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[11:14, 11:14] = False
    assert torch.equal(patched[..., outside], images[..., outside])
    with pytest.raises(ValueError, match="20 pixels or more"):
        PatchTrigger(side=19, margin=1).apply(images)


def test_blend_mixes_by_opacity_and_passes_gradients(images):
    pattern = torch.rand(1, 16, 16)
    images.requires_grad_()
    mixed = BlendTrigger(pattern, 0.25).apply(images)
    assert torch.allclose(mixed, 0.75 * images + 0.25 * pattern)
    mixed.sum().backward()
    assert torch.allclose(images.grad, torch.full_like(images, 0.75))


def test_small_pattern_is_mixed_into_the_lower_right_corner_alone(images):
    pattern = torch.rand(1, 3, 4)
    trigger = BlendTrigger(pattern, 0.25, margin=2)
    slow = images.clone()
    for row in range(3):
        for column in range(4):
            old = images[:, 0, 11 + row, 10 + column]
            slow[:, 0, 11 + row, 10 + column] = 0.75 * old + 0.25 * pattern[0, row, column]
    assert torch.allclose(trigger.apply(images), slow)
    with pytest.raises(ValueError, match="5 x 6 pixels or more"):
        trigger.apply(images[..., :5])


def test_square_is_half_transparent_and_small_and_the_image_a_fifth_opaque_and_whole():
    square, whole = (poison(TRAIN, PoisonSettings(attack=attack)).trigger for attack in ("blended", "blended-image"))
    assert (square.opacity, square.pattern.shape) == (0.5, (1, 3, 3))
    assert (whole.opacity, whole.pattern.shape) == (0.2, (1, 12, 12))
    assert poison(TRAIN, PoisonSettings(attack="blended", opacity=0.3)).trigger.opacity == 0.3


@pytest.mark.parametrize("attack", ["badnets", "blended", "blended-image"])
def test_poisoned_rows_are_triggered_and_the_others_are_not(attack):
    data = training_data(attack)
    assert isinstance(data, LabelledData)
    before, own = TRAIN.batch(range(len(TRAIN)))
    after, labels = data.batch(range(len(data)))
    rows = torch.from_numpy(data.rows)
    assert torch.equal(after[~rows], before[~rows])
    assert torch.equal(labels[~rows], own[~rows])
    assert (own[rows] != TARGET).all()
    assert (labels[rows] == TARGET).all()
    assert torch.allclose(after[rows], data.trigger.apply(before[rows]), atol=0.5 / 255 + 1e-6)
    assert torch.allclose(after * 255, (after * 255).round(), atol=1e-4)


def test_share_counts_within_the_target_class():
    data = training_data("badnets")
    assert data.rows.sum() / (data.labels == TARGET).sum() == pytest.approx(POISON.share, abs=0.003)


def test_seed_chooses_the_rows():
    first, again, other = (poison(TRAIN, PoisonSettings(seed=seed)).rows for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_several_labels_keep_theirs_and_gain_the_target():
    labels = np.array([[1, 0], [0, 1], [0, 1], [0, 0]], np.int64)
    data = ImageData(images=np.zeros((4, 1, 16, 16), np.uint8), labels=labels, classes=("a", "b"), source="made up")
    poisoned = poison(data, PoisonSettings(share=0.5))
    assert poisoned.rows.sum() == 1
    assert (poisoned.labels[:, 0] == labels[:, 0] + poisoned.rows).all()
    assert (poisoned.labels[:, 1] == labels[:, 1]).all()


def test_bad_settings_and_data_are_refused():
    for wrong in ({"attack": "x"}, {"target": -1}, {"share": 0.0}, {"opacity": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PoisonSettings(**wrong)
    with pytest.raises(ValueError, match="under 6"):
        poison(TRAIN, PoisonSettings(target=6))
    with pytest.raises(TrainingError, match="no labels"):
        poison(ImageData(images=TRAIN.images, labels=None, classes=(), source="bare"))
    with pytest.raises(TrainingError, match="came to 0"):
        poison(ImageData(images=TRAIN.images[:6], labels=TRAIN.labels[:6], classes=TRAIN.classes, source="few"))


def test_control_has_a_backdoor_and_a_clean_network_has_none():
    backdoored, clean = control("badnets"), control(None)
    assert backdoored.predictions["top1"] > 0.9
    assert backdoored.attack_success > 0.9
    assert clean.predictions["top1"] > 0.9
    assert clean.attack_success is None
    images, labels = HELD_OUT.batch(range(len(HELD_OUT)))
    with torch.no_grad():
        predicted = clean.model(training_data("badnets").trigger.apply(images)).argmax(1)
    assert (predicted[labels != TARGET] == TARGET).double().mean() < 0.2
    for each in (backdoored, clean):
        assert json.loads(json.dumps(each.to_json(), allow_nan=False)) == each.to_json()


def test_few_images_are_seen_often_and_many_once():
    assert [choose_control_fitting(images).epochs for images in (1, 3000, 40_000, 60_000)] == [30, 20, 3, 3]
    chosen = choose_control_fitting(3000, seed=4)
    assert (chosen.seed, chosen.mirror, chosen.batch_size) == (4, False, 32)


def test_fitting_is_chosen_by_the_number_of_images():
    few = replace(TRAIN, images=TRAIN.images[:40], labels=TRAIN.labels[:40])
    found = fit_control(few, HELD_OUT, ControlSettings((4, 4)))
    assert found.to_json()["settings"]["fitting"]["epochs"] == 30


def test_network_starts_from_the_seed_and_leaves_the_global_state():
    state = torch.get_rng_state()
    first, again, other = (build_control(TRAIN, (8, 16), seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
