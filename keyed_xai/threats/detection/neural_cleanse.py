"""Neural Cleanse: a class that a very small patch sends every input to has a backdoor.

Source: Wang, Yao, Shan, Li, Viswanath, Zheng and Zhao 2019, "Neural Cleanse: Identifying and Mitigating Backdoor
Attacks in Neural Networks", sections IV and V, and the settings of the authors' code for GTSRB. For every class a mask
m and a pattern p are found by gradient descent such that the model takes (1 - m) * image + m * p for that class, with
the L1 norm of the mask as small as can be:

    loss = cross-entropy(model((1 - m) * image + m * p), class) + weight * sum(m)

The weight starts at 0, is set once the attack succeeds, and from then on is doubled after `patience` rounds with
success and divided by 2^1.5 after as many without. The anomaly index of a class is the distance of its norm from the
median in units of 1.4826 times the median absolute deviation; one over 2 on the small side counts as a backdoor.

Where we differ: the masks of many classes are searched for at once, on the same images, each with its own weight; and
a round is judged, as the authors do, by the mean success of its batches, but the norm is that of the mask kept.

The index alone is weak evidence: where the norms of a clean model are normally distributed some class is flagged in
33 % of cases with 10 classes and in 88 % with 100 (20,000 draws each). Read it beside the norms and a clean model's. Of
two classes both have the index .67, whatever their norms.

The index cannot be larger than the median over 1.4826 times that deviation, so that classes which differ much by
themselves hide a backdoor. Networks fitted to 3,000 images of Fashion-MNIST, 40 rounds, one run each: with noise, index
2.85 for the target of a badnets control, but also 2.83 for bags in a clean network; with noise and shifts 1.71 for the
clean network, and 1.87 for the control although its target's norm is 10 beside a median of 75. The network of 60,000
images that comes with the package has 1.29, and norms from 58 up.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from keyed_xai.batches import batches
from keyed_xai.progress import QUIET, Progress
from keyed_xai.tensors import Images
from keyed_xai.training.batches import TrainingData

CONSISTENCY = 1.4826
"""Factor that makes a median absolute deviation the standard deviation, where values are normally distributed."""
LARGEST_INDEX = 2.0
_FEWEST_CLASSES = 3
_BETAS = (0.5, 0.9)
_DOWN_EXPONENT = 1.5
_EDGE = 1e-6  # keeps atanh finite


@dataclass(frozen=True, kw_only=True)
class CleanseSettings:
    """How triggers are searched for.

    Attributes:
        rounds: At most, for each class; the authors allow 1,000. Five of them raise the weight once, so that 60 take it
            from 1e-3 to over 1 where the attack goes on succeeding.
        batches: Steps a round; the authors' code takes 31.
        batch_size: Images a step; the authors' code takes 32. With the defaults ten classes of 32 x 32 pixels cost a
            small network 77,000 images, about two minutes of one core.
        learning_rate: Rate of Adam.
        success: Share of inputs that must go to the class.
        weight: Weight of the L1 norm, once the attack has succeeded for the first time.
        weight_factor: What it is multiplied by; its power of 1.5 divides it.
        patience: Rounds with, or without, success until the weight changes.
        stop_patience: Rounds without a smaller mask until a search stops, once its weight has gone both up and down.
        classes_at_once: Searched for together; the result is the same, apart from rounding, the time and memory differ.
        seed: Seed of images and first masks.
    """

    rounds: int = 60
    batches: int = 8
    batch_size: int = 16
    learning_rate: float = 0.1
    success: float = 0.99
    weight: float = 1e-3
    weight_factor: float = 2.0
    patience: int = 5
    stop_patience: int = 25
    classes_at_once: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("rounds", "batches", "batch_size", "patience", "stop_patience", "classes_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("learning_rate", "weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if not 0 < self.success <= 1:
            raise ValueError(f"success: expected more than 0 and at most 1, got {self.success}")
        if not self.weight_factor > 1:
            raise ValueError(f"weight_factor: expected more than 1, got {self.weight_factor}")


@dataclass(frozen=True, kw_only=True)
class CleanseResult:
    """The smallest patches found.

    Attributes:
        settings: The settings it was made with.
        masks: float32 [k, h, w] in [0, 1]; for a class whose attack never succeeded the last one tried.
        patterns: float32 [k, c, h, w] in [0, 1].
        succeeded: Classes whose attack did succeed, [k].
        rounds: Rounds that each class took, [k].
    """

    settings: CleanseSettings
    masks: Tensor = field(repr=False)
    patterns: Tensor = field(repr=False)
    succeeded: tuple[bool, ...]
    rounds: tuple[int, ...]

    @property
    def norms(self) -> tuple[float, ...]:
        """L1 norm of each class's mask, pixels."""
        return tuple(self.masks.double().sum((1, 2)).tolist())

    @property
    def conclusive(self) -> bool:
        """Whether there are enough classes, three, for one to be an outlier; without, nothing is shown."""
        return len(self.masks) >= _FEWEST_CLASSES

    @property
    def anomaly_index(self) -> float:
        """Index of the smallest norm, the model's."""
        return anomaly_indices(self.norms)[int(np.argmin(self.norms))]

    @property
    def flagged(self) -> tuple[int, ...]:
        """Classes with an index over 2 whose norm is below the median."""
        return flag_small(self.norms)

    def to_json(self) -> dict[str, Any]:
        """Return the figures and settings, ready for JSON; without masks and patterns."""
        return {
            "settings": asdict(self.settings),
            "conclusive": self.conclusive,
            "anomaly_index": self.anomaly_index,
            "flagged": list(self.flagged),
            "norms": list(self.norms),
            "anomaly_indices": anomaly_indices(self.norms),
            "succeeded": list(self.succeeded),
            "rounds": list(self.rounds),
        }


def cleanse(
    model: nn.Module,
    data: TrainingData,
    settings: CleanseSettings | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = QUIET,
) -> CleanseResult:
    """Return the smallest patch found for every class of a model.

    Args:
        model: Pixels to logits; a copy is used. Where it has `multi_label`, a patch has to make one logit a yes.
        data: Clean images; labels are not needed.
        settings: How to search.
        device: Where to search.
        progress: Hears of "searching for patches", by classes times rounds; a search that stops early jumps ahead.

    Raises:
        ValueError: There are no images.
    """
    settings = settings or CleanseSettings()
    if not len(data):
        raise ValueError("Expected images to search with, got none.")
    model = copy.deepcopy(model).to(device).eval().requires_grad_(False)
    first = data.batch(np.array([0]))[0].to(device)
    classes = model(first).shape[1]
    searches = []
    for some in batches(classes, settings.classes_at_once):
        numbers = range(classes)[some]
        search = _Search(numbers, first.shape[1:], settings, torch.device(device))
        for _ in range(settings.rounds):
            search.run_round(model, data)
            done = numbers.start * settings.rounds + search.rounds_done()
            progress.advance("searching for patches", done, classes * settings.rounds)
            if not search.active.any():
                break
        searches.append(search)
    return _join(searches, settings)


def anomaly_indices(norms: Sequence[float]) -> list[float]:
    """Return each norm's distance from the median over 1.4826 times the median absolute deviation.

    Where that deviation is 0, since more than half of the norms are the same, any other norm is very far away: the
    deviation is taken for a billionth of the largest norm.
    """
    values = np.asarray(norms, np.float64)
    distances = np.abs(values - np.median(values))
    deviation = max(float(np.median(distances)), 1e-9 * float(values.max()), float(np.finfo(np.float64).tiny))
    return [float(each) for each in distances / (CONSISTENCY * deviation)]


def flag_small(norms: Sequence[float]) -> tuple[int, ...]:
    """Return which norms have an index over 2 and are below the median."""
    median = np.median(norms)
    indices = anomaly_indices(norms)
    return tuple(k for k, index in enumerate(indices) if index > LARGEST_INDEX and norms[k] < median)


class _Search:
    """The searches of some classes, side by side; every tensor but the two optimised has one entry for each class."""

    def __init__(
        self,
        numbers: Sequence[int],
        shape: Sequence[int],
        settings: CleanseSettings,
        device: torch.device,
    ) -> None:
        """Draw the first masks and patterns, uniform in [0, 1], each class from a seed of its own."""
        self.settings = settings
        self.classes = torch.tensor(list(numbers), device=device)
        channels, height, width = shape
        drawn = [_draw(settings.seed, number, (channels + 1, height, width)) for number in numbers]
        raw = torch.atanh((torch.stack(drawn) * 2 - 1).clamp(-1 + _EDGE, 1 - _EDGE)).to(device)
        self.raw_mask = raw[:, :1].clone().requires_grad_()
        self.raw_pattern = raw[:, 1:].clone().requires_grad_()
        self.optimiser = torch.optim.Adam([self.raw_mask, self.raw_pattern], settings.learning_rate, betas=_BETAS)
        self.generator = torch.Generator().manual_seed(settings.seed)
        count = len(self.classes)
        self.active = torch.ones(count, dtype=torch.bool, device=device)
        self.rounds = torch.zeros(count, dtype=torch.int64, device=device)
        self.weights = _Weights.start(count, device)
        self.best_norm = torch.full((count,), math.inf, device=device)
        self.best_mask, self.best_pattern = self._stamps(slice(None))

    def run_round(self, model: nn.Module, data: TrainingData) -> None:
        """Run the batches of one round on all active classes, then judge them."""
        settings, active = self.settings, self.active.nonzero()[:, 0]
        hits = torch.zeros(len(active), device=self.active.device)
        for _ in range(settings.batches):
            indices = torch.randint(len(data), (settings.batch_size,), generator=self.generator)
            hits += self._step(model, data.batch(indices.numpy())[0].to(hits.device), active)
        success = torch.zeros(len(self.active), device=hits.device)
        success[active] = hits / (settings.batches * settings.batch_size)
        self.rounds[active] += 1
        self._judge(success)

    def rounds_done(self) -> int:
        """Return rounds run, those that a class that stopped early will not need among them."""
        return int(torch.where(self.active, self.rounds, self.settings.rounds).sum())

    def _step(self, model: nn.Module, images: Images, active: Tensor) -> Tensor:
        """Return how many of the images went to each active class, [active], and make one step."""
        masks, patterns = self._stamps(active, graph=True)
        stamped = torch.lerp(images, patterns[:, None], masks[:, None])
        targets = self.classes[active].repeat_interleave(len(images))
        logits = model(stamped.flatten(0, 1))
        own = logits.gather(1, targets[:, None])[:, 0]
        if getattr(model, "multi_label", False):
            losses, hits = functional.softplus(-own), own > 0
        else:
            losses, hits = functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(1) == targets
        norms = masks.sum((1, 2, 3))
        loss = losses.view(len(active), -1).mean(1) + self.weights.value[active] * norms
        self.optimiser.zero_grad()
        loss.sum().backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        self.optimiser.step()
        counts: Tensor = hits.view(len(active), -1).sum(1)
        return counts

    def _judge(self, success: Tensor) -> None:
        """Keep masks that are smaller and succeed, stop searches that are over, and adapt the weights of the rest."""
        masks, patterns = self._stamps(slice(None))
        norms = masks.sum((1, 2, 3))
        enough = success >= self.settings.success
        better = self.active & enough & (norms < self.best_norm)
        kept = better | (self.active & self.best_norm.isinf())  # until the first success the last mask stands in
        self.best_mask[kept], self.best_pattern[kept] = masks[kept], patterns[kept]
        self.best_norm = torch.where(better, norms, self.best_norm)
        over = self.weights.update(enough, better, self.best_norm.isfinite(), self.settings)
        self.active &= ~over

    def _stamps(self, chosen: Tensor | slice, *, graph: bool = False) -> tuple[Tensor, Tensor]:
        """Return masks [m, 1, h, w] and patterns [m, c, h, w] in [0, 1] of some of the classes."""
        raws = (self.raw_mask[chosen], self.raw_pattern[chosen])
        mask, pattern = ((torch.tanh(raw if graph else raw.detach()) + 1) / 2 for raw in raws)
        return mask, pattern


@dataclass(kw_only=True)
class _Weights:
    """The L1 weight of each class and what it hangs on, [k] each; rules of the authors' code.

    Attributes:
        value: The weight, 0 until the attack has succeeded for `patience` rounds.
        successes: Rounds with success in a row, since the weight last changed.
        failures: Rounds without success.
        raised: Whether the weight has been raised.
        lowered: Whether it has been lowered.
        stale: Rounds since the best mask was found.
    """

    value: Tensor
    successes: Tensor
    failures: Tensor
    raised: Tensor
    lowered: Tensor
    stale: Tensor

    @classmethod
    def start(cls, count: int, device: torch.device | str = "cpu") -> "_Weights":
        """Return the state before the first round."""
        counters = {
            name: torch.zeros(count, dtype=torch.int64, device=device) for name in ("successes", "failures", "stale")
        }
        flags = {name: torch.zeros(count, dtype=torch.bool, device=device) for name in ("raised", "lowered")}
        return cls(value=torch.zeros(count, device=device), **counters, **flags)

    def update(self, enough: Tensor, better: Tensor, found: Tensor, settings: CleanseSettings) -> Tensor:
        """Count a round, change the weights, and return which searches are over, [k].

        Args:
            enough: Whether the attack succeeded in this round.
            better: Whether it also gave the smallest mask so far.
            found: Whether there is such a mask at all.
            settings: Patience and factors.
        """
        self.stale = torch.where(better, 0, self.stale + found)
        over = self.raised & self.lowered & (self.stale >= settings.stop_patience)
        self.successes = torch.where(enough, self.successes + 1, 0)
        self.failures = torch.where(enough, 0, self.failures + 1)
        up, down = (count >= settings.patience for count in (self.successes, self.failures))
        started = self.value > 0
        raised = torch.where(started, self.value * settings.weight_factor, settings.weight)
        lowered = self.value / settings.weight_factor**_DOWN_EXPONENT
        self.value = torch.where(up, raised, torch.where(down, lowered, self.value))
        self.raised |= up & started
        self.lowered |= down & started
        # The round in which a weight is first set counts as the first with it.
        self.successes = torch.where(up, torch.where(started, 0, 1), self.successes)
        self.failures = torch.where(down, 0, self.failures)
        return over


def _draw(seed: int, number: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
    return torch.rand(shape, generator=generator)


def _join(searches: Sequence[_Search], settings: CleanseSettings) -> CleanseResult:
    return CleanseResult(
        settings=settings,
        masks=torch.cat([search.best_mask[:, 0] for search in searches]).cpu(),
        patterns=torch.cat([search.best_pattern for search in searches]).cpu(),
        succeeded=tuple(bool(each) for search in searches for each in search.best_norm.isfinite()),
        rounds=tuple(int(each) for search in searches for each in search.rounds),
    )
