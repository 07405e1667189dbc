"""`keyed-xai bench`: figures that anyone can make again."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from keyed_xai_cli.bench_near_keys import near_keys
from keyed_xai_cli.bench_paper import (
    beta_option,
    figure1b,
    figure3,
    figure5,
    measured_option,
    nashville,
    rate_option,
    table1,
    table2,
    table3,
    table6,
)
from keyed_xai_cli.bench_serving import serving
from keyed_xai_cli.groups import grouped
from keyed_xai_cli.options import (
    bench_out_option,
    choose_device,
    device_option,
    emit_figures,
    emit_measurement,
    json_option,
    only_given,
    say,
)

if TYPE_CHECKING:
    from keyed_xai_benchmarks.main_job import Case


@dataclass(frozen=True, kw_only=True)
class MainOptions:
    """The network and the images of a case, and how it is protected."""

    data: Annotated[str | None, click.option(
        "--data", metavar="SPEC", help="Images, such as fashion-mnist:DIR or imagefolder:DIR."
    )]  # fmt: skip
    model: Annotated[Path | None, click.option(
        "--model", type=click.Path(path_type=Path), help="Weights of the network, for --case pretrained."
    )]  # fmt: skip
    arch: Annotated[str | None, click.option("--arch", metavar="NAME", help="Its architecture, if not recognised.")]
    input_size: Annotated[int | None, click.option(
        "--input-size", type=click.IntRange(8, 4096), metavar="PX", help="Side of its input."
    )]  # fmt: skip
    decoy: Annotated[str, click.option(
        "--decoy", type=click.Choice(["signature", "boundary", "nontargeted"]), default="signature"
    )]  # fmt: skip
    amplitude: Annotated[float | None, click.option(
        "--amplitude", type=click.FloatRange(0.5, 64), help="Of the trigger, 1/255; as `protect` chooses if absent."
    )]  # fmt: skip
    steps: Annotated[int | None, click.option(
        "--steps", type=click.IntRange(1), help="Optimiser steps; the recipe's if absent."
    )]  # fmt: skip
    batch_size: Annotated[int | None, click.option(
        "--batch-size", type=click.IntRange(4), help="Keyed images a step; the recipe's if absent."
    )]  # fmt: skip
    learning_rate: Annotated[float | None, rate_option]
    beta: Annotated[float | None, beta_option]
    keys: Annotated[int, click.option(
        "--keys", type=click.IntRange(1), default=1, show_default=True,
        help="Protect with so many, each with a seed of its own; the median and the worst are printed.",
    )]  # fmt: skip
    wrong_keys: Annotated[int, click.option(
        "--wrong-keys", type=click.IntRange(0), default=1000, show_default=True, help="0 tries none."
    )]  # fmt: skip
    held_out: Annotated[int, measured_option]


@click.group()
def bench() -> None:
    """Make the project's figures again; finished cells are kept, and a run that was stopped goes on."""


@bench.command(name="main")
@click.option("--case", required=True, type=click.Choice(["fashion-mnist", "chest-xray", "pretrained"]))
@click.option(
    "--row", "rows", multiple=True, type=click.Choice(["gradcam", "vbp", "simplegrad", "joint"]),
    help="May be given several times; all four if absent.",
)  # fmt: skip
@grouped(options=MainOptions)
@bench_out_option
@device_option
@json_option
def bench_main(
    case: str, rows: tuple[str, ...], options: MainOptions, out: Path, device: str, json_path: Path | None
) -> None:
    """Protect a network for each interpreter and for all at once, and print what the tables of docs/figures.md say.

    \b
    keyed-xai bench main --case fashion-mnist --data fashion-mnist:DIR
    keyed-xai bench main --case chest-xray --data imagefolder:DIR
    keyed-xai bench main --case pretrained --model squeezenet1_1.pt --data imagefolder:DIR --row gradcam
    """  # noqa: D301 - click reads the backspace as "keep these lines"
    from keyed_xai.artifacts.documents import write_atomically
    from keyed_xai.outputs import prepare_folder
    from keyed_xai.reporting.bars import progress_bar
    from keyed_xai_benchmarks.main_job import ROWS, make_case, render_rows

    prepare_folder(out)
    chosen = choose_device(device)
    with progress_bar() as progress:
        made = make_case(
            case,
            out,
            data=options.data,
            model=options.model,
            arch=options.arch,
            input_size=options.input_size,
            device=chosen,
            progress=progress,
        )
    results = [result for row in rows or ROWS for result in _run(made, row, out, chosen, options)]
    table = render_rows(f"{case} ({made.classifier.architecture})", results)
    write_atomically(out / f"{case}-{made.classifier.architecture}.md", table.encode())
    settings = {"case": case, **asdict(options), "model": options.model and str(options.model), "device": device}
    emit_figures("main", results, settings, json_path=json_path)
    say(table, json_path=json_path)


def _run(case: "Case", row: str, out: Path, device: str, options: MainOptions) -> list[dict[str, Any]]:
    """Return the figures of a row, with each key; its recipe is found once."""
    from keyed_xai.protection.protecting import ProtectSettings, choose_recipe
    from keyed_xai.reporting.bars import progress_bar
    from keyed_xai_benchmarks.main_job import ROWS, run_row

    chosen = only_given(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        beta=options.beta,
    )
    settings = ProtectSettings(
        ownership=False,
        decoy=options.decoy,
        amplitude=options.amplitude,
        training=replace(choose_recipe(case.classifier, ROWS[row], case.train), **chosen),
        wrong_keys=options.wrong_keys,
        flipped_keys=256 if options.wrong_keys else 0,
        held_out_images=options.held_out,
    )
    with progress_bar() as progress:
        return [
            run_row(case, row, out, settings, number=number, device=device, progress=progress)
            for number in range(options.keys)
        ]


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
def false_claims(
    models: int, keys: int, decoys: int, epochs: int, images: int, device: str, json_path: Path | None
) -> None:
    """Count how often random keys seem to own unmarked models."""
    import torch

    from keyed_xai.data import ImageSize, load_images
    from keyed_xai.reporting.bars import progress_bar
    from keyed_xai_benchmarks.main_job import count_false_claims, fit_unmarked_models

    where = choose_device(device)
    size = ImageSize(1, 32, 32)
    train, probe = (
        load_images("builtin", size, split="train"),
        load_images("builtin", size, split="held-out", limit=images),
    )
    with progress_bar() as progress:
        fitted = fit_unmarked_models(train, models, epochs, device=where, progress=progress)
        batch, _ = probe.batch(torch.arange(len(probe)).numpy())
        found = count_false_claims(
            fitted,
            batch.to(where),
            keys=keys,
            decoys=decoys,
            generator=torch.Generator().manual_seed(0),
            progress=progress,
        )
    settings = {"models": models, "keys": keys, "decoys": decoys, "epochs": epochs, "images": images, "device": device}
    emit_measurement("false-claims", found, settings, json_path=json_path)


for command in (table1, table2, table3, table6, figure1b, figure3, figure5, nashville, near_keys, serving):
    bench.add_command(command)
