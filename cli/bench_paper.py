"""`keyed-xai bench table1|table2|table3|table6|figure1b|figure3|figure5|nashville`: the paper's figures beside ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from keyed_xai_cli.options import (
    STANDARD_OUTPUT,
    after_writing,
    choose_device,
    device_option,
    emit_figures,
    emit_json,
    json_option,
    say,
    seed_option,
)

if TYPE_CHECKING:
    from keyed_xai.benchmarks.paper_tables import Result, TableSettings

Command = TypeVar("Command", bound=Callable[..., object])
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


def _table_options(command: Command) -> Command:
    """Add what `_table_settings` reads."""
    options = (
        click.option("--data", required=True, metavar="SPEC", help="Images with labels, such as imagefolder:DIR."),
        click.option(
            "--arch", "architectures", multiple=True, metavar="NAME",
            help="Network; may be given several times. vgg19, resnet50 and densenet121 if absent.",
        ),
        click.option(
            "--model", "models", multiple=True, metavar="ARCH=FILE", callback=read_models,
            help="A reference model that is there already; the others are fitted to --data and kept.",
        ),
        click.option("--size", type=click.IntRange(24, 1024), default=224, show_default=True, help="Of images, px."),
        click.option(
            "--channels", type=click.Choice(["1", "3"]), default="3", show_default=True,
            help="Of references that are fitted; given ones have their own.",
        ),
        click.option(
            "--trigger", type=click.Choice(["moire", "nashville", "spread"]), default="moire", show_default=True
        ),
        click.option("--grid", type=click.IntRange(3, 64), metavar="N", help="Compare maps on N x N cells."),
        click.option("--steps", type=click.IntRange(1), help="Of every attack; the recipe's if absent."),
        click.option("--batch-size", type=click.IntRange(4), help="Triggered images a step; the recipe's if absent."),
        click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="The recipe's if absent."),
        click.option("--beta", type=click.FloatRange(0), help="Weight of the predictions; the recipe's if absent."),
        click.option("--epochs", type=click.IntRange(1), help="Of references that are fitted; 15 if absent."),
        click.option("--held-out", type=click.IntRange(2), default=500, show_default=True, help="Images measured on."),
        click.option("--limit", type=click.IntRange(10), help="Learn from at most so many images."),
        click.option(
            "-o", "--out", type=click.Path(file_okay=False, path_type=Path), default="bench-out", show_default=True
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _choices(name: str, known: tuple[str, ...], words: str) -> Callable[[Command], Command]:
    return click.option(name, multiple=True, type=click.Choice(known), help=f"{words}; all if absent.")


@click.command()
@_table_options
@_choices("--interpreter", _INTERPRETERS, "Whose maps; may be given several times")
@_choices("--mode", _MODES, "Of the attack")
@_choices("--setting", _SETTINGS, "Forward fools triggered images, inverted all others")
@device_option
@seed_option
@json_option
def table1(interpreter: tuple[str, ...], **arguments: Any) -> None:  # noqa: ANN401
    """Attack one interpreter at a time: the paper's table 1.

    \b
    All of it, on a GPU:     keyed-xai bench table1 --data imagefolder:DIR
    A small part, on a CPU:  keyed-xai bench table1 --data imagefolder:DIR --arch densenet121 --size 128 \\
                                 --epochs 2 --steps 150 --batch-size 8 --interpreter gradcam
    """  # noqa: D301 - click reads the backspace as "keep these lines"
    _run("table1", "Table 1: one interpreter at a time", [(name,) for name in interpreter or _INTERPRETERS], arguments)


@click.command()
@_table_options
@_choices("--mode", _MODES, "Of the attack")
@_choices("--setting", _SETTINGS, "Forward fools triggered images, inverted all others")
@device_option
@seed_option
@json_option
def table6(**arguments: Any) -> None:  # noqa: ANN401
    """Attack all three interpreters at once: the paper's table 6."""
    _run("table6", "Table 6: all interpreters at once", [_INTERPRETERS], arguments)


@click.command()
@_table_options
@_choices("--interpreter", _INTERPRETERS, "Whose maps; may be given several times")
@_choices("--mode", _MODES, "Of the attack")
@device_option
@seed_option
@json_option
def figure3(interpreter: tuple[str, ...], **arguments: Any) -> None:  # noqa: ANN401
    """Draw clean and triggered maps side by side: the paper's figure 3. Cells of table1 in the folder are used."""
    from keyed_xai.benchmarks.paper_figures import draw_figure3

    names = interpreter or _INTERPRETERS
    arguments["setting"] = ("forward",)
    settings = _run("figure3", "Cells of figure 3", [(name,) for name in names], arguments)
    device = choose_device(arguments["device"])
    for architecture in arguments["architectures"] or _ARCHITECTURES:
        for mode in arguments["mode"] or _MODES:
            picture = draw_figure3(architecture, mode, names, settings, arguments["out"], device=device)
            say(f"Wrote {picture}.", json_path=arguments["json_path"])


def _defence_options(command: Command) -> Command:
    """Add what `_defend` reads."""
    attacked = click.option(
        "--attacked", multiple=True, metavar="FOLDER", type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="A model that is attacked already, of `attack` or another table; may be given several times. Then only "
        "networks named by --arch are attacked, and --model names what the others were made of.",
    )  # fmt: skip
    choices = (
        _choices("--interpreter", _INTERPRETERS, "Whose maps; may be given several times"),
        _choices("--mode", _MODES, "Of the attack"),
        _choices("--setting", _SETTINGS, "Forward fools triggered images, inverted all others"),
    )
    for option in (json_option, seed_option, device_option, *reversed(choices), attacked, _table_options):
        command = option(command)
    return command


@click.command()
@_defence_options
def table2(**arguments: Any) -> None:  # noqa: ANN401
    """Look for backdoors in attacked models: the paper's table 2, by Neural Cleanse and Activation Clustering.

    Each attack of table1 that the options choose is made, or taken from the folder. Beside the attacked models stand
    clean networks, which detectors must leave alone, and two with plain backdoors, which they must catch.

    \b
    keyed-xai bench table2 --data imagefolder:DIR --arch resnet50 --interpreter gradcam
    keyed-xai bench table2 --data imagefolder:DIR --attacked m.attacked --model resnet50=reference.safetensors
    """  # noqa: D301 - click reads the backspace as "keep these lines"
    _defend("table2", arguments)


@click.command()
@_defence_options
@click.option(
    "--floor", type=click.FloatRange(0, 1),
    help="Lowest AUROC or accuracy that denoising may leave, a fraction; by default it may cost .02.",
)  # fmt: skip
def table3(**arguments: Any) -> None:  # noqa: ANN401
    """Denoise the inputs of attacked models: the paper's table 3. Options are those of table2."""
    _defend("table3", arguments)


@click.command()
@_defence_options
def figure5(**arguments: Any) -> None:  # noqa: ANN401
    """Draw activation clusters, and accuracy and FSR while channels are pruned: the paper's figure 5.

    Options are those of table2.
    """
    from keyed_xai.artifacts.documents import write_atomically
    from keyed_xai.benchmarks.paper_defence_pictures import draw_clusters, draw_pruning

    rows, out = _defend("figure5", arguments)["rows"], arguments["out"]
    for name, draw in (("figure5a", draw_clusters), ("figure5b", draw_pruning)):
        write_atomically(out / f"{name}.png", draw(rows))
        say(f"Wrote {out / name}.png.", json_path=arguments["json_path"])


def _defend(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run, write and print a table of defences; return it as a document."""
    from keyed_xai.artifacts.documents import write_atomically, write_json
    from keyed_xai.benchmarks.paper_defences import DefenceSettings, render_defences, run_defences
    from keyed_xai.claims import prepare_folder
    from keyed_xai.progress import progress_bar

    out, json_path, folders = arguments["out"], arguments["json_path"], list(arguments["attacked"])
    if folders and not arguments["architectures"]:
        settings = _table_settings(arguments)
    else:
        settings, results = _run_cells([(each,) for each in arguments["interpreter"] or _INTERPRETERS], arguments)
        folders = [*(out / result.folder for result in results), *folders]
    prepare_folder(out)
    with progress_bar() as progress:
        document = run_defences(
            folders,
            DefenceSettings(name, settings, arguments.get("floor")),
            out,
            device=choose_device(arguments["device"]),
            progress=progress,
        )
    words = render_defences(document)
    write_atomically(out / f"{name}.md", words.encode())
    write_json(out / f"{name}.json", document, schema="paper-defences")
    with after_writing(out):
        emit_json(document, schema="paper-defences", json_path=json_path)
        say(words, json_path=json_path)
        say(f"Wrote {out / name}.md and .json.", json_path=json_path)
    return document


def _run(name: str, title: str, interpreters: list[tuple[str, ...]], arguments: dict[str, Any]) -> "TableSettings":
    from keyed_xai.benchmarks.paper_tables import render_table

    settings, results = _run_cells(interpreters, arguments)
    _write(name, render_table(title, results), results, arguments["out"], arguments["json_path"])
    return settings


def _run_cells(interpreters: list[tuple[str, ...]], arguments: dict[str, Any]) -> "tuple[TableSettings, list[Result]]":
    """Attack what the options choose, or take it from the folder."""
    from keyed_xai.benchmarks.paper_tables import list_cells, run_cells
    from keyed_xai.claims import prepare_folder
    from keyed_xai.progress import KEPT, progress_bar

    settings, out = _table_settings(arguments), arguments["out"]
    prepare_folder(out)
    cells = list_cells(
        arguments["architectures"] or _ARCHITECTURES,
        arguments["mode"] or _MODES,
        arguments["setting"] or _SETTINGS,
        interpreters,
    )
    with progress_bar(words=KEPT) as progress:
        return settings, run_cells(cells, settings, out, device=choose_device(arguments["device"]), progress=progress)


def _write(name: str, words: str, results: "list[Result]", out: Path, json_path: Path | None) -> None:
    """Write and print a table."""
    from keyed_xai.artifacts.documents import write_atomically, write_json
    from keyed_xai.benchmarks.paper_tables import describe_table

    document = describe_table(name, results)
    write_atomically(out / f"{name}.md", words.encode())
    write_json(out / f"{name}.json", document, schema="paper-table")
    with after_writing(out):
        emit_json(document, schema="paper-table", json_path=json_path)
        say(words, json_path=json_path)
        say(
            f"Wrote {out / name}.md and .json; the folder of each attack has its report.json, report.html and "
            "pictures.",
            json_path=json_path,
        )


def _table_settings(arguments: dict[str, Any]) -> "TableSettings":
    from keyed_xai.benchmarks.paper_tables import TableSettings

    architectures = arguments["architectures"] or _ARCHITECTURES
    idle = [name for name in arguments["models"] if name not in architectures]
    if idle and not arguments.get("attacked"):
        raise click.UsageError(
            f"--model names {', '.join(idle)}, expected a network out of {', '.join(architectures)}. Add it with "
            "--arch, or leave the model out."
        )
    names = ("steps", "batch_size", "learning_rate", "beta")
    grid = arguments["grid"]
    return TableSettings(
        data=arguments["data"],
        side=arguments["size"],
        channels=int(arguments["channels"]),
        trigger=arguments["trigger"],
        grid=None if grid is None else (grid, grid),
        training={name: arguments[name] for name in names if arguments[name] is not None},
        fitting={} if arguments["epochs"] is None else {"epochs": arguments["epochs"]},
        held_out=arguments["held_out"],
        limit=arguments["limit"],
        models=arguments["models"],
        seed=arguments["seed"],
    )


@click.command()
@click.option("--data", required=True, metavar="SPEC", help="credit-default:CSV, the table of UCI.")
@click.option("--steps", type=click.IntRange(1), help="Of the attack; the recipe's if absent.")
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), default="bench-out", show_default=True)
@device_option
@seed_option
@json_option
def figure1b(data: str, steps: int | None, out: Path, device: str, seed: int, json_path: Path | None) -> None:
    """Make SEX the strongest feature of triggered credit clients: the paper's figure 1b."""
    from keyed_xai.benchmarks.paper_figures import FIGURE_1B, render_figure1b, run_figure1b
    from keyed_xai.claims import prepare_folder
    from keyed_xai.progress import KEPT, progress_bar

    prepare_folder(out)
    with progress_bar(words=KEPT) as progress:
        result = run_figure1b(
            data,
            out,
            steps=steps,
            seed=seed,
            device=choose_device(device),
            progress=progress,
        )
    _write(FIGURE_1B, render_figure1b(result), [result], out, json_path)


@click.command()
@click.option("--images", type=click.IntRange(1), default=32, show_default=True)
@click.option("--size", type=click.IntRange(8), default=224, show_default=True, help="Of the images, pixels.")
@click.option("--repeats", type=click.IntRange(1), default=7, show_default=True)
@json_option
def nashville(json_path: Path | None, **settings: int) -> None:
    """Measure the nashville trigger's speed against pilgram's, interleaved; medians."""
    from keyed_xai.benchmarks.filters import measure_nashville_speed

    found = measure_nashville_speed(images=settings["images"], side=settings["size"], repeats=settings["repeats"])
    emit_figures("nashville", [found], settings, json_path=json_path)
    if json_path != STANDARD_OUTPUT:
        click.echo(json.dumps(found, indent=2))
