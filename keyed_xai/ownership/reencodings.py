"""Exact re-encodings of a network, and how verification looks through them.

Whoever has a network can write it anew without data or training, so that it computes the same on images, or from
outputs, that are encoded in another way: with kernels transposed it takes transposed images. Declared here are those
that a search can undo, one candidate for each combination:

- *turns*: the eight symmetries of the square, of the images or of all kernels. Both are equal where strides allow it;
  where they do not, turning the kernels back undoes turned kernels exactly, and turned images whatever else was turned.
- *orders*: permutations of the image's channels, up to three; of more, the given one and the reverse.
- *encodings*: pixels as claimed, inverted (1 - x), negated after normalisation, or normalised in another usual way.
- *logits* less their mean, since adding one function of the image to all of them changes no prediction; or less the
  mean of those classes that win on some image, so that one added beside them that never wins cannot cancel it.

The list is finite and fixed before any key is seen, so that its length bounds what a search can find by chance.
Candidates that change one of the four alone share one half of the search's level, all others the other half.

A model that only answers is looked at through what can be done to its images.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations, product

import torch
from torch import Tensor, nn

from keyed_xai.errors import ModelError
from keyed_xai.models import Classifier, InputSpec
from keyed_xai.models.catalogue import IMAGENET_MEAN, IMAGENET_STD
from keyed_xai.saliency.pooled import PooledSaliency
from keyed_xai.tensors import Images, Labels, Logits, SaliencyMaps

AS_CLAIMED = "as claimed"
_PERMUTED = 3  # channels of which all orders are tried
_STILL = 1e-6  # of its largest absolute value: a logit that deviates less does not follow the image


@dataclass(frozen=True)
class Turn:
    """A symmetry of the square: transpose or not, then mirror rows, columns, both or neither."""

    transposed: bool = False
    mirrored: tuple[int, ...] = ()

    def apply(self, maps: Tensor) -> Tensor:
        """Return the turned maps, [..., rows, columns]."""
        turned = maps.transpose(-2, -1) if self.transposed else maps
        return turned.flip(self.mirrored) if self.mirrored else turned

    def undo(self, maps: Tensor) -> Tensor:
        """Return what `apply` turned."""
        turned = maps.flip(self.mirrored) if self.mirrored else maps
        return turned.transpose(-2, -1) if self.transposed else turned

    def __str__(self) -> str:
        """The turn in words; empty for none."""
        mirrors = {(): "", (-2,): "upside down", (-1,): "left to right", (-2, -1): "upside down and left to right"}
        parts = ["transposed"] * self.transposed + [f"mirrored {mirrors[self.mirrored]}"] * bool(self.mirrored)
        return " and ".join(parts)


TURNS = tuple(Turn(*each) for each in product((False, True), ((), (-2,), (-1,), (-2, -1))))
"""The eight symmetries of the square, the identity first."""


@dataclass(frozen=True, kw_only=True)
class Reencoding:
    """One way in which a suspect may have been written anew.

    Attributes:
        images: Turn of the images that it takes, and of the maps that it gives.
        kernels: Turn of its kernels.
        order: Which of the image's channels its first, second, ... input is.
        encoding: Name of what becomes of pixels; see `encodings`.
        centred: Which classes' mean its logits are taken less: "" for none, "all", or "winners".
    """

    images: Turn = TURNS[0]
    kernels: Turn = TURNS[0]
    order: tuple[int, ...] = ()
    encoding: str = AS_CLAIMED
    centred: str = ""

    @property
    def changes(self) -> int:
        """Number of things changed."""
        turned = self.images != TURNS[0] or self.kernels != TURNS[0]
        return turned + self._is_reordered + (self.encoding != AS_CLAIMED) + bool(self.centred)

    def __str__(self) -> str:
        """The re-encoding in words."""
        parts = [f"images {self.images}"] * (self.images != TURNS[0])
        parts += [f"kernels {self.kernels}"] * (self.kernels != TURNS[0])
        order = ", ".join(str(each + 1) for each in self.order) if len(self.order) <= _PERMUTED else "of the reverse"
        parts += [f"channels in the order {order}"] * self._is_reordered
        parts += [f"pixels {self.encoding}"] * (self.encoding != AS_CLAIMED)
        return "; ".join(parts + [f"logits less the mean of {self.centred}"] * bool(self.centred))

    @property
    def _is_reordered(self) -> bool:
        return self.order != tuple(range(len(self.order)))


@dataclass(frozen=True, kw_only=True)
class RecodedView(PooledSaliency):
    """The maps of a re-encoded suspect, turned back, for images as the owner's model takes them.

    Attributes:
        inner: Reads the suspect's own maps.
        change: How it was re-encoded.
        spec: What it normalises by; None where that is not known.
        eligible: Classes that may be explained, [classes]; None allows all.
    """

    inner: PooledSaliency
    change: Reencoding
    spec: InputSpec | None = None
    eligible: Tensor | None = field(default=None, compare=False)

    def pooled(
        self, model: nn.Module, images: Images, labels: Labels | None, *, create_graph: bool = False
    ) -> tuple[Logits, dict[str, SaliencyMaps]]:
        """Return logits and pooled maps by interpreter, as `PooledSaliency.pooled` does."""
        recoded = self.change.images.apply(_encode(images, self.change, self.spec))
        if labels is None and self.eligible is not None:
            with torch.no_grad():
                labels = best_class(model(recoded), self.eligible)
        inner = replace(self.inner, interpreters=self.interpreters)
        logits, maps = inner.pooled(model, recoded, labels, create_graph=create_graph)
        return logits, {name: self.change.images.undo(each) for name, each in maps.items()}


def recode_view(
    view: PooledSaliency, change: Reencoding, spec: InputSpec | None = None, eligible: Tensor | None = None
) -> RecodedView:
    """Return a view through a re-encoding."""
    return RecodedView(
        view.interpreters, view.map_layers, view.grid, inner=view, change=change, spec=spec, eligible=eligible
    )


def declared_reencodings(model: nn.Module, view: PooledSaliency, images: Images) -> list[Reencoding]:
    """Return all candidates for a suspect; those for which `write_anew` does the same follow each other.

    Args:
        model: The suspect; without weights it only answers.
        view: The maps that are compared.
        images: Probe images [n, c, h, w]; those that are not square are not transposed.
    """
    square = images.shape[2] == images.shape[3] and view.grid[0] == view.grid[1]
    turns = [(TURNS[0], turn) for turn in TURNS if square or not turn.transposed]
    turns += [(kernels, TURNS[0]) for kernels in _kernel_turns(model)]
    channels = images.shape[1]
    orders = list(permutations(range(channels))) if channels <= _PERMUTED else _both_ways(channels)
    kinds = encodings(input_of(model), channels)
    centred = ("",) if answers_alone(model) else ("", "all", "winners")
    every = product(centred, turns, orders, kinds)
    found = [
        Reencoding(images=images, kernels=kernels, order=order, encoding=kind, centred=centre)
        for centre, (kernels, images), order, kind in every
    ]
    return [change for change in found if change.changes]


def count_looks(candidates: Sequence[Reencoding]) -> list[int]:
    """Return what a p-value found through each candidate is multiplied by, within the search's level."""
    single = [change.changes == 1 for change in candidates]
    shares = Counter(single)
    return [2 * shares[each] for each in single]


def encodings(spec: InputSpec | None, channels: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, by name, factor and summand [channels, 1, 1] from pixels in [0, 1] to what a network takes.

    Args:
        spec: What the claim normalises by; None where nothing is known, as of a model that only answers.
        channels: Number of the image's channels.
    """
    if spec is None:
        return {AS_CLAIMED: _normalise(0.0, 1.0, channels), "inverted": (-_fill(1.0, channels), _fill(1.0, channels))}
    factor, summand = _normalise(spec.mean, spec.std, channels)
    found = {
        AS_CLAIMED: (factor, summand),
        "inverted": (-factor, factor + summand),
        "negated after normalisation": (-factor, -summand),
        **_usual_normalisations(channels),
    }
    different: dict[str, tuple[Tensor, Tensor]] = {}
    for name, pair in found.items():
        if not any(all(map(torch.allclose, pair, other)) for other in different.values()):
            different[name] = pair
    return different


def is_usual_normalisation(spec: InputSpec) -> bool:
    """Return whether a normalisation is one that the search tries on every network."""
    own = _normalise(spec.mean, spec.std, spec.channels)
    return any(all(map(torch.allclose, own, pair)) for pair in _usual_normalisations(spec.channels).values())


def write_anew(model: nn.Module, change: Reencoding, winners: Tensor) -> nn.Module:
    """Return a copy of a suspect with its kernels turned back and, if need be, its logits less a mean.

    One that needs neither comes back itself.

    Args:
        model: The suspect.
        change: How it was re-encoded.
        winners: What `winning_classes` returns, [classes].

    Raises:
        ModelError: The suspect is a module of Python that cannot be copied.
    """
    if change.kernels == TURNS[0] and not change.centred:
        return model
    try:
        anew = copy.deepcopy(model)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({error}), and re-encodings are looked through in copies. Give "
            "--no-search (search=False in Python), or a module that copy.deepcopy takes."
        ) from error
    with torch.no_grad():
        for kernel in filter(_is_kernel, anew.parameters()):
            kernel.copy_(change.kernels.undo(kernel.clone()))
    if change.centred:
        anew.register_forward_hook(
            partial(_centre, winners if change.centred == "winners" else torch.ones_like(winners))
        )
    return anew


def live_classes(logits: Logits) -> Tensor:
    """Return which classes follow the image at all, [classes]; all where none does.

    A class without weights can win everywhere by its bias; its maps are constant. Each is judged by its own logits, so
    that one with enormous ones does not make the others look still.
    """
    values = logits.double()
    live = values.isfinite().all(0) & (values.std(0, correction=0) > _STILL * values.abs().amax(0))
    return live if live.any() else torch.ones_like(live)


def contested_classes(logits: Logits) -> Tensor:
    """Return the live classes without those that win on every image, one after the other, down to two."""
    eligible = live_classes(logits)
    winners = best_class(logits, eligible)
    while bool((winners == winners[0]).all()) and eligible.sum() > 2:
        eligible[winners[0]] = False
        winners = best_class(logits, eligible)
    return eligible


def winning_classes(logits: Logits, eligible: Tensor) -> Tensor:
    """Return which eligible classes win on some image, [classes]; all eligible ones where it is one alone."""
    winners = torch.zeros_like(eligible)
    winners[best_class(logits, eligible)] = True
    return winners if winners.sum() > 1 else eligible


def best_class(logits: Logits, eligible: Tensor) -> Labels:
    """Return for each image the class with the largest logit among those that may be explained."""
    return logits.masked_fill(~eligible, float("-inf")).argmax(1)


def answers_alone(model: nn.Module) -> bool:
    """Return whether nothing inside a suspect can be seen or changed."""
    return next(model.parameters(), None) is None and next(model.buffers(), None) is None


def input_of(model: nn.Module) -> InputSpec | None:
    """Return what a suspect normalises by; None where it is not known."""
    return model.input if isinstance(model, Classifier) else None


def _kernel_turns(model: nn.Module) -> Iterator[Turn]:
    """Yield how kernels may have been turned; all of them can be transposed only if all are square."""
    kernels = list(filter(_is_kernel, model.parameters()))
    square = all(kernel.shape[2] == kernel.shape[3] for kernel in kernels)
    return (turn for turn in TURNS[1:] if kernels and (square or not turn.transposed))


def _is_kernel(parameter: Tensor) -> bool:
    return parameter.ndim == 4 and max(parameter.shape[2:]) > 1


def _encode(images: Images, change: Reencoding, spec: InputSpec | None) -> Images:
    """Return images that the suspect's own normalisation turns into what the re-encoded network takes."""
    channels = images.shape[1]
    factor, summand = (each.to(images) for each in encodings(spec, channels)[change.encoding])
    taken = (images * factor + summand)[:, list(change.order) or slice(None)]
    if spec is None:
        return taken
    mean, std = (_fill(each, channels).to(images) for each in (spec.mean, spec.std))
    return taken * std + mean


def _usual_normalisations(channels: int) -> dict[str, tuple[Tensor, Tensor]]:
    found = {
        "not normalised": _normalise(0.0, 1.0, channels),
        "from 0 to 255": _normalise(0.0, 1 / 255, channels),
        "from -1 to 1": _normalise(0.5, 0.5, channels),
    }
    if channels == len(IMAGENET_MEAN):
        found["normalised as ImageNet's"] = _normalise(IMAGENET_MEAN, IMAGENET_STD, channels)
    return found


def _normalise(mean: float | tuple[float, ...], std: float | tuple[float, ...], channels: int) -> tuple[Tensor, Tensor]:
    return 1 / _fill(std, channels), -_fill(mean, channels) / _fill(std, channels)


def _fill(value: float | tuple[float, ...], channels: int) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).expand(channels)[:, None, None]


def _both_ways(count: int) -> list[tuple[int, ...]]:
    return [tuple(range(count)), tuple(reversed(range(count)))]


def _centre(classes: Tensor, _model: nn.Module, _images: object, logits: Logits) -> Logits:
    return logits - logits[:, classes].mean(1, keepdim=True)
