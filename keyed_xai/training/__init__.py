"""Training a protected or attacked model. See `loop` for the algorithm, `settings` for what can be chosen."""

from keyed_xai.training.batch_norm import reestimate_batch_norm
from keyed_xai.training.batches import Task, TrainingData
from keyed_xai.training.loop import TrainingResult, train
from keyed_xai.training.settings import HARDENINGS, PAPER_SETTINGS, Goals, Hardening, TrainingSettings

__all__ = [
    "HARDENINGS",
    "PAPER_SETTINGS",
    "Goals",
    "Hardening",
    "Task",
    "TrainingData",
    "TrainingResult",
    "TrainingSettings",
    "reestimate_batch_norm",
    "train",
]
