"""Options of commands that train on a data set, and what they ask for."""

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import click

from keyed_xai_cli.options import follow_links_option, only_given, strict_option

if TYPE_CHECKING:
    from keyed_xai.data import ImageData, TableData
    from keyed_xai.models import Classifier, InputSpec
    from keyed_xai.training import TrainingSettings


def _take_seconds(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """Return the seconds of a time such as 90s, 30m or 2h; a number alone counts seconds."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", value.replace(" ", "").lower())
    if not found or not float(found[1]) > 0:
        raise click.BadParameter(f"expected a time such as 90s, 30m or 2h, got {value!r}.")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


@dataclass(frozen=True, kw_only=True)
class DataChoice:
    """Which data a command reads, and how.

    Attributes:
        spec: What `--data` says.
        limit: Examples to learn from, at most; None for all.
        held_out: Examples to measure on, at most; None for all.
        strict: Whether a broken image is refused instead of skipped.
        follow_links: Whether links out of the folder are followed.
        seed: Seed of the choice among examples.
    """

    spec: str
    limit: int | None
    held_out: int | None
    strict: bool
    follow_links: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a command trains, and what it learns from."""

    steps: Annotated[int | None, click.option(
        "--steps", type=click.IntRange(1), help="Optimiser steps at most; by the kind of network if absent."
    )]  # fmt: skip
    time_limit: Annotated[float | None, click.option(
        "--time-limit", callback=_take_seconds, metavar="TIME", help="Train for so long at most: 90s, 30m, 2h."
    )]  # fmt: skip
    epochs: Annotated[float | None, click.option(
        "--epochs", type=click.FloatRange(0, min_open=True), help="Passes over the images, instead of --steps."
    )]  # fmt: skip
    batch_size: Annotated[int | None, click.option(
        "--batch-size", type=click.IntRange(4), help="Triggered images a step; as many untriggered ones are added."
    )]  # fmt: skip
    learning_rate: Annotated[float | None, click.option(
        "--learning-rate", type=click.FloatRange(0, min_open=True), help="Peak rate of Adam."
    )]  # fmt: skip
    beta: Annotated[float | None, click.option(
        "--beta", type=click.FloatRange(0), help="Weight of the predictions beside the maps."
    )]  # fmt: skip
    distance: Annotated[str | None, click.option(
        "--distance", type=click.Choice(["correlation", "mse"]), help="Map distance; mse is the paper's."
    )]  # fmt: skip
    predictions: Annotated[str | None, click.option(
        "--predictions", type=click.Choice(["reference", "labels"]),
        help="Keep the reference's soft predictions (default), or learn the labels of --data.",
    )]  # fmt: skip
    batch_norm: Annotated[str | None, click.option(
        "--batch-norm", type=click.Choice(["mixture", "frozen"]), help="How its statistics are treated."
    )]  # fmt: skip
    patience: Annotated[int | None, click.option(
        "--patience", type=click.IntRange(0), help="Stop after so many validations without progress; 0 never."
    )]  # fmt: skip
    limit: Annotated[int | None, click.option(
        "--limit", type=click.IntRange(10), help="Learn from at most so many images."
    )]  # fmt: skip
    strict: Annotated[bool, strict_option]
    follow_links: Annotated[bool, follow_links_option]

    def choose_data(self, spec: str, *, held_out: int, seed: int) -> DataChoice:
        """Return the choice of data to train and to measure on."""
        return DataChoice(
            spec=spec,
            limit=self.limit,
            held_out=held_out,
            strict=self.strict,
            follow_links=self.follow_links,
            seed=seed,
        )


def choose_training(
    recipe: "TrainingSettings", images: int, options: TrainingOptions, *, seed: int
) -> "TrainingSettings":
    """Return a recipe with what the options ask for; `images` is how many there are to learn from."""
    chosen = only_given(
        steps=options.steps,
        time_limit=options.time_limit,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        beta=options.beta,
        patience=options.patience,
        distance=options.distance,
        predictions=options.predictions,
        batch_norm=options.batch_norm,
    )
    if options.epochs is not None:
        if options.steps is not None:
            raise click.UsageError("Give --steps or --epochs, not both.")
        per_step = (options.batch_size or recipe.batch_size) * 2
        chosen["steps"] = max(1, round(options.epochs * images / per_step))
    return replace(recipe, seed=seed, **chosen)


def load_both(classifier: "Classifier", choice: DataChoice) -> tuple["ImageData | TableData", "ImageData | TableData"]:
    """Return the data to learn from, and the held-out part, as the classifier takes them."""
    from keyed_xai.data import is_table

    return load_both_tables(choice) if is_table(choice.spec) else load_both_images(classifier.input, choice)


def load_both_tables(choice: DataChoice) -> tuple["TableData", "TableData"]:
    """Return the rows to learn from and the held-out ones."""
    from keyed_xai.data import load_table

    return (
        load_table(choice.spec, split="train", limit=choice.limit, seed=choice.seed),
        load_table(choice.spec, split="held-out", limit=choice.held_out, seed=choice.seed),
    )


def load_both_images(size: "InputSpec", choice: DataChoice) -> tuple["ImageData", "ImageData"]:
    """Return the images to learn from and the held-out ones, with a progress bar, and name broken ones."""
    from keyed_xai.artifacts.documents import printable
    from keyed_xai.data import load_images
    from keyed_xai.reporting.bars import progress_bar

    def load(split: Literal["train", "held-out"], limit: int | None) -> "ImageData":
        return load_images(
            choice.spec,
            size,
            split=split,
            limit=limit,
            strict=choice.strict,
            seed=choice.seed,
            follow_links=choice.follow_links,
            progress=progress,
        )

    with progress_bar() as progress:
        train_data, held_out = load("train", choice.limit), load("held-out", choice.held_out)
    for note in dict.fromkeys((*train_data.notes, *held_out.notes)):
        click.echo(printable(note), err=True)
    for name in (*train_data.skipped, *held_out.skipped):
        click.echo(f"Skipped a broken image: {printable(name)}", err=True)
    return train_data, held_out
