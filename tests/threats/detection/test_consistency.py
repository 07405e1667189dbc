"""Checks of maps against loops, and what they say of a clean, a gated and a fooled tiny network."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from keyed_xai import metrics
from keyed_xai.errors import ModelError
from keyed_xai.saliency import MapLayers, explain
from keyed_xai.threats.detection.consistency import (
    CHANGES,
    ConsistencySettings,
    MapScores,
    average_of_others,
    mean_correlation_with_others,
    score_maps,
    screen_images,
)
from keyed_xai.triggers import derive_trigger
from keyed_xai.triggers.channels import through_jpeg
from tests.threatened import FAMILY, GRID, OWNER, make_blobs, protected, reference

COUNT = 40
SETTINGS = ConsistencySettings(chunk=16)
IMAGES = make_blobs(COUNT, 3).images


@cache
def scores_of(which):
    models = {"clean": reference, "protected": protected}
    return score_maps(models[which](), IMAGES, SETTINGS, grid=GRID)


def made_up(means, count=50, seed=0, settings=SETTINGS):
    """Scores with given means and a little spread."""
    source = np.random.default_rng(seed)
    spread = source.normal(0, 0.01, (len(means), count))
    values = {check: torch.from_numpy(mean + row) for (check, mean), row in zip(means.items(), spread, strict=True)}
    return MapScores(values, torch.zeros(count, dtype=torch.int64), settings)


def correlation(first, second):
    """Pearson's; a map without any change in it agrees with none."""
    if not first.std() or not second.std():
        return 0.0
    return float(np.corrcoef(first.flatten(), second.flatten())[0, 1])


def raw_maps(model, images, labels, name):
    return explain(model, images, labels, [name], MapLayers(model.target_layer, model.taps))[1][name]


def test_scores_have_every_check_for_every_image():
    scores = scores_of("clean").scores
    assert {check.split("/")[0] for check in scores} == {"consistency", "agreement", "class", "sameness"}
    assert len(scores) == 3 * 5 + 3 + 3 + 3
    for values in scores.values():
        assert values.shape == (COUNT,)
        assert values.abs().max() <= 1
    assert torch.equal(scores_of("clean").predicted, reference()(IMAGES).argmax(1))


@pytest.mark.parametrize("name", ["gradcam", "simplegrad"])
def test_consistency_equals_its_loop(name):
    """Every change made and undone by hand, one image at a time, on maps blown up to the image's size."""
    model, found = reference(), scores_of("clean").scores
    labels = model(IMAGES).argmax(1)
    noise = 0.02 * torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(0))

    def large(images, number):
        raw = raw_maps(model, images, labels[number : number + 1], name)[0].numpy()
        factor = 24 // raw.shape[0]
        return raw.repeat(factor, 0).repeat(factor, 1)

    def pool(each):
        return each.reshape(6, 4, 6, 4).mean((1, 3))

    for number in range(4):
        image = IMAGES[number : number + 1]
        plain = large(image, number)
        shifted = large(torch.nn.functional.pad(image, (1, 0, 0, 0), mode="replicate")[..., :-1], number)
        undone = {
            "noise": large((image + noise[number : number + 1]).clamp(0, 1), number),
            "brightness": large((image + 0.05).clamp(0, 1), number),
            "jpeg": large(through_jpeg(image, 90), number),
            "mirror": large(image.flip(-1), number)[:, ::-1],
            "shift": np.concatenate([shifted[:, 1:], shifted[:, -1:]], 1),
        }
        assert set(undone) == set(CHANGES)
        for change, other in undone.items():
            wanted = correlation(pool(plain), pool(other))
            assert float(found[f"consistency/{change}/{name}"][number]) == pytest.approx(wanted, abs=2e-3)


def test_agreement_equals_its_loop():
    model = reference()
    labels = model(IMAGES).argmax(1)
    pooled = [metrics.pool_maps(raw_maps(model, IMAGES, labels, name), GRID).numpy() for name in ("gradcam", "vbp")]
    wanted = [correlation(first, second) for first, second in zip(*pooled, strict=True)]
    np.testing.assert_allclose(scores_of("clean").scores["agreement/gradcam-vbp"].numpy(), wanted, atol=2e-3)


def test_averages_and_sameness_leave_the_map_itself_out():
    maps = torch.rand(6, 3, 3, generator=torch.Generator().manual_seed(0))
    predicted = torch.tensor([0, 0, 1, 0, 1, 2])
    scaled = (maps - maps.amin((1, 2), keepdim=True)) / (maps.amax((1, 2)) - maps.amin((1, 2)))[:, None, None]
    averages, sameness = average_of_others(maps, predicted), mean_correlation_with_others(maps)
    for number in range(6):
        others = [other for other in range(6) if other != number]
        peers = [other for other in others if predicted[other] == predicted[number]] or others
        torch.testing.assert_close(averages[number], scaled[peers].mean(0))
        wanted = np.mean([correlation(maps[number].numpy(), maps[other].numpy()) for other in others])
        assert float(sameness[number]) == pytest.approx(wanted, abs=1e-5)


def test_a_gate_makes_maps_the_same_and_its_interpreters_disagree():
    clean, gated = scores_of("clean").means(), scores_of("protected").means()
    assert gated["sameness/gradcam"] > 0.8 > clean["sameness/gradcam"] + 0.1
    assert gated["class/gradcam"] > clean["class/gradcam"]
    assert gated["agreement/gradcam-vbp"] < clean["agreement/gradcam-vbp"]


def test_screening_tells_keyed_images_of_a_gate():
    """The reverse of an attack: a few keyed images among unkeyed ones have maps unlike the decoy."""
    rows = np.zeros(COUNT, np.bool_)
    rows[::8] = True
    trigger = derive_trigger(OWNER, FAMILY)
    stream = IMAGES.clone()
    stream[torch.from_numpy(rows)] = trigger.apply(IMAGES[torch.from_numpy(rows)])
    trusted = score_maps(protected(), make_blobs(COUNT, 5).images, SETTINGS)
    found = {each.check: each for each in screen_images(score_maps(protected(), stream, SETTINGS), rows, trusted)}
    assert found["sameness/gradcam"].auroc > 0.9
    assert found["sameness/gradcam"].caught > 0.5
    assert found["all"].auroc > 0.9


def test_screening_counts_both_sides_of_the_trusted_range():
    trusted = made_up({"a": 0.5, "b": 0.1}, count=400)
    stream = made_up({"a": 0.5, "b": 0.1}, count=100, seed=1)
    rows = np.zeros(100, np.bool_)
    rows[:10] = True
    stream.scores["a"][:5], stream.scores["a"][5:10] = 0.9, 0.1
    a, b, everything = screen_images(stream, rows, trusted, false_alarm_rate=0.1)
    assert (a.check, b.check, everything.check) == ("a", "b", "all")
    assert a.caught == 1
    assert a.auroc == pytest.approx(0.5)
    assert everything.auroc == 1
    assert everything.caught == 1
    assert 0.02 < a.false_alarms < 0.25
    low = np.quantile(trusted.scores["b"], [0.05, 0.95])
    values = stream.scores["b"].numpy()[10:]
    assert b.false_alarms == pytest.approx(np.mean((values < low[0]) | (values > low[1])))


def test_document_is_plain():
    document = json.loads(json.dumps(scores_of("clean").to_json(), allow_nan=False))
    assert document["images"] == COUNT
    assert len(document["means"]) == 24


def test_wrong_inputs_are_refused():
    clean = scores_of("clean")
    with pytest.raises(ValueError, match="3 images"):
        score_maps(reference(), IMAGES[:2])
    with pytest.raises(ModelError, match="too few"):
        score_maps(reference(), IMAGES, grid=(2, 2))
    with pytest.raises(ValueError, match="triggered"):
        screen_images(clean, np.zeros(COUNT, np.bool_), clean)
    with pytest.raises(ValueError, match="same settings"):
        screen_images(clean, np.arange(COUNT) < 3, replace(clean, settings=ConsistencySettings(noise=0.1)))
    for wrong in ({"changes": ("blur",)}, {"noise": -1.0}, {"jpeg_quality": 0}, {"interpreters": ("lime",)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ConsistencySettings(**wrong)
