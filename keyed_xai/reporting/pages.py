"""Pages from the templates in templates/: one HTML file each that explains itself, without scripts or network.

Names in a report may come from files of strangers. Whatever a template prints is therefore escaped, its control
characters replaced, and a field that a template asks for and a report lacks is an error, not an empty place.
"""

import base64
import json
from functools import cache
from typing import TYPE_CHECKING

from keyed_xai.artifacts.documents import printable
from keyed_xai.reporting.names import interpreter_name
from keyed_xai.reporting.wording import as_decimal, as_duration, as_p_value, as_percent, as_plain, as_power, as_share

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: object) -> str:
    """Return the page that a template makes of values."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("keyed_xai.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_on_one_line,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "base64": lambda data: base64.b64encode(data).decode(),
        "decimal": as_decimal,
        "duration": as_duration,
        "interpreter": interpreter_name,
        "json": json.dumps,
        "p_value": as_p_value,
        "percent": as_percent,
        "plain": as_plain,
        "power": as_power,
        "share": as_share,
    }
    return environment


def _on_one_line(value: object) -> object:
    """Return a value without control characters; markup of the templates' own stays as it is."""
    return value if hasattr(value, "__html__") else printable(str(value))
