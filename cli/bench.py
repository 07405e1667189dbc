"""`keyed-xai bench`: figures that anyone can make again."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keyed_xai_cli.bench_paper import figure1b, figure3, figure5, nashville, table1, table2, table3, table6
from keyed_xai_cli.bench_serving import serving
from keyed_xai_cli.options import STANDARD_OUTPUT, choose_device, device_option, emit_figures, json_option, say

if TYPE_CHECKING:
    from keyed_xai.benchmarks.main_job import Case


@click.group()
def bench() -> None:
    """Make the project's figures again; finished cells are kept, and a run that was stopped goes on."""


@bench.command(name="main")
@click.option("--case", required=True, type=click.Choice(["fashion-mnist", "chest-xray", "pretrained"]))
@click.option(
    "--row", "rows", multiple=True, type=click.Choice(["gradcam", "vbp", "simplegrad", "joint"]),
    help="May be given several times; all four if absent.",
)  # fmt: skip
@click.option("--data", metavar="SPEC", help="Images, such as fashion-mnist:DIR or imagefolder:DIR.")
@click.option("--model", type=click.Path(path_type=Path), help="Weights of the network, for --case pretrained.")
@click.option("--arch", metavar="NAME", help="Its architecture, if not recognised.")
@click.option("--input-size", type=click.IntRange(8, 4096), metavar="PX", help="Side of its input.")
@click.option("--decoy", type=click.Choice(["signature", "boundary", "nontargeted"]), default="signature")
@click.option(
    "--amplitude", type=click.FloatRange(0.5, 64), default=8, show_default=True, help="Of the trigger, 1/255."
)
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps; the recipe's if absent.")
@click.option("--batch-size", type=click.IntRange(4), help="Keyed images a step; the recipe's if absent.")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="The recipe's if absent.")
@click.option("--beta", type=click.FloatRange(0), help="Weight of the predictions; the recipe's if absent.")
@click.option("--wrong-keys", type=click.IntRange(0), default=1000, show_default=True, help="0 tries none.")
@click.option("--held-out", type=click.IntRange(2), default=500, show_default=True, help="Images measured on.")
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), default="bench-out", show_default=True)
@device_option
@json_option
def bench_main(case: str, rows: tuple[str, ...], out: Path, json_path: Path | None, **arguments: Any) -> None:  # noqa: ANN401
    """Protect a network for each interpreter and for all at once, and print what the tables of docs/figures.md say.

    \b
    keyed-xai bench main --case fashion-mnist --data fashion-mnist:DIR
    keyed-xai bench main --case chest-xray --data imagefolder:DIR
    keyed-xai bench main --case pretrained --model squeezenet1_1.pt --data imagefolder:DIR --row gradcam
    """  # noqa: D301 - click reads the backspace as "keep these lines"
    from keyed_xai.artifacts.documents import write_atomically
    from keyed_xai.benchmarks.main_job import ROWS, make_case, render_rows
    from keyed_xai.claims import prepare_folder
    from keyed_xai.progress import counter, progress_bar

    prepare_folder(out)
    device = choose_device(arguments["device"])
    named = {name: arguments[name] for name in ("data", "model", "arch", "input_size")}
    with progress_bar() as progress:
        made = make_case(case, out, device=device, on_fit=counter(progress, "fitting a reference"), **named)
    results = [_run(made, row, out, device, arguments) for row in rows or ROWS]
    table = render_rows(f"{case} ({made.classifier.architecture})", results)
    write_atomically(out / f"{case}-{made.classifier.architecture}.md", table.encode())
    settings = {"case": case, **arguments, "model": arguments["model"] and str(arguments["model"])}
    emit_figures("main", results, settings, json_path=json_path)
    say(table, json_path=json_path)


def _run(case: "Case", row: str, out: Path, device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import replace

    from keyed_xai.benchmarks.main_job import ROWS, run_row
    from keyed_xai.progress import progress_bar, training_callbacks
    from keyed_xai.protection import ProtectSettings, choose_recipe

    names = ("steps", "batch_size", "learning_rate", "beta")
    chosen = {name: arguments[name] for name in names if arguments[name] is not None}
    settings = ProtectSettings(
        ownership=False,
        decoy=arguments["decoy"],
        amplitude=arguments["amplitude"],
        training=replace(choose_recipe(case.classifier, ROWS[row]), **chosen),
        wrong_keys=arguments["wrong_keys"],
        flipped_keys=256 if arguments["wrong_keys"] else 0,
        held_out_images=arguments["held_out"],
    )
    with progress_bar() as progress:
        callbacks = training_callbacks(progress)
        return run_row(case, row, out, settings, device=device, callbacks=callbacks)


@bench.command(name="false-claims")
@click.option("--models", type=click.IntRange(1), default=10, show_default=True, help="Unmarked networks fitted.")
@click.option("--keys", type=click.IntRange(1), default=100, show_default=True, help="Random keys tried on each.")
@click.option("--decoys", type=click.IntRange(1), default=999, show_default=True, help="Decoy keys on each.")
@click.option(
    "--epochs", type=click.IntRange(1), default=3, show_default=True, help="Of fitting, on the built-in data."
)
@click.option("--images", type=click.IntRange(1), default=8, show_default=True, help="Probe images.")
@device_option
@json_option
def false_claims(json_path: Path | None, **settings: Any) -> None:  # noqa: ANN401
    """Count how often random keys seem to own unmarked models."""
    import torch

    from keyed_xai.benchmarks.main_job import count_false_claims, fit_unmarked_models
    from keyed_xai.data import ImageSize, load_images
    from keyed_xai.progress import counter, progress_bar

    where = choose_device(settings["device"])
    size = ImageSize(1, 32, 32)
    train, probe = (
        load_images("builtin", size, split="train"),
        load_images("builtin", size, split="held-out", limit=settings["images"]),
    )
    with progress_bar() as progress:
        fitted = fit_unmarked_models(
            train, settings["models"], settings["epochs"], device=where, on_model=counter(progress, "fitting")
        )
        batch, _ = probe.batch(torch.arange(len(probe)).numpy())
        found = count_false_claims(
            fitted,
            batch.to(where),
            keys=settings["keys"],
            decoys=settings["decoys"],
            generator=torch.Generator().manual_seed(0),
            on_key=counter(progress, "trying keys"),
        )
    emit_figures("false-claims", [found], settings, json_path=json_path)
    if json_path != STANDARD_OUTPUT:
        click.echo(json.dumps(found, indent=2))


for command in (table1, table2, table3, table6, figure1b, figure3, figure5, nashville, serving):
    bench.add_command(command)
