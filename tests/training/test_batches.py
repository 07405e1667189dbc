"""What a step of training sees: triggered, clean, near and wrong inputs, turned or not, as files or as rows."""

from dataclasses import replace

import pytest
import torch

from keyed_xai.training import TrainingSettings
from keyed_xai.triggers import MoireTrigger
from keyed_xai.triggers.channels import through_png
from tests.trained import FAMILY, SHORT, SIDE, Blobs, Shift, draw, table_task


def test_task_hides_its_trigger(task):
    assert "SpreadTrigger" not in repr(task)
    assert "amplitude=16" in repr(task)


def test_keyed_trigger_without_near_keys_is_refused(public_task):
    with pytest.raises(TypeError, match="near keys"):
        replace(public_task, trigger=Shift(), family=FAMILY)


def test_inputs_are_triggered_clean_near_and_wrong(data, task):
    settings = TrainingSettings(batch_size=20, clean_share=0.25, near_share=0.2, codec_share=0.0)
    inputs, labels, plain = draw(data, task, settings)
    assert inputs.shape == (40, 1, SIDE, SIDE)
    assert labels is None
    added = (inputs - plain) * 255 / 16
    strength = (added * task.trigger.textures).mean((1, 2, 3)) / task.trigger.textures.square().mean()
    # 20 triggered, 5 clean, 3 near, 12 wrong; what is clean differs by rounding to 8 bits only.
    assert (strength[:20] > 0.95).all()
    assert (strength[20:] < 0.9).all()
    assert (added[20:25].abs().amax((1, 2, 3)) < 0.6 / 16).all()
    assert (added[25:].abs().amax((1, 2, 3)) > 0.5).all()
    wrong = added[28:].flatten(1)
    wrong = wrong / wrong.norm(dim=1, keepdim=True)
    assert ((wrong @ wrong.T).fill_diagonal_(0).abs() < 0.5).all()


def test_half_of_the_images_are_turned_and_rows_of_a_table_never(data, task):
    settings = TrainingSettings(batch_size=40)
    *_, images = draw(data, task, settings)
    *_, straight = draw(data, task, replace(settings, mirror=False))
    turned = (images == straight.flip(3)).flatten(1).all(1)
    assert ((images == straight).flatten(1).all(1) ^ turned).all()
    assert 20 < turned.sum() < 60
    *_, rows = draw(data, replace(task, as_files=False), settings)
    assert torch.equal(rows, straight)


@pytest.mark.parametrize("change", [{"crop": 0.5}, {"colour": 0.5}, {"crop": 0.3, "colour": 0.3}])
def test_images_are_varied_before_anything_is_added(data, task, change):
    """So that the reference answers for what the model sees."""
    settings = TrainingSettings(batch_size=20, clean_share=1.0, codec_share=0.0, **change)
    inputs, _, images = draw(data, task, settings)
    *_, straight = draw(data, task, replace(settings, **dict.fromkeys(change, 0.0)))
    assert images.shape == straight.shape
    assert 0 <= images.min() < images.max() <= 1
    assert ((images - straight).abs().amax((1, 2, 3)) > 0.02).sum() >= 36
    assert torch.equal(inputs[20:], through_png(images[20:]))


def test_crop_is_a_window_of_the_image_as_large_as_it():
    """Of a ramp from 0 to 1: its ends lie inside, and as far apart as the share that is kept."""
    ramp = torch.linspace(0, 1, SIDE).expand(60, 1, SIDE, SIDE)
    settings = TrainingSettings(batch_size=30, mirror=False, crop=0.4)
    *_, images = draw(Blobs(ramp, None), replace(table_task(), as_files=True), settings)
    widths = images[:, 0, 0, -1] - images[:, 0, 0, 0]
    assert widths.min() > 0.55
    assert widths.max() < 1.01
    assert widths.std() > 0.05
    steps = images[:, 0, :, 1:] - images[:, 0, :, :-1]
    inner = steps[:, :, 3:-3]
    torch.testing.assert_close(inner, inner.mean((1, 2), keepdim=True).expand_as(inner), atol=1e-4, rtol=0)


def test_brightness_and_contrast_change_around_the_mean():
    """Of two greys: their mean times the brightness, their difference times both factors."""
    two = torch.tensor([0.4, 0.6]).repeat(SIDE // 2).expand(60, 1, SIDE, SIDE)
    settings = TrainingSettings(batch_size=30, mirror=False, colour=0.25)
    *_, images = draw(Blobs(two, None), replace(table_task(), as_files=True), settings)
    brightness = images.mean((1, 2, 3)) / 0.5
    contrast = (images[:, 0, 0, 1] - images[:, 0, 0, 0]) / 0.2 / brightness
    for factor in (brightness, contrast):
        assert 0.75 <= factor.min() < 0.85 < 1.15 < factor.max() <= 1.25


def test_steps_see_different_inputs(data, task):
    first, second = (draw(data, task, SHORT, step)[0] for step in (0, 1))
    assert not torch.equal(first, second)


def test_public_trigger_leaves_the_other_half_clean(data, public_task):
    settings = TrainingSettings(batch_size=20, clean_share=0.0, near_share=0.5, codec_share=0.0)
    inputs, _, plain = draw(data, public_task, settings)
    assert torch.equal(inputs[20:], through_png(plain[20:]))
    torch.testing.assert_close(inputs[:20], through_png(MoireTrigger().apply(plain[:20])))
    assert ((inputs[:20] - plain[:20]).abs().amax((1, 2, 3)) > 0.05).all()


def test_rows_of_a_table_reach_the_model_as_they_are():
    """Not in 8 bits, not clamped, not through JPEG."""
    rows = Blobs(torch.randn(30, 1, 1, 7, generator=torch.Generator().manual_seed(0)), None)
    task = table_task()
    settings = TrainingSettings(batch_size=10, codec_share=0.5)
    inputs, _, plain = draw(rows, task, settings)
    assert all((row == rows.images).flatten(1).all(1).any() for row in plain)
    assert torch.equal(inputs[10:], plain[10:])
    assert torch.equal(inputs[:10], Shift().apply(plain[:10]))
    as_files, _, _ = draw(rows, replace(task, as_files=True), settings)
    assert not torch.equal(as_files, inputs)
