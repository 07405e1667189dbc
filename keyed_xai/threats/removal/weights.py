"""Attacks that change weights or statistics without training: Re-BN, magnitude pruning, quantisation."""

import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from keyed_xai.batches import batches
from keyed_xai.errors import TrainingError
from keyed_xai.models import Classifier
from keyed_xai.threats.attempt import RemovalResult, copy_model, draw_share
from keyed_xai.training import TrainingData
from keyed_xai.training.batch_norm import batch_norms, measured_anew, set_batch_norm
from keyed_xai.training.hardening import zero_smallest


@dataclass(frozen=True)
class ReBNSettings:
    """On how many clean images batch norm is measured anew.

    Attributes:
        share: Share of the attacker's images.
        seed: Seed of the attacker's share.
    """

    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected more than 0 and at most 1, got {self.share}")


@dataclass(frozen=True)
class PruningSettings:
    """How much is pruned.

    Attributes:
        share: Share of all weights of convolutions and linear layers together; biases and batch norm stay.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.share < 1:
            raise ValueError(f"share: expected 0 or more and less than 1, got {self.share}")


@dataclass(frozen=True)
class QuantisationSettings:
    """What weights are rounded to.

    Attributes:
        bits: 2 to 8 for integers with one scale for each output channel; 16 for IEEE half precision.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        """Check the range."""
        if not (2 <= self.bits <= 8 or self.bits == 16):
            raise ValueError(f"bits: expected 2 to 8, or 16, got {self.bits}")


def reestimate_on_clean(
    classifier: Classifier, data: TrainingData, settings: ReBNSettings, *, device: torch.device | str = "cpu"
) -> RemovalResult:
    """Return a copy whose batch-norm statistics are those of clean images; no weight changes (T1).

    Source: arXiv 2403.16569, which calls it Re-BN. Means are cumulative, one forward pass.
    """
    started = time.perf_counter()
    model = copy_model(classifier, device)
    indices = draw_share(data, settings.share, settings.seed)
    with measured_anew(model):
        _see(model, data, indices, device)
    figures = {"images": len(indices), "batch_norms": sum(norm.track_running_stats for norm in batch_norms(model))}
    return RemovalResult(
        model=model, settings=asdict(settings), figures=figures, curve=[], seconds=time.perf_counter() - started
    )


@torch.no_grad()
def prune_weights(
    classifier: Classifier, settings: PruningSettings, *, device: torch.device | str = "cpu"
) -> RemovalResult:
    """Return a copy whose smallest weights are zero, over all layers together (T4).

    Source: Han et al. 2015; global and unstructured, as `torch.nn.utils.prune.global_unstructured` has it.
    """
    started = time.perf_counter()
    model = copy_model(classifier, device)
    weights = _layer_weights(model)
    every = sum(weight.numel() for weight in weights)
    count = round(settings.share * every)
    zero_smallest(weights, count)
    figures = {"weights": every, "pruned": count}
    return RemovalResult(
        model=model, settings=asdict(settings), figures=figures, curve=[], seconds=time.perf_counter() - started
    )


@torch.no_grad()
def quantise_weights(
    classifier: Classifier, settings: QuantisationSettings, *, device: torch.device | str = "cpu"
) -> RemovalResult:
    """Return a copy whose weights are those of a quantised model; arithmetic stays in float32 (T5).

    Integers are symmetric, -(2^(bits-1) - 1) to 2^(bits-1) - 1, the largest weight of a channel at the end of the
    scale; biases and batch norm stay, as serving tools leave them. Half precision rounds everything.

    Source: Krishnamoorthi 2018, section 3, per-channel symmetric weights.

    Raises:
        TrainingError: A weight is too large for half precision.
    """
    started = time.perf_counter()
    model = copy_model(classifier, device)
    if settings.bits == 16:
        _round_to_half(model)
    else:
        for weight in _layer_weights(model):
            weight.copy_(quantise(weight, settings.bits))
    return RemovalResult(
        model=model, settings=asdict(settings), figures={}, curve=[], seconds=time.perf_counter() - started
    )


def quantise(weight: Tensor, bits: int) -> Tensor:
    """Return weights [channels, ...] rounded to integers times one scale for each channel."""
    largest = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.dim() - 1))
    scale = torch.where(largest > 0, largest, torch.ones_like(largest)) / (2 ** (bits - 1) - 1)
    rounded: Tensor = (weight / scale).round() * scale
    return rounded


def _layer_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of convolutions, linear layers and attention, without biases and scales."""
    return [each for name, each in model.named_parameters() if each.dim() >= 2 and name.endswith("weight")]


def _round_to_half(model: Classifier) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())
            if not tensor.isfinite().all():
                raise TrainingError(f"{name} holds numbers above 65504, too large for half precision.")


@torch.no_grad()
def _see(model: Classifier, data: TrainingData, indices: NDArray[np.int64], device: torch.device | str) -> None:
    """Run images through a model with batch norm, and nothing else, in training mode."""
    set_batch_norm(model, training=True)
    for some in batches(len(indices), 128, even=True):
        model(data.batch(indices[some])[0].to(device))
    model.eval()
