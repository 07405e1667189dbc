"""Which architecture a set of weights belongs to, from the names and shapes of its tensors alone."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NoReturn

from torch import Tensor

from keyed_xai.errors import ModelError
from keyed_xai.models import catalogue
from keyed_xai.models.catalogue import SOURCES, Shapes
from keyed_xai.models.contents import is_averaged, is_wanted, unknown_part_error
from keyed_xai.models.heads import Head, list_heads
from keyed_xai.models.naming import (
    Reading,
    current_names,
    filter_known,
    list_prefixes,
    list_readings,
    list_split_readings,
    numbers_in,
)

_LARGEST_HEAD = 6  # tensors of torchvision's heads: three linear layers
_SHOWN = 4  # tensors or names listed in a message
_MOST_NEARBY = 3  # prefixes below which the nearest architecture is sought


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """An architecture, and what its weights say about input and output.

    Attributes:
        architecture: Name that the source knows, such as ``resnet50``.
        source: ``keyed_xai``, ``torchvision``, ``efficientnet_lite_pytorch`` or ``timm``.
        classes: Number of logits, from the last layer's weight.
        channels: Number of the image's channels, from the first convolution's weight; 1 for rows of a table.
        head: Layers in place of the architecture's own last ones; None where it has its own.
        names: Names of the network's tensors: in the file, to those in the network.
        notes: Sentences for the user about which prefix was taken off, and what was left out.
    """

    architecture: str
    source: str
    classes: int
    channels: int
    head: Head | None = None
    names: Mapping[str, str] = field(default_factory=dict, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class _Fit:
    """An architecture that tensors of a file fit, and which of them."""

    reading: Reading
    recognised: Recognised


@dataclass(frozen=True, kw_only=True)
class _Mismatch:
    """Why weights are not an architecture's."""

    architecture: str
    source: str
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    reshaped: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.missing) + len(self.extra) + len(self.reshaped)

    def __str__(self) -> str:
        parts = {"missing": self.missing, "not expected": self.extra, "with another shape": self.reshaped}
        return "; ".join(f"{len(names)} tensors {what} ({_some(names)})" for what, names in parts.items() if names)


def recognise_architecture(
    state_dict: Mapping[str, Tensor], *, arch: str | None = None, hints: Iterable[str] = (), weights: str | None = None
) -> Recognised:
    """Return the architecture that a state dict's tensor names and shapes fit, below whatever prefix.

    SmallResNet and TableMLP are tried first, then every torchvision classification model, EfficientNet-Lite and timm's
    models where they are installed. The number of classes, of channels, and a vision transformer's image size may be
    any. Where torchvision and timm both have the architecture torchvision's is taken. Tensors of losses and metrics,
    and what is beside the network's prefix, are left out; whole modules that the network has not only if `arch` is
    given.

    Args:
        state_dict: Names as in a file, wrapper prefixes and all.
        arch: Take this one; ``timm:NAME`` or ``torchvision:NAME`` says whose.
        hints: Names that settle an ambiguity but are otherwise not trusted.
        weights: Which of several networks: ``ema`` for averages, or a part of its prefix.

    Raises:
        ModelError: None fits, several do, the one named does not, or what would be left out is the larger part.
    """
    shapes = catalogue.shapes_of(state_dict)
    if arch is not None:
        return _choose(_fits_of_named(shapes, named_candidates(arch)), shapes, weights, sure=True)
    known = set(hints)
    fits = _collect(list_readings(shapes), shapes, lambda inner: _recognise(inner, known))
    fits = fits or _collect(list_split_readings(shapes), shapes, lambda inner: _recognise(inner, known))
    fits = fits or _collect(list_readings(shapes), shapes, lambda inner: _recognise_headed(inner, known))
    if not fits:
        _raise_unknown(shapes)
    return _choose(fits, shapes, weights, sure=weights is not None)


def named_candidates(arch: str) -> list[tuple[str, str]]:
    """Return (source, architecture) for a name such as ``resnet50``, ``ResNet50`` or ``timm:resnet50``.

    Raises:
        ModelError: No source that is installed knows it; close names are listed.
    """
    match = re.fullmatch(rf"(?:({'|'.join(SOURCES)})[:/])?(.+)", arch)
    source, name = match.groups() if match else (None, arch)
    sources = [source] if source else list(SOURCES)
    for spelling in (name, name.lower()):
        found = [(source, spelling) for source in sources if catalogue.knows(source, spelling)]
        if found:
            return found
    known = [known for source in sources for known in catalogue.architectures(source)]
    close = difflib.get_close_matches(name.lower(), known, 5) or ["resnet50", "vgg16", "efficientnet_b0"]
    absent = [source for source in sources if not catalogue.installed(source)]
    also = f" ({', '.join(absent)} not installed.)" if absent else ""
    raise ModelError(f"no architecture is called {arch!r}. Names like it: {', '.join(close)}.{also}")


def _collect(
    readings: Iterable[Reading], shapes: Shapes, recognise: Callable[[Shapes], Recognised | None]
) -> list[_Fit]:
    """Return the readings that fit an architecture; none of them takes a tensor that an earlier one took."""
    fits: list[_Fit] = []
    taken: set[str] = set()
    for reading in readings:
        if taken.isdisjoint(reading.names) and (found := recognise(reading.shapes(shapes))) is not None:
            fits.append(_Fit(reading, found))
            taken.update(reading.names)
            if not reading.left_out:
                break
    return fits


def _recognise(shapes: Shapes, hints: set[str]) -> Recognised | None:
    """Return the architecture that tensors fit exactly, None if there is none.

    Raises:
        ModelError: They fit several.
    """
    for source in SOURCES:
        results = [_compare(source, name, shapes) for name in _candidates(source, shapes)]
        fits = [result for result in results if isinstance(result, Recognised)]
        if fits:
            return _only(fits, hints)
    return None


def _recognise_headed(shapes: Shapes, hints: set[str]) -> Recognised | None:
    """Return the architecture that tensors fit but for a head of other layers, None if there is none.

    Raises:
        ModelError: They fit several.
    """
    fits = _other_heads(shapes)
    return _only(fits, hints) if fits else None


def _only(fits: list[Recognised], hints: set[str]) -> Recognised:
    """Return the only architecture found, or the first of several that a hint names.

    Raises:
        ModelError: There are several, and no hint says which.
    """
    hinted = [fit for fit in fits if fit.architecture in hints]
    return (hinted or fits)[0] if len(fits) == 1 or hinted else _raise_ambiguous(fits)


def _fits_of_named(shapes: Shapes, candidates: list[tuple[str, str]]) -> list[_Fit]:
    """Return how the weights fit the first of the architectures named that they fit at all.

    Raises:
        ModelError: They fit none.
    """
    mismatches: list[_Mismatch] = []
    for source, name in candidates:

        def compare(inner: Shapes, source: str = source, name: str = name) -> Recognised | None:
            result = _compare(source, name, inner)
            if isinstance(result, Recognised):
                return result
            mismatches.append(result)
            return None

        known = filter_known(shapes, catalogue.signature(source, name))
        fits = _collect(chain(list_readings(shapes), known, list_split_readings(shapes)), shapes, compare)
        if fits:
            return fits
    headed = _collect(list_readings(shapes), shapes, lambda inner: next(iter(_other_heads(inner, candidates)), None))
    if headed:
        return headed
    worst = min(mismatches, key=len)
    raise ModelError(
        f"the weights do not fit {worst.architecture} ({worst.source}): {worst}. Name another architecture with "
        "--arch, leave --arch out to have it recognised, or give the module itself in Python (wrap_network)."
    )


def _choose(fits: list[_Fit], shapes: Shapes, weights: str | None, *, sure: bool) -> Recognised:
    """Return the network asked for, else the first that is no average; `sure` if the user knows what is left out.

    Raises:
        ModelError: It is not there, or more is left out than taken.
    """
    wanted = fits
    if weights is not None:
        wanted = [each for each in fits if is_wanted(each.reading.prefix, weights, averaged=_averaged(each))]
        if not wanted:
            raise unknown_part_error(weights, [each.reading.prefix.rstrip(".") for each in fits])
    chosen = min(wanted, key=_averaged)
    others = [each for each in fits if each is not chosen]
    left_out = set(chosen.reading.left_out).difference(*(each.reading.names for each in others))
    if not sure and numbers_in(shapes, left_out) > numbers_in(shapes, chosen.reading.names):
        _raise_smaller_part(chosen, shapes)
    done = _describe(chosen, others)
    notes = (*((done,) if done else ()), *chosen.recognised.notes)
    return replace(chosen.recognised, names=chosen.reading.names, notes=notes)


def _averaged(fit: _Fit) -> bool:
    return is_averaged(fit.reading.prefix)


def _describe(chosen: _Fit, others: list[_Fit]) -> str:
    """Return a sentence on what was done to the names in a file; empty if nothing was."""
    parts = describe_reading(chosen.reading)
    if others:
        named = [other.reading.prefix.rstrip(".") for other in others]
        averages = [other for other in others if _averaged(other)]
        how = "ema" if averages else named[0] or "NAME"
        parts.append(f"the file also has {_some(named)}, which --weights {how} takes")
    return f"Taken as {chosen.recognised.architecture}: {'; '.join(parts)}." if parts else ""


def describe_reading(reading: Reading) -> list[str]:
    """Return, in words, what was done to the names in a file; nothing if they were taken as they are."""
    parts = list[str]()
    if reading.prefix:
        parts.append(f"the prefix {reading.prefix} was taken off")
    if reading.head is not None and reading.head[0] != reading.head[1]:
        parts.append(f"{reading.head[0]} is taken for its {reading.head[1]}")
    if reading.left_out:
        parts.append(f"left out: {_some(reading.left_out)} ({len(reading.left_out)} tensors)")
    return parts


def _candidates(source: str, shapes: Shapes) -> list[str]:
    """Return the architectures of a source that have the weights' tensor names, at least by the table."""
    names = catalogue.architectures(source)
    if source == "keyed_xai":
        fits = {"SmallResNet": catalogue.small_resnet_widths, "TableMLP": catalogue.table_widths}
        return [name for name in names if fits[name](shapes)]
    if source == "efficientnet_lite_pytorch":
        return [*names] if "_conv_stem.weight" in shapes else []
    groups = catalogue.name_table()[source]
    count = sum(not name.endswith("num_batches_tracked") for name in shapes)
    alike = [group for group in groups if group.tensors == count]
    digest = catalogue.digest_names(shapes) if alike else ""
    listed = [name for group in alike if group.digest == digest for name in group.architectures if name in names]
    if listed or source == "timm":  # timm adds hundreds a year: newer ones than the table's need --arch
        return listed
    return [name for name in names if all(name not in group.architectures for group in groups)]


def _compare(source: str, architecture: str, shapes: Shapes) -> Recognised | _Mismatch:
    """Hold weights against an architecture, with any number of classes and channels."""
    expected = catalogue.signature(source, architecture, shapes)
    missing = tuple(n for n in expected if n not in shapes and not n.endswith("num_batches_tracked"))
    extra = tuple(name for name in shapes if name not in expected)
    own = source == "keyed_xai"  # whose widths may be 1,000 too
    head = [n for n, shape in expected.items() if shape[:1] == (1000,) and (n.startswith("fc.") or not own)]
    stem = catalogue.stem_name(expected)
    classes = next((shapes[name][0] for name in reversed(head) if len(shapes.get(name, ())) > 0), 0)
    channels = 1 if stem is None else 0
    fitted = {name: (classes, *expected[name][1:]) for name in head}
    if stem is not None and len(shapes.get(stem, ())) == 4:
        width, of_three = shapes[stem][1], expected[stem][1]  # some networks fold pixels into channels first
        channels = 0 if 3 * width % of_three else 3 * width // of_three
        fitted[stem] = (expected[stem][0], width, *expected[stem][2:])
    reshaped = tuple(
        f"{name} {list(shapes[name])} instead of {list(fitted.get(name, shape))}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != fitted.get(name, shape)
    )
    if missing or extra or reshaped or classes < 1 or channels < 1:
        return _Mismatch(architecture=architecture, source=source, missing=missing, extra=extra, reshaped=reshaped)
    return Recognised(architecture=architecture, source=source, classes=classes, channels=channels)


def _other_heads(shapes: Shapes, named: Sequence[tuple[str, str]] | None = None) -> list[Recognised]:
    """Return the architectures, all or some named, that weights fit but for a head of other layers."""
    found: dict[tuple[str, str], Recognised] = {}
    for head in list_heads(shapes):
        body = {name: shape for name, shape in shapes.items() if not name.startswith(f"{head.module}.")}
        for source, architecture in _headless(body, head) if named is None else named:
            expected = catalogue.signature(source, architecture, shapes)
            own = {name: shape for name, shape in expected.items() if name.startswith(f"{head.module}.")}
            widths = [shape[1] for shape in own.values() if len(shape) == 2]
            fit = _compare(source, architecture, {**body, **own}) if widths[:1] == [head.inputs] else None
            if isinstance(fit, Recognised):
                headed = replace(fit, classes=head.classes, head=head, notes=head.notes)
                found.setdefault((source, architecture), headed)
        if found:
            break
    return list(found.values())


def _headless(body: Shapes, head: Head) -> list[tuple[str, str]]:
    """Return architectures that may have a body: with a linear head, or torchvision's with as many tensors."""
    headed = {**body, f"{head.module}.weight": (), f"{head.module}.bias": ()}
    for source in ("torchvision", "timm"):
        found = [(source, name) for name in _candidates(source, headed)]
        if found:
            return found
    count = sum(not name.endswith("num_batches_tracked") for name in body)
    groups = [group for group in catalogue.name_table()["torchvision"] if 0 <= group.tensors - count <= _LARGEST_HEAD]
    return [("torchvision", name) for group in groups for name in group.architectures]


def _raise_ambiguous(fits: list[Recognised]) -> NoReturn:
    names = [f"{fit.source}:{fit.architecture}" for fit in fits]
    raise ModelError(
        f"the weights fit {len(fits)} architectures that compute different things: {_some(names, 12)}. "
        f"Say which with --arch, for example --arch {names[0]}."
    )


def _raise_smaller_part(chosen: _Fit, shapes: Shapes) -> NoReturn:
    reading, name = chosen.reading, chosen.recognised.architecture
    where = f"below {reading.prefix}" if reading.prefix else "in it"
    raise ModelError(
        f"the file holds a {name} {where}, but {numbers_in(shapes, reading.left_out)} of its numbers are in other "
        f"tensors ({_some(reading.left_out)}), more than the {name}'s {numbers_in(shapes, reading.names)}: it is "
        f"probably a part of a larger network. Say --arch {name} if it is the classifier all the same."
    )


def _raise_unknown(shapes: Shapes) -> NoReturn:
    nearest, prefix = min(_nearby(shapes), key=lambda pair: len(pair[0]), default=(None, ""))
    near = ""
    if nearest is not None and len(nearest) < len(shapes):
        below = f", below {prefix}" if prefix else ""
        near = f" The nearest is {nearest.architecture} ({nearest.source}){below}: {nearest}."
    missing = [source for source in SOURCES if not catalogue.installed(source)]
    if "timm" in missing:
        digests = {catalogue.digest_names(reading.names.values()) for reading in list_readings(shapes)}
        others = [group for group in catalogue.name_table()["timm"] if group.digest in digests]
        if others:
            near += f" They could be timm's {_some(others[0].architectures)}: install timm (keyed-xai[timm])."
    raise ModelError(
        f"the {len(shapes)} tensors in the file ({_some([f'{n} {list(s)}' for n, s in shapes.items()])}) fit no "
        f"architecture of {', '.join(source for source in SOURCES if source not in missing)}.{near} Name the "
        "architecture with --arch if it is one of those, or build the module in Python and pass it to wrap_network."
    )


def _nearby(shapes: Shapes) -> Iterator[tuple[_Mismatch, str]]:
    """Yield how the weights differ from architectures with the same names or nearly as many, and below which prefix."""
    for prefix in list_prefixes(shapes)[:_MOST_NEARBY] or [""]:
        names = current_names([name for name in shapes if name.startswith(prefix)], prefix)
        inner = {name: shapes[file_name] for file_name, name in names.items()}
        count = sum(not name.endswith("num_batches_tracked") for name in inner)
        groups = sorted(catalogue.name_table()["torchvision"], key=lambda group: abs(group.tensors - count))[:5]
        near = [("torchvision", group.architectures[0]) for group in groups]
        known = [pair for pair in near if catalogue.knows(*pair)]
        same = [(source, name) for source in SOURCES for name in _candidates(source, inner)]
        for source, name in [*same, *known]:
            result = _compare(source, name, inner)
            if isinstance(result, _Mismatch):
                yield result, prefix


def _some(names: Iterable[str], shown: int = _SHOWN) -> str:
    """Return the first few of many names."""
    listed = list(names)
    return ", ".join(listed[:shown]) + (", ..." if len(listed) > shown else "")
