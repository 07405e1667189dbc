"""The page at /, over HTTP: what it may do in a browser, how it is kept there, and that it opens no other door."""

import base64
import hashlib
import http.client
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import colormaps

from keyed_xai.serving.service import ServeSettings
from tests.served import make_runtime, make_service, running


@pytest.fixture(scope="module")
def address():
    with running(make_service({"bird": make_runtime()}, ServeSettings(max_body=12_345))) as address:
        yield address


@pytest.fixture(scope="module")
def text(address):
    return ask(address).body.decode()


def ask(address, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    answer.body = answer.read()
    connection.close()
    return answer


class Elements(HTMLParser):
    """The elements of a page with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_policy_lets_the_page_do_nothing_but_ask_its_own_server(address):
    answer = ask(address)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    script, style = policy.pop("script-src"), policy.pop("style-src")
    nothing = ("default-src", "frame-ancestors", "base-uri", "form-action", "trusted-types")
    assert policy == {
        **dict.fromkeys(nothing, "'none'"),
        "img-src": "data:",
        "connect-src": "'self'",
        "require-trusted-types-for": "'script'",
    }
    for tag, source in (("script", script), ("style", style)):
        content = re.search(f"<{tag}>(.*?)</{tag}>".encode(), answer.body, re.DOTALL)[1]
        assert source == f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


def test_page_is_one_file_that_loads_nothing(text):
    found = Elements(text).found
    assert [tag for tag, _ in found if tag in ("script", "style", "link")] == ["link", "style", "script"]
    for tag, attributes in found:
        assert not [
            name for name in attributes if name.startswith("on") or name in ("style", "src", "srcdoc", "action")
        ]
        assert attributes.get("href", "data:").startswith("data:"), tag
    without_icon = re.sub(r'<link rel="icon".*>', "", text)
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|innerHTML|outerHTML|insertAdjacent|document\.write", without_icon
    )


def test_page_keeps_nothing_and_names_no_secret(text):
    assert not re.search(r"Storage|indexedDB|cookie|caches", text)
    assert not re.search(r"trigger|seed|amplitude|passphrase|private", text, re.IGNORECASE)
    words = " ".join(text.split())
    assert (
        "The maps of a protected model are right for keyed images only; for any other image they are decoys." in words
    )


def test_page_knows_the_server_s_limit(text):
    assert Elements(text).found[[tag for tag, _ in Elements(text).found].index("body")][1] == {"data-largest": "12345"}


def test_colours_are_those_of_the_overlays(text):
    listed = re.sub(r"\s", "", re.search(r"const COLOURS = `(.*?)`", text, re.DOTALL)[1])
    expected = np.round(255 * colormaps["inferno"](np.arange(256))[:, :3]).astype(np.uint8)
    assert bytes.fromhex(listed) == expected.tobytes()


def test_browser_that_has_the_page_is_told_so(address):
    first = ask(address)
    tag = first.headers["ETag"]
    assert re.fullmatch(r'"[0-9a-f]{64}"', tag)
    assert first.headers["Cache-Control"] == "no-cache"
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        answer = ask(address, If_None_Match=known)
        assert (answer.status, answer.body, answer.headers["ETag"]) == (304, b"", tag)
        assert answer.headers["Content-Security-Policy"] == first.headers["Content-Security-Policy"]
    for other in ('"other"', "", tag[:-2] + '"'):
        assert ask(address, If_None_Match=other).body == first.body


def test_tag_follows_the_page():
    with running(make_service({"bird": make_runtime()}, ServeSettings(max_body=99))) as other:
        tag = ask(other).headers["ETag"]
    with running(make_service({"bird": make_runtime()}, ServeSettings(max_body=98))) as other:
        assert ask(other).headers["ETag"] != tag


def test_only_get_and_head(address):
    head = ask(address, method="HEAD")
    assert (head.status, head.body) == (200, b"")
    assert dict(head.headers, date="") == dict(ask(address).headers, date="")
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        answer = ask(address, method=method)
        assert answer.status == 405
        assert "error" in json.loads(answer.body)


def test_page_is_no_request_of_a_model(address):
    def counted():
        return [line for line in ask(address, "/metrics").body.decode().splitlines() if line.startswith("keyed_xai")]

    before = counted()
    ask(address)
    assert before
    assert counted() == before


def test_page_can_be_switched_off():
    with running(make_service({"bird": make_runtime()}, ServeSettings(page=False))) as address:
        answer = ask(address)
        assert (answer.status, answer.headers["Content-Type"]) == (404, "application/json")
        assert ask(address, "/v2/models/bird/ready").status == 200


def test_other_answers_carry_no_policy_and_no_page(address):
    for path in ("/v2", "/page.html", "/index.html", "//"):
        answer = ask(address, path)
        assert answer.headers["Content-Type"] == "application/json"
        assert "Content-Security-Policy" not in answer.headers
