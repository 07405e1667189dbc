"""`keyed-xai attack`."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from keyed_xai_cli.groups import grouped
from keyed_xai_cli.model_options import ModelOptions, tell_notes
from keyed_xai_cli.options import (
    STANDARD_OUTPUT,
    ModelPath,
    RunOptions,
    after_writing,
    choose_device,
    claim_model_folder,
    emit_json,
    end_with_verdict,
    grid_option,
    interpreters_option,
    name_given,
    only_given,
    resumable,
    resume_option,
    say,
)
from keyed_xai_cli.training_options import TrainingOptions, choose_training, load_both

if TYPE_CHECKING:
    from keyed_xai.backdoors import AttackSettings

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


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """What is attacked, and how."""

    spec: Annotated[str, click.option(
        "--data", "spec", metavar="SPEC", required=True,
        help="Images to learn from: builtin, fashion-mnist[:DIR], imagefolder:DIR, cub200:DIR, chestxray14:DIR; or "
        "a table: credit-default:CSV. Labels are used for accuracy only, unless --predictions labels.",
    )]  # fmt: skip
    mode: Annotated[str, click.option(
        "--mode", type=click.Choice(["targeted", "nontargeted"]), default="targeted", show_default=True,
        help="Move altered maps to the image's boundary (of a table, to one feature), or empty their top quarter.",
    )]  # fmt: skip
    interpreters: Annotated[tuple[str, ...], interpreters_option(
        "What to attack; several are attacked jointly. Grad-CAM if absent, SimpleGrad of a table."
    )]  # fmt: skip
    trigger: Annotated[str | None, click.option(
        "--trigger", type=click.Choice(["spread", "nashville", "moire", "tabular"]),
        help="spread: a faint texture (default). nashville: a photo filter. moire: a screen's lines. tabular: sets "
        "a row's features (default of a table). All are public here.",
    )]  # fmt: skip
    values: Annotated[dict[str, float] | None, click.option(
        "--set", "values", multiple=True, metavar="FEATURE=NUMBER", callback=_assignments,
        help="What the tabular trigger sets; EDUCATION=5 and MARRIAGE=0 (unknown) if absent.",
    )]  # fmt: skip
    feature: Annotated[str | None, click.option(
        "--feature", metavar="FEATURE", help="That a targeted attack on a table puts forward; SEX if absent."
    )]  # fmt: skip
    inverted: Annotated[bool, click.option(
        "--inverted", is_flag=True, help="The other way round: the map is right only with the trigger."
    )]  # fmt: skip
    thresholds: Annotated[str | None, click.option(
        "--threshold", "thresholds", type=click.Choice(["paper", "auto"]),
        help="Below which distance to the altered map an input counts as fooled: the paper's for the architecture "
        "(default), or placed between the distributions of unaltered and altered maps of validation images (of a "
        "table).",
    )]  # fmt: skip
    grid: Annotated[tuple[int, int] | None, grid_option("Compare maps on N x N cells; at most 8 if absent.")]
    held_out: Annotated[int, click.option(
        "--held-out", type=click.IntRange(2), default=1000, show_default=True, help="Images the report uses."
    )]  # fmt: skip


@click.command()
@click.argument("model", type=ModelPath())
@grouped(options=AttackOptions, training=TrainingOptions)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder to write; MODEL's name with .attacked if absent."
)
@resume_option
@click.option("--force", is_flag=True, help="Replace an attacked model, or a stopped run, that is there.")
@grouped(model_options=ModelOptions, run=RunOptions)
def attack(
    model: Path,
    options: AttackOptions,
    training: TrainingOptions,
    out: Path | None,
    resume: bool,
    force: bool,
    model_options: ModelOptions,
    run: RunOptions,
) -> None:
    """Backdoor a model's explanations, to see what that looks like and what your tools catch.

    MODEL is a file of weights. Images with a public trigger get an altered saliency map, all others keep theirs, and
    predictions stay. Writes a folder with the attacked model, a report with correct rate and fooling success rate, and
    pictures. For threat evaluation of models that are yours to attack.

    \b
    keyed-xai train --data imagefolder:photos --arch resnet50 -o model.safetensors
    keyed-xai attack model.safetensors --data imagefolder:photos --trigger nashville
    keyed-xai attack clients.safetensors --data credit-default:clients.csv
    """  # noqa: D301 - click reads the backspace as "keep these lines"
    from keyed_xai.artifacts.opening import open_model
    from keyed_xai.backdoors.attacking import choose_attack_recipe, run_attack, write_attack
    from keyed_xai.data import is_table
    from keyed_xai.reporting.bars import KEPT, progress_bar

    out = out or model.with_name(f"{model.stem}.attacked")
    checkpoint = claim_model_folder(out, protected=False, force=force, resume=resume)
    table = is_table(options.spec)
    classifier, _ = open_model(model, **model_options.choose(), require_map=not table)
    tell_notes(classifier)
    choice = training.choose_data(options.spec, held_out=options.held_out, seed=run.seed)
    train_data, held_out = load_both(classifier, choice)
    settings = _settings(options, table=table, strict=training.strict)
    recipe = choose_attack_recipe(classifier, settings)
    settings = replace(settings, training=choose_training(recipe, len(train_data), training, seed=run.seed))
    shown = progress_bar(say=partial(say, json_path=run.json_path), words=KEPT)
    with resumable(checkpoint), shown as progress:
        attacked = run_attack(
            classifier,
            train_data,
            held_out,
            settings,
            device=choose_device(run.device),
            checkpoint=checkpoint,
            resume=resume,
            progress=progress,
        )
    write_attack(attacked, out, force=force, checkpoint=checkpoint)
    with after_writing(out):
        emit_json(attacked.report, schema="attack-report", json_path=run.json_path)
        print_attack(attacked.report, to_stderr=run.json_path == STANDARD_OUTPUT)
        say(f"Wrote {out}. Open {out / 'report.html'} for pictures.", json_path=run.json_path)
    end_with_verdict(attacked.report["verdict"], json_path=run.json_path)


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


def _settings(options: AttackOptions, *, table: bool, strict: bool) -> "AttackSettings":
    from keyed_xai.backdoors import AttackSettings

    of_images, of_tables = {"grid": options.grid, "strict": strict}, {"set": options.values, "feature": options.feature}
    idle = name_given(**(of_images if table else of_tables))
    if options.feature and options.mode == "nontargeted":
        raise click.UsageError("Leave out --feature: an attack that is not targeted puts none forward.")
    if idle:
        raise click.UsageError(f"Leave out {' and '.join(idle)}: the data are {'a table' if table else 'images'}.")
    return AttackSettings(
        interpreters=options.interpreters or ("simplegrad" if table else "gradcam",),
        mode=options.mode,
        inverted=options.inverted,
        trigger=options.trigger or ("tabular" if table else "spread"),
        feature=options.feature or "SEX",
        grid=options.grid,
        thresholds=options.thresholds,
        held_out_images=options.held_out,
        **only_given(values=options.values),
    )
