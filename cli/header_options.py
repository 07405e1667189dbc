"""Options for headers that are sent with every request to a server, such as a token."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import click

from keyed_xai_cli.options import STANDARD_OUTPUT

_LARGEST_FILE = 64 * 1024


def _read_headers(_ctx: click.Context, _parameter: click.Parameter, values: Iterable[str]) -> dict[str, str]:
    found = {}
    for value in values:
        name, colon, content = value.partition(":")
        if not (colon and name.strip() and content.strip()):
            raise click.BadParameter("expected a name, a colon and a value.")  # the value may be a secret
        found[name.strip()] = content.strip()
    return found


def _read_header_file(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        with click.open_file("-" if path == STANDARD_OUTPUT else path, "rb") as file:
            data = file.read(_LARGEST_FILE + 1)
        lines = data.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise click.BadParameter(f"cannot read {path}: {reason}.") from None
    if len(data) > _LARGEST_FILE:
        raise click.BadParameter(f"{path} has more than {_LARGEST_FILE} bytes: no headers have.")
    return _read_headers(ctx, parameter, [line for line in lines if line.strip()])


@dataclass(frozen=True, kw_only=True)
class HeaderOptions:
    """Headers by name, of the command line and of a file; their values may be secret."""

    headers: Annotated[dict[str, str], click.option(
        "--header", "headers", multiple=True, metavar="'NAME: VALUE'", callback=_read_headers,
        help="Sent with every request to a server; may be given several times. Other users of this machine can see "
        "it in the list of processes: put a token into --header-file.",
    )] = field(repr=False)  # fmt: skip
    header_file: Annotated[dict[str, str], click.option(
        "--header-file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
        callback=_read_header_file,
        help="A file of such headers, one a line, such as Authorization: Bearer ...; - for standard input.",
    )] = field(repr=False)  # fmt: skip

    def merge(self) -> dict[str, str]:
        """Return all headers; those of the command line replace those of the file."""
        return self.header_file | self.headers
