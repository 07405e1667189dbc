"""From a tensor's name in a file to its name in a network: wrappers' prefixes, parts besides, older names.

A file may hold a network below any prefix (``module.`` of DataParallel, ``_orig_mod.`` of torch.compile, ``model.`` of
Lightning, ``encoder_q.`` of MoCo), beside losses, metrics and other networks, or with its last layer elsewhere.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import NamedTuple

from keyed_xai.models.contents import is_averaged

Shapes = Mapping[str, tuple[int, ...]]

_OLD_NAMES = (  # renamed by torchvision itself when it loads its own older files
    (re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$"), r"\1\2"),
    (re.compile(r"^(encoder\.layers\.encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"^(encoder\.layers\.encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)
_SIDE_WORDS = {
    "criterion", "loss", "losses", "metric", "metrics", "acc", "accuracy", "auroc", "f1", "precision", "recall",
    "confmat", "queue", "projector", "predictor", "prototypes", "averaged", "steps", "updates",
}  # fmt: skip
_HEADS = ("fc", "classifier", "head", "head.fc", "classifier.1", "heads.head")
_FEWEST, _MOST = 4, 4096  # tensors of a network
_MOST_PREFIXES = 32
_DEEPEST_PREFIX = 8


class Reading(NamedTuple):
    """One way to take a file's tensors for a network's.

    Attributes:
        prefix: Taken off the names.
        names: Names in the file to names in the network.
        left_out: Names in the file of tensors that are not the network's.
        head: Name in the file of the last layer, if it is from outside the prefix, and its name in the network.
    """

    prefix: str
    names: dict[str, str]
    left_out: tuple[str, ...]
    head: tuple[str, str] | None = None

    def shapes(self, found: Shapes) -> dict[str, tuple[int, ...]]:
        """Return the network's shapes, given those in the file."""
        return {name: found[file_name] for file_name, name in self.names.items()}


def current_names(files: Iterable[str], prefix: str = "") -> dict[str, str]:
    """Return names in a file to names in the network: the prefix taken off, older names brought up to date."""
    bare = {name: name.removeprefix(prefix) for name in files}
    current = {name: _current_name(inner) for name, inner in bare.items()}
    return current if len(set(current.values())) == len(current) else bare


def list_readings(shapes: Shapes) -> Iterator[Reading]:
    """Yield how the tensors below each prefix may be a network's: all of them, or without those of losses and metrics.

    The prefixes with the most tensors come first, and the shortest of those with as many.
    """
    for prefix in list_prefixes(shapes):
        yield _read(shapes, prefix, [name for name in shapes if name.startswith(prefix)])
        kept = _without_sides(shapes, prefix)
        if kept:
            yield _read(shapes, prefix, kept)


def list_split_readings(shapes: Shapes) -> Iterator[Reading]:
    """Yield how the tensors below a prefix may be a network's whose last layer is the file's only other linear one."""
    for prefix in list_prefixes(shapes):
        inside = [name for name in shapes if name.startswith(prefix)]
        layers = {
            name.removesuffix("weight")
            for name, shape in shapes.items()
            if len(shape) == 2 and name.endswith(".weight") and not name.startswith(prefix) and not _says_side(name)
        }
        if len(layers) != 1:  # also without a prefix, where everything is inside
            continue
        layer = layers.pop()
        ends = [end for end in ("weight", "bias") if layer + end in shapes]
        for head in _HEADS:
            reading = _read(shapes, prefix, inside)
            moved = {layer + end: f"{head}.{end}" for end in ends}
            left = tuple(name for name in reading.left_out if name not in moved)
            yield Reading(prefix, reading.names | moved, left, (layer.rstrip("."), head))


def filter_known(shapes: Shapes, known: Iterable[str]) -> Iterator[Reading]:
    """Yield, below each prefix, the tensors of modules that an architecture has; `known` are its names."""
    modules = {name.partition(".")[0] for name in known}
    for prefix in list_prefixes(shapes):
        inside = [name for name in shapes if name.startswith(prefix)]
        current = current_names(inside, prefix)
        kept = [name for name in inside if current[name].partition(".")[0] in modules]
        if kept:
            yield _read(shapes, prefix, kept)


def list_prefixes(shapes: Shapes) -> list[str]:
    """Return the prefixes below which a network may be: a few tensors, one of them of a layer."""
    counts: dict[str, int] = {}
    layers: set[str] = set()
    for name, shape in shapes.items():
        parts = name.split(".")[:-1][:_DEEPEST_PREFIX]
        for end in range(len(parts) + 1):
            prefix = "".join(f"{part}." for part in parts[:end])
            counts[prefix] = counts.get(prefix, 0) + 1
            if len(shape) > 1:
                layers.add(prefix)
    likely = [prefix for prefix, count in counts.items() if _FEWEST <= count <= _MOST and prefix in layers]
    return sorted(likely, key=lambda prefix: (-counts[prefix], len(prefix)))[:_MOST_PREFIXES]


def numbers_in(shapes: Shapes, names: Iterable[str]) -> int:
    """Return how many numbers some tensors hold."""
    return sum(prod(shapes[name]) for name in names)


def _read(shapes: Shapes, prefix: str, names: list[str]) -> Reading:
    kept = current_names(names, prefix)
    return Reading(prefix, kept, tuple(name for name in shapes if name not in kept))


def _without_sides(shapes: Shapes, prefix: str) -> list[str]:
    """Return the names below a prefix but those of modules that cannot be layers; empty if that are all or none."""
    modules: dict[str, list[str]] = {}
    for name in shapes:
        if name.startswith(prefix):
            modules.setdefault(name.removeprefix(prefix).partition(".")[0], []).append(name)
    kept = {module: names for module, names in modules.items() if not _is_side(module, names, shapes)}
    return [name for names in kept.values() for name in names] if len(kept) < len(modules) else []


def _is_side(module: str, names: list[str], shapes: Shapes) -> bool:
    """Return whether a module, or a bare tensor, counts nothing in a network's output, by its names and shapes.

    Losses, metrics, counters and averages of everything else are known by their names, or hold no layer: nothing of two
    dimensions, and no bias or running mean, as norms have.
    """
    if is_averaged(module) or _says_side(module):
        return True
    ends = {name.rpartition(".")[2] for name in names}
    return all(len(shapes[name]) < 2 for name in names) and ends.isdisjoint({"bias", "running_mean", "gamma"})


def _says_side(name: str) -> bool:
    return not _SIDE_WORDS.isdisjoint(re.split(r"[._]", name.lower()))


def _current_name(name: str) -> str:
    for pattern, replacement in _OLD_NAMES:
        name = pattern.sub(replacement, name)
    return name
