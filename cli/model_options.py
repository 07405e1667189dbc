"""Options that say how a model file is to be read."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import click

if TYPE_CHECKING:
    from torch import nn

    from keyed_xai.models import Classifier
    from keyed_xai.models.loading import ModelChoices


def _numbers(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter("expected numbers with commas between them, one per channel: .485,.456,.406") from None


def _size(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    sides = value.lower().replace("\N{MULTIPLICATION SIGN}", "x").split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdecimal() and 8 <= int(side[:5]) <= 4096 for side in sides):
        raise click.BadParameter("expected pixels from 8 to 4096: one side, or height x width as in 96x160.")
    return int(sides[0]), int(sides[-1])


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model file is to be read, where neither the file nor its architecture says so."""

    arch: Annotated[str | None, click.option(
        "--arch", metavar="NAME", help="Architecture, such as resnet50 or timm:NAME; recognised if absent."
    )]  # fmt: skip
    classes: Annotated[int | None, click.option(
        "--classes", type=click.IntRange(1), metavar="N", help="Number of classes; read from the weights."
    )]  # fmt: skip
    input_size: Annotated[tuple[int, int] | None, click.option(
        "--input-size", callback=_size, metavar="PX", help="Side of the model's input, or height x width: 96x160."
    )]  # fmt: skip
    mean: Annotated[tuple[float, ...] | None, click.option(
        "--mean", callback=_numbers, metavar="M,M,M", help="Normalisation, for pixels in [0, 1]."
    )]  # fmt: skip
    std: Annotated[tuple[float, ...] | None, click.option(
        "--std", callback=_numbers, metavar="S,S,S", help="Normalisation, for pixels in [0, 1]."
    )]  # fmt: skip
    target_layer: Annotated[str | None, click.option(
        "--target-layer", metavar="LAYER", help="Grad-CAM's layer; the last feature map if absent."
    )]  # fmt: skip
    weights: Annotated[str | None, click.option(
        "--weights", metavar="NAME", help="Which of several in the file: ema for averaged ones, or an entry's name."
    )]  # fmt: skip
    factory: Annotated[str | None, click.option(
        "--factory", metavar="PACKAGE.MODULE:CALLABLE",
        help="What makes your own network, whose weights the file holds. Imports and runs that code of yours!",
    )]  # fmt: skip
    allow_pickle: Annotated[bool, click.option(
        "--allow-pickle", is_flag=True, help="Also load a pickled module. Runs code from the file!"
    )]  # fmt: skip

    def choose(self) -> "ModelChoices":
        """Return them as `load_classifier` and `open_model` take them.

        Raises:
            ModelError: `--factory` makes no network.
        """
        return {
            "arch": self.arch,
            "classes": self.classes,
            "input_size": self.input_size,
            "mean": self.mean,
            "std": self.std,
            "target_layer": self.target_layer,
            "weights": self.weights,
            "allow_pickle": self.allow_pickle,
            "network": _build(self.factory),
        }


def _build(factory: str | None) -> "nn.Module | None":
    if factory is None:
        return None
    from keyed_xai.models.factory import build_with_factory

    return build_with_factory(factory)


def tell_notes(classifier: "Classifier") -> None:
    """Print what was done to a model's file when it was read: a prefix taken off, tensors left out, averages taken."""
    from keyed_xai.artifacts.documents import printable

    for note in classifier.notes:
        click.echo(printable(note), err=True)
