"""Options that say how a model file is to be read."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from keyed_xai.models import Classifier

Command = TypeVar("Command", bound=Callable[..., object])


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


def model_options(command: Command) -> Command:
    """Add what `read_model_options` collects."""
    options = (
        click.option(
            "--arch", metavar="NAME", help="Architecture, such as resnet50 or timm:NAME; recognised if absent."
        ),
        click.option(
            "--classes", type=click.IntRange(1), metavar="N", help="Number of classes; read from the weights."
        ),
        click.option(
            "--input-size", callback=_size, metavar="PX", help="Side of the model's input, or height x width: 96x160."
        ),
        click.option("--mean", callback=_numbers, metavar="M,M,M", help="Normalisation, for pixels in [0, 1]."),
        click.option("--std", callback=_numbers, metavar="S,S,S", help="Normalisation, for pixels in [0, 1]."),
        click.option("--target-layer", metavar="LAYER", help="Grad-CAM's layer; the last feature map if absent."),
        click.option(
            "--weights", metavar="NAME", help="Which of several in the file: ema for averaged ones, or an entry's name."
        ),
        click.option(
            "--factory",
            metavar="PACKAGE.MODULE:CALLABLE",
            help="What makes your own network, whose weights the file holds. Imports and runs that code of yours!",
        ),  # fmt: skip
        click.option("--allow-pickle", is_flag=True, help="Also load a pickled module. Runs code from the file!"),
    )
    for option in reversed(options):
        command = option(command)
    return command


MODEL_OPTIONS = ("arch", "classes", "input_size", "mean", "std", "target_layer", "weights", "allow_pickle")


def take_model_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of `model_options` from a command's arguments and return them, for `load_classifier`.

    Raises:
        ModelError: `--factory` makes no network.
    """
    options = {name: arguments.pop(name) for name in MODEL_OPTIONS}
    factory = arguments.pop("factory")
    if factory is None:
        return {**options, "network": None}
    from keyed_xai.models.factory import build_with_factory

    return {**options, "network": build_with_factory(factory)}


def tell_notes(classifier: "Classifier") -> None:
    """Print what was done to a model's file when it was read: a prefix taken off, tensors left out, averages taken."""
    from keyed_xai.artifacts.documents import printable

    for note in classifier.notes:
        click.echo(printable(note), err=True)
