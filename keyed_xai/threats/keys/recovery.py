"""Recovering a trigger from keyed images (T12): from pairs with their originals, or from keyed images alone.

An additive trigger is the difference of a keyed image and its original, up to the rounding to 8 bits and to pixels that
were cut off at black or white. Of a `spread` texture everything but its waves and their phases is public, so that these
are all that has to be estimated. Derived here, not published; the estimate from keyed images alone is that of camera
noise in forensics (Lukas, Fridrich & Goljan, IEEE TIFS 2006): the mean of what denoising takes away.

Whoever is shown keyed images is shown the key. Results have figures only, never a texture.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from keyed_xai.errors import TrainingError
from keyed_xai.models import Classifier
from keyed_xai.progress import QUIET, Progress
from keyed_xai.tensors import Images
from keyed_xai.threats.gate_state import OwnerEvidence
from keyed_xai.threats.keys.opening import match_texture, try_trigger
from keyed_xai.threats.keys.textures import fold_into_tile, nearest_texture
from keyed_xai.threats.removal.denoising import denoise
from keyed_xai.triggers import Spread, SpreadTrigger

_COMPLETIONS = 20
_DENOISING = 0.05


@dataclass(frozen=True)
class RecoverySettings:
    """From how much a texture is recovered.

    Attributes:
        counts: Numbers of keyed images.
    """

    counts: tuple[int, ...] = (1, 4, 16, 64, 256)


@dataclass(frozen=True, kw_only=True)
class RecoveryRow:
    """What an attacker recovers from some images.

    Attributes:
        source: "pairs", "keyed" (images alone), or "keyed, others" (with other images of the task, without a key).
        images: Keyed images he has.
        match: Correlation of the recovered texture with the right one, the best over all shifts.
        correlation: Correlation with the reference's maps on held-out images, with the recovered trigger, by
            interpreter.
        opened: Share of maps that correlate more than .5.
        agreement: Share of predictions that stay.
        seconds: Seconds that recovering took.
    """

    source: str
    images: int
    match: float
    correlation: dict[str, float]
    opened: dict[str, float]
    agreement: float
    seconds: float


@dataclass(frozen=True)
class RecoveryResult:
    """Rows for each source and number of images.

    Attributes:
        others: Images without a key that the attacker has besides.
        rows: Results in the order tried.
    """

    others: int
    rows: tuple[RecoveryRow, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        return {"others": self.others, "rows": [vars(row) for row in self.rows]}


def measure_recovery(
    classifier: Classifier,
    evidence: OwnerEvidence,
    images: Images,
    settings: RecoverySettings,
    *,
    others: Tensor | None = None,
    progress: Progress = QUIET,
) -> RecoveryResult:
    """Return what is recovered from some of the owner's keyed images, in 8 bits, and whether it opens the gate.

    Args:
        classifier: The protected classifier.
        evidence: Holds the key and the held-out images that the gate is tried on.
        images: What the owner keys and the attacker gets; others than those held out. Counts beyond them are left out.
        settings: How many of them he gets.
        others: The attacker's own images of the same task, without a key, [m, c, h, w].
        progress: Hears of "recovering the trigger", by recoveries.

    Raises:
        TrainingError: The key is not of the `spread` family, or there are no images.
    """
    family = evidence.family
    if not isinstance(family, Spread):
        raise TrainingError(f"Recovery is of additive textures; {family.name!r} has none. Leave this attack out.")
    counts = tuple(count for count in settings.counts if 0 < count <= len(images))
    if not counts:
        raise TrainingError("Expected images for the attack, got none. Give some with --data.")
    keyed = evidence.as_file(evidence.trigger.apply(images[: max(counts)]))
    methods: dict[str, Callable[[int], SpreadTrigger]] = {
        "pairs": lambda count: recover_from_pairs(images[:count], keyed[:count], family),
        "keyed": lambda count: recover_from_keyed(keyed[:count], family),
    }
    if others is not None:
        methods["keyed, others"] = lambda count: recover_from_keyed(keyed[:count], family, others=others)
    rows: list[RecoveryRow] = []
    for source, recover in methods.items():
        for count in counts:
            started = time.perf_counter()
            trigger = recover(count)
            seconds = time.perf_counter() - started
            opening, match = try_trigger(classifier, evidence, trigger), match_texture(evidence, trigger)
            rows.append(RecoveryRow(source=source, images=count, match=match or 0.0, **vars(opening), seconds=seconds))
            progress.advance("recovering the trigger", len(rows), len(methods) * len(counts))
    return RecoveryResult(0 if others is None else len(others), tuple(rows))


def recover_from_pairs(clean: Images, keyed: Images, family: Spread) -> SpreadTrigger:
    """Return the trigger that turned clean images into keyed ones.

    Cells that were cut off at black or white in every pair are completed from what is public: the texture is made of
    the family's waves alone, and lies beyond the cut (Gerchberg 1974, Papoulis 1975).
    """
    tile = family.settings.tile
    change = keyed - clean
    unclipped = (keyed > 0) & (keyed < 1)
    known, weight = fold_into_tile(change, unclipped.to(change), tile)
    missing = weight == 0
    dark = fold_into_tile(change, (keyed <= 0).to(change), tile)[1] > 0
    unit = (known * (255 / family.settings.amplitude)).float()
    texture = nearest_texture(unit, family.settings)
    for _ in range(_COMPLETIONS):
        beyond = torch.where(dark, texture.clamp(max=0), texture.clamp(min=0))
        texture = nearest_texture(torch.where(missing, beyond, unit), family.settings)
    return _make_trigger(texture, family)


def recover_from_keyed(keyed: Images, family: Spread, *, others: Tensor | None = None) -> SpreadTrigger:
    """Return the trigger that keyed images have in common.

    Args:
        keyed: Without their originals.
        family: Family of the trigger, which is public.
        others: Images of the same task without a key, [m, c, h, w]: what denoising takes away from them on average is
            no key.
    """
    common = _residual(keyed)
    if others is not None:
        common = common - _residual(others)
    folded, _ = fold_into_tile(common, torch.ones_like(common), family.settings.tile)
    return _make_trigger(nearest_texture(folded, family.settings), family)


def _residual(images: Images) -> Tensor:
    """Return what denoising takes away, mean over images, [1, c, h, w]."""
    return (images - denoise(images, _DENOISING)).mean(0, keepdim=True)


def _make_trigger(texture: Tensor, family: Spread) -> SpreadTrigger:
    return SpreadTrigger(texture[None], family.settings.amplitude)
