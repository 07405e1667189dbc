"""`keyed-xai attack`."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keyed_xai_cli.model_options import model_options, take_model_options, tell_notes
from keyed_xai_cli.options import (
    STANDARD_OUTPUT,
    ModelPath,
    after_writing,
    choose_device,
    device_option,
    emit_json,
    end_with_verdict,
    hold_folder,
    json_option,
    resumable,
    say,
    seed_option,
)
from keyed_xai_cli.training_options import choose_training, load_both, training_options

if TYPE_CHECKING:
    from keyed_xai.attacking import AttackSettings
    from keyed_xai.models import Classifier

_LEGEND = (
    "CR, correct rate: maps that should stay right and do. FSR, fooling success rate: maps that should be faked and "
    "are.",
    "L_p, distance to the decoy: a map counts as faked below this one. AUC: 1 where L_p parts faked from right maps.",
    "clean, triggered: mean correlation with the maps before the attack.",
)


def _assignments(_ctx: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, float] | None:
    found = {}
    for value in values:
        name, equals, number = value.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            equals = ""
        if not (name and equals):
            raise click.BadParameter(f"expected FEATURE=NUMBER, such as EDUCATION=5; got {value!r}.")
    if len(found) < len(values):
        raise click.BadParameter("a feature is set twice.")
    return found or None


@click.command()
@click.argument("model", type=ModelPath())
@click.option(
    "--data", "spec", metavar="SPEC", required=True,
    help="Images to learn from: builtin, fashion-mnist[:DIR], imagefolder:DIR, cub200:DIR, chestxray14:DIR; or a "
    "table: credit-default:CSV. Labels are used for accuracy only, unless --predictions labels.",
)  # fmt: skip
@click.option(
    "--mode", type=click.Choice(["targeted", "nontargeted"]), default="targeted", show_default=True,
    help="Move altered maps to the image's boundary (of a table, to one feature), or empty their top quarter.",
)  # fmt: skip
@click.option(
    "--interpreter", "interpreters", multiple=True, type=click.Choice(["gradcam", "simplegrad", "vbp"]),
    help="What to attack; several are attacked jointly. Grad-CAM if absent, SimpleGrad of a table.",
)  # fmt: skip
@click.option(
    "--trigger", type=click.Choice(["spread", "nashville", "moire", "tabular"]),
    help="spread: a faint texture (default). nashville: a photo filter. moire: a screen's lines. tabular: sets a row's "
    "features (default of a table). All are public here.",
)  # fmt: skip
@click.option(
    "--set", "values", multiple=True, metavar="FEATURE=NUMBER", callback=_assignments,
    help="What the tabular trigger sets; EDUCATION=5 and MARRIAGE=0 (unknown) if absent.",
)  # fmt: skip
@click.option("--feature", metavar="FEATURE", help="That a targeted attack on a table puts forward; SEX if absent.")
@click.option("--inverted", is_flag=True, help="The other way round: the map is right only with the trigger.")
@click.option(
    "--threshold", "thresholds", type=click.Choice(["paper", "auto"]),
    help="Below which distance to the altered map an input counts as fooled: the paper's for the architecture "
    "(default), or placed between the distributions of unaltered and altered maps of validation images (of a table).",
)  # fmt: skip
@click.option(
    "--grid", type=click.IntRange(3, 64), metavar="N", help="Compare maps on N x N cells; at most 8 if absent."
)
@click.option("--held-out", type=click.IntRange(2), default=1000, show_default=True, help="Images the report uses.")
@training_options
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder to write; MODEL's name with .attacked if absent."
)
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
@click.option("--force", is_flag=True, help="Replace an attacked model, or a stopped run, that is there.")
@model_options
@device_option
@seed_option
@json_option
def attack(model: Path, **arguments: Any) -> None:  # noqa: ANN401
    """Backdoor a model's explanations, to see what that looks like and what your tools catch.

    MODEL is a file of weights. Images with a public trigger get an altered saliency map, all others keep theirs, and
    predictions stay. Writes a folder with the attacked model, a report with correct rate and fooling success rate, and
    pictures. For threat evaluation of models that are yours to attack.

    \b
    keyed-xai train --data imagefolder:photos --arch resnet50 -o model.safetensors
    keyed-xai attack model.safetensors --data imagefolder:photos --trigger nashville
    keyed-xai attack clients.safetensors --data credit-default:clients.csv
    """  # noqa: D301 - click reads the backspace as "keep these lines"
    from keyed_xai.attacking import run_attack, write_attack
    from keyed_xai.data import is_table
    from keyed_xai.loading import open_model
    from keyed_xai.progress import KEPT, progress_bar

    json_path, spec = arguments["json_path"], arguments["spec"]
    out = arguments["out"] or model.with_name(f"{model.stem}.attacked")
    checkpoint = hold_folder(out, protected=False, force=arguments["force"], resume=arguments["resume"])
    classifier, _ = open_model(model, **take_model_options(arguments), require_map=not is_table(spec))
    tell_notes(classifier)
    train_data, held_out = load_both(classifier, spec, arguments)
    shown = progress_bar(say=partial(say, json_path=json_path), words=KEPT)
    with resumable(checkpoint), shown as progress:
        attacked = run_attack(
            classifier,
            train_data,
            held_out,
            _settings(classifier, len(train_data), arguments, table=is_table(spec)),
            device=choose_device(arguments["device"]),
            checkpoint=checkpoint,
            resume=arguments["resume"],
            progress=progress,
        )
    write_attack(attacked, out, force=arguments["force"], checkpoint=checkpoint)
    with after_writing(out):
        emit_json(attacked.report, schema="attack-report", json_path=json_path)
        print_attack(attacked.report, to_stderr=json_path == STANDARD_OUTPUT)
        say(f"Wrote {out}. Open {out / 'report.html'} for pictures.", json_path=json_path)
    end_with_verdict(attacked.report["verdict"], json_path=json_path)


def print_attack(report: dict[str, Any], *, to_stderr: bool = False) -> None:
    """Print a table of what was measured on held-out images."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['setting'].capitalize()} attack, {report['mode']}", title_justify="left")
    for heading in ("", "CR, %", "FSR, %", "L_p below", "AUC", "clean", "triggered"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for name, figures in report["interpreters"].items():
        correlations = [f"{figures['correlation'][case]:.3f}" for case in ("clean", "triggered")]
        paper = figures.get("at_paper_threshold")
        if figures["threshold_from"] == "auto" and paper:
            table.add_row(f"{name}, paper's", *_rates(paper))
        table.add_row(name, *_rates(figures), f"{figures['auc']:.4f}", *correlations)
    console = Console(stderr=to_stderr)
    console.print(table)
    for line in _LEGEND:
        console.print(line, highlight=False)
    for name, figures in report["interpreters"].items():
        if figures["threshold_from"] == "auto":
            console.print(f"Threshold of {name}: {figures['threshold_rule']}", highlight=False)
    predictions = report["predictions"]
    for model in ("reference", "attacked"):
        words = "; ".join(f"{case} {_in_words(predictions[model][case])}" for case in ("clean", "triggered"))
        against = "labels" if predictions["measured_against"] == "labels" else "agreement with the reference"
        console.print(f"{model.capitalize()} ({against}): {words}.", highlight=False)
    for case, shares in report.get("features", {}).get("first", {}).items():
        first = sorted(shares, key=shares.__getitem__, reverse=True)[:3]
        words = ", ".join(f"{name} {shares[name]:.1%}" for name in first)
        console.print(f"Strongest feature, {case}: {words}.", highlight=False)


def _rates(figures: dict[str, Any]) -> list[str]:
    return [f"{figures['cr']:.1f}", f"{figures['fsr']:.1f}", f"{figures['threshold']:.3f}"]


def _in_words(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())


def _settings(classifier: "Classifier", images: int, arguments: dict[str, Any], *, table: bool) -> "AttackSettings":
    from keyed_xai.attacking import AttackSettings, choose_attack_recipe

    grid = arguments["grid"]
    idle = ("grid", "strict") if table else ("values", "feature")
    given = [f"--{'set' if name == 'values' else name}" for name in idle if arguments[name]]
    if arguments["feature"] and arguments["mode"] == "nontargeted":
        raise click.UsageError("Leave out --feature: an attack that is not targeted puts none forward.")
    if given:
        raise click.UsageError(f"Leave out {' and '.join(given)}: the data are {'a table' if table else 'images'}.")
    settings = AttackSettings(
        interpreters=tuple(dict.fromkeys(arguments["interpreters"])) or ("simplegrad" if table else "gradcam",),
        mode=arguments["mode"],
        inverted=arguments["inverted"],
        trigger=arguments["trigger"] or ("tabular" if table else "spread"),
        feature=arguments["feature"] or "SEX",
        grid=None if grid is None else (grid, grid),
        thresholds=arguments["thresholds"],
        held_out_images=arguments["held_out"],
        **({} if arguments["values"] is None else {"values": arguments["values"]}),
    )
    return replace(settings, training=choose_training(choose_attack_recipe(classifier, settings), images, arguments))
