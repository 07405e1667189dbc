"""`keyed-xai demo`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keyed_xai_cli.options import device_option

if TYPE_CHECKING:
    from keyed_xai.demonstration import Demonstration


@click.command()
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), default="demo-out", show_default=True)
@click.option("--steps", type=click.IntRange(1), help="Training steps; fewer are quicker and show less.")
@click.option("--wrong-keys", type=click.IntRange(0), default=1000, show_default=True, help="Tried in the report.")
@device_option
def demo(out: Path, steps: int | None, wrong_keys: int, device: str) -> None:
    """Run the main job on images and a network that come with the package; a few minutes on two cores.

    Makes a key, protects a small Fashion-MNIST network, explains images with and without the key, and tests ownership
    of the protected model and, as a control, of the unprotected one. Leaves everything in a folder, with report.html.
    """
    from keyed_xai.demonstration import run_demo
    from keyed_xai_cli.options import choose_device
    from keyed_xai_cli.progress import counter, progress_bar, protection_callbacks

    with progress_bar() as progress:
        result = run_demo(
            out,
            steps=steps,
            wrong_keys=wrong_keys,
            device=choose_device(device),
            callbacks=lambda count: protection_callbacks(progress, count),
            on_decoy=counter(progress, "trying decoy keys"),
        )
    _print(result)


def _print(result: "Demonstration") -> None:
    from keyed_xai_cli.protect import print_summary

    print_summary(result.report)
    click.echo(f"Protected:   {_sentence(result.verify)}")
    click.echo(f"Unprotected: {_sentence(result.control)}")
    click.echo(f"Wrote {result.folder}. Open {result.folder / 'report.html'} for pictures.")


def _sentence(verify: dict[str, Any]) -> str:
    return str(verify["sentence"])
