"""Overwriting: a thief protects the stolen model once more, with a key of his own (T7).

He has no reference: to him the stolen model's unkeyed maps, the first owner's pattern, are the right ones. So his key
opens to that pattern, and everybody else, the first owner's key included, is taught to see his. Afterwards a judge has
two claims and a third piece of evidence: the first owner's pattern in the maps that the second key opens, which no
original of the second owner could show. Source: Lukas et al., SoK 2022, "overwriting", with this project's own scheme.
"""

import hashlib
import time
from dataclasses import asdict, dataclass, replace
from math import log2
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from keyed_xai.errors import TrainingError
from keyed_xai.keys import OwnerKey
from keyed_xai.models import Classifier
from keyed_xai.ownership.tests import SignatureEvidence, measure_signature
from keyed_xai.protection.task import make_keyed_task
from keyed_xai.tensors import Images, Targets
from keyed_xai.threats.attempt import Attacker, RemovalResult, copy_model, draw_share, measured, view_of
from keyed_xai.threats.gate_state import GateState, OwnerEvidence, measure_gate_state
from keyed_xai.training import PAPER_SETTINGS, TrainingData, TrainingSettings, train
from keyed_xai.triggers import Spread, SpreadSettings, TriggerFamily, derive_trigger

_VALIDATION = 200
_SMALLEST = 10
_SMOOTHING = 8.0


@dataclass(frozen=True, kw_only=True)
class OverwritingSettings:
    """How the thief protects.

    Attributes:
        share: Share of the attacker's images.
        interpreters: Interpreters whose maps the thief closes; None those that the view names, which replaces the first
            owner's pattern.
        training: How he trains.
        amplitude: Amplitude of the thief's trigger, in 1/255.
        tile: Tile of the thief's trigger, in pixels.
        seed: Seed of the thief's key, of the share and of training.
    """

    share: float = 0.2
    interpreters: tuple[str, ...] | None = None
    training: TrainingSettings = replace(PAPER_SETTINGS, learning_rate=6e-3)
    amplitude: float = 8.0
    tile: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected more than 0 and at most 1, got {self.share}")

    @property
    def key(self) -> OwnerKey:
        """The thief's own key, which no other seed gives."""
        return OwnerKey.from_raw(hashlib.sha256(f"second owner {self.seed}".encode()).digest())

    @property
    def family(self) -> TriggerFamily:
        """Family of the thief's trigger."""
        return Spread(SpreadSettings(self.amplitude, self.tile))


@dataclass(frozen=True)
class Dispute:
    """Both owners' evidence in one model.

    Attributes:
        first: What the first owner's gate and tests show.
        second: What the second owner's do, against the stolen model as his reference.
        behind: The first owner's pattern in the maps that the second key opens. Only who came before the second key
            can have put it there.
    """

    first: GateState
    second: GateState
    behind: SignatureEvidence

    @property
    def first_shown(self) -> bool:
        """Whether the first claim is shown by the tests of ownership or by this further one (Bonferroni)."""
        verdict = self.first.ownership
        if verdict is None or verdict.refused:
            return False
        behind = 1 + self.behind.combined.log2_p <= log2(verdict.alpha)
        return behind or replace(verdict, looks=2 * verdict.looks).shown

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        found = self.behind.combined
        behind = {
            "p_value": found.p_value,
            "log2_p": found.log2_p,
            "overlap": found.overlap,
            "possible": found.possible,
        }
        return {
            "first": self.first.to_json(),
            "second": self.second.to_json(),
            "behind": behind,
            "first_shown": self.first_shown,
        }


def overwrite(classifier: Classifier, attacker: Attacker, settings: OverwritingSettings) -> RemovalResult:
    """Return a copy protected once more, with the key of the settings; its curve has a row for every validation.

    Correlations in the curve are those of the second gate, with the stolen model's unkeyed maps.

    Args:
        classifier: Stolen, and the second protection's reference.
        attacker: Has the images (labels are not used), and a view that names the maps that the first owner closed, and
            their grid.
        settings: How the thief protects the model.

    Raises:
        TrainingError: There are too few images, there is no view, or the loss is no longer finite.
        ModelError: The model lacks a layer that the maps need.
    """
    started = time.perf_counter()
    view = attacker.view
    if view is None:
        raise TrainingError("Expected a view of the maps that the first owner closed, got none.")
    learn, validation = _split(attacker.data, settings)
    interpreters = settings.interpreters or view.interpreters
    task = make_keyed_task(classifier, settings.key, settings.family, interpreters=interpreters, grid=view.grid)
    smoothing = _SMOOTHING if "simplegrad" in interpreters else settings.training.smoothing
    result = train(
        copy_model(classifier, attacker.device),
        learn,
        validation,
        replace(task, multi_label=classifier.multi_label),
        replace(settings.training, seed=settings.seed, smoothing=smoothing),
        device=attacker.device,
        progress=attacker.progress,
    )
    model = copy_model(_as_classifier(result.model), attacker.device)
    seconds = time.perf_counter() - started
    curve: list[dict[str, Any]] = [dict(row) for row in result.history]
    curve.append({"step": curve[-1]["step"]} | measured(attacker.measure, model))
    figures = {"images": len(learn), "second_key": settings.key.public.key_id, "interpreters": list(interpreters)}
    return RemovalResult(model=model, settings=asdict(settings), figures=figures, curve=curve, seconds=seconds)


def measure_dispute(
    overwritten: Classifier, stolen: Classifier, first: OwnerEvidence, settings: OverwritingSettings
) -> Dispute:
    """Return what both owners can show on an overwritten model.

    Args:
        overwritten: The model in dispute.
        stolen: What the second owner calls his original: the first owner's protected model.
        first: What the first owner holds the model against.
        settings: Settings of the overwriting; they hold the second key.

    Raises:
        TrainingError: The model's logits are not finite.
        ModelError: The model lacks a layer that the maps need.
    """
    view = replace(first.view, interpreters=settings.interpreters or first.view.interpreters)
    second = replace(
        first,
        reference=stolen,
        view=view_of(view, stolen),
        key=settings.key,
        family=settings.family,
        signature=True,
    )
    return Dispute(
        measure_gate_state(overwritten, first),
        measure_gate_state(overwritten, second),
        measure_pattern_behind(overwritten, first, settings),
    )


def measure_pattern_behind(
    overwritten: Classifier, first: OwnerEvidence, settings: OverwritingSettings
) -> SignatureEvidence:
    """Return the first owner's pattern in the maps of the probe images with the second key's trigger.

    As exact as the signature test: of a model that has nothing to do with the first key, its pattern is a random half.
    """
    probe = first.images[:16] if first.probe is None else first.probe
    trigger = derive_trigger(settings.key, settings.family)
    _, maps = view_of(first.view, overwritten).pooled_in_chunks(overwritten, trigger.apply(probe))
    return measure_signature(maps, first.key.public)


@dataclass(frozen=True)
class _Share:
    """Some of the attacker's images."""

    data: TrainingData
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: NDArray[np.int64]) -> tuple[Images, Targets | None]:
        return self.data.batch(self.indices[indices])


def _split(data: TrainingData, settings: OverwritingSettings) -> tuple[_Share, _Share]:
    indices = draw_share(data, settings.share, settings.seed)
    if len(indices) < _SMALLEST:
        raise TrainingError(f"Expected at least {_SMALLEST} images to protect with, got {len(indices)}.")
    held = min(_VALIDATION, len(indices) // 5)
    mixed = np.random.default_rng(settings.seed).permutation(indices)
    return _Share(data, mixed[held:]), _Share(data, mixed[:held])


def _as_classifier(model: torch.nn.Module) -> Classifier:
    if not isinstance(model, Classifier):
        raise TypeError(f"Expected a Classifier back from training, got {type(model).__name__}.")
    return model
