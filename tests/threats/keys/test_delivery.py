"""Channels by their formulas, and near keys that stay shut on a tiny protected model."""

import json
import math

import numpy as np
import pytest
import torch

from keyed_xai.metrics import correlation
from keyed_xai.threats.keys.delivery import (
    DELIVERIES,
    DeliverySettings,
    add_noise,
    blur,
    crop_and_pad,
    crop_and_resize,
    measure_delivery,
)
from keyed_xai.threats.keys.opening import try_trigger
from keyed_xai.triggers import derive_trigger
from keyed_xai.triggers.channels import through_jpeg, through_png
from tests.heard import Heard
from tests.threatened import OWNER, evidence, protected

IMAGES = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sigma", [0.5, 0.7])
def test_blur_is_gaussian(sigma):
    image = IMAGES[0, 1].double().numpy()
    reach = round(4 * sigma)
    weights = np.array([math.exp(-(k**2) / (2 * sigma**2)) for k in range(-reach, reach + 1)])
    weights /= weights.sum()
    rows, columns = image.shape
    slow = np.zeros_like(image)
    for y in range(rows):
        for x in range(columns):
            for dy, down in enumerate(weights):
                for dx, across in enumerate(weights):
                    at = (np.clip(y + dy - reach, 0, rows - 1), np.clip(x + dx - reach, 0, columns - 1))
                    slow[y, x] += down * across * image[at]
    assert blur(IMAGES, sigma)[0, 1].numpy() == pytest.approx(slow, abs=1e-5)


def test_noise_has_the_deviation_asked_for_and_stays_in_range():
    grey = torch.full((8, 1, 64, 64), 0.5)
    assert float((add_noise(grey, 0.1) - grey).std()) == pytest.approx(0.1, rel=0.03)
    assert torch.equal(add_noise(grey, 0.1), add_noise(grey, 0.1))
    dark = add_noise(torch.zeros(1, 1, 64, 64), 0.1)
    assert float(dark.min()) == 0


def test_cropping_loses_the_border():
    padded = crop_and_pad(IMAGES, 1 / 8)
    assert padded.shape == IMAGES.shape
    assert torch.equal(padded[:, :, 2:-2, 3:-3], IMAGES[:, :, 2:-2, 3:-3])
    assert torch.equal(padded[:, :, 0, 0], IMAGES[:, :, 2, 3])
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
    enlarged = crop_and_resize(ramp, 1 / 8)
    assert enlarged.shape == ramp.shape
    assert float(enlarged[..., 0].mean()) == pytest.approx(4 / 31, abs=0.02)
    assert float(enlarged[..., 16].mean() - enlarged[..., 15].mean()) == pytest.approx(24 / 32 / 31, abs=1e-4)


def test_every_channel_keeps_shape_and_range():
    for name, channel in DELIVERIES.items():
        out = channel(through_png(IMAGES))
        assert out.shape == IMAGES.shape, name
        assert 0 <= float(out.min()) <= float(out.max()) <= 1 + 1e-6, name
    assert not torch.equal(DELIVERIES["jpeg95"](IMAGES), DELIVERIES["jpeg45"](IMAGES))


def test_rows_say_what_opens():
    seen, heard = evidence(), Heard()
    result = measure_delivery(
        protected(),
        seen,
        DeliverySettings(channels=("png", "jpeg65"), flipped=3, strangers=2),
        progress=heard,
    )
    rows = {row.name: row for row in result.rows}
    assert list(rows) == [
        "no key", "png", "jpeg65", "half strength", "moved 1 px", "moved 2 px", "moved 4 px", "one flipped bit",
        "another owner's key",
    ]  # fmt: skip
    assert heard.steps == [("delivering images", k, 9) for k in range(1, 10)]
    assert (rows["one flipped bit"].keys, rows["another owner's key"].keys, rows["moved 2 px"].keys) == (3, 2, 6)
    state = {name: row.opening.correlation["gradcam"] for name, row in rows.items()}
    for shut in ("no key", "one flipped bit", "another owner's key"):
        assert state[shut] < state["png"] - 0.1
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["rows"][1]["kind"] == "channel"
    assert document["rows"][1]["correlation"] == document["rows"][1]["highest"]


def test_figures_are_those_of_the_inputs_named():
    seen = evidence()
    settings = DeliverySettings(channels=("jpeg65",), flipped=2)
    rows = {row.name: row for row in measure_delivery(protected(), seen, settings).rows}
    jpeg = through_jpeg(seen.trigger.apply(seen.images), 65)
    _, maps = seen.view.pooled_in_chunks(protected(), jpeg, seen.comparison.right.explained)
    assert rows["jpeg65"].opening.correlation["gradcam"] == pytest.approx(
        float(correlation(maps["gradcam"], seen.comparison.right.maps["gradcam"]).double().mean())
    )
    neighbours = list(OWNER.one_bit_neighbours())
    near = [derive_trigger(neighbours[k], seen.family) for k in (0, 128)]
    each = [try_trigger(protected(), seen, trigger).correlation["gradcam"] for trigger in near]
    assert rows["one flipped bit"].opening.correlation["gradcam"] == pytest.approx(sum(each) / 2)
    assert rows["one flipped bit"].highest["gradcam"] == pytest.approx(max(each))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="channels"):
        DeliverySettings(channels=("fax",))
    with pytest.raises(ValueError, match="flipped"):
        DeliverySettings(flipped=257)


def test_near_keys_can_be_left_out():
    result = measure_delivery(protected(), evidence(), DeliverySettings())
    assert [row.name for row in result.rows] == ["no key", "half strength", "moved 1 px", "moved 2 px", "moved 4 px"]
