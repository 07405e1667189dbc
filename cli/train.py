"""`keyed-xai train`."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keyed_xai_cli.options import (
    STANDARD_OUTPUT,
    after_writing,
    choose_device,
    device_option,
    emit_json,
    end_with_verdict,
    follow_links_option,
    hold,
    json_option,
    resumable,
    say,
    seed_option,
)
from keyed_xai_cli.training_options import load_both_images

if TYPE_CHECKING:
    from keyed_xai.data import ImageData, TableData
    from keyed_xai.fitting import FittingSettings
    from keyed_xai.models import Classifier
    from keyed_xai.references import Blueprint

_TINY = ("builtin", "fashion-mnist")
_GREY = (*_TINY, "chestxray14")


def _widths(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(",")) if value is not None else ()
    except ValueError:
        raise click.BadParameter("expected whole numbers with commas between them: 16,32,64,128") from None


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
@click.option(
    "--arch", metavar="NAME",
    help="Architecture, such as resnet50, vgg19 or densenet121; SmallResNet, or TableMLP for a table, if absent.",
)  # fmt: skip
@click.option("--model", type=click.Path(path_type=Path), help="Start from these weights instead of random ones.")
@click.option(
    "--input-size", type=click.IntRange(8, 4096), metavar="PX",
    help="Side of the model's input; the architecture's own if absent, of SmallResNet 96, or 32 on Fashion-MNIST.",
)  # fmt: skip
@click.option(
    "--channels", type=click.Choice(["1", "3"]),
    help="1 grey, 3 RGB; 3 if absent, but 1 for SmallResNet on Fashion-MNIST and ChestX-ray14.",
)  # fmt: skip
@click.option(
    "--widths", callback=_widths, metavar="N,N,...",
    help="Channels of SmallResNet's blocks, 16,32,64,128 if absent; of TableMLP's hidden layers, 64,32.",
)  # fmt: skip
@click.option("--epochs", type=click.IntRange(1), help="Passes over the data; 15 if absent.")
@click.option("--batch-size", type=click.IntRange(2), help="Examples a step; 32, or 128 rows of a table, if absent.")
@click.option(
    "--optimiser", type=click.Choice(["sgd", "adam", "adamw"]),
    help="sgd if absent; adam for tables and for networks without batch norm, such as VGG.",
)  # fmt: skip
@click.option(
    "--learning-rate", type=click.FloatRange(0, min_open=True),
    help="Peak rate; sgd .01, adam .001 or without batch norm .0001 if absent.",
)  # fmt: skip
@click.option("--weight-decay", type=click.FloatRange(0), help="0.0001 if absent.")
@click.option(
    "--schedule", type=click.Choice(["step", "one-cycle", "constant"]),
    help="Of the rate: step (default) divides it by ten after each third of the epochs.",
)  # fmt: skip
@click.option("--noise", type=click.FloatRange(0, 1), help="Largest noise on images, of 1; none if absent.")
@click.option("--mirror/--no-mirror", default=True, show_default=True, help="Turn half of the images left to right.")
@click.option("--limit", type=click.IntRange(10), help="Learn from at most so many examples.")
@click.option("--held-out", type=click.IntRange(2), help="Measure on at most so many; all if absent.")
@click.option("--strict", is_flag=True, help="Refuse a data set with a broken image instead of skipping the image.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
@click.option("--force", is_flag=True, help="Replace a file, or a stopped run, that is there.")
@follow_links_option
@device_option
@seed_option
@json_option
def train(spec: str, out: Path, **arguments: Any) -> None:  # noqa: ANN401
    """Fit a plain classifier to labelled data: a reference model to protect or attack.

    Writes a safetensors file that the other commands take with nothing else given, and ends with a verdict; exit code 3
    means no better than guessing. A run that is stopped goes on with --resume.

    \b
    keyed-xai train --data imagefolder:photos --arch resnet50 -o photos.safetensors
    keyed-xai train --data credit-default:default.csv -o credit.safetensors
    """  # noqa: D301 - click reads the backspace as "keep these lines"
    from keyed_xai.progress import progress_bar
    from keyed_xai.references import build_classifier, claim_output, train_reference, write_reference

    json_path, force, resume = arguments["json_path"], arguments["force"], arguments["resume"]
    hold(out)
    checkpoint = claim_output(out, resume=resume, force=force)
    blueprint, train_data, held_out = _load(spec, arguments)
    classifier = build_classifier(blueprint, len(train_data.classes), seed=arguments["seed"])
    settings = _settings(classifier, len(train_data), arguments)
    with resumable(checkpoint), progress_bar(say=partial(say, json_path=json_path)) as progress:
        reference = train_reference(
            classifier,
            train_data,
            held_out,
            settings,
            device=choose_device(arguments["device"]),
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
    spec: str, arguments: dict[str, Any]
) -> "tuple[Blueprint, ImageData, ImageData] | tuple[Blueprint, TableData, TableData]":
    from keyed_xai.data import is_table, load_table

    if not is_table(spec):
        blueprint = _plan_for_images(spec, arguments)
        return blueprint, *load_both_images(blueprint.input, spec, arguments)
    seed = arguments["seed"]
    train_data = load_table(spec, split="train", limit=arguments["limit"], seed=seed)
    held_out = load_table(spec, split="held-out", limit=arguments["held_out"], seed=seed)
    return _plan_for_table(train_data, arguments), train_data, held_out


def _plan_for_images(spec: str, arguments: dict[str, Any]) -> "Blueprint":
    from keyed_xai.references import plan_for_images, plan_from_model

    arch, side, widths = arguments["arch"], arguments["input_size"], arguments["widths"]
    channels = int(arguments["channels"]) if arguments["channels"] else None
    if arguments["model"] is not None:
        _refuse_options(arguments, "widths")
        return plan_from_model(arguments["model"], arch, channels=channels, side=side)
    name = spec.partition(":")[0]
    if arch in (None, "SmallResNet"):
        channels = channels or (1 if name in _GREY else 3)
        side = side or (32 if name in _TINY else None)
    return plan_for_images(arch, channels=channels, side=side, widths=widths)


def _plan_for_table(data: "TableData", arguments: dict[str, Any]) -> "Blueprint":
    from keyed_xai.references import plan_for_table, plan_from_model

    _refuse_options(arguments, "input_size", "channels", "noise")
    if arguments["model"] is not None:
        _refuse_options(arguments, "widths")
        return plan_from_model(arguments["model"], arguments["arch"], table=True)
    return plan_for_table(len(data.columns), arguments["arch"], widths=arguments["widths"])


def _refuse_options(arguments: dict[str, Any], *names: str) -> None:
    """Refuse options that would have no effect."""
    given = [f"--{name.replace('_', '-')}" for name in names if arguments[name]]
    if given:
        why = "--model settles the widths" if "widths" in names else "these data are a table"
        raise click.UsageError(f"Leave out {' and '.join(given)}: {why}.")


def _settings(classifier: "Classifier", examples: int, arguments: dict[str, Any]) -> "FittingSettings":
    from keyed_xai.references import choose_settings

    chosen = choose_settings(classifier, examples, arguments["optimiser"])
    names = ("epochs", "batch_size", "learning_rate", "weight_decay", "schedule", "noise")
    given = {name: arguments[name] for name in names if arguments[name] is not None}
    return replace(chosen, mirror=arguments["mirror"], seed=arguments["seed"], **given)
