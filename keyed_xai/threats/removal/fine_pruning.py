"""Fine-pruning: channels that clean images leave asleep are pruned, then the rest is fine-tuned.

Source: Liu, Dolan-Gavitt & Garg 2018, "Fine-Pruning", section 3: neurons of the last convolution, least mean activation
on clean images first. A channel is pruned by setting its filter, and its batch norm's scale and shift, to zero. In
residual networks that silences the block's own branch; what the shortcut brings stays, as in BackdoorBench.

Measured on a badnets control (3,000 images of Fashion-MNIST): pruning alone left .93 of an attack success of .99, and
cost half of the accuracy, since the shortcut carries both; fine-tuning after it brought success to .26 at 3.6 points of
accuracy. Pruning the shortcut too (another such control) cost 24 points after the same fine-tuning, and left .13.
"""

import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyed_xai.batches import batches
from keyed_xai.models import Classifier
from keyed_xai.models.layer_graph import batch_norm_after, last_convolution, silence_channels
from keyed_xai.saliency import captured_features
from keyed_xai.tensors import Images
from keyed_xai.threats.attempt import Attacker, RemovalResult, copy_model, draw_share, measured
from keyed_xai.threats.removal.fine_tuning import FineTuningSettings, fine_tune
from keyed_xai.training import TrainingData

_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96)


@dataclass(frozen=True, kw_only=True)
class FinePruningSettings:
    """How far the last convolution is pruned. Defaults: .96 then 10 epochs (BackdoorBench and Lukas et al. 2022).

    Attributes:
        shares: Shares of the channels pruned, rising; the curve has a row for each, and the last one is what comes
            back.
        share: Share of the attacker's images that activations are measured on.
        fine_tuning: What follows; None ends with pruning.
        seed: Seed of the attacker's share.
    """

    shares: tuple[float, ...] = _SHARES
    share: float = 1 / 3
    fine_tuning: FineTuningSettings | None = field(default_factory=FineTuningSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the shares."""
        if (
            not self.shares
            or list(self.shares) != sorted(self.shares)
            or not 0 <= self.shares[0] <= self.shares[-1] <= 1
        ):
            raise ValueError(f"shares: expected rising shares in [0, 1], got {self.shares}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected more than 0 and at most 1, got {self.share}")


def fine_prune(classifier: Classifier, attacker: Attacker, settings: FinePruningSettings) -> RemovalResult:
    """Return a copy pruned to the last share and fine-tuned; pruned channels stay pruned.

    The curve has a row for no pruning and for every share ("share", "pruned"), then one for every epoch ("epoch").

    Args:
        classifier: The classifier attacked.
        attacker: Has the images, clean.
        settings: How to prune and fine-tune.

    Raises:
        TrainingError: There are no images, or the loss is no longer finite.
        ModelError: The model has no convolution.
    """
    started = time.perf_counter()
    model = copy_model(classifier, attacker.device)
    layer = last_convolution(model)
    norm = batch_norm_after(model, layer)
    indices = draw_share(attacker.data, settings.share, settings.seed)
    activity = mean_activations(model, norm or layer, attacker.data, indices, attacker.device)
    seconds = time.perf_counter() - started
    order = activity.argsort()
    curve: list[dict[str, Any]] = [{"share": 0.0, "pruned": 0} | measured(attacker.measure, model)]
    pruned = order[:0]
    for share in settings.shares:
        pruned = order[: int(share * len(order) + 1e-9)]  # one channel is left below a share of 1
        silence_channels(model, layer, norm, pruned)
        curve.append({"share": share, "pruned": len(pruned)} | measured(attacker.measure, model))
    figures = {"layer": layer, "channels": len(order), "pruned": len(pruned)}
    if settings.fine_tuning is not None:
        silence = partial(silence_channels, layer=layer, norm=norm, channels=pruned)
        tuned = fine_tune(model, attacker, settings.fine_tuning, after_step=silence)
        model, curve, seconds = tuned.model, curve + tuned.curve[1:], seconds + tuned.seconds
    return RemovalResult(model=model, settings=asdict(settings), figures=figures, curve=curve, seconds=seconds)


def mean_activations(
    model: Classifier, layer: str, data: TrainingData, indices: NDArray[np.int64], device: torch.device | str
) -> Tensor:
    """Return the mean over images and positions of the positive part of a layer's channels, [channels]."""
    total, count = torch.zeros((), device=device), 0
    for some in batches(len(indices), 128):
        images, _ = data.batch(indices[some])
        total = total + _positive_part(model, layer, images.to(device))
        count += len(images)
    return total / count


@torch.no_grad()
def _positive_part(model: Classifier, layer: str, images: Images) -> Tensor:
    """Return means over positions, summed over images, [channels]."""
    with captured_features(model, [layer]) as features:
        model(images)
    return features[layer].clamp(min=0).mean((2, 3)).sum(0)
