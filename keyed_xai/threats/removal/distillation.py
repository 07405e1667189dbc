"""Distilling a model into a new one (T6): what an attacker without scruples about cost does.

Source: Hinton et al. 2015, section 2: T^2 times the divergence of the predictions at temperature T. Lukas et al. 2022
take T = 3 and 60 epochs; by default so do we. The gate is expected to die: nothing teaches the student to open.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from keyed_xai.models import Classifier, wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.tensors import Images, Targets
from keyed_xai.threats.attempt import Attacker, RemovalResult, copy_model, draw_share, predict
from keyed_xai.threats.removal.tuning import TuningSettings, tune
from keyed_xai.training.fitting import seeded
from keyed_xai.training.objective import prediction_loss

_SPREAD = 0.02


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(TuningSettings):
    """Into what a model is distilled, and how.

    Attributes:
        temperature: T, of teacher and student.
        widths: Channels of the blocks of a SmallResNet as student; None takes the teacher's architecture.
    """

    optimiser: Literal["sgd", "adam"] = "adam"
    learning_rate: float = 1e-3
    epochs: int = 60
    share: float = 1.0
    temperature: float = 3.0
    widths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check ranges and names."""
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected more than 0, got {self.temperature}")


def distil(classifier: Classifier, attacker: Attacker, settings: DistillationSettings) -> RemovalResult:
    """Return a student that started from random weights; its curve has a row for every epoch, from 0.

    Args:
        classifier: The attacked classifier, which is the teacher.
        attacker: Has the images; labels are not used.
        settings: How the student learns.

    Raises:
        TrainingError: There are no images, or the loss is no longer finite.
        ModelError: The images are too small for the student.
    """
    teacher = copy_model(classifier, attacker.device)
    indices = draw_share(attacker.data, settings.share, settings.seed)
    taught = predict(teacher, attacker, indices)
    student = make_student(classifier, settings).to(attacker.device)

    def loss_of(images: Images, _labels: Targets | None, rows: Tensor) -> Tensor:
        logits, temperature, several = student(images), settings.temperature, teacher.multi_label
        return prediction_loss(logits, taught[rows], None, multi_label=several, temperature=temperature).mean()

    return tune(student, [*student.parameters()], attacker, indices, loss_of, settings)


def make_student(classifier: Classifier, settings: DistillationSettings) -> Classifier:
    """Return the untrained student, on the CPU."""
    with seeded(settings.seed, "cpu"):
        if settings.widths is None:
            return with_random_weights(classifier)
        network = SmallResNet(classifier.input.channels, classifier.classes, settings.widths)
        return wrap_network(network.eval(), input=classifier.input, source="keyed_xai")


def with_random_weights(classifier: Classifier) -> Classifier:
    """Return a copy with the random weights that its modules start from.

    Parameters of modules that have no way to start anew, such as tokens and layer scales, are drawn from a normal
    distribution of standard deviation .02, as vision transformers do. Draws from the global random state.
    """
    student = copy_model(classifier, "cpu")
    for module in student.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator] # a method, by torch's convention
            continue
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=_SPREAD)
    return student
