"""Checks of maps, attacks on the key, and ways round the gate, as entries of an audit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from keyed_xai.auditing.entries import KEYED_FLOOR, UNKEYED_CEILING, Entry, Examination, Observation, Outcome
from keyed_xai.auditing.subject import Subject
from keyed_xai.errors import TrainingError
from keyed_xai.keys import OwnerKey
from keyed_xai.metrics import OPEN_CORRELATION
from keyed_xai.tensors import Images
from keyed_xai.threats.attempt import view_of
from keyed_xai.threats.bypass.attributions import AttributionSettings
from keyed_xai.threats.bypass.explanations import measure_bypass
from keyed_xai.threats.detection.consistency import ConsistencySettings, score_maps, screen_images
from keyed_xai.threats.gate_state import OwnerEvidence
from keyed_xai.threats.keys.delivery import DELIVERIES, DeliveryRow, DeliverySettings, measure_delivery
from keyed_xai.threats.keys.inversion import InversionSettings, forge_trigger, invert_trigger
from keyed_xai.threats.keys.opening import match_texture, try_trigger
from keyed_xai.threats.keys.recovery import RecoverySettings, measure_recovery
from keyed_xai.triggers import Spread, Trigger

_WRONG_KEYS = ("one flipped bit", "another owner's key")
_SCREENED_AT_LEAST = 3  # images on each side of a screening


@dataclass(frozen=True)
class _Screening:
    """How single images are screened.

    Attributes:
        maps: Which maps are compared, and how images are changed.
        noticed: Area under the ROC curve from which triggered images are told from clean ones.
        unnoticed: Area up to which they are not.
    """

    maps: ConsistencySettings = field(default_factory=ConsistencySettings)
    noticed: float = 0.8
    unnoticed: float = 0.65


def _try_near_keys(subject: Subject, settings: DeliverySettings) -> Observation:
    result = measure_delivery(subject.classifier, _evidence(subject), settings, progress=subject.progress)
    rows = [row for row in result.rows if row.kind == "near key"]
    wrong = max(_most(row) for row in rows if row.name in _WRONG_KEYS)
    worst = max((row for row in rows if row.name not in _WRONG_KEYS), key=_most)
    sentence = (
        f"With keys of others, or one bit away, maps correlate at most {wrong:.2f} with the right ones; with the right "
        f"trigger weakened or moved at most {_most(worst):.2f} ({worst.name})."
    )
    return Observation(outcome=_judge_opening(wrong), sentence=sentence, figures=result.to_json())


def _try_channels(subject: Subject, settings: DeliverySettings) -> Observation:
    result = measure_delivery(subject.classifier, _evidence(subject), settings, progress=subject.progress)
    rows = [row for row in result.rows if row.kind == "channel"]
    worst, shut = min(rows, key=_least), [row.name for row in rows if _least(row) < OPEN_CORRELATION]
    sentence = f"Keyed maps correlate at least {_least(worst):.2f} with the right ones ({worst.name})"
    sentence += f"; the gate shuts after {', '.join(shut)}." if shut else "."
    outcome: Outcome = "survives" if _least(worst) >= KEYED_FLOOR else "maps damaged"
    return Observation(outcome=outcome, sentence=sentence, figures=result.to_json())


def _recover(subject: Subject, settings: RecoverySettings) -> Observation:
    images, others = _attackers_images(subject, max(settings.counts))
    result = measure_recovery(
        subject.classifier, _evidence(subject), images, settings, others=others, progress=subject.progress
    )
    parts = []
    for source, words in _SOURCES.items():
        rows = [row for row in result.rows if row.source == source]
        if rows:
            best = max(rows, key=lambda row: max(row.correlation.values()))
            parts.append(f"{best.images} {words}: {max(best.correlation.values()):.2f}")
    reached = max(max(row.correlation.values()) for row in result.rows)
    sentence = f"Correlation of maps with the right ones by a trigger recovered from {', '.join(parts)}."
    return Observation(outcome=_judge_opening(reached), sentence=sentence, figures=result.to_json())


_SOURCES = {
    "pairs": "pairs of clean and keyed image",
    "keyed": "keyed images alone",
    "keyed, others": "keyed images and others without a key",
}


def _invert(subject: Subject, settings: InversionSettings, *, surrogate: bool) -> Observation:
    evidence = _evidence(subject)
    family = _spread(evidence)

    def judge(trigger: Trigger) -> Mapping[str, Any]:
        opening = try_trigger(subject.classifier, evidence, trigger)
        return {"recovered": max(opening.correlation.values()), "agreement": opening.agreement,
                "match": match_texture(evidence, trigger)}  # fmt: skip

    result = invert_trigger(
        subject.classifier,
        subject.data,
        subject.view,
        settings.of(family),
        surrogate=subject.surrogate if surrogate else None,
        device=subject.device,
        judge=judge,
        progress=subject.progress,
    )
    reached = result.final["recovered"]
    sentence = (
        f"In {result.seconds / 60:.1f} minutes with {result.images} images a change was found by which maps correlate "
        f"{reached:.2f} with the right ones; its texture correlates {result.final['match']:.2f} with the key's."
    )
    curve = [row for row in result.curve if row["restart"] == result.restart]
    return Observation(
        outcome=_judge_opening(reached), sentence=sentence, figures=result.to_json() | {"curve": []}, curve=curve
    )


def _forge(subject: Subject, settings: InversionSettings) -> Observation:
    evidence = _evidence(subject)
    result = forge_trigger(
        subject.classifier,
        subject.data,
        evidence.images if evidence.probe is None else evidence.probe,
        subject.view,
        _spread(evidence),
        OwnerKey.from_raw(np.random.default_rng(subject.seed).bytes(32)),
        settings,
        decoys=evidence.decoys,
        device=subject.device,
        progress=subject.progress,
    )
    shown = "shows" if result.verdict.shown else "does not show"
    sentence = (
        f"A forged texture reaches T = {result.own_test.statistic:.2f} in {result.inversion.seconds / 60:.1f} minutes. "
        f"No key is known to have it: the nearest of {result.keys} has T = {result.nearest_statistic:.2f}; the test "
        f"with the forger's own key {shown} ownership."
    )
    return Observation(
        outcome="forged" if result.verdict.shown else "resists", sentence=sentence, figures=result.to_json()
    )


def _explain_otherwise(subject: Subject, settings: AttributionSettings) -> Observation:
    if subject.reference is None:
        raise TrainingError("Expected a reference model to compare with. Give --reference.")
    result = measure_bypass(
        subject.classifier,
        subject.reference,
        view_of(subject.view, subject.reference),
        subject.images,
        settings,
        keyed=None if subject.trigger is None else subject.trigger_images(subject.images),
        progress=subject.progress,
    )
    best = [(name, row) for name in result.interpreters if (row := result.best(name)) is not None]
    if not best:
        return Observation(outcome="not applicable", sentence="No other explanation can be made of this network.",
                           figures=result.to_json())  # fmt: skip
    name, row = max(best, key=lambda each: each[1].recovered[each[0]]["unkeyed"].correlation)
    correlations = {case: match.correlation for case, match in row.recovered[name].items()}
    sentence = (
        f"Unkeyed {row.method} ({row.reduction}) correlates {correlations['unkeyed']:.2f} with the right map of "
        f"{name}, on the reference it does {correlations['reference']:.2f}."
    )
    return Observation(outcome=_judge_opening(correlations["unkeyed"]), sentence=sentence, figures=result.to_json())


def _score_maps(subject: Subject, settings: ConsistencySettings) -> Observation:
    scores = score_maps(subject.classifier, subject.images, settings, grid=subject.view.grid, progress=subject.progress)
    means = scores.means()
    low = min((name for name in means if name.startswith("consistency/")), key=means.__getitem__)
    sentence = (
        f"Maps are least like themselves after {low.split('/')[1]} ({low.split('/')[2]}, {means[low]:.2f}). What is "
        "usual differs from network to network, so this is for comparing with clean ones."
    )
    return Observation(outcome="reported", sentence=sentence, figures=scores.to_json())


def _screen(subject: Subject, settings: _Screening) -> Observation:
    half = len(subject.images) // 2
    if half < _SCREENED_AT_LEAST:
        least = 2 * _SCREENED_AT_LEAST
        raise TrainingError(f"Expected {least} held-out images or more, got {len(subject.images)}. Raise --held-out.")
    stream, trusted = subject.images[:half].clone(), subject.images[half : 2 * half]
    triggered = np.arange(half) % 2 == 0
    stream[torch.from_numpy(triggered)] = subject.trigger_images(stream[torch.from_numpy(triggered)])
    scores = [
        score_maps(subject.classifier, images, settings.maps, grid=subject.view.grid) for images in (stream, trusted)
    ]
    found = screen_images(scores[0], triggered, scores[1])
    best = max(found, key=lambda each: abs(each.auroc - 0.5))
    power = max(best.auroc, 1 - best.auroc)
    sentence = (
        f"The best check, {best.check}, tells triggered from clean images with an AUROC of {power:.2f}: it catches "
        f"{100 * best.caught:.0f} % of them at {100 * best.false_alarms:.0f} % false alarms."
    )
    outcome: Outcome = (
        "flagged" if power >= settings.noticed else "left alone" if power <= settings.unnoticed else "unclear"
    )
    return Observation(outcome=outcome, sentence=sentence, figures={"checks": [vars(each) for each in found]})


def _evidence(subject: Subject) -> OwnerEvidence:
    if subject.evidence is None:
        raise TrainingError("Expected the owner's key and the reference model. Give --key-file and --reference.")
    return subject.evidence


def _spread(evidence: OwnerEvidence) -> Spread:
    if not isinstance(evidence.family, Spread):
        raise TrainingError(f"This attack is on textures of the family spread; the key's is {evidence.family.name}.")
    return evidence.family


def _attackers_images(subject: Subject, count: int) -> tuple[Images, Images | None]:
    """Return images that an attacker saw with the key, and others of his own; none where there are too few."""
    count = min(count, len(subject.data))
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


def _describe(settings: InversionSettings) -> str:
    return f"{settings.restarts} x {settings.steps} steps, {settings.share:.0%} of the data"


_OWNED = frozenset({"key", "reference"})
CHECKS: dict[str, Entry[Any]] = {
    "consistency": Examination(
        title="Consistency of maps",
        threat="T17",
        group="checks",
        settings=ConsistencySettings(),
        words=lambda s: f"{len(s.changes)} harmless changes, {len(s.interpreters)} interpreters",
        examine=_score_maps,
        images=200,
    ),
    "screening": Examination(
        title="Screening of single images",
        threat="T17",
        group="checks",
        settings=_Screening(),
        words=lambda _: (
            "trigger known; every second image triggered, others trusted; consistency, agreement, class average"
        ),
        examine=_screen,
        images=400,
        needs=frozenset({"trigger"}),
    ),
}
KEY_ATTACKS: dict[str, Entry[Any]] = {
    "near-keys": Examination(
        title="Near and wrong keys",
        threat="T15",
        group="keys",
        settings=DeliverySettings(flipped=32, strangers=32),
        words=lambda s: (
            f"one bit flipped ({s.flipped}), half strength, moved by {s.moved[0]} to {s.moved[-1]} pixels, "
            f"{s.strangers} strangers"
        ),
        examine=_try_near_keys,
        images=200,
        needs=_OWNED,
    ),
    "channels": Examination(
        title="Channel noise on keyed images",
        threat="T13",
        group="keys",
        settings=DeliverySettings(channels=tuple(DELIVERIES)),
        words=lambda s: f"{len(s.channels)} channels: {', '.join(s.channels)}",
        examine=_try_channels,
        images=200,
        needs=_OWNED,
    ),
    "recovery": Examination(
        title="Recovery of the trigger from keyed images",
        threat="T12",
        group="keys",
        settings=RecoverySettings(),
        words=lambda s: f"up to {max(s.counts)} pairs, or keyed images alone",
        examine=_recover,
        images=200,
        needs=_OWNED,
    ),
    "inversion": Examination(
        title="Trigger inversion",
        threat="T11",
        group="keys",
        settings=InversionSettings(),
        words=lambda s: f"a texture that moves the maps, {_describe(s)}",
        examine=partial(_invert, surrogate=False),
        images=200,
        needs=_OWNED,
        slow=True,
    ),
    "inversion-surrogate": Examination(
        title="Trigger inversion towards a surrogate's maps",
        threat="T11",
        group="keys",
        settings=InversionSettings(),
        words=lambda s: f"a texture that makes maps agree with a surrogate's, {_describe(s)}",
        examine=partial(_invert, surrogate=True),
        images=200,
        needs=_OWNED | {"surrogate"},
        slow=True,
    ),
    "forgery": Examination(
        title="Forged key",
        threat="T9",
        group="keys",
        settings=InversionSettings(),
        words=lambda s: f"a texture that wins the ownership test, {_describe(s)}",
        examine=_forge,
        images=16,
        needs=_OWNED,
        slow=True,
    ),
}
BYPASSES: dict[str, Entry[Any]] = {
    "bypass": Examination(
        title="Other explanations",
        threat="T14",
        group="bypass",
        settings=AttributionSettings(),
        words=lambda s: ", ".join(s.methods) or "captum's methods, RISE and other layers",
        examine=_explain_otherwise,
        images=64,
        needs=frozenset({"reference"}),
        slow=True,
    ),
}
