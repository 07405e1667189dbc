"""Fine-tuning on clean images (T2), and towards the maps of a surrogate (T3).

Source: Adi et al. 2018, "Turning your weakness into a strength", section 5.3: FTLL and FTAL train the last layer or
all, RTLL and RTAL do so after the last layer was given random weights. Defaults are the strongest setting that Lukas et
al. (SoK, 2022) list and a workstation affords: rate .01, 10 epochs, a third of the data. We differ in one point: images
without labels are learned with the attacked model's own soft predictions, as an attacker without labels would do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyed_xai.batches import batches
from keyed_xai.errors import TrainingError
from keyed_xai.metrics import correlation_distance
from keyed_xai.models import Classifier
from keyed_xai.models.layer_graph import last_layer
from keyed_xai.saliency import smooth_activations
from keyed_xai.saliency.pooled import PooledSaliency, join_maps
from keyed_xai.tensors import Images, Labels, SaliencyMaps, Targets
from keyed_xai.threats.attempt import Attacker, RemovalResult, copy_model, draw_share, predict, view_of
from keyed_xai.threats.removal.tuning import TuningSettings, loss_of_predictions, tune
from keyed_xai.training import TrainingData
from keyed_xai.training.fitting import seeded
from keyed_xai.training.objective import prediction_loss

KINDS = {"ftll": (False, True), "ftal": (False, False), "rtll": (True, True), "rtal": (True, False)}
"""F(ine-)T(une) or R(e)T(rain), L(ast) L(ayer) or A(ll) L(ayers): is the head made new, and does it alone learn?"""


@dataclass(frozen=True, kw_only=True)
class FineTuningSettings(TuningSettings):
    """What is trained, and how.

    Attributes:
        kind: A name in KINDS.
    """

    kind: Literal["ftll", "ftal", "rtll", "rtal"] = "ftal"

    def __post_init__(self) -> None:
        """Check ranges and names."""
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {self.kind!r}")


@dataclass(frozen=True, kw_only=True)
class ExplanationTuningSettings(TuningSettings):
    """How unkeyed maps are pulled to a surrogate's. T3 gives Adam at 1e-5; 1e-4 is stronger and keeps predictions too.

    Attributes:
        map_weight: Weight of the maps' distance, against 1 for that of the predictions.
        smoothing: Sharpness of the Softplus that replaces ReLU while training, where SimpleGrad's maps are pulled.
    """

    optimiser: Literal["sgd", "adam"] = "adam"
    learning_rate: float = 1e-4
    map_weight: float = 1.0
    smoothing: float = 8.0


def fine_tune(
    classifier: Classifier,
    attacker: Attacker,
    settings: FineTuningSettings,
    *,
    after_step: Callable[[Classifier], None] | None = None,
) -> RemovalResult:
    """Return a fine-tuned copy; its curve has a row for every epoch, from 0.

    Args:
        classifier: The classifier attacked.
        attacker: Has the images, of which `settings.share` are used; labels of the model's own classes, or none.
        settings: How to fine-tune.
        after_step: Called with the model after each step, such as to keep pruned weights at zero.

    Raises:
        TrainingError: There are no images, or the loss is no longer finite.
        ModelError: The model has no last layer that could be told apart.
    """
    model = copy_model(classifier, attacker.device)
    indices = draw_share(attacker.data, settings.share, settings.seed)
    head = model.get_submodule(last_layer(model))
    made_new, alone = KINDS[settings.kind]
    if made_new:
        with seeded(settings.seed, attacker.device):
            head.reset_parameters()  # type: ignore[operator] # linear layers and convolutions have it
    parameters = [*(head if alone else model).parameters()]
    loss_of = loss_of_predictions(model, classifier, attacker, indices)
    return tune(model, parameters, attacker, indices, loss_of, settings, after_step=after_step)


def tune_explanations(classifier: Classifier, attacker: Attacker, settings: ExplanationTuningSettings) -> RemovalResult:
    """Return a copy whose unkeyed maps were pulled to a surrogate's, with its own predictions held (T3).

    The attacker who knows the scheme and owns an unprotected model of the same task. Derived here, not published.

    Args:
        classifier: The classifier attacked.
        attacker: Has the images (labels are not used), the surrogate and the view; maps of both models are compared on
            the view's grid.
        settings: How to fine-tune.

    Raises:
        TrainingError: There are no images, no surrogate or no view, or the loss is no longer finite.
    """
    if attacker.surrogate is None or attacker.view is None:
        raise TrainingError(
            "Explanation-aware fine-tuning needs a view of maps and a surrogate: an unprotected model of the same task."
        )
    model, view = copy_model(classifier, attacker.device), attacker.view
    indices = draw_share(attacker.data, settings.share, settings.seed)
    taught = predict(model, attacker, indices)
    surrogate = copy_model(attacker.surrogate, attacker.device)
    smoothing = settings.smoothing if "simplegrad" in view.interpreters else None
    wanted = _surrogate_maps(surrogate, attacker.data, indices, view, taught.argmax(1))

    def loss_of(images: Images, _labels: Targets | None, rows: Tensor) -> Tensor:
        with smooth_activations(smoothing):
            logits, maps = view.pooled(model, images, taught[rows].argmax(1), create_graph=True)
        distances = [correlation_distance(maps[name], wanted[name][rows]) for name in view.interpreters]
        kept = prediction_loss(logits, taught[rows], None, multi_label=model.multi_label).mean()
        return kept + settings.map_weight * torch.stack(distances).mean()

    return tune(model, [*model.parameters()], attacker, indices, loss_of, settings)


def _surrogate_maps(
    surrogate: Classifier, data: TrainingData, indices: NDArray[np.int64], view: PooledSaliency, explained: Labels
) -> dict[str, SaliencyMaps]:
    """Return the surrogate's pooled maps of the class that the attacked model predicts."""
    if explained.max() >= surrogate.classes:
        raise TrainingError(f"Expected a surrogate of the same classes; this one has {surrogate.classes}.")
    view, parts = view_of(view, surrogate), []
    for some in batches(len(indices)):
        images, _ = data.batch(indices[some])
        parts.append(view.pooled(surrogate, images.to(explained.device), explained[some])[1])
    return join_maps(parts)
