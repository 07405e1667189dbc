"""Options that commands share, and JSON output. Nothing heavy is imported before a command runs."""

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import click

from keyed_xai.errors import KeyedXAIError, KeyFormatError
from keyed_xai_cli.groups import Command
from keyed_xai_cli.main import NOT_SHOWN

if TYPE_CHECKING:
    from keyed_xai.keys import OwnerKey

STANDARD_OUTPUT = Path("-")
_LARGEST_PASSPHRASE = 1023  # bytes; what PKCS#8 encryption takes


def _check_device(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
        raise click.BadParameter("expected auto, cpu, cuda or cuda:N.")
    return value


def json_option(command: Command) -> Command:
    """Add `--json PATH` as the argument `json_path`; what cannot be written is refused before the command starts."""

    @wraps(command)
    def start(*arguments: Any, **options: Any) -> object:  # noqa: ANN401 - the command's own
        if options["json_path"] not in (None, STANDARD_OUTPUT):
            _make_room(options["json_path"])
        return command(*arguments, **options)

    return click.option(
        "--json",
        "json_path",
        type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
        help="Also write the result as JSON; - for standard output, the text then goes to standard error.",
    )(cast(Command, start))


def device_option(command: Command) -> Command:
    """Add `--device NAME` as the argument `device`: "auto", "cpu", "cuda" or "cuda:N"."""
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        callback=_check_device,
        help="auto, cpu, cuda or cuda:N; auto takes a GPU where there is one.",
    )(command)


def seed_option(command: Command) -> Command:
    """Add `--seed N` as the argument `seed`."""
    return click.option(
        "--seed",
        type=click.IntRange(0, 2**63 - 1),
        default=0,
        show_default=True,
        help="Of all random choices but keys; the same seed gives the same result on the CPU.",
    )(command)


def follow_links_option(command: Command) -> Command:
    """Add `--follow-links` as the argument `follow_links`."""
    return click.option(
        "--follow-links", is_flag=True, help="Read images and folders that are links out of the folder given."
    )(command)


def strict_option(command: Command) -> Command:
    """Add `--strict` as the argument `strict`."""
    return click.option(
        "--strict", is_flag=True, help="Refuse a data set with a broken image instead of skipping the image."
    )(command)


def resume_option(command: Command) -> Command:
    """Add `--resume` as the argument `resume`."""
    return click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")(command)


def bench_out_option(command: Command) -> Command:
    """Add `-o` as the argument `out`, the folder of a benchmark."""
    return click.option(
        "-o", "--out", type=click.Path(file_okay=False, path_type=Path), default="bench-out", show_default=True
    )(command)


def interpreters_option(help_text: str) -> Callable[[Command], Command]:
    """Add `--interpreter NAME` as the argument `interpreters`, names without repetition."""
    return click.option(
        "--interpreter",
        "interpreters",
        multiple=True,
        type=click.Choice(["gradcam", "simplegrad", "vbp"]),
        callback=lambda _ctx, _parameter, names: tuple(dict.fromkeys(names)),
        help=help_text,
    )


def grid_option(help_text: str) -> Callable[[Command], Command]:
    """Add `--grid N` as the argument `grid`, rows and columns, or None."""
    return click.option(
        "--grid",
        type=click.IntRange(3, 64),
        metavar="N",
        callback=lambda _ctx, _parameter, cells: None if cells is None else (cells, cells),
        help=help_text,
    )


def key_file_option(*, required: bool) -> Callable[[Command], Command]:
    """Add `--key-file` as the argument `key_file`."""
    return click.option("--key-file", required=required, type=click.Path(path_type=Path), help="The owner key, PEM.")


def passphrase_option(command: Command) -> Command:
    """Add `--passphrase-file` as the argument `passphrase_file`."""
    return click.option(
        "--passphrase-file",
        type=click.Path(path_type=Path),
        help="A file with the key's passphrase on its first line.",
    )(command)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a command runs, what its random choices start from, and where its result goes."""

    device: Annotated[str, device_option]
    seed: Annotated[int, seed_option]
    json_path: Annotated[Path | None, json_option]


@dataclass(frozen=True, kw_only=True)
class KeyOptions:
    """The owner key of a command that can do without."""

    key_file: Annotated[Path | None, key_file_option(required=False)]
    passphrase_file: Annotated[Path | None, passphrase_option]

    def read(self) -> "OwnerKey | None":
        """Return the key; None without one. See `read_key`."""
        return None if self.key_file is None else read_key(self.key_file, self.passphrase_file)


def only_given(**values: object) -> dict[str, Any]:
    """Return the values that are not None, to replace defaults with."""
    return {name: value for name, value in values.items() if value is not None}


def name_given(**values: object) -> list[str]:
    """Return the options that were given, as they are typed, out of values by their long names."""
    return [f"--{name.replace('_', '-')}" for name, value in values.items() if value]


def choose_device(name: str) -> str:
    """Return the torch device that `--device` asks for.

    Raises:
        KeyedXAIError: There is no such GPU.
    """
    import torch

    found = torch.cuda.device_count() if name != "cpu" else 0
    if name == "auto":
        return "cuda" if found else "cpu"
    if name != "cpu" and int(name.partition(":")[2] or 0) >= found:
        raise KeyedXAIError(f"There is no device {name}: PyTorch finds {found} GPUs. Give --device cpu or auto.")
    return name


def read_key(key_file: Path, passphrase_file: Path | None) -> "OwnerKey":
    """Return the owner key that the options name.

    Raises:
        KeyFormatError: A file cannot be read, holds no such key, or the passphrase does not fit.
    """
    from keyed_xai.keys import read_owner_key

    return read_owner_key(key_file, read_passphrase(passphrase_file))


def read_passphrase(path: Path | None) -> bytes | None:
    """Return the first line of a file, without its line ending and a byte order mark; None without a file.

    Raises:
        KeyFormatError: The file cannot be read, is UTF-16, or its first line is empty or too long.
    """
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            line = file.readline(_LARGEST_PASSPHRASE + 6).removesuffix(b"\n").removesuffix(b"\r")
    except OSError as error:
        raise KeyFormatError(f"Cannot read the passphrase file {path}: {error.strerror}.") from error
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise KeyFormatError(f"{path} is UTF-16, expected UTF-8. Save the passphrase file as UTF-8.")
    line = line.removeprefix(codecs.BOM_UTF8)
    if not line or len(line) > _LARGEST_PASSPHRASE:
        raise KeyFormatError(f"The first line of {path} must hold a passphrase of 1 to {_LARGEST_PASSPHRASE} bytes.")
    return line


class ModelPath(click.Path):
    """The path of a model that is there; a folder that a killed run was about to replace gets its name again."""

    def __init__(self) -> None:
        """Take files and folders."""
        super().__init__(exists=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """Return the path."""
        from keyed_xai.outputs import put_back

        put_back(Path(value))
        return super().convert(value, param, ctx)


def default_output(model: Path, ending: str) -> Path:
    """Return where a command writes when it is not told: beside the model, under all of its name, so no two meet."""
    named = model if model.name not in ("", "..") else model.resolve()
    return named.with_name(f"{named.name}{ending}")


def claim_output(output: Path) -> None:
    """Claim an output until the command has ended, before any long work; its folder is made.

    Raises:
        ArtifactError: Another run is writing it, or it cannot be written.
    """
    from keyed_xai.outputs import claimed

    click.get_current_context().with_resource(claimed(output))


def claim_model_folder(out: Path, *, force: bool, resume: bool, protected: bool = True) -> Path:
    """Claim the folder of a model before hours of training, and return where the run's checkpoint is.

    Raises:
        ArtifactError: Another run is writing it; or a result or a stopped run is there, and neither `--force` nor
            `--resume` says what to do with it.
    """
    from keyed_xai.artifacts.checkpoint import check_not_stopped
    from keyed_xai.artifacts.writer import check_replaceable

    claim_output(out)
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    check_replaceable(out, force=force, protected=protected)
    check_not_stopped(checkpoint, resume=resume, force=force)
    return checkpoint


@contextmanager
def after_writing(output: Path) -> Iterator[None]:
    """Have the message of what fails in here say that the command's output was written all the same."""
    try:
        yield
    except (KeyedXAIError, OSError) as error:
        error.add_note(f"{output} was written all the same.")
        raise


def emit_json(document: Mapping[str, Any], *, schema: str, json_path: Path | None) -> None:
    """Write a result where `--json` says, once it fits its schema; without `--json` only check it.

    Raises:
        ArtifactError: The document does not fit, or the file cannot be written.
    """
    from keyed_xai.artifacts.documents import encode_json, write_json

    if json_path is not None and json_path != STANDARD_OUTPUT:
        write_json(json_path, document, schema=schema)
        return
    text = encode_json(document, schema=schema)
    if json_path == STANDARD_OUTPUT:
        click.echo(text, nl=False)


@contextmanager
def resumable(checkpoint: Path) -> Iterator[None]:
    """Have a run that is interrupted in here say how to go on with it."""
    try:
        yield
    except KeyboardInterrupt:
        kept = "The same command with --resume goes on." if checkpoint.exists() else "Nothing was kept so far."
        click.echo(kept, err=True)
        raise


def end_with_verdict(verdict: Mapping[str, str], *, json_path: Path | None) -> None:
    """Print a run's verdict, last of all, and end with exit code 3 where it is a no; in part warns."""
    line = f"{verdict['answer'].upper()}: {verdict['sentence']}"
    if not verdict["answer"].startswith("not") and not verdict["answer"].endswith("in part"):
        say(line, json_path=json_path)
        return
    click.echo(f"Warning: {line}", err=True)
    if verdict["answer"].startswith("not"):
        click.get_current_context().exit(NOT_SHOWN)


def emit_figures(bench: str, rows: list[dict[str, Any]], settings: dict[str, Any], *, json_path: Path | None) -> None:
    """Write what a benchmark measured where `--json` says; see `emit_json`."""
    from keyed_xai.artifacts.versions import package_versions

    document = {
        "schema": "keyed-xai/bench-figures/v1",
        "bench": bench,
        "rows": rows,
        "settings": settings,
        "versions": package_versions(),
    }
    emit_json(document, schema="bench-figures", json_path=json_path)


def emit_measurement(bench: str, found: dict[str, Any], settings: dict[str, Any], *, json_path: Path | None) -> None:
    """Write what a benchmark of one row measured; without `--json -` also print it."""
    emit_figures(bench, [found], settings, json_path=json_path)
    if json_path != STANDARD_OUTPUT:
        click.echo(json.dumps(found, indent=2))


def _make_room(path: Path) -> None:
    from keyed_xai.outputs import claimed

    with claimed(path):
        pass


def say(message: str, *, json_path: Path | None) -> None:
    """Print a line for people: to standard error when standard output holds the JSON."""
    click.echo(message, err=json_path == STANDARD_OUTPUT)
