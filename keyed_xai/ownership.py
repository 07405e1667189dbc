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

When the first look fails, a model marked with the key may still stand behind an exact re-encoding. Verification looks
through all declared ones (`keyed_xai.reencodings`) at the public pattern of a few images, and tests the best in full.
The first look has half of the level, the others share the rest (Bonferroni): p is twice the first look's, or 2 n times
that of a later one, as `count_looks` says. Which class is explained is settled by rules that no key has a part in.

VisualBackProp's maps count for nothing: whoever has the weights can scale channels up and down without changing a
prediction, and its maps follow the scale (arXiv 2205.00199). Its pattern is reported beside the others'; which
interpreters count is settled by their names, before any test is made, so that the tests stay exact.

Probe images come from a public set or from the verifier, never from the claimant.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import chain, groupby
from math import comb, factorial, isfinite, log, log2

import numpy as np
import torch
from torch import Tensor, nn

from keyed_xai import metrics
from keyed_xai.keys import OwnerKey, PublicKey
from keyed_xai.maps import MapView
from keyed_xai.models.modes import evaluating
from keyed_xai.patterns import signature_cells
from keyed_xai.progress import QUIET, Progress
from keyed_xai.reencodings import (
    Reencoding,
    best_class,
    contested_classes,
    count_looks,
    declared_reencodings,
    input_of,
    live_classes,
    recode_view,
    winning_classes,
    write_anew,
)
from keyed_xai.tensors import Images, Labels, Logits, SaliencyMaps
from keyed_xai.triggers import Trigger, TriggerFamily, derive_trigger

DEFAULT_ALPHA = 2.0**-40
"""Level of a claim: some 10^12 keys would have to be tried to find one that passes by chance."""
OPENING_STOP = 10
"""Decoy keys that must reach the owner's statistic before the opening test stops early."""
SECRET_LEVEL = 0.01
"""Largest p-value of the opening test that lets both tests together show a claim; see `OpeningEvidence.holds`."""
MAP_FLATNESS = 1e-6
"""Of a map's largest absolute value: cells that differ by less show nothing."""
_NEAR_LEAST = 0.002
_SCREENED = 4  # images on which re-encodings are compared
_CONFIRMED = 12  # re-encodings whose pattern is then read on all images
_TESTED = 3  # of these, how many get the secret test
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


class Finding(StrEnum):
    """What both tests come to.

    KEY: the model answers to the key; where its pattern is claimed too, to the secret trigger as well. PUBLIC_PATTERN:
    it shows the public pattern, and the secret trigger was not tested. Only these two count as shown.
    """

    KEY = "key"
    PUBLIC_PATTERN = "public pattern"
    PATTERN_ONLY = "public pattern only"
    CONSTANT_MAPS = "constant maps"
    NOT_COUNTED = "not counted"
    NOT_TESTED = "not tested"
    NOTHING = "nothing"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What both tests show.

    Attributes:
        alpha: The level asked for.
        opening: None when the secret key was not at hand, or no outcome could have mattered.
        has_key: Whether the secret key was at hand.
        signature: The public test; None when the claim has no signature pattern.
        refused: Whether the claim names no interpreter that counts: nothing is shown then, whatever the tests found.
        looks: What p-values are multiplied by, for all looks through re-encodings that were or could have been taken.
        reencoding: The one looked through; None of the suspect as it stands.
        images: Probe images.
        constant: Of how many of them the unkeyed map is constant or not finite, by interpreter.
    """

    alpha: float
    opening: OpeningEvidence | None
    signature: SignatureEvidence | None
    refused: bool = False
    has_key: bool = False
    looks: int = 1
    reencoding: Reencoding | None = None
    images: int = 0
    constant: Mapping[str, int] = field(default_factory=dict)

    @property
    def log2_p(self) -> float:
        """Base-2 logarithm of the p-value of all that was tested, looks counted; at most 0."""
        single = [log2(self.opening.p_value)] if self.opening else []
        single += [self.signature.combined.log2_p] if self.signature else []
        return min(0.0, product_tail(sum(single), len(single)) + log2(self.looks)) if single else 0.0

    @property
    def finding(self) -> Finding:
        """What the tests come to."""
        if self.opening is None and self.signature is None:
            return Finding.NOT_TESTED
        if self.refused:
            return Finding.NOT_COUNTED
        if self._is_unreadable:
            return Finding.CONSTANT_MAPS
        strong = self.log2_p <= log2(self.alpha)
        if strong and self.opening is None and not self.has_key:
            return Finding.PUBLIC_PATTERN
        if strong and self.opening is not None and (self.signature is None or self.opening.holds):
            return Finding.KEY
        return Finding.PATTERN_ONLY if self._has_pattern else Finding.NOTHING

    @property
    def shown(self) -> bool:
        """Whether the claim is shown."""
        return self.finding in (Finding.KEY, Finding.PUBLIC_PATTERN)

    @property
    def _has_pattern(self) -> bool:
        return self.signature is not None and (self.signature.combined.log2_p + log2(self.looks) <= log2(self.alpha))

    @property
    def _is_unreadable(self) -> bool:
        """Whether all maps that count are constant."""
        counted = counted_interpreters(self.constant)
        return bool(counted) and all(self.constant[name] == self.images for name in counted)


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """What every look at a suspect has in common; fields as `verify_ownership`'s arguments."""

    images: Images
    key: OwnerKey | PublicKey
    family: TriggerFamily
    alpha: float
    decoys: int
    test_signature: bool
    may_count: bool
    generator: torch.Generator
    progress: Progress

    @property
    def public(self) -> PublicKey:
        return self.key.public if isinstance(self.key, OwnerKey) else self.key


def counted_interpreters(names: Iterable[str]) -> tuple[str, ...]:
    """Return those of some interpreters whose maps count as evidence, in order."""
    return tuple(name for name in names if name not in RESCALABLE)


def verify_ownership(
    model: nn.Module,
    images: Images,
    view: MapView,
    key: OwnerKey | PublicKey,
    family: TriggerFamily,
    *,
    alpha: float = DEFAULT_ALPHA,
    decoys: int = 999,
    test_signature: bool = True,
    search: bool = True,
    may_count: bool = False,
    generator: torch.Generator | None = None,
    progress: Progress = QUIET,
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
        search: Whether to look through exact re-encodings when the suspect as it stands does not show the pattern.
        may_count: Whether the suspect may answer by the number of the query, as a server can. The owner's trigger then
            takes a random place, and the secret test is left out where no outcome would matter.
        generator: Draws the decoy keys; None seeds one from the operating system.
        progress: Hears of "trying random keys" and of "looking through re-encodings".

    Raises:
        ValueError: There are no images or no decoys, or alpha is no probability.
        ModelError: The model lacks a layer that the maps need.
    """
    if not len(images) or decoys < 1 or not 0 < alpha < 1:
        raise ValueError(
            f"Expected images, at least 1 decoy and 0 < alpha < 1; got {len(images)}, {decoys} and {alpha}."
        )
    trial = _Trial(
        images=images,
        key=key,
        family=family,
        alpha=alpha,
        decoys=decoys,
        test_signature=test_signature,
        may_count=may_count,
        generator=generator or _fresh_generator(),
        progress=progress,
    )
    searched = search and test_signature
    with evaluating(model):
        logits, maps = view.pooled_in_chunks(model, images)
        labels = best_class(logits, live_classes(logits))
        if not torch.equal(labels, logits.argmax(1)):
            _, maps = view.pooled_in_chunks(model, images, labels)
        first = _look(model, view, trial, labels, maps, looks=2 if searched else 1)
        if not searched or first.shown or first.refused or (may_count and first.opening is not None):
            return first
        return min([first, *_search(model, view, trial, logits)], key=_rank)


def measure_opening(
    model: nn.Module,
    images: Images,
    view: MapView,
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
        view: Maps compared.
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
    view: MapView,
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
        view: Maps compared.
        trigger: Of one key.
        plain: Pooled maps of the same images without it.
        labels: Class explained.
        readable: Of `readable_maps`, where it is at hand.
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


def _look(
    model: nn.Module,
    view: MapView,
    trial: _Trial,
    labels: Labels,
    maps: Mapping[str, SaliencyMaps],
    *,
    looks: int,
    reencoding: Reencoding | None = None,
) -> Verdict:
    """Return what both tests show through one view, given the classes explained and the unkeyed maps."""
    counted = counted_interpreters(view.interpreters)
    verdict = Verdict(
        alpha=trial.alpha,
        opening=None,
        signature=measure_signature(maps, trial.public) if trial.test_signature else None,
        refused=not counted,
        has_key=isinstance(trial.key, OwnerKey),
        looks=looks,
        reencoding=reencoding,
        images=len(trial.images),
        constant={name: int(flat_maps(each).sum()) for name, each in maps.items()},
    )
    if not isinstance(trial.key, OwnerKey) or (trial.may_count and _is_lost(verdict, trial.decoys)):
        return verdict
    place = int(torch.randint(trial.decoys + 1, (), generator=trial.generator)) if trial.may_count else 0
    opening = measure_opening(
        model,
        trial.images,
        replace(view, interpreters=counted or view.interpreters),
        derive_trigger(trial.key, trial.family),
        lambda: trial.family.draw(1, trial.generator),
        decoys=trial.decoys,
        labels=labels,
        place=place,
        progress=trial.progress,
    )
    return replace(verdict, opening=opening)


def _search(model: nn.Module, view: MapView, trial: _Trial, logits: Logits) -> Iterator[Verdict]:
    """Yield verdicts through the declared re-encodings with most of the pattern in them, up to one that is shown.

    A wrong encoding may leave the pattern whole and hide the trigger, so that several get the secret test; of those
    with equal patterns the ones through which predictions vary most. Of a suspect that may count, one does: the trigger
    that came twice would be the owner's.
    """
    candidates, spec = declared_reencodings(model, view, trial.images), input_of(model)
    looks, eligible = count_looks(candidates), contested_classes(logits)
    winners = winning_classes(logits, eligible)

    def read(anew: nn.Module, number: int, images: Images) -> tuple[float, Logits, dict[str, SaliencyMaps]]:
        logits, maps = recode_view(view, candidates[number], spec, eligible).pooled_in_chunks(anew, images)
        return measure_signature(maps, trial.public).combined.log2_p + log2(looks[number]), logits, maps

    screened: list[float] = []
    for _, alike in groupby(candidates, key=lambda change: (change.kernels, change.centred)):
        group = list(alike)
        anew = write_anew(model, group[0], winners)
        for _ in group:
            screened.append(read(anew, len(screened), trial.images[:_SCREENED])[0])
            trial.progress.advance("looking through re-encodings", len(screened), len(candidates))
    best = sorted(range(len(screened)), key=screened.__getitem__)[:_CONFIRMED]
    confirmed = {}
    for number in best:
        weighted, logits, maps = read(write_anew(model, candidates[number], winners), number, trial.images)
        labels = best_class(logits, eligible)
        confirmed[weighted, -variety(labels), number] = labels, maps
    for order in sorted(confirmed)[: 1 if trial.may_count else _TESTED]:
        number, (labels, maps) = order[2], confirmed[order]
        change = candidates[number]
        anew, seen = write_anew(model, change, winners), recode_view(view, change, spec, eligible)
        verdict = _look(anew, seen, trial, labels, maps, looks=2 * looks[number], reencoding=change)
        yield verdict
        if verdict.shown:
            return


def variety(labels: Labels) -> float:
    """Return the entropy of classes over images, nats."""
    shares = labels.bincount().double() / len(labels)
    return float(torch.special.entr(shares).sum())


def _rank(verdict: Verdict) -> tuple[bool, bool, bool]:
    """Return what sorts verdicts that say more to the front."""
    finding = verdict.finding
    return not verdict.shown, finding is not Finding.PATTERN_ONLY, finding is Finding.CONSTANT_MAPS


def _is_lost(verdict: Verdict, decoys: int) -> bool:
    """Return whether the best outcome of the secret test could not show a claim."""
    pattern = verdict.signature.combined.log2_p if verdict.signature else 0.0
    best = product_tail(pattern - log2(1 + decoys), 1 + (verdict.signature is not None))
    weak = verdict.signature is not None and 1 / (1 + decoys) > SECRET_LEVEL
    return verdict.refused or weak or best + log2(verdict.looks) > log2(verdict.alpha)


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


def _fresh_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator
