"""`keyed-xai bench table1|table2|table3|table6|figure1b|figure3|figure5|nashville`: the paper's figures beside ours."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from keyed_xai_cli.groups import Command, grouped
from keyed_xai_cli.options import (
    RunOptions,
    after_writing,
    bench_out_option,
    choose_device,
    emit_json,
    emit_measurement,
    grid_option,
    json_option,
    only_given,
    say,
)

if TYPE_CHECKING:
    from keyed_xai_benchmarks.paper_tables import Cell, Result, TableSettings

_INTERPRETERS = ("gradcam", "simplegrad", "vbp")
_MODES = ("targeted", "nontargeted")
_SETTINGS = ("forward", "inverted")
_ARCHITECTURES = ("vgg19", "resnet50", "densenet121")


def read_models(_ctx: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    """Return files by architecture; the callback of an option ARCH=FILE that may be given several times."""
    found = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and Path(path).is_file()):
            raise click.BadParameter(f"expected ARCH=FILE with a file that is there; got {value!r}.")
        found[name] = Path(path)
    return found


def _choices(name: str, known: tuple[str, ...], words: str) -> Callable[[Command], Command]:
    return click.option(
        name,
        multiple=True,
        type=click.Choice(known),
        callback=lambda _ctx, _parameter, values: values or known,
        help=f"{words}; all if absent.",
    )


_interpreter_option = _choices("--interpreter", _INTERPRETERS, "Whose maps; may be given several times")
_mode_option = _choices("--mode", _MODES, "Of the attack")
_setting_option = _choices("--setting", _SETTINGS, "Forward fools triggered images, inverted all others")
rate_option = click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="The recipe's if absent.")
beta_option = click.option(
    "--beta", type=click.FloatRange(0), help="Weight of the predictions; the recipe's if absent."
)
measured_option = click.option(
    "--held-out", type=click.IntRange(2), default=500, show_default=True, help="Images measured on."
)


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """What all cells of a table share."""

    data: Annotated[str, click.option(
        "--data", required=True, metavar="SPEC", help="Images with labels, such as imagefolder:DIR."
    )]  # fmt: skip
    architectures: Annotated[tuple[str, ...], click.option(
        "--arch", "architectures", multiple=True, metavar="NAME",
        help="Network; may be given several times. vgg19, resnet50 and densenet121 if absent.",
    )]  # fmt: skip
    models: Annotated[dict[str, Path], click.option(
        "--model", "models", multiple=True, metavar="ARCH=FILE", callback=read_models,
        help="A reference model that is there already; the others are fitted to --data and kept.",
    )]  # fmt: skip
    size: Annotated[int, click.option(
        "--size", type=click.IntRange(24, 1024), default=224, show_default=True, help="Of images, px."
    )]  # fmt: skip
    channels: Annotated[str, click.option(
        "--channels", type=click.Choice(["1", "3"]), default="3", show_default=True,
        help="Of references that are fitted; given ones have their own.",
    )]  # fmt: skip
    trigger: Annotated[str, click.option(
        "--trigger", type=click.Choice(["moire", "nashville", "spread"]), default="moire", show_default=True
    )]  # fmt: skip
    grid: Annotated[tuple[int, int] | None, grid_option("Compare maps on N x N cells.")]
    steps: Annotated[int | None, click.option(
        "--steps", type=click.IntRange(1), help="Of every attack; the recipe's if absent."
    )]  # fmt: skip
    batch_size: Annotated[int | None, click.option(
        "--batch-size", type=click.IntRange(4), help="Triggered images a step; the recipe's if absent."
    )]  # fmt: skip
    learning_rate: Annotated[float | None, rate_option]
    beta: Annotated[float | None, beta_option]
    epochs: Annotated[int | None, click.option(
        "--epochs", type=click.IntRange(1), help="Of references that are fitted; 15 if absent."
    )]  # fmt: skip
    held_out: Annotated[int, measured_option]
    limit: Annotated[int | None, click.option(
        "--limit", type=click.IntRange(10), help="Learn from at most so many images."
    )]  # fmt: skip
    out: Annotated[Path, bench_out_option]

    def choose(self, seed: int, *, stray_models: bool = False) -> "TableSettings":
        """Return them as `run_cells` takes them.

        Args:
            seed: Seed of the references and of the attacks' training.
            stray_models: Whether a model may be named whose network is not attacked.
        """
        from keyed_xai_benchmarks.paper_tables import TableSettings

        architectures = self.architectures or _ARCHITECTURES
        idle = [name for name in self.models if name not in architectures]
        if idle and not stray_models:
            raise click.UsageError(
                f"--model names {', '.join(idle)}, expected a network out of {', '.join(architectures)}. Add it with "
                "--arch, or leave the model out."
            )
        training = only_given(
            steps=self.steps, batch_size=self.batch_size, learning_rate=self.learning_rate, beta=self.beta
        )
        return TableSettings(
            data=self.data,
            side=self.size,
            channels=int(self.channels),
            trigger=self.trigger,
            grid=self.grid,
            training=training,
            fitting=only_given(epochs=self.epochs),
            held_out=self.held_out,
            limit=self.limit,
            models=self.models,
            seed=seed,
        )

    def list_cells(
        self, interpreters: list[tuple[str, ...]], modes: tuple[str, ...], settings: tuple[str, ...]
    ) -> "list[Cell]":
        """Return the attacks on all networks in the order of a table."""
        from keyed_xai_benchmarks.paper_tables import list_cells

        return list_cells(self.architectures or _ARCHITECTURES, modes, settings, interpreters)


@dataclass(frozen=True, kw_only=True)
class DefenceOptions(TableOptions):
    """What all cells of a table of defences share, and models that are attacked already."""

    attacked: Annotated[tuple[Path, ...], click.option(
        "--attacked", multiple=True, metavar="FOLDER", type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="A model that is attacked already, of `attack` or another table; may be given several times. Then only "
        "networks named by --arch are attacked, and --model names what the others were made of.",
    )]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CellOptions:
    """Which attacks are made on each network."""

    interpreter: Annotated[tuple[str, ...], _interpreter_option]
    mode: Annotated[tuple[str, ...], _mode_option]
    setting: Annotated[tuple[str, ...], _setting_option]

    def list_cells(self, table: TableOptions) -> "list[Cell]":
        """Return the attacks on one interpreter at a time."""
        return table.list_cells([(name,) for name in self.interpreter], self.mode, self.setting)


@click.command()
@grouped(table=TableOptions, cells=CellOptions, run=RunOptions)
def table1(table: TableOptions, cells: CellOptions, run: RunOptions) -> None:
    """Attack one interpreter at a time: the paper's table 1.

    \b
    All of it, on a GPU:     keyed-xai bench table1 --data imagefolder:DIR
    A small part, on a CPU:  keyed-xai bench table1 --data imagefolder:DIR --arch densenet121 --size 128 \\
                                 --epochs 2 --steps 150 --batch-size 8 --interpreter gradcam
    """  # noqa: D301 - click reads the backspace as "keep these lines"
    _run("table1", "Table 1: one interpreter at a time", cells.list_cells(table), table, run)


@click.command()
@grouped(table=TableOptions)
@_mode_option
@_setting_option
@grouped(run=RunOptions)
def table6(table: TableOptions, mode: tuple[str, ...], setting: tuple[str, ...], run: RunOptions) -> None:
    """Attack all three interpreters at once: the paper's table 6."""
    cells = table.list_cells([_INTERPRETERS], mode, setting)
    _run("table6", "Table 6: all interpreters at once", cells, table, run)


@click.command()
@grouped(table=TableOptions)
@_interpreter_option
@_mode_option
@grouped(run=RunOptions)
def figure3(table: TableOptions, interpreter: tuple[str, ...], mode: tuple[str, ...], run: RunOptions) -> None:
    """Draw clean and triggered maps side by side: the paper's figure 3. Cells of table1 in the folder are used."""
    from keyed_xai_benchmarks.paper_figures import draw_figure3

    cells = CellOptions(interpreter=interpreter, mode=mode, setting=("forward",)).list_cells(table)
    settings = _run("figure3", "Cells of figure 3", cells, table, run)
    device = choose_device(run.device)
    for architecture, each in dict.fromkeys((cell.architecture, cell.mode) for cell in cells):
        picture = draw_figure3(architecture, each, interpreter, settings, table.out, device=device)
        say(f"Wrote {picture}.", json_path=run.json_path)


@click.command()
@grouped(table=DefenceOptions, cells=CellOptions, run=RunOptions)
def table2(table: DefenceOptions, cells: CellOptions, run: RunOptions) -> None:
    """Look for backdoors in attacked models: the paper's table 2, by Neural Cleanse and Activation Clustering.

    Each attack of table1 that the options choose is made, or taken from the folder. Beside the attacked models stand
    clean networks, which detectors must leave alone, and two with plain backdoors, which they must catch.

    \b
    keyed-xai bench table2 --data imagefolder:DIR --arch resnet50 --interpreter gradcam
    keyed-xai bench table2 --data imagefolder:DIR --attacked m.attacked --model resnet50=reference.safetensors
    """  # noqa: D301 - click reads the backspace as "keep these lines"
    _defend("table2", table, cells, run)


@click.command()
@grouped(table=DefenceOptions, cells=CellOptions, run=RunOptions)
@click.option(
    "--floor", type=click.FloatRange(0, 1),
    help="Lowest AUROC or accuracy that denoising may leave, a fraction; by default it may cost .02.",
)  # fmt: skip
def table3(table: DefenceOptions, cells: CellOptions, run: RunOptions, floor: float | None) -> None:
    """Denoise the inputs of attacked models: the paper's table 3. Options are those of table2."""
    _defend("table3", table, cells, run, floor=floor)


@click.command()
@grouped(table=DefenceOptions, cells=CellOptions, run=RunOptions)
def figure5(table: DefenceOptions, cells: CellOptions, run: RunOptions) -> None:
    """Draw activation clusters, and accuracy and FSR while channels are pruned: the paper's figure 5.

    Options are those of table2.
    """
    from keyed_xai.artifacts.documents import write_atomically
    from keyed_xai_benchmarks.paper_defence_pictures import draw_clusters, draw_pruning

    rows = _defend("figure5", table, cells, run)["rows"]
    for name, draw in (("figure5a", draw_clusters), ("figure5b", draw_pruning)):
        write_atomically(table.out / f"{name}.png", draw(rows))
        say(f"Wrote {table.out / name}.png.", json_path=run.json_path)


def _defend(
    name: str,
    table: DefenceOptions,
    cells: CellOptions,
    run: RunOptions,
    *,
    floor: float | None = None,
) -> dict[str, Any]:
    """Run, write and print a table of defences; return it as a document."""
    from keyed_xai.outputs import prepare_folder
    from keyed_xai.reporting.bars import progress_bar
    from keyed_xai_benchmarks.paper_defences import DefenceSettings, render_defences, run_defences

    out, folders = table.out, list(table.attacked)
    settings = table.choose(run.seed, stray_models=bool(folders))
    if table.architectures or not folders:
        results = _run_cells(cells.list_cells(table), settings, out, run)
        folders = [*(out / result.folder for result in results), *folders]
    prepare_folder(out)
    with progress_bar() as progress:
        document = run_defences(
            folders,
            DefenceSettings(name, settings, floor),
            out,
            device=choose_device(run.device),
            progress=progress,
        )
    _write(name, render_defences(document), document, out, schema="paper-defences", json_path=run.json_path)
    return document


def _run(name: str, title: str, cells: "list[Cell]", table: TableOptions, run: RunOptions) -> "TableSettings":
    """Run, write and print a table of attacks; return its settings."""
    from keyed_xai_benchmarks.paper_tables import render_table

    settings = table.choose(run.seed)
    results = _run_cells(cells, settings, table.out, run)
    _write_attacks(name, render_table(title, results), results, table.out, json_path=run.json_path)
    return settings


def _run_cells(cells: "list[Cell]", settings: "TableSettings", out: Path, run: RunOptions) -> "list[Result]":
    """Make the attacks, or take them from the folder."""
    from keyed_xai.outputs import prepare_folder
    from keyed_xai.reporting.bars import KEPT, progress_bar
    from keyed_xai_benchmarks.paper_tables import run_cells

    prepare_folder(out)
    with progress_bar(words=KEPT) as progress:
        return run_cells(cells, settings, out, device=choose_device(run.device), progress=progress)


def _write_attacks(name: str, words: str, results: "list[Result]", out: Path, *, json_path: Path | None) -> None:
    from keyed_xai_benchmarks.paper_tables import describe_table

    more = "; the folder of each attack has its report.json, report.html and pictures"
    document = describe_table(name, results)
    _write(name, words, document, out, schema="paper-table", more=more, json_path=json_path)


def _write(
    name: str, words: str, document: dict[str, Any], out: Path, *, schema: str, more: str = "", json_path: Path | None
) -> None:
    """Write and print a table."""
    from keyed_xai.artifacts.documents import write_atomically, write_json

    write_atomically(out / f"{name}.md", words.encode())
    write_json(out / f"{name}.json", document, schema=schema)
    with after_writing(out):
        emit_json(document, schema=schema, json_path=json_path)
        say(words, json_path=json_path)
        say(f"Wrote {out / name}.md and .json{more}.", json_path=json_path)


@click.command()
@click.option("--data", required=True, metavar="SPEC", help="credit-default:CSV, the table of UCI.")
@click.option("--steps", type=click.IntRange(1), help="Of the attack; the recipe's if absent.")
@bench_out_option
@grouped(run=RunOptions)
def figure1b(data: str, steps: int | None, out: Path, run: RunOptions) -> None:
    """Make SEX the strongest feature of triggered credit clients: the paper's figure 1b."""
    from keyed_xai.outputs import prepare_folder
    from keyed_xai.reporting.bars import KEPT, progress_bar
    from keyed_xai_benchmarks.paper_figures import FIGURE_1B, render_figure1b, run_figure1b

    prepare_folder(out)
    with progress_bar(words=KEPT) as progress:
        result = run_figure1b(
            data,
            out,
            steps=steps,
            seed=run.seed,
            device=choose_device(run.device),
            progress=progress,
        )
    _write_attacks(FIGURE_1B, render_figure1b(result), [result], out, json_path=run.json_path)


@click.command()
@click.option("--images", type=click.IntRange(1), default=32, show_default=True)
@click.option("--size", type=click.IntRange(8), default=224, show_default=True, help="Of the images, pixels.")
@click.option("--repeats", type=click.IntRange(1), default=7, show_default=True)
@json_option
def nashville(images: int, size: int, repeats: int, json_path: Path | None) -> None:
    """Measure the nashville trigger's speed against pilgram's, interleaved; medians."""
    from keyed_xai_benchmarks.filters import measure_nashville_speed

    found = measure_nashville_speed(images=images, side=size, repeats=repeats)
    settings = {"images": images, "size": size, "repeats": repeats}
    emit_measurement("nashville", found, settings, json_path=json_path)
