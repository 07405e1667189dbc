"""The verdict on a claim: both tests, made on the model as it stands and, where that fails, through re-encodings.

When the first look fails, a model marked with the key may still stand behind an exact re-encoding. All declared ones
(`keyed_xai.ownership.reencodings`) are looked through at the public pattern of a few images, and the best are tested in
full. The first look has half of the level, the others share the rest (Bonferroni): p is twice the first look's, or 2 n
times that of a later one, as `count_looks` says. Which class is explained is settled by rules in which no key has a
part.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import groupby
from math import log2

import torch
from torch import nn

from keyed_xai.keys import OwnerKey, PublicKey
from keyed_xai.models.modes import evaluating
from keyed_xai.ownership.reencodings import (
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
from keyed_xai.ownership.tests import (
    SECRET_LEVEL,
    OpeningEvidence,
    SignatureEvidence,
    counted_interpreters,
    flat_maps,
    measure_opening,
    measure_signature,
    product_tail,
)
from keyed_xai.progress import QUIET, Progress
from keyed_xai.saliency.pooled import PooledSaliency
from keyed_xai.tensors import Images, Labels, Logits, SaliencyMaps
from keyed_xai.triggers import TriggerFamily, derive_trigger

DEFAULT_ALPHA = 2.0**-40
"""Level of a claim: some 10^12 keys would have to be tried to find one that passes by chance."""
_SCREENED = 4  # images on which re-encodings are compared
_CONFIRMED = 12  # re-encodings whose pattern is then read on all images
_TESTED = 3  # of these, how many get the secret test


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
        constant: Number of images whose unkeyed map is constant or not finite, by interpreter.
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


def verify_ownership(
    model: nn.Module,
    images: Images,
    view: PooledSaliency,
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
        view: The maps that are compared.
        key: The claimant's key.
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


def _look(
    model: nn.Module,
    view: PooledSaliency,
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


def _search(model: nn.Module, view: PooledSaliency, trial: _Trial, logits: Logits) -> Iterator[Verdict]:
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
        anew, recoded = write_anew(model, change, winners), recode_view(view, change, spec, eligible)
        verdict = _look(anew, recoded, trial, labels, maps, looks=2 * looks[number], reencoding=change)
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


def _fresh_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator
