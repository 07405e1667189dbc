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


def model_options(command: Command) -> Command:
    """Add what `read_model_options` collects."""
    options = (
        click.option(
            "--arch", metavar="NAME", help="Architecture, such as resnet50 or timm:NAME; recognised if absent."
        ),
        click.option(
            "--classes", type=click.IntRange(1), metavar="N", help="Number of classes; read from the weights."
        ),
        click.option("--input-size", type=click.IntRange(8, 4096), metavar="PX", help="Side of the model's input."),
        click.option("--mean", callback=_numbers, metavar="M,M,M", help="Normalisation, for pixels in [0, 1]."),
        click.option("--std", callback=_numbers, metavar="S,S,S", help="Normalisation, for pixels in [0, 1]."),
        click.option("--target-layer", metavar="LAYER", help="Grad-CAM's layer; the last feature map if absent."),
        click.option(
            "--weights", metavar="NAME", help="Which of several in the file: ema for averaged ones, or an entry's name."
        ),
        click.option("--allow-pickle", is_flag=True, help="Also load a pickled module. Runs code from the file!"),
    )
    for option in reversed(options):
        command = option(command)
    return command


MODEL_OPTIONS = ("arch", "classes", "input_size", "mean", "std", "target_layer", "weights", "allow_pickle")


def take_model_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of `model_options` from a command's arguments and return them, for `load_classifier`."""
    return {name: arguments.pop(name) for name in MODEL_OPTIONS}


def tell_notes(classifier: "Classifier") -> None:
    """Print what was done to a model's file when it was read: a prefix taken off, tensors left out, averages taken."""
    from keyed_xai.artifacts.documents import printable

    for note in classifier.notes:
        click.echo(printable(note), err=True)
