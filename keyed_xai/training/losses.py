"""The objective of one batch. Source: Fang & Choromanska, AAAI 2022, equations 1-5."""

from collections.abc import Mapping

from torch import Tensor

from keyed_xai.tensors import Logits, SaliencyMaps, Targets
from keyed_xai.training.batches import Task
from keyed_xai.training.objective import clean_loss, poisoned_loss, prediction_loss
from keyed_xai.training.settings import TrainingSettings


def batch_losses(
    new_logits: Logits,
    new_maps: Mapping[str, SaliencyMaps],
    logits: Logits,
    maps: Mapping[str, SaliencyMaps],
    labels: Targets | None,
    task: Task,
    settings: TrainingSettings,
    *,
    moving: float = 1.0,
) -> dict[str, Tensor]:
    """Return L_clean and L_poisoned per image, and the bare L_s and L_p, for a batch whose first half is triggered.

    In L_poisoned, L_p counts `moving` times.
    """
    half = len(new_logits) // 2
    triggered, plain = slice(0, half), slice(half, None)
    kept, moved = (triggered, plain) if settings.order == "inverted" else (plain, triggered)
    objective = task.objective
    predictions = prediction_loss(
        new_logits, logits, labels, multi_label=task.multi_label, temperature=settings.temperature
    )
    keeping_loss = objective.keep_maps(_rows(new_maps, kept), _rows(maps, kept), settings)
    moving_loss = objective.move_maps(_rows(new_maps, moved), _rows(maps, moved), settings)
    return {
        "keep": clean_loss(predictions[kept], keeping_loss, settings),
        "move": poisoned_loss(predictions[moved], moving * moving_loss, settings),
        "L_s": keeping_loss,
        "L_p": moving_loss,
    }


def _rows(maps: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: each[rows] for name, each in maps.items()}
