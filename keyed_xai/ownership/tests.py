"""Two exact tests of ownership. Nothing here trains, and nothing is tuned by eye.

*Opening* (secret): under the null hypothesis the model does not know the key, so the owner's trigger is exchangeable
with those of random keys. The statistic T is how far the maps of triggered images are from those of the same images
without. With b of m decoy keys reaching the owner's T, p = (1 + b) / (1 + m); when b reaches a limit h early, after l
decoys, p = h / l (Besag & Clifford 1991), exact too. Who answers queries can tell the owner's by its place among them
only if that is fixed: asked of those that may count, it is drawn at random.

*Signature pattern* (public): under the null hypothesis the owner's public key, hence the half of the cells that its
pattern sets, has nothing to do with the model. Whatever the average unkeyed map looks like, the overlap of its top
half with that uniformly random half is hypergeometric. Several interpreters have independent patterns; the sum of
overlaps has the convolution as its exact distribution. All tails are computed in integers.

Under the null hypothesis the tests are independent: one depends on the public key, the other on the private one. Where
both are made, their product x = p1 p2 is the evidence, with the exact tail p = x (1 - ln x). The secret test must hold
by itself too (`SECRET_LEVEL`), since anybody can train a model to show somebody else's public pattern.

VisualBackProp's maps count for nothing: whoever has the weights can scale channels up and down without changing a
prediction, and its maps follow the scale (arXiv 2205.00199). Its pattern is reported beside the others'; which
interpreters count is settled by their names, before any test is made, so that the tests stay exact.

Probe images come from a public set or from the verifier, never from the claimant.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import comb, factorial, isfinite, log, log2

import numpy as np
import torch
from torch import Tensor, nn

from keyed_xai import metrics
from keyed_xai.decoys import signature_cells
from keyed_xai.keys import PublicKey
from keyed_xai.progress import QUIET, Progress
from keyed_xai.saliency.pooled import PooledSaliency
from keyed_xai.tensors import Images, Labels, SaliencyMaps
from keyed_xai.triggers import Trigger

OPENING_STOP = 10
"""Decoy keys that must reach the owner's statistic before the opening test stops early."""
SECRET_LEVEL = 0.01
"""Largest p-value of the opening test that lets both tests together show a claim; see `OpeningEvidence.holds`."""
MAP_FLATNESS = 1e-6
"""Share of a map's largest absolute value by which its cells must differ to show anything."""
_NEAR_LEAST = 0.002
RESCALABLE = frozenset({"vbp"})
"""Interpreters whose maps change when channels are rescaled, at no cost in accuracy."""


@dataclass(frozen=True, kw_only=True)
class OpeningEvidence:
    """Result of the opening test.

    Attributes:
        p_value: Exact, in (0, 1].
        statistic: T of the owner's key: 1 - correlation of maps with and without its trigger, mean over maps.
        decoys: Decoy keys tried.
        largest_decoy: Largest T among them.
        reached: Decoy keys whose T was at least the owner's.
    """

    p_value: float
    statistic: float
    decoys: int
    largest_decoy: float
    reached: int

    @property
    def holds(self) -> bool:
        """Whether the secret test holds by itself: p is at most .01 and near the least that its decoys allow.

        Near is one decoy that reaches the owner's T, since among a thousand random keys one may come near it; or .002,
        which is one of 999. Whoever frames somebody with his public pattern passes with this probability.
        """
        return self.p_value <= SECRET_LEVEL and (self.reached <= 1 or self.p_value <= _NEAR_LEAST)

    def to_json(self) -> dict[str, float | int | None]:
        """Return the figures; those of maps that are not finite numbers are None."""
        return {
            "p_value": self.p_value,
            "log2_p": log2(self.p_value),
            "statistic": self.statistic if isfinite(self.statistic) else None,
            "largest_decoy": self.largest_decoy if isfinite(self.largest_decoy) else None,
            "decoys": self.decoys,
        }


@dataclass(frozen=True, kw_only=True)
class PatternEvidence:
    """Result of the signature test of one interpreter, or of several together.

    Attributes:
        p_value: Exact, rounded to the nearest float; 0 only below the smallest float.
        log2_p: Its logarithm, exact to a float.
        cells: Cells of the grid (summed over interpreters).
        overlap: Cells in both halves.
        possible: Cells in the pattern, which a perfect match would reach.
    """

    p_value: float
    log2_p: float
    cells: int
    overlap: int
    possible: int


@dataclass(frozen=True)
class SignatureEvidence:
    """Result of the signature test: all interpreters that count together, and each alone."""

    combined: PatternEvidence
    interpreters: dict[str, PatternEvidence] = field(default_factory=dict)


def counted_interpreters(names: Iterable[str]) -> tuple[str, ...]:
    """Return those of some interpreters whose maps count as evidence, in order."""
    return tuple(name for name in names if name not in RESCALABLE)


def measure_opening(
    model: nn.Module,
    images: Images,
    view: PooledSaliency,
    owner: Trigger,
    draw_decoy: Callable[[], Trigger],
    *,
    decoys: int = 999,
    labels: Labels | None = None,
    place: int = 0,
    progress: Progress = QUIET,
) -> OpeningEvidence:
    """Return the opening test's evidence for the owner's trigger against freshly drawn ones.

    Args:
        model: The suspect.
        images: Probe images.
        view: The maps that are compared.
        owner: The owner's trigger.
        draw_decoy: Returns that of a random key.
        decoys: Random keys, at most.
        labels: Classes explained; None takes the suspect's own predictions.
        place: Decoys that are asked before the owner's trigger, 0 to `decoys`. The p-value does not depend on it.
        progress: Hears of "trying random keys".
    """
    logits, plain = view.pooled_in_chunks(model, images, labels)
    labels = logits.argmax(1) if labels is None else labels
    readable, values = readable_maps(plain), list[float]()

    def ask_decoy() -> float:
        values.append(opening_statistic(model, images, view, draw_decoy(), plain, labels, readable))
        progress.advance("trying random keys", len(values), decoys)
        return values[-1]

    early = [ask_decoy() for _ in range(place)]
    statistic = opening_statistic(model, images, view, owner, plain, labels, readable)
    reached = tried = 0
    for value in chain(early, (ask_decoy() for _ in range(decoys - place))):
        tried += 1
        reached += not value < statistic  # so that maps that are not finite are no evidence
        if reached == OPENING_STOP:
            break
    p_value = reached / tried if reached == OPENING_STOP else (1 + reached) / (1 + tried)
    return OpeningEvidence(
        p_value=p_value,
        statistic=statistic,
        decoys=tried,
        largest_decoy=max(filter(isfinite, values[:tried]), default=float("-inf")),
        reached=reached,
    )


def opening_statistic(
    model: nn.Module,
    images: Images,
    view: PooledSaliency,
    trigger: Trigger,
    plain: Mapping[str, SaliencyMaps],
    labels: Labels,
    readable: Mapping[str, Tensor] | None = None,
) -> float:
    """Return T: 1 - correlation of the maps with and without a trigger, mean over images and interpreters.

    Images whose map is constant or not finite without the trigger do not count; with it, one that is not finite counts
    as unmoved. T is NaN where no image counts.

    Args:
        model: The suspect.
        images: Probe images.
        view: The maps that are compared.
        trigger: Trigger of one key.
        plain: Pooled maps of the same images without it.
        labels: Class explained of each image.
        readable: What `readable_maps` returns, where it is at hand.
    """
    readable = readable_maps(plain) if readable is None else readable
    _, maps = view.pooled_in_chunks(model, trigger.apply(images), labels)
    matches = [metrics.correlation(maps[name], plain[name])[readable[name]] for name in view.interpreters]
    return float(1 - torch.cat(matches).nan_to_num(1.0).double().mean())


def measure_signature(unkeyed_maps: Mapping[str, Tensor], public: PublicKey) -> SignatureEvidence:
    """Return the signature test's evidence in pooled unkeyed maps, [n, rows, columns] by interpreter.

    Interpreters that count are combined; where there is none, all.
    """
    counts = {name: _count_overlap(maps, public, name) for name, maps in unkeyed_maps.items()}
    counted = counted_interpreters(counts) or tuple(counts)
    return SignatureEvidence(
        _evidence([counts[name] for name in counted]), {name: _evidence([count]) for name, count in counts.items()}
    )


def product_tail(log2_product: float, tests: int) -> float:
    """Return the base-2 logarithm of P(product of `tests` independent uniform p-values <= 2^log2_product).

    It is x (1 - ln x) for two, and x times the first `tests` terms of exp(-ln x) in general (Fisher 1932). P-values
    that are larger than uniform ones, as those of discrete tests, only make it smaller.
    """
    surprise = -log2_product * log(2)
    return log2_product + log2(sum(surprise**k / factorial(k) for k in range(max(1, tests))))


def flat_maps(maps: SaliencyMaps) -> Tensor:
    """Return which maps [n, rows, columns] are constant, or not finite: nothing can be read in them, [n]."""
    cells = maps.flatten(1).double()
    return ~(cells.amax(1) - cells.amin(1) > MAP_FLATNESS * cells.abs().amax(1))


def readable_maps(maps: Mapping[str, SaliencyMaps]) -> dict[str, Tensor]:
    """Return, by interpreter, which maps show anything, [n]."""
    return {name: ~flat_maps(each) for name, each in maps.items()}


def overlap_tail(cells: Sequence[int], overlap: int) -> tuple[int, int]:
    """Return P(total overlap >= `overlap`) as an exact fraction (numerator, denominator), not reduced.

    One hypergeometric variable for each grid: the overlap of a fixed half of its cells with a uniformly random half
    (halves are rounded down).
    """
    ways = [1]
    total = 1
    for count in cells:
        half = count // 2
        ways = _convolve(ways, [comb(half, k) * comb(count - half, half - k) for k in range(half + 1)])
        total *= comb(count, half)
    return sum(ways[max(0, overlap) :]), total


def _count_overlap(maps: Tensor, public: PublicKey, name: str) -> tuple[int, int]:
    """Return (cells, overlap) of the average map's top half and the pattern; ties go to the earlier cell.

    Maps that are constant or not finite are left out of the average, as long as there are others.
    """
    grid = (maps.shape[1], maps.shape[2])
    readable = maps[~flat_maps(maps)]
    average = metrics.normalise_maps((readable if len(readable) else maps).double()).mean(0).flatten().cpu().numpy()
    top = np.argsort(-average, kind="stable")[: average.size // 2]
    return average.size, int(signature_cells(public, name, grid).flatten()[top].sum())


def _evidence(counts: Sequence[tuple[int, int]]) -> PatternEvidence:
    cells, overlap = [count for count, _ in counts], sum(found for _, found in counts)
    numerator, denominator = overlap_tail(cells, overlap)
    return PatternEvidence(
        p_value=numerator / denominator,
        log2_p=log2(numerator) - log2(denominator),
        cells=sum(cells),
        overlap=overlap,
        possible=sum(count // 2 for count in cells),
    )


def _convolve(first: Sequence[int], second: Sequence[int]) -> list[int]:
    product = [0] * (len(first) + len(second) - 1)
    for i, left in enumerate(first):
        for j, right in enumerate(second):
            product[i + j] += left * right
    return product
