"""`keyed-xai demo`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    say,
)

if TYPE_CHECKING:
    from keyed_xai.demo import Demonstration


@click.command()
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), default="demo-out", show_default=True)
@click.option("--steps", type=click.IntRange(1), help="Training steps; fewer are quicker and show less.")
@click.option("--wrong-keys", type=click.IntRange(0), default=1000, show_default=True, help="Tried in the report.")
@grouped(run=RunOptions)
def demo(out: Path, steps: int | None, wrong_keys: int, run: RunOptions) -> None:
    """Run the main job on images and a network that come with the package; a few minutes on two cores.

    Makes a key, protects a small Fashion-MNIST network, explains images with and without the key, and tests ownership
    of the protected model and, as a control, of the unprotected one. Leaves everything in a folder, with report.html.
    """
    from keyed_xai.demo import run_demo
    from keyed_xai.reporting.bars import progress_bar

    claim_output(out / "report.html")
    with progress_bar(say=partial(say, json_path=run.json_path)) as progress:
        result = run_demo(
            out,
            steps=steps,
            wrong_keys=wrong_keys,
            seed=run.seed,
            device=choose_device(run.device),
            progress=progress,
        )
    with after_writing(out):
        emit_json(result.report, schema="protect-report", json_path=run.json_path)
        _print(result, run.json_path)
    end_with_verdict(result.report["verdict"], json_path=run.json_path)


def _print(result: "Demonstration", json_path: Path | None) -> None:
    from keyed_xai_cli.protect import print_summary

    print_summary(result.report, to_stderr=json_path == STANDARD_OUTPUT)
    say(f"Protected:   {_sentence(result.verify)}", json_path=json_path)
    say(f"Unprotected: {_sentence(result.control)}", json_path=json_path)
    say(f"Wrote {result.folder}. Open {result.folder / 'report.html'} for pictures.", json_path=json_path)


def _sentence(verify: dict[str, Any]) -> str:
    return str(verify["sentence"])
