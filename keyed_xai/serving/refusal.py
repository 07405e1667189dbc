"""Why a request gets no result, with the HTTP status that says so."""

import reprlib
from collections.abc import Mapping

from keyed_xai.errors import KeyedXAIError

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = 60


class Refused(KeyedXAIError):
    """A request that is answered with an error instead of tensors.

    Attributes:
        status: The HTTP status code.
        headers: Further headers of the answer.
    """

    def __init__(self, status: int, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        """Keep the status beside the message, which the client gets to read."""
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})


def malformed(message: str) -> Refused:
    """Return the refusal of a request that does not follow the protocol or does not fit the model."""
    return Refused(400, message)


def busy(message: str) -> Refused:
    """Return the refusal of a request that may be sent again a little later."""
    return Refused(503, message, headers={"Retry-After": "1"})


def shown(value: object) -> str:
    """Return something from a request, short and on one line, for an error message."""
    return "".join(letter if letter.isprintable() else "?" for letter in _SHORT.repr(value))
