"""Denoising inputs by total variation, so that a trigger is smoothed away before the model sees it.

Source: Chambolle 2004, through scikit-image; as a defence in Fang & Choromanska, AAAI 2022, section 5, who lower the
strength until predictions are good enough (there an AUROC of .80).
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from skimage.restoration import denoise_tv_chambolle

from keyed_xai import metrics
from keyed_xai.models import Classifier
from keyed_xai.models.modes import predict_images
from keyed_xai.tensors import Images, Logits, Targets
from keyed_xai.threats.attempt import Attacker, RemovalResult, copy_model, draw_share, measured

_WEIGHTS = (0.5, 0.35, 0.25, 0.18, 0.12, 0.09, 0.06, 0.04, 0.03, 0.02, 0.01)


@dataclass(frozen=True, kw_only=True)
class DenoisingSettings:
    """How the strength is found.

    Attributes:
        weights: Weights of total variation, falling; pixels are in [0, 1].
        floor: Lowest score accepted, as a fraction: AUROC where there is one, else top-1 accuracy. None accepts `loss`.
        loss: Score given up against images as they are, where there is no floor.
        images: The attacker's images that scores are measured on, at most.
        seed: Seed of the choice of images.
    """

    weights: tuple[float, ...] = _WEIGHTS
    floor: float | None = None
    loss: float = 0.02
    images: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        if not self.weights or list(self.weights) != sorted(self.weights, reverse=True) or self.weights[-1] <= 0:
            raise ValueError(f"weights: expected falling strengths above 0, got {self.weights}")
        if self.images < 1:
            raise ValueError(f"images: expected 1 or more, got {self.images}")


class DenoisingClassifier(Classifier):
    """A classifier that sees its inputs denoised.

    Gradients pass the denoising unchanged (straight through: Athalye et al. 2018), so that maps explain the denoised
    image.

    Attributes:
        weight: Weight of total variation; 0 leaves inputs as they are.
    """

    def __init__(self, classifier: Classifier, weight: float) -> None:
        """Take over another classifier's network; it is used, not copied."""
        names = ("network", "input", "architecture", "source", "classes", "target_layer", "taps", "file_names")
        fields = {name: getattr(classifier, name) for name in names}
        super().__init__(fields.pop("network"), **fields)
        self.weight = weight

    def forward(self, images: Images) -> Logits:
        """Return the logits of the denoised images."""
        change = denoise(images.detach(), self.weight) - images.detach()
        return super().forward(images + change)


def denoise(images: Images, weight: float) -> Images:
    """Return images smoothed by total variation, all channels of a pixel together; no gradient flows."""
    if not weight:
        return images
    pixels = images.detach().double().cpu().numpy()
    smooth = [denoise_tv_chambolle(image, weight=weight, channel_axis=0) for image in pixels]  # type: ignore[no-untyped-call]
    return torch.from_numpy(np.stack(smooth)).to(images).clamp(0, 1)


def denoise_inputs(classifier: Classifier, attacker: Attacker, settings: DenoisingSettings) -> RemovalResult:
    """Return a copy behind the strongest denoising that keeps predictions above the floor.

    The curve has a row for each strength tried, from 0 and then from the strongest down ("weight", "score"); the
    figures name the "weight" taken, 0 where none keeps predictions above the "floor".

    Args:
        classifier: The classifier attacked.
        attacker: Has the images; without labels the score is agreement with predictions on images as they are.
        settings: How inputs are denoised.

    Raises:
        TrainingError: There are no images.
    """
    started, aside = time.perf_counter(), 0.0
    data, device = attacker.data, attacker.device
    model = copy_model(classifier, device)
    share = min(1.0, settings.images / max(1, len(data)))
    images, labels = data.batch(draw_share(data, share, settings.seed))
    images = images.to(device)
    truth = predict_images(model, images).argmax(1) if labels is None else labels.to(device)
    floor, chosen = settings.floor, 0.0
    curve: list[dict[str, Any]] = []
    for weight in (0.0, *settings.weights):
        model = DenoisingClassifier(model, weight).eval()
        score = score_predictions(predict_images(model, images), truth)
        floor = score - settings.loss if floor is None else floor
        before = time.perf_counter()
        curve.append({"weight": weight, "score": score} | measured(attacker.measure, model))
        aside += time.perf_counter() - before
        attacker.progress.advance("denoising", len(curve), len(settings.weights) + 1)
        if weight and score >= floor:
            chosen = weight
            break
    figures = {"weight": chosen, "floor": floor, "images": len(images)}
    model = DenoisingClassifier(model, chosen).eval()
    return RemovalResult(
        model=model,
        settings=asdict(settings),
        figures=figures,
        curve=curve,
        seconds=time.perf_counter() - started - aside,
    )


def score_predictions(logits: Logits, truth: Targets) -> float:
    """Return the AUROC of two classes or several labels, else top-1 accuracy, a fraction."""
    figures = metrics.prediction_figures(logits, truth)
    return figures.get("auroc", figures.get("top1", 0.0))
