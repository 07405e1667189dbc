"""What commands get from their options: names and types of records and arguments are those that click hands over."""

import inspect
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

import click
import pytest
from beartype.door import is_bearable
from click.testing import CliRunner

from keyed_xai_cli import main as cli
from keyed_xai_cli.groups import grouped

TYPES = {
    click.Choice: str,
    click.Path: Path,
    type(click.STRING): str,
    type(click.BOOL): bool,
    type(click.INT): int,
    type(click.FLOAT): float,
}
"""Python types by click's, whose ranges are children of their numbers."""


def list_commands():
    for name in cli.COMMANDS:
        command = cli._load(name)
        yield from command.commands.values() if isinstance(command, click.Group) else [command]


COMMANDS = list(list_commands())


def list_arguments(command):
    """Return names and types of what a command's function takes; of records, the fields."""
    hints = get_type_hints(inspect.unwrap(command.callback))
    for name, hint in hints.items():
        if is_dataclass(hint):
            yield from get_type_hints(hint).items()
        elif name not in ("ctx", "return"):
            yield name, hint


RECORDS = {
    hint
    for command in COMMANDS
    for hint in get_type_hints(inspect.unwrap(command.callback)).values()
    if is_dataclass(hint)
}


def told_type(parameter):
    """Return the type that a declaration gives; None where a callback may make another."""
    if parameter.callback is not None:
        return None
    one = next(made for kind, made in TYPES.items() if isinstance(parameter.type, kind))
    if parameter.multiple or parameter.nargs == -1:
        return tuple[one, ...]
    always = parameter.required or parameter.to_info_dict().get("default") is not None
    return one if always else one | None


@pytest.mark.parametrize("record", sorted(RECORDS, key=str), ids=lambda record: record.__name__)
def test_fields_of_a_record_are_its_options_in_their_order(record):
    command = click.command()(grouped(made=record)(lambda made: made))
    assert [parameter.name for parameter in command.params] == [field.name for field in fields(record)]
    assert record.__dataclass_params__.frozen
    assert all(field.kw_only for field in fields(record))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_command_takes_what_its_options_give(command):
    exposed = [parameter for parameter in command.params if parameter.expose_value]
    taken = dict(list_arguments(command))
    assert len(taken) == len(list(list_arguments(command))) == len(exposed)
    assert taken.keys() == {parameter.name for parameter in exposed}
    told = {parameter.name: told for parameter in exposed if (told := told_type(parameter)) is not None}
    assert told == {name: taken[name] for name in told}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_values_are_of_the_types_that_the_command_names(command, tmp_path):
    """Of options that are left out too, and of those whose callback makes something else."""
    (tmp_path / "file").touch()
    values = {"spec": "builtin", "data": "builtin", "case": "chest-xray"}
    arguments = []
    for parameter in command.params:
        if parameter.required:
            value = values.get(parameter.name, str(tmp_path / "file"))
            arguments += [parameter.opts[0], value] if isinstance(parameter, click.Option) else [value]
    made = command.make_context(command.name, arguments).params
    for name, hint in list_arguments(command):
        assert is_bearable(made[name], hint), f"{name}: {made[name]!r} is no {hint}"


@dataclass(frozen=True, kw_only=True)
class Size:
    height: Annotated[int, click.option("--height", type=int, default=2)]
    width: Annotated[int | None, click.option("--width", "width", type=int)]


def test_command_gets_records_beside_its_own_arguments():
    seen = []

    @click.command()
    @click.argument("name")
    @grouped(size=Size)
    @click.pass_context
    def draw(ctx, /, name, size):
        seen.append((ctx.info_name, name, size))

    assert CliRunner().invoke(draw, ["--width", "5", "picture"]).exit_code == 0
    assert seen == [("draw", "picture", Size(height=2, width=5))]
    assert list(inspect.signature(draw.callback).parameters) == ["ctx", "name", "size"]
    with pytest.raises(FrozenInstanceError):
        seen[0][2].width = 6


def test_headers_are_not_in_the_record_s_words():
    from keyed_xai_cli.header_options import HeaderOptions

    made = HeaderOptions(headers={"Authorization": "Bearer s3cret"}, header_file={"X": "s3cret"})
    assert "s3cret" not in repr(made)
    assert made.merge() == {"Authorization": "Bearer s3cret", "X": "s3cret"}
