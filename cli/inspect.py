"""`keyed-xai inspect`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keyed_xai_cli.options import STANDARD_OUTPUT, ModelPath, emit_json, json_option, say

if TYPE_CHECKING:
    from rich.table import Table


@click.command()
@click.argument("path", type=ModelPath())
@json_option
@click.pass_context
def inspect(ctx: click.Context, path: Path, json_path: Path | None) -> None:
    """Print the card and licence of a protected model, or a licence alone.

    PATH is a model's folder, a license.json or a card.json. The licence's signature is checked, and in a folder the
    digest of every file too; exit code 1 says that something does not hold. Anybody can sign a licence with a key of
    their own: compare the key id with the one you expect.
    """
    from keyed_xai.artifacts.inspection import inspect_artifact

    result = inspect_artifact(path)
    emit_json(result, schema="inspect", json_path=json_path)
    _print_tables(result, to_stderr=json_path == STANDARD_OUTPUT)
    for problem in result["problems"]:
        click.echo(f"Problem: {problem}", err=True)
    if result["problems"]:
        ctx.exit(1)
    say(_summary(result), json_path=json_path)


def _summary(result: dict[str, Any]) -> str:
    if result["signature"] == "absent":
        return "The card is well formed. It carries no signature of its own."
    if result["kind"] == "license":
        return "The signature holds. The files it covers were not looked at: inspect the model's folder for that."
    return "The signature holds, and every file it covers is as it was signed."


def _print_tables(result: dict[str, Any], *, to_stderr: bool) -> None:
    from rich.console import Console

    console = Console(stderr=to_stderr)
    for title in ("card", "license"):
        if result[title] is not None:
            console.print(_table(title.capitalize(), _rows(result[title])))
    if result["subjects"]:
        console.print(_table("Files", ((subject["name"], subject["state"]) for subject in result["subjects"])))


def _table(title: str, rows: Iterator[tuple[str, str]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(Text(name), Text(value, overflow="fold"))  # Text: no markup from the file is obeyed
    return table


def _rows(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted field names and values in words."""
    for name, value in document.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield f"{prefix}{name}", ", ".join(map(_in_words, value))
        else:
            yield f"{prefix}{name}", _in_words(value)


def _in_words(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(map(str, value.values()))
    return str(value).strip()
