"""Two exact tests of ownership. Nothing here trains, and nothing is tuned by eye.

*Opening* (secret): under the null hypothesis the model does not know the key, so the owner's trigger is exchangeable
with those of random keys. The statistic T is how far the maps of triggered images are from those of the same images
without. With b of m decoy keys reaching the owner's T, p = (1 + b) / (1 + m); when b reaches a limit h early, after l
decoys, p = h / l (Besag & Clifford 1991), exact too.

*Signature pattern* (public): under the null hypothesis the owner's public key, hence the half of the cells that its
pattern sets, has nothing to do with the model. Whatever the average unkeyed map looks like, the overlap of its top
half with that uniformly random half is hypergeometric. Several interpreters have independent patterns; the sum of
overlaps has the convolution as its exact distribution. All tails are computed in integers.

VisualBackProp's maps count for nothing: whoever has the weights can scale channels up and down without changing a
prediction, and its maps follow the scale (arXiv 2205.00199). Its pattern is reported beside the others'; which
interpreters count is settled by their names, before any test is made, so that the tests stay exact.

Probe images come from a public set or from the verifier, never from the claimant.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from math import comb, log2

import numpy as np
import torch
from torch import Tensor, nn

from keyed_xai import metrics
from keyed_xai.keys import ByteStream, OwnerKey, PublicKey
from keyed_xai.maps import MapView
from keyed_xai.models.modes import evaluating
from keyed_xai.patterns import signature_cells
from keyed_xai.tensors import Images, Labels, SaliencyMaps
from keyed_xai.triggers import Trigger, TriggerFamily

OPENING_STOP = 10
"""Decoy keys that must reach the owner's statistic before the opening test stops early."""
RESCALABLE = frozenset({"vbp"})
"""Interpreters whose maps change when channels are rescaled, at no cost in accuracy."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Verdict:
    """What both tests show.

    Attributes:
        shown: Whether the smallest p-value, times the number of tests made (Bonferroni), is at most alpha.
        alpha: The level asked for.
        opening: None when the secret key was not at hand.
        signature: The public test; None when the claim has no signature pattern.
        refused: Whether the claim names no interpreter that counts: nothing is shown then, whatever the tests found.
    """

    shown: bool
    alpha: float
    opening: OpeningEvidence | None
    signature: SignatureEvidence | None
    refused: bool = False

    @property
    def log2_p(self) -> float:
        """Base-2 logarithm of the smallest p-value times the number of tests made, at most 0."""
        single = [log2(self.opening.p_value)] if self.opening else []
        single += [self.signature.combined.log2_p] if self.signature else []
        return min(0.0, log2(len(single)) + min(single)) if single else 0.0


@dataclass(frozen=True)
class DatedClaim:
    """What one claimant has shown on a model, and when the claim was signed.

    Attributes:
        owner: The claimant's key id, or a name.
        shown: Whether a test shows the claim on the model in dispute.
        time: Of the licence, with a time zone; None without a licence.
        witnessed: Whether a third party dated the licence, such as a timestamping authority or a court. Without one
            a time is the claimant's own word: whoever signs can set the clock back.
    """

    owner: str
    shown: bool
    time: datetime | None = None
    witnessed: bool = False


@dataclass(frozen=True)
class Ruling:
    """Whose a model is.

    Attributes:
        owner: As in the claim; None where nobody's claim is shown, or the times do not tell.
        proven: Whether it rests on more than a claimant's word for a time.
        reason: In a sentence.
    """

    owner: str | None
    proven: bool
    reason: str


def counted_interpreters(names: Iterable[str]) -> tuple[str, ...]:
    """Return those of some interpreters whose maps count as evidence, in order."""
    return tuple(name for name in names if name not in RESCALABLE)


def rule_on_claims(first: DatedClaim, second: DatedClaim) -> Ruling:
    """Return whose a model is when two keys claim it: of claims that are shown, the first licence wins.

    A second protection may hide the first, so that one claim shown alone is not the last word where the other party has
    an older licence: ask both for what they protected. The overwriter's is the owner's protected model.
    """
    shown = [claim for claim in (first, second) if claim.shown]
    if not shown:
        return Ruling(None, False, "Neither claim is shown on this model.")
    if len(shown) == 1:
        return _rule_on_single(shown[0], second if shown[0] is first else first)
    if first.time is None or second.time is None:
        return Ruling(None, False, "Both claims are shown, and not both have a licence that says when it was signed.")
    if first.time == second.time:
        return Ruling(None, False, "Both claims are shown, and their licences have the same time.")
    return _rule_on_times(*((first, second) if first.time < second.time else (second, first)))


def verify_ownership(
    model: nn.Module,
    images: Images,
    view: MapView,
    key: OwnerKey | PublicKey,
    family: TriggerFamily,
    *,
    alpha: float = 1e-6,
    decoys: int = 999,
    test_signature: bool = True,
    generator: torch.Generator | None = None,
    on_decoy: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Test whether `model` knows `key`; a public key alone allows the signature test only.

    Where no test can be made nothing is shown, nor where the view has no interpreter that counts: then the tests are
    made on those that do not, for what they are worth.

    Args:
        model: The suspect, pixels to logits, in any mode; it is tested in evaluation mode.
        images: Probe images, on the model's device.
        view: Maps compared.
        key: The claimant's.
        family: Trigger family of the claim.
        alpha: Level, a probability.
        decoys: Random keys that the owner's is compared with, at most.
        test_signature: Whether the claim has a signature pattern. Tests are chosen by the claim, before any is made.
        generator: Draws the decoy keys; None seeds one from the operating system.
        on_decoy: Called with decoys done and in all.

    Raises:
        ValueError: There are no images or no decoys, or alpha is no probability.
        ModelError: The model lacks a layer that the maps need.
    """
    if not len(images) or decoys < 1 or not 0 < alpha < 1:
        raise ValueError(
            f"Expected images, at least 1 decoy and 0 < alpha < 1; got {len(images)}, {decoys} and {alpha}."
        )
    signature = opening = None
    counted = counted_interpreters(view.interpreters)
    with evaluating(model):
        if test_signature:
            _, plain = view.pooled_in_chunks(model, images)
            signature = measure_signature(plain, key.public if isinstance(key, OwnerKey) else key)
        if isinstance(key, OwnerKey):
            owner = family.derive(ByteStream(key.derive_seed(family.name)))
            draw = _decoy_source(family, generator)
            compared = replace(view, interpreters=counted or view.interpreters)
            opening = measure_opening(model, images, compared, owner, draw, decoys=decoys, on_decoy=on_decoy)
    p_values = ([signature.combined.p_value] if signature else []) + ([opening.p_value] if opening else [])
    shown = bool(p_values and counted) and len(p_values) * min(p_values) <= alpha
    return Verdict(shown, alpha, opening, signature, refused=not counted)


def measure_opening(
    model: nn.Module,
    images: Images,
    view: MapView,
    owner: Trigger,
    draw_decoy: Callable[[], Trigger],
    *,
    decoys: int = 999,
    on_decoy: Callable[[int, int], None] | None = None,
) -> OpeningEvidence:
    """Return the opening test's evidence for the owner's trigger against freshly drawn ones."""
    logits, plain = view.pooled_in_chunks(model, images)
    labels = logits.argmax(1)
    statistic = opening_statistic(model, images, view, owner, plain, labels)
    reached, largest, tried = 0, float("-inf"), 0
    while tried < decoys and reached < OPENING_STOP:
        tried += 1
        value = opening_statistic(model, images, view, draw_decoy(), plain, labels)
        largest = max(largest, value)
        reached += not value < statistic  # so that maps that are not finite are no evidence
        if on_decoy is not None:
            on_decoy(tried, decoys)
    p_value = reached / tried if reached == OPENING_STOP else (1 + reached) / (1 + tried)
    return OpeningEvidence(p_value, statistic, tried, largest, reached)


def opening_statistic(
    model: nn.Module,
    images: Images,
    view: MapView,
    trigger: Trigger,
    plain: Mapping[str, SaliencyMaps],
    labels: Labels,
) -> float:
    """Return T: 1 - correlation of the maps with and without a trigger, mean over images and interpreters.

    Args:
        model: The suspect.
        images: Probe images.
        view: Maps compared.
        trigger: Of one key.
        plain: Pooled maps of the same images without it.
        labels: Class explained.
    """
    _, maps = view.pooled_in_chunks(model, trigger.apply(images), labels)
    distances = [1 - metrics.correlation(maps[name], plain[name]) for name in view.interpreters]
    return float(torch.stack(distances).double().mean())


def measure_signature(unkeyed_maps: Mapping[str, Tensor], public: PublicKey) -> SignatureEvidence:
    """Return the signature test's evidence in pooled unkeyed maps, [n, rows, columns] by interpreter.

    Interpreters that count are combined; where there is none, all.
    """
    counts = {name: _count_overlap(maps, public, name) for name, maps in unkeyed_maps.items()}
    counted = counted_interpreters(counts) or tuple(counts)
    return SignatureEvidence(
        _evidence([counts[name] for name in counted]), {name: _evidence([count]) for name, count in counts.items()}
    )


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


def _rule_on_single(shown: DatedClaim, other: DatedClaim) -> Ruling:
    """Rule where one claim alone is shown; an older licence of the other party, if it is dated, leaves it open."""
    if other.time is None or (shown.time is not None and shown.time <= other.time):
        return Ruling(shown.owner, True, "One claim alone is shown, and no older licence stands against it.")
    hidden = (
        "One claim alone is shown, and the other party has the older licence: a second protection may have hidden the "
        "first. Test both keys on the models that the licences cover"
    )
    if other.witnessed:
        return Ruling(None, False, f"{hidden}.")
    return Ruling(shown.owner, False, f"{hidden}; the older time is its owner's own word.")


def _rule_on_times(earlier: DatedClaim, later: DatedClaim) -> Ruling:
    if earlier.witnessed:
        return Ruling(earlier.owner, True, "Both claims are shown; the earlier licence is dated by a third party.")
    if later.witnessed:
        return Ruling(
            None,
            False,
            "Both claims are shown; the earlier time is its owner's own word, and the later licence is dated by a "
            "third party.",
        )
    return Ruling(
        earlier.owner,
        False,
        "Both claims are shown, and the earlier licence wins; but both times are the claimants' own word, which a "
        "third party's date would prove.",
    )


def _count_overlap(maps: Tensor, public: PublicKey, name: str) -> tuple[int, int]:
    """Return (cells, overlap) of the average map's top half and the pattern; ties go to the earlier cell."""
    grid = (maps.shape[1], maps.shape[2])
    average = metrics.normalise_maps(maps.double()).mean(0).flatten().cpu().numpy()
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


def _decoy_source(family: TriggerFamily, generator: torch.Generator | None) -> Callable[[], Trigger]:
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return lambda: family.draw(1, generator)
