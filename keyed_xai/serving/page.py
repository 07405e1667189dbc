"""The page at /: one HTML file that shows people what the picture route answers.

It loads nothing but itself and asks nobody but the server that it came from. Its policy holds a browser to that: the
page's one script and one style are allowed by their digests, everything else is forbidden.
"""

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

_POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_LARGEST = "{largest}"


@dataclass(frozen=True)
class Page:
    """What a browser gets.

    Attributes:
        body: The HTML file.
        headers: Headers that it is sent with.
    """

    body: bytes
    headers: Mapping[str, str]


def make_page(largest: int) -> Page:
    """Return the page of a server that takes files of so many bytes at most."""
    text = files("keyed_xai.serving").joinpath("page.html").read_text(encoding="utf-8")
    body = text.replace(_LARGEST, str(largest)).encode()
    headers = {
        "Content-Security-Policy": _POLICY.format(script=_digest(text, "script"), style=_digest(text, "style")),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",  # may be kept, and is asked for by its tag each time
        "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
    }
    return Page(body, headers)


async def answer_page(page: Page, request: Request) -> Response:
    """Return the page, or that the browser has it already."""
    cached = request.headers.get("if-none-match", "").split(",")
    if page.headers["ETag"] in (tag.strip().removeprefix("W/") for tag in cached):
        return Response(status_code=304, headers=page.headers)
    return Response(page.body, media_type="text/html", headers=page.headers)


def _digest(text: str, tag: str) -> str:
    """Return the digest of an element's content as a policy names it. Source: Content Security Policy 3, 2.3.1."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
