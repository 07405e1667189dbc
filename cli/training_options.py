"""Options of commands that train on a data set, and what they ask for."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from keyed_xai_cli.options import follow_links_option

if TYPE_CHECKING:
    from keyed_xai.data import ImageData, TableData
    from keyed_xai.models import Classifier, InputSpec
    from keyed_xai.training import TrainingSettings

Command = TypeVar("Command", bound=Callable[..., object])


def _take_seconds(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """Return the seconds of a time such as 90s, 30m or 2h; a number alone counts seconds."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", value.replace(" ", "").lower())
    if not found or not float(found[1]) > 0:
        raise click.BadParameter(f"expected a time such as 90s, 30m or 2h, got {value!r}.")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def training_options(command: Command) -> Command:
    """Add what `choose_training` and `load_both` read."""
    options = (
        click.option(
            "--steps", type=click.IntRange(1), help="Optimiser steps at most; by the kind of network if absent."
        ),
        click.option(
            "--time-limit", callback=_take_seconds, metavar="TIME", help="Train for so long at most: 90s, 30m, 2h."
        ),
        click.option(
            "--epochs", type=click.FloatRange(0, min_open=True), help="Passes over the images, instead of --steps."
        ),
        click.option(
            "--batch-size", type=click.IntRange(4), help="Triggered images a step; as many untriggered ones are added."
        ),
        click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="Peak rate of Adam."),
        click.option("--beta", type=click.FloatRange(0), help="Weight of the predictions beside the maps."),
        click.option("--distance", type=click.Choice(["correlation", "mse"]), help="Map distance; mse is the paper's."),
        click.option(
            "--predictions",
            type=click.Choice(["reference", "labels"]),
            help="Keep the reference's soft predictions (default), or learn the labels of --data.",
        ),
        click.option("--batch-norm", type=click.Choice(["mixture", "frozen"]), help="How its statistics are treated."),
        click.option(
            "--patience", type=click.IntRange(0), help="Stop after so many validations without progress; 0 never."
        ),
        click.option("--limit", type=click.IntRange(10), help="Learn from at most so many images."),
        click.option(
            "--strict", is_flag=True, help="Refuse a data set with a broken image instead of skipping the image."
        ),
        follow_links_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def choose_training(recipe: "TrainingSettings", images: int, arguments: dict[str, Any]) -> "TrainingSettings":
    """Return a recipe with what the options ask for; `images` is how many there are to learn from."""
    numbers = ("steps", "time_limit", "batch_size", "learning_rate", "beta", "patience")
    names = (*numbers, "distance", "predictions", "batch_norm")
    chosen = {name: arguments[name] for name in names if arguments[name] is not None}
    if arguments["epochs"] is not None:
        if arguments["steps"] is not None:
            raise click.UsageError("Give --steps or --epochs, not both.")
        per_step = chosen.get("batch_size", recipe.batch_size) * 2
        chosen["steps"] = max(1, round(arguments["epochs"] * images / per_step))
    return replace(recipe, seed=arguments["seed"], **chosen)


def load_both(
    classifier: "Classifier", spec: str, arguments: dict[str, Any]
) -> tuple["ImageData | TableData", "ImageData | TableData"]:
    """Return what a SPEC has to learn from, and its held-out part, as the classifier takes it."""
    from keyed_xai.data import is_table, load_table

    if not is_table(spec):
        return load_both_images(classifier.input, spec, arguments)
    seed = arguments["seed"]
    train_data = load_table(spec, split="train", limit=arguments["limit"], seed=seed)
    return train_data, load_table(spec, split="held-out", limit=arguments["held_out"], seed=seed)


def load_both_images(size: "InputSpec", spec: str, arguments: dict[str, Any]) -> tuple["ImageData", "ImageData"]:
    """Return the images to learn from and the held-out ones, with a progress bar, and name broken ones."""
    from keyed_xai.artifacts.documents import printable
    from keyed_xai.data import load_images
    from keyed_xai.progress import counter, progress_bar

    def load(split: Literal["train", "held-out"], limit: int | None) -> "ImageData":
        return load_images(
            spec,
            size,
            split=split,
            limit=limit,
            strict=arguments["strict"],
            seed=arguments["seed"],
            follow_links=arguments["follow_links"],
            progress=counter(progress, f"reading {split} images"),
        )

    with progress_bar() as progress:
        train_data, held_out = load("train", arguments["limit"]), load("held-out", arguments["held_out"])
    for note in dict.fromkeys((*train_data.notes, *held_out.notes)):
        click.echo(printable(note), err=True)
    for name in (*train_data.skipped, *held_out.skipped):
        click.echo(f"Skipped a broken image: {printable(name)}", err=True)
    return train_data, held_out
