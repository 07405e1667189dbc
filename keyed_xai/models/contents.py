"""Which of a file's entries are the weights: training scripts keep several sets, averages, and much besides."""

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from keyed_xai.errors import ModelError

WRAPPERS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params", "params_ema",
    "student",
)  # fmt: skip
_AVERAGED = {"ema", "swa", "avg", "average", "averaged", "shadow"}  # parts of names
_NO_WEIGHTS = re.compile(
    r"(?:^|_)(?:optim\w*|opt|(?:lr_?)?sched\w*|scaler|rng\w*|callbacks?|loops?)(?:$|_)", re.IGNORECASE
)
_DEEPEST = 3
_MOST_SETS = 64
_SHOWN = 4


class WeightSet(NamedTuple):
    """Tensors that a file keeps together.

    Attributes:
        name: Name of the dictionary that holds them in the file, such as ``model_ema``; empty where they are all there
            is.
        tensors: The tensors, by their names there.
        averaged: Whether they are averages over training steps.
    """

    name: str
    tensors: dict[str, Tensor]
    averaged: bool


class LeftOut:
    """Stands where a file has an object of a class that is not loaded: NumPy's scalars, options of training scripts.

    Nothing of the class is imported or run, and what the object was made of is forgotten.
    """

    def __init__(self, *_: object) -> None:
        """Forget the arguments."""

    def __setstate__(self, _: object) -> None:
        """Forget the state."""


class LeftOutMapping(LeftOut):
    """Stands for a class of dictionaries: their entries are kept in a plain one."""

    def __new__(cls, *_: object) -> Any:  # noqa: ANN401 - not one of its own
        """Return an empty dictionary."""
        return OrderedDict[object, object]()


def find_sets(loaded: object) -> list[WeightSet]:
    """Return the sets of weights in what a file holds, the likeliest first.

    Plain weights come before averaged ones, and names that training scripts use before others.
    """
    if not isinstance(loaded, Mapping):
        return []
    averaging = _averages_under_plain_name(loaded)
    found = [
        WeightSet(name, tensors, averaging.get(name, is_averaged(name))) for name, tensors in _walk(loaded, "", set())
    ]
    with_layers = [each for each in found if any(tensor.ndim > 1 for tensor in each.tensors.values())]
    return sorted((with_layers or found)[:_MOST_SETS], key=_rank)


def choose_set(sets: Sequence[WeightSet], wanted: str | None) -> tuple[WeightSet, str | None]:
    """Return the set asked for, or else the likeliest, and a sentence where there was a choice.

    Args:
        sets: What `find_sets` returns; not empty.
        wanted: ``ema`` for averages, or a set's name; one that no set has may be that of a part of the first.
    """
    named = [each for each in sets if wanted is not None and is_wanted(each.name, wanted, averaged=each.averaged)]
    chosen = (named or sets)[0]
    others = [each for each in sets if each is not chosen]
    if not others and not chosen.averaged:
        return chosen, None
    what = "averaged weights (EMA)" if chosen.averaged else "weights"
    more = [f"{each.name or 'the file itself'}{' (averaged)' if each.averaged else ''}" for each in others]
    also = f"; the file also has {_listed(more)}, which --weights {_how(others[0])} takes" if more else ""
    return chosen, f"The {what} under {chosen.name or 'the file itself'} are used{also}."


def is_averaged(name: str) -> bool:
    """Return whether a name is one that averages over training steps are kept under."""
    return not _AVERAGED.isdisjoint(re.split(r"[^a-z0-9]+", name.lower()))


def is_wanted(name: str, wanted: str, *, averaged: bool) -> bool:
    """Return whether a set, or a prefix, is the one that a user asks for."""
    name, wanted = name.strip("."), wanted.strip(".")
    return bool(name) and (wanted in (name, *name.split(".")) or (wanted.lower() == "ema" and averaged))


def unknown_part_error(wanted: str, names: Sequence[str]) -> ModelError:
    """Return the error for weights that a file has not."""
    return ModelError(
        f"the file has no weights called {wanted!r}. It has {_listed([name or 'one set' for name in names])}: leave "
        "--weights out, or name one of them."
    )


def _walk(entries: Mapping[object, object], name: str, seen: set[int]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the names and tensors of dictionaries of tensors, down to `_DEEPEST` floors; each dictionary once."""
    seen.add(id(entries))
    tensors = {key: value for key, value in entries.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield name, tensors
    for key, value in entries.items() if name.count(".") < _DEEPEST else ():
        if not isinstance(key, str) or _NO_WEIGHTS.search(key):
            continue
        if isinstance(value, Mapping) and id(value) not in seen:
            yield from _walk(value, f"{name}.{key}".lstrip("."), seen)


def _averages_under_plain_name(loaded: Mapping[object, object]) -> dict[str, bool]:
    """Return which names say the contrary of what they hold.

    MMEngine's EMAHook and Lightning's WeightAveraging save averages as ``state_dict``, and what was averaged beside it.
    """
    meta = loaded.get("meta")
    if "ema_state_dict" in loaded and isinstance(meta, Mapping) and "mmengine_version" in meta:
        return {"state_dict": True, "ema_state_dict": False}
    return {"state_dict": True} if {"current_model_state", "averaging_state"} <= loaded.keys() else {}


def _rank(found: WeightSet) -> tuple[bool, int, int]:
    """Return a sort key: plain before averaged, known names, the file itself, then by size."""
    first = found.name.partition(".")[0]
    known = WRAPPERS.index(first) if first in WRAPPERS else len(WRAPPERS) + bool(found.name)
    return found.averaged, known, -sum(tensor.numel() for tensor in found.tensors.values())


def _how(other: WeightSet) -> str:
    return "ema" if other.averaged else other.name or "NAME"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
