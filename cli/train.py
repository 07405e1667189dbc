"""`keyed-xai train`."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from keyed_xai_cli.groups import grouped
from keyed_xai_cli.options import (
    STANDARD_OUTPUT,
    RunOptions,
    after_writing,
    choose_device,
    claim_output,
    emit_json,
    end_with_verdict,
    follow_links_option,
    name_given,
    only_given,
    resumable,
    resume_option,
    say,
    strict_option,
)
from keyed_xai_cli.training_options import DataChoice, load_both_images, load_both_tables

if TYPE_CHECKING:
    from keyed_xai.data import ImageData, TableData
    from keyed_xai.models import Classifier
    from keyed_xai.training.fitting import FittingSettings
    from keyed_xai.training.references import ModelSpec

_TINY = ("builtin", "fashion-mnist")
_GREY = (*_TINY, "chestxray14")


def _widths(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(",")) if value is not None else ()
    except ValueError:
        raise click.BadParameter("expected whole numbers with commas between them: 16,32,64,128") from None


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The network that is fitted."""

    arch: Annotated[str | None, click.option(
        "--arch", metavar="NAME",
        help="Architecture, such as resnet50, vgg19 or densenet121; SmallResNet, or TableMLP for a table, if absent.",
    )]  # fmt: skip
    model: Annotated[Path | None, click.option(
        "--model", type=click.Path(path_type=Path), help="Start from these weights instead of random ones."
    )]  # fmt: skip
    input_size: Annotated[int | None, click.option(
        "--input-size", type=click.IntRange(8, 4096), metavar="PX",
        help="Side of the model's input; the architecture's own if absent, of SmallResNet 96, or 32 on Fashion-MNIST.",
    )]  # fmt: skip
    channels: Annotated[str | None, click.option(
        "--channels", type=click.Choice(["1", "3"]),
        help="1 grey, 3 RGB; 3 if absent, but 1 for SmallResNet on Fashion-MNIST and ChestX-ray14.",
    )]  # fmt: skip
    widths: Annotated[tuple[int, ...], click.option(
        "--widths", callback=_widths, metavar="N,N,...",
        help="Channels of SmallResNet's blocks, 16,32,64,128 if absent; of TableMLP's hidden layers, 64,32.",
    )]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FittingOptions:
    """How the network is fitted."""

    epochs: Annotated[int | None, click.option(
        "--epochs", type=click.IntRange(1), help="Passes over the data; 15 if absent."
    )]  # fmt: skip
    batch_size: Annotated[int | None, click.option(
        "--batch-size", type=click.IntRange(2), help="Examples a step; 32, or 128 rows of a table, if absent."
    )]  # fmt: skip
    optimiser: Annotated[str | None, click.option(
        "--optimiser", type=click.Choice(["sgd", "adam", "adamw"]),
        help="sgd if absent; adam for tables and for networks without batch norm, such as VGG.",
    )]  # fmt: skip
    learning_rate: Annotated[float | None, click.option(
        "--learning-rate", type=click.FloatRange(0, min_open=True),
        help="Peak rate; sgd .01, adam .001 or without batch norm .0001 if absent.",
    )]  # fmt: skip
    weight_decay: Annotated[float | None, click.option(
        "--weight-decay", type=click.FloatRange(0), help="0.0001 if absent."
    )]  # fmt: skip
    schedule: Annotated[str | None, click.option(
        "--schedule", type=click.Choice(["step", "one-cycle", "constant"]),
        help="Of the rate: step (default) divides it by ten after each third of the epochs.",
    )]  # fmt: skip
    noise: Annotated[float | None, click.option(
        "--noise", type=click.FloatRange(0, 1), help="Largest noise on images, of 1; none if absent."
    )]  # fmt: skip
    mirror: Annotated[bool, click.option(
        "--mirror/--no-mirror", default=True, show_default=True, help="Turn half of the images left to right."
    )]  # fmt: skip


@click.command()
@click.option(
    "--data", "spec", metavar="SPEC", required=True,
    help="Labelled data: imagefolder:DIR, cub200:DIR, chestxray14:DIR, fashion-mnist[:DIR], builtin (a part of it), "
    "credit-default:CSV.",
)  # fmt: skip
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=Path("model.safetensors"), show_default=True,
    help="File to write.",
)  # fmt: skip
@grouped(network=NetworkOptions, fitting=FittingOptions)
@click.option("--limit", type=click.IntRange(10), help="Learn from at most so many examples.")
@click.option("--held-out", type=click.IntRange(2), help="Measure on at most so many; all if absent.")
@strict_option
@resume_option
@click.option("--force", is_flag=True, help="Replace a file, or a stopped run, that is there.")
@follow_links_option
@grouped(run=RunOptions)
def train(
    spec: str,
    out: Path,
    network: NetworkOptions,
    fitting: FittingOptions,
    limit: int | None,
    held_out: int | None,
    strict: bool,
    resume: bool,
    force: bool,
    follow_links: bool,
    run: RunOptions,
) -> None:
    """Fit a plain classifier to labelled data: a reference model to protect or attack.

    Writes a safetensors file that the other commands take with nothing else given, and ends with a verdict; exit code 3
    means no better than guessing. A run that is stopped goes on with --resume.

    \b
    keyed-xai train --data imagefolder:photos --arch resnet50 -o photos.safetensors
    keyed-xai train --data credit-default:default.csv -o credit.safetensors
    """  # noqa: D301 - click reads the backspace as "keep these lines"
    from keyed_xai.reporting.bars import progress_bar
    from keyed_xai.training.references import build_classifier, check_output, train_reference, write_reference

    json_path = run.json_path
    claim_output(out)
    checkpoint = check_output(out, resume=resume, force=force)
    choice = DataChoice(
        spec=spec, limit=limit, held_out=held_out, strict=strict, follow_links=follow_links, seed=run.seed
    )
    model_spec, train_data, held_out_data = _load(choice, network, fitting)
    classifier = build_classifier(model_spec, len(train_data.classes), seed=run.seed)
    settings = _settings(classifier, len(train_data), fitting, seed=run.seed)
    with resumable(checkpoint), progress_bar(say=partial(say, json_path=json_path)) as progress:
        reference = train_reference(
            classifier,
            train_data,
            held_out_data,
            settings,
            device=choose_device(run.device),
            checkpoint=checkpoint,
            resume=resume,
            progress=progress,
        )
    write_reference(reference, out, force=force, checkpoint=checkpoint)
    with after_writing(out):
        emit_json(reference.report, schema="train-report", json_path=json_path)
        print_summary(reference.report, to_stderr=json_path == STANDARD_OUTPUT)
        say(f"Wrote {out}.", json_path=json_path)
    end_with_verdict(reference.report["verdict"], json_path=json_path)


def print_summary(report: dict[str, Any], *, to_stderr: bool = False) -> None:
    """Print a line of what was measured on held-out data."""
    measured = report["predictions"]
    words = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "auroc": "AUROC"}
    figures = ", ".join(f"{word} {measured[name]:.3f}" for name, word in words.items() if name in measured)
    count = report["data"]["held_out"]["images"]
    click.echo(f"{report['model']} on {count} held-out examples: {figures or 'nothing to measure'}.", err=to_stderr)


def _load(
    choice: DataChoice, network: NetworkOptions, fitting: FittingOptions
) -> "tuple[ModelSpec, ImageData, ImageData] | tuple[ModelSpec, TableData, TableData]":
    from keyed_xai.data import is_table

    if not is_table(choice.spec):
        model_spec = _plan_for_images(choice.spec, network)
        return model_spec, *load_both_images(model_spec.input, choice)
    train_data, held_out = load_both_tables(choice)
    return _plan_for_table(train_data, network, fitting), train_data, held_out


def _plan_for_images(spec: str, network: NetworkOptions) -> "ModelSpec":
    from keyed_xai.training.references import plan_for_images, plan_from_model

    side, channels = network.input_size, int(network.channels) if network.channels else None
    if network.model is not None:
        _refuse_widths(network)
        return plan_from_model(network.model, network.arch, channels=channels, side=side)
    name = spec.partition(":")[0]
    if network.arch in (None, "SmallResNet"):
        channels = channels or (1 if name in _GREY else 3)
        side = side or (32 if name in _TINY else None)
    return plan_for_images(network.arch, channels=channels, side=side, widths=network.widths)


def _plan_for_table(data: "TableData", network: NetworkOptions, fitting: FittingOptions) -> "ModelSpec":
    from keyed_xai.training.references import plan_for_table, plan_from_model

    given = name_given(input_size=network.input_size, channels=network.channels, noise=fitting.noise)
    if given:
        raise click.UsageError(f"Leave out {' and '.join(given)}: these data are a table.")
    if network.model is not None:
        _refuse_widths(network)
        return plan_from_model(network.model, network.arch, table=True)
    return plan_for_table(len(data.columns), network.arch, widths=network.widths)


def _refuse_widths(network: NetworkOptions) -> None:
    if network.widths:
        raise click.UsageError("Leave out --widths: --model settles the widths.")


def _settings(classifier: "Classifier", examples: int, fitting: FittingOptions, *, seed: int) -> "FittingSettings":
    from keyed_xai.training.references import choose_settings

    given = only_given(
        epochs=fitting.epochs,
        batch_size=fitting.batch_size,
        learning_rate=fitting.learning_rate,
        weight_decay=fitting.weight_decay,
        schedule=fitting.schedule,
        noise=fitting.noise,
    )
    chosen = choose_settings(classifier, examples, fitting.optimiser)
    return replace(chosen, mirror=fitting.mirror, seed=seed, **given)
