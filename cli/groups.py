"""Groups of options: a frozen record, each of whose fields carries the option that fills it.

@dataclass(frozen=True, kw_only=True)
class RunOptions:
    device: Annotated[str, click.option("--device", default="auto")]

@click.command()
@grouped(run=RunOptions)
def command(run: RunOptions) -> None: ...
"""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import TYPE_CHECKING, TypeVar, cast, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Command = TypeVar("Command", bound=Callable[..., object])


def grouped(**records: "type[DataclassInstance]") -> Callable[[Command], Command]:
    """Add the options of records in their order; the command gets one record of each under the name given here."""

    def decorate(command: Command) -> Command:
        @wraps(command)
        def start(*arguments: object, **values: object) -> object:
            made = {
                name: record(**{field.name: values.pop(field.name) for field in fields(record)})
                for name, record in records.items()
            }
            return command(*arguments, **values, **made)

        decorated = cast(Command, start)
        options = [hint for record in records.values() for hint in get_type_hints(record, include_extras=True).values()]
        for option in reversed(options):
            decorated = option.__metadata__[0](decorated)
        return decorated

    return decorate
