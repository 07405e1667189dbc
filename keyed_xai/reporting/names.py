"""Interpreters and classes as people read them; classes by number where names are not known."""

from collections.abc import Sequence
from difflib import get_close_matches

INTERPRETER_NAMES = {"gradcam": "Grad-CAM", "simplegrad": "SimpleGrad", "vbp": "VisualBackProp"}
_MOST_SUGGESTED = 5
_ALIKE = 0.5  # of difflib's ratio, from 0 to 1


def interpreter_name(name: str) -> str:
    """Return how an interpreter is written."""
    return INTERPRETER_NAMES.get(name, name)


def name_class(index: int, names: Sequence[str]) -> str:
    """Return a class's name, or "class 3" where names are not known."""
    return names[index] if index < len(names) else f"class {index}"


def say_probability(probability: float) -> str:
    """Return a probability in two decimals: ".83"."""
    return f"{probability:.2f}".removeprefix("0")


def find_class(asked: str, names: Sequence[str], classes: int) -> int:
    """Return the class that somebody means by a name, in whatever case where that is clear, or by a number.

    Args:
        asked: The name or the number; a name counts first.
        names: Names of the classes, in the order of the logits; empty where they are not known.
        classes: How many there are.

    Raises:
        ValueError: No class, or more than one, is meant; the message lists those that come near.
    """
    if list(names).count(asked) == 1:
        return list(names).index(asked)
    folded = [name.casefold() for name in names]
    meant = [index for index, name in enumerate(folded) if name == asked.casefold()]
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise ValueError(f"{asked} may be any of {_listed(meant, names)}: give the number.")
    if asked.isdecimal() and int(asked) < classes:
        return int(asked)
    raise ValueError(f"the model has no class {asked}; {_expected(asked, names, folded, classes)}.")


def _expected(asked: str, names: Sequence[str], folded: Sequence[str], classes: int) -> str:
    """Return what can be asked for instead."""
    if not names:
        return f"its classes have no names, only the numbers 0 to {classes - 1}"
    inside = [name for name in folded if asked.casefold() in name]
    near = [*inside, *get_close_matches(asked.casefold(), folded, _MOST_SUGGESTED, _ALIKE)]
    indices = list(dict.fromkeys(folded.index(name) for name in near))[:_MOST_SUGGESTED]
    if indices:
        return f"near it are {_listed(indices, names)}"
    return f"expected one of {len(names)} names, such as {names[0]}, or a number from 0 to {classes - 1}"


def _listed(indices: Sequence[int], names: Sequence[str]) -> str:
    return ", ".join(f"{names[index]} ({index})" for index in indices)
