"""`keyed-xai audit`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from keyed_xai_cli.groups import grouped
from keyed_xai_cli.model_options import ModelOptions, tell_notes
from keyed_xai_cli.options import (
    STANDARD_OUTPUT,
    KeyOptions,
    ModelPath,
    RunOptions,
    after_writing,
    choose_device,
    claim_output,
    default_output,
    emit_json,
    follow_links_option,
    say,
    strict_option,
)
from keyed_xai_cli.training_options import DataChoice, load_both_images

if TYPE_CHECKING:
    from keyed_xai.auditing import Audit, AuditSettings, Suspect

_HEADS = {
    "accuracy": "of images without the trigger, after the attack.",
    "keyed": "mean correlation of maps with the right ones, with the trigger (worst interpreter).",
    "unkeyed": "the same without it.",
    "ownership p": "chance of as much evidence from a model that has nothing to do with the key.",
}
_COLOURS = {"good": "green", "middling": "yellow", "bad": "red"}


def _list_entries(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    """Print all that can be run, and end."""
    if not value or ctx.resilient_parsing:
        return
    from rich.console import Console
    from rich.table import Table

    from keyed_xai.auditing.catalogue import AUDITS, GROUPS
    from keyed_xai.auditing.entries import THREATS

    console = Console()
    console.print("What --against takes. Removal attacks may be joined: prune-30+ftal.", highlight=False)
    for group, about in GROUPS.items():
        console.print(f"\n{group}: {about}", highlight=False, style="bold")
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        for name, entry in AUDITS.items():
            if entry.group == group:
                groups = [*entry.also, *(() if entry.slow else ("quick",))]
                more = f" Also in {', '.join(groups)}." if groups else ""
                kind = f"{THREATS[entry.threat]} ({entry.threat})"
                table.add_row(f"  {name}", f"{entry.title}: {entry.strength}. Threat: {kind}.{more}")
        console.print(table, highlight=False)
    ctx.exit()


@dataclass(frozen=True, kw_only=True)
class SuspectOptions(KeyOptions):
    """What is known about the model: its owner's key, and other models of the same task."""

    reference: Annotated[Path | None, click.option(
        "--reference", type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="The model before it was protected or attacked: what its maps should show.",
    )]  # fmt: skip
    surrogate: Annotated[Path | None, click.option(
        "--surrogate", type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="An unprotected model of the same task, such as an attacker fits to images of their own.",
    )]  # fmt: skip

    def open(self, model: Path, model_options: ModelOptions) -> "Suspect":
        """Return the model with all that; see `open_suspect`."""
        from keyed_xai.auditing import open_suspect

        key = self.read()
        return open_suspect(
            model, key=key, reference=self.reference, surrogate=self.surrogate, options=model_options.choose()
        )


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """The images of an audit, and how thorough it is."""

    spec: Annotated[str, click.option(
        "--data", "spec", metavar="SPEC", default="builtin", show_default=True,
        help="Images to attack and defend with: builtin, fashion-mnist[:DIR], imagefolder:DIR, cub200:DIR, "
        "chestxray14:DIR. Positive controls need labels.",
    )]  # fmt: skip
    limit: Annotated[int | None, click.option(
        "--limit", type=click.IntRange(10), help="Attack and defend with at most so many images."
    )]  # fmt: skip
    held_out: Annotated[int, click.option(
        "--held-out", type=click.IntRange(2), default=500, show_default=True, help="Images to measure on."
    )]  # fmt: skip
    strict: Annotated[bool, strict_option]
    controls: Annotated[bool, click.option(
        "--controls/--no-controls", default=True, show_default=True,
        help="Also run the defences on a clean network and on two with plain backdoors, which they must catch.",
    )]  # fmt: skip
    decoys: Annotated[int, click.option(
        "--decoys", type=click.IntRange(1), default=999, show_default=True,
        help="Random keys in each ownership test, at most.",
    )]  # fmt: skip


@click.command()
@click.argument("model", type=ModelPath())
@click.option(
    "--against", multiple=True, metavar="NAME", default=("quick",), show_default=True,
    help="A defence, an attack or a group: quick, defences, checks, removal, keys, bypass, all. May be given several "
    "times; --list shows all.",
)  # fmt: skip
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_list_entries,
              help="Show what can be run, and end.")  # fmt: skip
@grouped(suspect_options=SuspectOptions, options=AuditOptions)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder to write; MODEL's name with .audit if absent."
)
@click.option("--resume", is_flag=True, help="Go on with an audit: what is done on the same model and data is kept.")
@follow_links_option
@grouped(model_options=ModelOptions, run=RunOptions)
def audit(
    model: Path,
    against: tuple[str, ...],
    suspect_options: SuspectOptions,
    options: AuditOptions,
    out: Path | None,
    resume: bool,
    follow_links: bool,
    model_options: ModelOptions,
    run: RunOptions,
) -> None:
    """Run backdoor defences and removal attacks on a model, and report what is left.

    MODEL is a protected or attacked model's folder, or a file of weights. Defences run on any model. What an attack
    leaves of a gate and of ownership needs the owner's key and the reference model; of an attacked model it needs
    neither. Every finding is kept as it is made. The exit code is 0 when the audit ran, whatever it found.

    \b
    keyed-xai audit m.keyed --key-file k.pem --reference m.safetensors
    keyed-xai audit m.attacked --data imagefolder:photos --against defences
    """  # noqa: D301 - click reads the backspace as "keep these lines"
    from keyed_xai.artifacts.documents import printable
    from keyed_xai.auditing.running import REPORT_NAME, check_same_audit
    from keyed_xai.auditing.running import audit as run_audit
    from keyed_xai.reporting.bars import progress_bar
    from keyed_xai.training.preflight import describe_data

    json_path, out = run.json_path, out or default_output(model, ".audit")
    settings = _settings(against, options, seed=run.seed)
    claim_output(out / REPORT_NAME)
    check_same_audit(out, resume=resume)
    suspect = suspect_options.open(model, model_options)
    if suspect.kind == "plain":
        tell_notes(suspect.classifier)
    choice = DataChoice(
        spec=options.spec,
        limit=options.limit,
        held_out=options.held_out,
        strict=options.strict,
        follow_links=follow_links,
        seed=run.seed,
    )
    train_data, held_out = load_both_images(suspect.classifier.input, choice)
    click.echo(printable(f"{describe_data(len(train_data), 0, train_data, held_out, len(held_out))}."), err=True)

    with progress_bar(words={}, whole="audit") as progress:
        result = run_audit(
            suspect,
            train_data,
            held_out,
            settings,
            folder=out,
            resume=resume,
            device=choose_device(run.device),
            progress=progress,
        )
    with after_writing(out):
        emit_json(result.report, schema="audit-report", json_path=json_path)
        print_audit(result, to_stderr=json_path == STANDARD_OUTPUT)
        say(f"Wrote {out}. Open {out / 'audit.html'} for the curves.", json_path=json_path)


def print_audit(result: "Audit", *, to_stderr: bool = False) -> None:
    """Print what was tried and what was left."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from keyed_xai.auditing.report import grade_outcome, list_findings

    report, console = result.report, Console(stderr=to_stderr)
    heads, rows = list_findings(report)
    table = Table(title=Text(f"Audit of {report['model']['name']}"), title_justify="left", box=SIMPLE_HEAD)
    for head in heads:
        table.add_column(
            head, justify="left" if head in ("", "result") else "right", no_wrap=head not in ("", "result")
        )
    for row in rows:
        colour = _COLOURS.get(grade_outcome(row[1]), "")
        table.add_row(*(Text(cell, style=colour if place == 1 else "") for place, cell in enumerate(row)))
    console.print(table)
    for head in heads:
        if head in _HEADS:
            console.print(f"{head}: {_HEADS[head]}", highlight=False)
    lines = [f"{each['title']} {each['verdict']}. {each['sentence']}" for each in report["defences"]]
    lines += [f"Not run: {each['name']} {each['why']}." for each in report["not_run"]]
    for line in [*lines, *report["notes"]]:
        console.print(line, highlight=False, markup=False)


def _settings(against: tuple[str, ...], options: AuditOptions, *, seed: int) -> "AuditSettings":
    from keyed_xai.auditing import AuditSettings
    from keyed_xai.auditing.catalogue import choose_entries

    try:
        choose_entries(against)
    except ValueError as error:
        raise click.UsageError(f"--against: {error}") from error
    return AuditSettings(
        against=against,
        controls=options.controls,
        held_out_images=options.held_out,
        decoys=options.decoys,
        seed=seed,
    )
