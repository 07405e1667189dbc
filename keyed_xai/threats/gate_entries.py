"""Checks of maps, attacks on the key, and ways round the gate, as entries of an audit."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from keyed_xai.errors import TrainingError
from keyed_xai.keys import OwnerKey
from keyed_xai.metrics import OPEN_CORRELATION
from keyed_xai.tensors import Images
from keyed_xai.threats.attempt import view_of
from keyed_xai.threats.attributions import AttributionSettings
from keyed_xai.threats.bypass import measure_bypass
from keyed_xai.threats.consistency import ConsistencySettings, score_maps, screen_images
from keyed_xai.threats.delivery import DELIVERIES, DeliveryRow, measure_delivery
from keyed_xai.threats.entries import KEYED_FLOOR, UNKEYED_CEILING, Entry, Observation, Outcome
from keyed_xai.threats.gate_state import Witness
from keyed_xai.threats.inversion import InversionSettings, forge_trigger, invert_trigger
from keyed_xai.threats.opening import Referee
from keyed_xai.threats.recovery import measure_recovery
from keyed_xai.threats.subject import Subject
from keyed_xai.triggers import Spread, Trigger

_IMAGES = 200
_EXPLAINED = 64
_ATTACKERS_IMAGES = 256
_WRONG_KEYS = ("one flipped bit", "another owner's key")
_SCREENED = 0.8
_UNNOTICED = 0.65


def _try_near_keys(subject: Subject) -> Observation:
    result = measure_delivery(
        subject.classifier, _few(subject), channels=(), flipped=32, strangers=32, on_step=subject.on_step
    )
    rows = [row for row in result.rows if row.kind == "near key"]
    wrong = max(_most(row) for row in rows if row.name in _WRONG_KEYS)
    worst = max((row for row in rows if row.name not in _WRONG_KEYS), key=_most)
    sentence = (
        f"With keys of others, or one bit away, maps correlate at most {wrong:.2f} with the right ones; with the right "
        f"trigger weakened or moved at most {_most(worst):.2f} ({worst.name})."
    )
    return Observation(_judge_opening(wrong), sentence, figures=result.to_json())


def _try_channels(subject: Subject) -> Observation:
    result = measure_delivery(subject.classifier, _few(subject), flipped=0, strangers=0, on_step=subject.on_step)
    rows = [row for row in result.rows if row.kind == "channel"]
    worst, shut = min(rows, key=_least), [row.name for row in rows if _least(row) < OPEN_CORRELATION]
    sentence = f"Keyed maps correlate at least {_least(worst):.2f} with the right ones ({worst.name})"
    sentence += f"; the gate shuts after {', '.join(shut)}." if shut else "."
    outcome: Outcome = "survives" if _least(worst) >= KEYED_FLOOR else "maps damaged"
    return Observation(outcome, sentence, figures=result.to_json())


def _recover(subject: Subject) -> Observation:
    images, others = _attackers_images(subject)
    result = measure_recovery(subject.classifier, _few(subject), images, others=others, on_step=subject.on_step)
    parts = []
    for source, words in _SOURCES.items():
        rows = [row for row in result.rows if row.source == source]
        if rows:
            best = max(rows, key=lambda row: max(row.correlation.values()))
            parts.append(f"{best.images} {words}: {max(best.correlation.values()):.2f}")
    reached = max(max(row.correlation.values()) for row in result.rows)
    sentence = f"Correlation of maps with the right ones by a trigger recovered from {', '.join(parts)}."
    return Observation(_judge_opening(reached), sentence, figures=result.to_json())


_SOURCES = {
    "pairs": "pairs of clean and keyed image",
    "keyed": "keyed images alone",
    "keyed, others": "keyed images and others without a key",
}


def _invert(subject: Subject, settings: InversionSettings, *, surrogate: bool) -> Observation:
    witness = _witness(subject)
    referee, family = Referee.of(_few(subject)), _spread(witness)

    def judge(trigger: Trigger) -> Mapping[str, Any]:
        opening = referee.judge(subject.classifier, trigger)
        return {"recovered": max(opening.correlation.values()), "agreement": opening.agreement,
                "match": referee.match(trigger)}  # fmt: skip

    result = invert_trigger(
        subject.classifier,
        subject.data,
        subject.view,
        replace(settings, amplitude=float(family.settings.amplitude), tile=family.settings.tile, seed=subject.seed),
        surrogate=subject.surrogate if surrogate else None,
        multi_label=subject.multi_label,
        device=subject.device,
        judge=judge,
        on_step=subject.on_step,
    )
    reached = result.final["recovered"]
    sentence = (
        f"In {result.seconds / 60:.1f} minutes with {result.images} images a change was found by which maps correlate "
        f"{reached:.2f} with the right ones; its texture correlates {result.final['match']:.2f} with the key's."
    )
    curve = [row for row in result.curve if row["restart"] == result.restart]
    return Observation(_judge_opening(reached), sentence, figures=result.to_json() | {"curve": []}, curve=curve)


def _forge(subject: Subject, settings: InversionSettings) -> Observation:
    witness = _witness(subject)
    result = forge_trigger(
        subject.classifier,
        subject.data,
        witness.images[:16] if witness.probe is None else witness.probe,
        subject.view,
        _spread(witness),
        OwnerKey.from_raw(np.random.default_rng(subject.seed).bytes(32)),
        replace(settings, seed=subject.seed),
        decoys=witness.decoys,
        device=subject.device,
        on_step=subject.on_step,
    )
    shown = "shows" if result.verdict.shown else "does not show"
    sentence = (
        f"A forged texture reaches T = {result.own_test.statistic:.2f} in {result.inversion.seconds / 60:.1f} minutes. "
        f"No key is known to have it: the nearest of {result.keys} has T = {result.nearest_statistic:.2f}; the test "
        f"with the forger's own key {shown} ownership."
    )
    return Observation("forged" if result.verdict.shown else "resists", sentence, figures=result.to_json())


def _explain_otherwise(subject: Subject, settings: AttributionSettings) -> Observation:
    if subject.reference is None:
        raise TrainingError("Expected a reference model to compare with. Give --reference.")
    images = subject.images[:_EXPLAINED]
    result = measure_bypass(
        subject.classifier,
        subject.reference,
        view_of(subject.view, subject.reference),
        images,
        replace(settings, seed=subject.seed),
        keyed=None if subject.trigger is None else subject.trigger_images(images),
        on_step=subject.on_step,
    )
    best = [(name, row) for name in result.interpreters if (row := result.best(name)) is not None]
    if not best:
        return Observation("not applicable", "No other explanation can be made of this network.",
                           figures=result.to_json())  # fmt: skip
    name, row = max(best, key=lambda each: each[1].recovered[each[0]]["unkeyed"].correlation)
    seen = {case: match.correlation for case, match in row.recovered[name].items()}
    sentence = (
        f"Unkeyed {row.method} ({row.reduction}) correlates {seen['unkeyed']:.2f} with the right map of {name}, "
        f"on the reference it does {seen['reference']:.2f}."
    )
    return Observation(_judge_opening(seen["unkeyed"]), sentence, figures=result.to_json())


def _score_maps(subject: Subject) -> Observation:
    scores = score_maps(
        subject.classifier,
        subject.images[:_IMAGES],
        ConsistencySettings(seed=subject.seed),
        grid=subject.view.grid,
        on_step=subject.on_step,
    )
    means = scores.means()
    low = min((name for name in means if name.startswith("consistency/")), key=means.__getitem__)
    sentence = (
        f"Maps are least like themselves after {low.split('/')[1]} ({low.split('/')[2]}, {means[low]:.2f}). What is "
        "usual differs from network to network, so this is for comparing with clean ones."
    )
    return Observation("reported", sentence, figures=scores.to_json())


def _screen(subject: Subject) -> Observation:
    half = min(_IMAGES, len(subject.images) // 2)
    stream, trusted = subject.images[:half].clone(), subject.images[half : 2 * half]
    triggered = np.arange(half) % 2 == 0
    stream[torch.from_numpy(triggered)] = subject.trigger_images(stream[torch.from_numpy(triggered)])
    settings = ConsistencySettings(seed=subject.seed)
    scores = [score_maps(subject.classifier, images, settings, grid=subject.view.grid) for images in (stream, trusted)]
    found = screen_images(scores[0], triggered, scores[1])
    best = max(found, key=lambda each: abs(each.auroc - 0.5))
    power = max(best.auroc, 1 - best.auroc)
    sentence = (
        f"The best check, {best.check}, tells triggered from clean images with an AUROC of {power:.2f}: it catches "
        f"{100 * best.caught:.0f} % of them at {100 * best.false_alarms:.0f} % false alarms."
    )
    outcome: Outcome = "flagged" if power >= _SCREENED else "left alone" if power <= _UNNOTICED else "unclear"
    return Observation(outcome, sentence, figures={"checks": [vars(each) for each in found]})


def _few(subject: Subject) -> Witness:
    """Return the witness with fewer images: many triggers are tried on them."""
    return _witness(subject.first(_IMAGES))


def _witness(subject: Subject) -> Witness:
    if subject.witness is None:
        raise TrainingError("Expected the owner's key and the reference model. Give --key-file and --reference.")
    return subject.witness


def _spread(witness: Witness) -> Spread:
    if not isinstance(witness.family, Spread):
        raise TrainingError(f"This attack is on textures of the family spread; the key's is {witness.family.name}.")
    return witness.family


def _attackers_images(subject: Subject) -> tuple[Images, Images | None]:
    """Return images that an attacker saw with the key, and others of his own; none where there are too few."""
    count = min(_ATTACKERS_IMAGES, len(subject.data))
    images = subject.data.batch(np.arange(count))[0].to(subject.device)
    rest = np.arange(count, min(2 * count, len(subject.data)))
    return images, subject.data.batch(rest)[0].to(subject.device) if len(rest) else None


def _most(row: DeliveryRow) -> float:
    """Return the highest correlation of a single key."""
    return max(row.highest.values())


def _least(row: DeliveryRow) -> float:
    return min(row.opening.correlation.values())


def _judge_opening(reached: float) -> Outcome:
    """Return what it means that maps without the key correlate so much with the right ones."""
    if reached <= UNKEYED_CEILING:
        return "resists"
    return "gate opened" if reached > OPEN_CORRELATION else "gate leaks"


_OWNED = frozenset({"key", "reference"})
CHECKS: dict[str, Entry] = {
    "consistency": Entry(
        "checks", "T17", "Consistency of maps", "5 harmless changes of up to 200 images, 3 interpreters", _score_maps
    ),
    "screening": Entry(
        "checks",
        "T17",
        "Screening of single images",
        "trigger known; every second image triggered, others trusted; consistency, agreement, class average",
        _screen,
        frozenset({"trigger"}),
    ),
}
KEY_ATTACKS: dict[str, Entry] = {
    "near-keys": Entry(
        "keys",
        "T15",
        "Near and wrong keys",
        "one bit flipped (32), half strength, moved by 1 to 4 pixels, 32 strangers",
        _try_near_keys,
        _OWNED,
    ),
    "channels": Entry(
        "keys",
        "T13",
        "Channel noise on keyed images",
        f"{len(DELIVERIES)} channels: {', '.join(DELIVERIES)}",
        _try_channels,
        _OWNED,
    ),
    "recovery": Entry(
        "keys",
        "T12",
        "Recovery of the trigger from keyed images",
        "up to 256 pairs, or keyed images alone",
        _recover,
        _OWNED,
    ),
    "inversion": Entry(
        "keys",
        "T11",
        "Trigger inversion",
        "a texture that moves the maps, 3 x 240 steps, a tenth of the data",
        partial(_invert, settings=InversionSettings(), surrogate=False),
        _OWNED,
        slow=True,
    ),
    "inversion-surrogate": Entry(
        "keys",
        "T11",
        "Trigger inversion towards a surrogate's maps",
        "a texture that makes maps agree with a surrogate's, 3 x 240 steps, a tenth of the data",
        partial(_invert, settings=InversionSettings(), surrogate=True),
        _OWNED | {"surrogate"},
        slow=True,
    ),
    "forgery": Entry(
        "keys",
        "T9",
        "Forged key",
        "a texture that wins the ownership test, 3 x 240 steps, a tenth of the data",
        partial(_forge, settings=InversionSettings()),
        _OWNED,
        slow=True,
    ),
}
BYPASSES: dict[str, Entry] = {
    "bypass": Entry(
        "bypass",
        "T14",
        "Other explanations",
        "captum's methods, RISE and other layers on up to 64 images",
        partial(_explain_otherwise, settings=AttributionSettings()),
        frozenset({"reference"}),
        slow=True,
    ),
}
