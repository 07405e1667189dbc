"""The page in a real browser: what a person drops is sent, and what the server answers is what is drawn.

Where neither Chromium nor Chrome is on PATH these tests are skipped.
"""

import base64
import http.client
import io
import json
import re
import shutil
import threading
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from keyed_xai.inference.client import Client
from keyed_xai.inference.runtime import Runtime
from keyed_xai.serving.service import ServeSettings
from tests import served
from tests.served import LABELS, make_runtime, make_service, running

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser: install Chromium or Chrome so that one of {', '.join(NAMES)} is on PATH"
)
FLAGS = (
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
TITLES = {"gradcam": "Grad-CAM", "vbp": "VisualBackProp"}
TOKEN = "letmein-7"
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)  # without a sandbox, in a new folder
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address():
    models = {"bird": make_runtime(), "cat": make_runtime(targeted=False), "eight": make_runtime(pixels="uint8")}
    with running(make_service(models)) as address:
        yield address


@pytest.fixture
def picture(tmp_path):
    return write_picture(tmp_path / "picture.png", seed=0)


def write_picture(path, *, seed, size=(90, 70)):
    corners = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)
    Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@contextmanager
def visiting(browser, url, *, troubles=0, **options):
    """The page, opened. It says nothing to the console, breaks no rule of its policy, and asks no other host.

    Args:
        browser: To open it in.
        url: Address of the page.
        troubles: Answers other than 200 that the visit will get; the browser itself writes those to the console.
        options: Options of the browser's window.
    """
    context = browser.new_context(**options)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"fault: {error}"))
    page.on("request", lambda request: asked.append(request.url))
    page.add_init_script("addEventListener('securitypolicyviolation', (e) => console.log(e.violatedDirective))")
    try:
        page.goto(url)
        yield page
    finally:
        context.close()
    loads = [message for message in said if message.startswith("error: Failed to load resource")]
    assert (len(loads), len(said)) == (troubles, troubles), said
    assert {address for address in asked if not address.startswith((url, "data:"))} == set()


def choose(page, path):
    page.set_input_files("#file", path)


def drop(page, *paths, at="#drop"):
    """Drops files as the system does when they are dragged over the window."""
    box = page.locator(at).bounding_box()
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, **place, "data": data})


def answer_of(address, path, model="bird"):
    """What the picture route answers to a file."""
    connection = http.client.HTTPConnection(address, timeout=20)
    headers = {"Content-Type": "application/octet-stream"}
    connection.request("POST", f"/v2/models/{model}/explain?maps=true", path.read_bytes(), headers)
    answer = json.load(connection.getresponse())
    connection.close()
    return answer


def explained_by_client(address, path, model="bird"):
    with Client(f"http://{address}", model=model) as client:
        return client.explain(path)


def expect_prediction(page, logits):
    """The page shows the three most probable classes of these logits."""
    shares = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-shares)[:3]
    expect(page.locator("#winner")).to_have_text(LABELS[order[0]])
    expect(page.locator("#top li")).to_have_text([f"{LABELS[each]}{100 * shares[each]:.1f} %" for each in order])
    widths = page.locator("#top .bar").evaluate_all(
        "(bars) => bars.map((bar) => bar.offsetWidth / bar.parentElement.offsetWidth)"
    )
    np.testing.assert_allclose(widths, shares[order], atol=0.01)


def painted(page, interpreter):
    """The pixels of a raw map as they are on its canvas, [rows, columns, 3]."""
    rows = page.locator(f"[data-interpreter={interpreter}] .raw").evaluate(
        """(canvas) => {
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          return [canvas.height, canvas.width, ...data];
        }"""
    )
    pixels = np.array(rows[2:]).reshape(*rows[:2], 4)
    assert (pixels[..., 3] == 255).all()
    return pixels[..., :3]


def in_colours(values):
    values = np.asarray(values, np.float64)
    return np.round(255 * colormaps["inferno"]((values - values.min()) / (values.max() - values.min()))[..., :3])


def seen(page, interpreter):
    """What is on the screen where a map lies over the image, without the rounded corners, [rows, columns, 3]."""
    shot = Image.open(io.BytesIO(page.locator(f"[data-interpreter={interpreter}] .stack").screenshot()))
    pixels = np.asarray(shot.convert("RGB"), np.float64)
    return pixels[8:-8, 8:-8]


def unpack(text, size):
    """A PNG file, scaled as a browser shows it."""
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        wide = image.convert("RGB").resize((size[1] + 16, size[0] + 16), Image.Resampling.BILINEAR)
    return np.asarray(wide, np.float64)[8:-8, 8:-8]


class TestPicture:
    @pytest.mark.parametrize(
        ("model", "interpreters"), [("bird", ["gradcam", "vbp"]), ("cat", ["vbp"]), ("eight", None)]
    )
    def test_prediction_and_maps_are_the_client_s(self, browser, address, picture, model, interpreters):
        expected = explained_by_client(address, picture, model)
        with visiting(browser, f"http://{address}/") as page:
            page.select_option("#model", model)
            choose(page, picture)
            expect(page.locator("#who")).to_have_text(f"Predicted by {model}")
            expect_prediction(page, expected.logits[0])
            names = interpreters or ["gradcam", "vbp"]
            expect(page.locator("article h3")).to_have_text([TITLES[name] for name in names])
            for name in names:
                values = expected.maps[name][0]
                off = np.abs(painted(page, name) - in_colours(values))
                assert off.max() <= 8  # next to each other in the list of colours: its steps are cut by rounding
                assert (off.max(-1) == 0).mean() > 0.9
                card = page.locator(f"[data-interpreter={name}]")
                ends = [float(each) for each in card.locator(".ends span").all_inner_texts()]
                np.testing.assert_allclose(
                    ends, [values.min(), (values.min() + values.max()) / 2, values.max()], rtol=6e-3
                )
                rows, columns = values.shape
                expect(card.locator("figcaption").last).to_have_text(f"Raw map, {rows} × {columns} cells")

    def test_overlays_are_the_answer_s_and_fade(self, browser, address, picture):
        answer = answer_of(address, picture)
        with visiting(browser, f"http://{address}/") as page:
            choose(page, picture)
            expect(page.locator("#result")).to_be_visible()
            bare = page.locator("#image").get_attribute("src").removeprefix("data:image/png;base64,")
            for name, overlay in answer["overlays"].items():
                page.locator("#opacity").fill("100")
                expect(page.locator("#strength")).to_have_text("100 %")
                full = seen(page, name)
                assert np.abs(full - unpack(overlay, full.shape)).mean() < 6
                page.locator("#opacity").fill("0")
                none = seen(page, name)
                assert np.abs(none - unpack(bare, none.shape)).mean() < 12  # its few pixels have sharp edges here
                assert np.abs(full - none).mean() > 20
                page.locator("#opacity").fill("50")
                assert np.abs(seen(page, name) - (full + none) / 2).max() < 3

    def test_colour_bar_runs_from_dark_to_bright(self, browser, address, picture):
        with visiting(browser, f"http://{address}/") as page:
            choose(page, picture)
            row = page.locator("[data-interpreter=gradcam] .colours").evaluate(
                "(canvas) => [...canvas.getContext('2d').getImageData(0, 0, 256, 1).data]"
            )
            np.testing.assert_array_equal(np.reshape(row, (256, 4))[:, :3], in_colours([np.arange(256)])[0])

    def test_constant_map_is_one_colour_with_one_number(self, browser, address, tmp_path):
        Image.new("RGB", (24, 32), (200, 200, 200)).save(tmp_path / "grey.png")
        with visiting(browser, f"http://{address}/") as page:
            choose(page, tmp_path / "grey.png")
            expect(page.locator("#result")).to_be_visible()
            for name, values in answer_of(address, tmp_path / "grey.png")["maps"].items():
                assert np.ptp(values) == 0
                assert (painted(page, name) == in_colours([0, 1])[0]).all()
                lowest, *further = page.locator(f"[data-interpreter={name}] .ends span").all_inner_texts()
                assert float(lowest.replace("−", "-")) == pytest.approx(values[0][0], rel=6e-3)
                assert further == ["", ""]

    def test_cells_that_are_no_numbers_are_grey(self, browser, picture):
        class Broken(Runtime):
            def run(self, images, target=None):
                outputs = dict(super().run(images, target))
                outputs["saliency_vbp"] = np.array(outputs["saliency_vbp"])
                outputs["saliency_vbp"][:, 0, 0] = np.nan
                return outputs

        with running(make_service({"bird": make_runtime(Broken)})) as address:
            expected = answer_of(address, picture)["maps"]["vbp"]
            assert expected[0][0] is None
            with visiting(browser, f"http://{address}/") as page:
                choose(page, picture)
                expect(page.locator("#result")).to_be_visible()
                grey = (painted(page, "vbp") == 128).all(-1)
                assert grey[0, 0]
                assert grey.sum() == 1

    def test_formats_that_browsers_do_not_draw_are_shown(self, browser, address, tmp_path):
        write_picture(tmp_path / "picture.tiff", seed=3)
        expected = explained_by_client(address, tmp_path / "picture.tiff")
        with visiting(browser, f"http://{address}/") as page:
            choose(page, tmp_path / "picture.tiff")
            expect_prediction(page, expected.logits[0])
            assert page.locator("#image").evaluate("(image) => [image.naturalWidth, image.naturalHeight]") == [24, 32]

    def test_class_names_are_text(self, browser, picture, monkeypatch):
        hostile = [f"<img src=x onerror=alert({number})>&amp;" for number in range(4)]
        monkeypatch.setattr(served, "LABELS", hostile)
        with running(make_service({"bird": make_runtime()})) as address:
            (best,) = explained_by_client(address, picture).predicted
            with visiting(browser, f"http://{address}/") as page:
                choose(page, picture)
                expect(page.locator("#winner")).to_have_text(hostile[best])
                expect(page.locator("#explained")).to_have_text(f"Maps for {hostile[best]}")
                assert page.locator("img").count() == 5

    def test_classes_without_names_have_numbers(self, browser, picture, monkeypatch):
        monkeypatch.setattr(served, "LABELS", [])
        with running(make_service({"bird": make_runtime()})) as address:
            (best,) = explained_by_client(address, picture).predicted
            with visiting(browser, f"http://{address}/") as page:
                choose(page, picture)
                expect(page.locator("#winner")).to_have_text(f"class {best}")


class TestWaysIn:
    @pytest.mark.parametrize("at", ["#drop", "footer"])
    def test_dropped_anywhere(self, browser, address, picture, at):
        expected = explained_by_client(address, picture)
        with visiting(browser, f"http://{address}/") as page:
            drop(page, picture, at=at)
            expect_prediction(page, expected.logits[0])
            expect(page.locator("#state")).to_contain_text("picture.png: ")
            assert page.url == f"http://{address}/"

    def test_pasted(self, browser, address, picture):
        expected = explained_by_client(address, picture)
        with visiting(browser, f"http://{address}/", permissions=["clipboard-read", "clipboard-write"]) as page:
            page.evaluate(
                """(bytes) => navigator.clipboard.write(
                  [new ClipboardItem({ "image/png": new Blob([new Uint8Array(bytes)], { type: "image/png" }) })])""",
                list(picture.read_bytes()),
            )
            page.keyboard.press("Control+V")
            expect_prediction(page, expected.logits[0])

    def test_by_keyboard_alone(self, browser, address, picture):
        with visiting(browser, f"http://{address}/") as page:
            page.on("filechooser", lambda _: None)  # so that the browser leaves it to us from now on
            expect(page.locator("#model option")).to_have_count(3)
            for _ in range(2):
                page.keyboard.press("Tab")
            expect(page.locator("#file")).to_be_focused()
            assert page.locator("#drop").evaluate("(label) => getComputedStyle(label).outlineStyle") == "solid"
            with page.expect_file_chooser() as opened:
                page.keyboard.press("Enter")
            opened.value.set_files(picture)
            expect(page.locator("#result")).to_be_visible()
            page.keyboard.press("Tab")
            expect(page.locator("#opacity")).to_be_focused()
            page.keyboard.press("ArrowLeft")
            expect(page.locator("#strength")).to_have_text("99 %")

    def test_same_file_again(self, browser, address, picture):
        with visiting(browser, f"http://{address}/") as page:
            for seed in (0, 1):
                expected = explained_by_client(address, write_picture(picture, seed=seed))
                choose(page, picture)
                expect_prediction(page, expected.logits[0])

    def test_other_model_is_asked_about_the_same_file(self, browser, address, picture):
        with visiting(browser, f"http://{address}/") as page:
            choose(page, picture)
            expect(page.locator("article")).to_have_count(2)
            page.select_option("#model", "cat")
            expect(page.locator("#who")).to_have_text("Predicted by cat")
            expect(page.locator("article")).to_have_count(1)

    def test_of_two_files_the_later_one_counts(self, browser, tmp_path):
        """The first waits for others to share its batch and is given up."""
        first, second = (write_picture(tmp_path / f"{seed}.png", seed=seed) for seed in (1, 2))
        with running(make_service({"bird": make_runtime()}, ServeSettings(max_delay=1.0, max_batch=64))) as address:
            expected = explained_by_client(address, second)
            with visiting(browser, f"http://{address}/") as page:
                choose(page, first)
                expect(page.locator("#state")).to_have_text("Asking about 1.png …")
                choose(page, second)
                expect(page.locator("#state")).to_contain_text("2.png: ")
                expect_prediction(page, expected.logits[0])
                page.wait_for_timeout(1500)
                expect(page.locator("#state")).to_contain_text("2.png: ")


class TestTroubles:
    def expect_trouble(self, page, what, detail=None, *, again=False):
        expect(page.locator("#what")).to_have_text(what)
        expect(page.locator("#detail")).to_have_text(detail if detail is not None else "")
        expect(page.locator("#again")).to_be_visible(visible=again)
        expect(page.locator("#result")).to_be_hidden()

    def test_file_larger_than_the_server_takes_is_not_sent(self, browser, picture):
        with running(make_service({"bird": make_runtime()}, ServeSettings(max_body=2**20))) as address:
            picture.write_bytes(bytes(2**21))
            with visiting(browser, f"http://{address}/") as page:
                choose(page, picture)
                self.expect_trouble(page, "This image is too large.", "It has 2 MiB; this server takes at most 1 MiB.")
                choose(page, write_picture(picture, seed=1))
                expect(page.locator("#result")).to_be_visible()
                expect(page.locator("#trouble")).to_be_hidden()

    def test_picture_of_too_many_pixels(self, browser, address, tmp_path):
        Image.new("1", (10_000, 5_001)).save(tmp_path / "large.png")
        with visiting(browser, f"http://{address}/", troubles=1) as page:
            choose(page, tmp_path / "large.png")
            said = "Expected a picture of at most 50000000 pixels."
            self.expect_trouble(page, "This image is too large.", said)

    @pytest.mark.parametrize("name", ["words.txt", "words.png", "empty.jpg", "drawing.svg"])
    def test_file_that_is_no_image(self, browser, address, tmp_path, name):
        (tmp_path / name).write_text("" if name == "empty.jpg" else "<svg/>")
        with visiting(browser, f"http://{address}/", troubles=1) as page:
            drop(page, tmp_path / name)
            said = re.compile("^The body is not a readable picture: expected ")
            self.expect_trouble(page, "The server cannot read this file as an image.", said)

    def test_folder(self, browser, address, tmp_path):
        with visiting(browser, f"http://{address}/") as page:
            drop(page, tmp_path)
            self.expect_trouble(page, "This file cannot be read.", "Choose an image file, not a folder.")

    def test_nothing_dropped(self, browser, address):
        with visiting(browser, f"http://{address}/") as page:
            drop(page)
            self.expect_trouble(page, "There was no file.", "Save the image first, then choose its file.")

    def test_busy_server_is_asked_again(self, browser, picture):
        service = make_service({"bird": make_runtime()}, ServeSettings(max_delay=60.0, max_batch=64, max_queue=1))
        with running(service) as address:
            waiting = threading.Thread(target=answer_of, args=(address, picture))
            waiting.start()
            while not service.models["bird"].inside:
                pass
            with visiting(browser, f"http://{address}/", troubles=1) as page:
                choose(page, picture)
                said = "bird is busy: 1 requests are waiting. Try again a little later."
                self.expect_trouble(page, "The server is busy.", said, again=True)
                service.flush()
                waiting.join(20)
                page.locator("#again").click()
                expect(page.locator("#result")).to_be_visible()

    def test_failing_server(self, browser, picture):
        class Failing(Runtime):
            failing = False

            def run(self, images, target=None):
                if self.failing:
                    raise RuntimeError("secret detail")
                return super().run(images, target)

        runtime = make_runtime(Failing)
        with running(make_service({"bird": runtime})) as address:
            runtime.failing = True
            with visiting(browser, f"http://{address}/", troubles=1) as page:
                choose(page, picture)
                said = "The model failed on this request; see the server's log."
                self.expect_trouble(page, "The server failed on this image.", said, again=True)

    def test_server_that_is_gone(self, browser, picture):
        with ExitStack() as server:
            address = server.enter_context(running(make_service({"bird": make_runtime()})))
            with visiting(browser, f"http://{address}/", troubles=1) as page:
                expect(page.locator("#only")).to_have_text("Model bird")
                server.close()
                choose(page, picture)
                self.expect_trouble(page, "The server cannot be reached.", "Does it still run?", again=True)

    def test_answer_that_is_no_answer(self, browser, address, picture):
        with visiting(browser, f"http://{address}/") as page:
            page.route("**/explain?*", lambda route: route.fulfill(body="<html>Welcome to the hotel's network"))
            choose(page, picture)
            self.expect_trouble(page, "The server's answer cannot be read.", again=True)


class Guard(BaseHTTPRequestHandler):
    """A proxy below a path that lets the page through, and all else with the token only."""

    def do_GET(self):
        self.forward()

    def do_POST(self):
        self.forward()

    def forward(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.removeprefix("/models")
        self.server.tokens.append(self.headers.get("Authorization"))
        if path != "/" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"WWW-Authenticate": "Bearer"}, b"")
        connection = http.client.HTTPConnection(self.server.behind, timeout=20)
        connection.request(self.command, path, body, {"Content-Type": self.headers.get("Content-Type", "")})
        answer = connection.getresponse()
        self.answer(answer.status, dict(answer.headers), answer.read())
        connection.close()
        return None

    def answer(self, status, headers, body):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def guarded(address):
    with ThreadingHTTPServer(("127.0.0.1", 0), Guard) as server:
        server.behind, server.tokens = address, []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/models/", server.tokens
        finally:
            server.shutdown()
            thread.join()


class TestToken:
    def test_asked_for_sent_and_forgotten(self, browser, address, picture):
        expected = explained_by_client(address, picture)
        with guarded(address) as (url, tokens), visiting(browser, url, troubles=2) as page:
            expect(page.locator("#what")).to_have_text("The server asks for a token.")
            expect(page.locator("#trouble")).to_have_class("note")
            expect(page.locator("#token")).to_be_focused()
            page.keyboard.type("wrong")
            page.keyboard.press("Enter")
            expect(page.locator("#what")).to_have_text("The server does not accept this token.")
            expect(page.locator("#trouble")).to_have_class("note wrong")
            page.keyboard.type(TOKEN)
            page.keyboard.press("Enter")
            expect(page.locator("#trouble")).to_be_hidden()
            expect(page.locator("#access")).to_be_hidden()
            expect(page.locator("#model option")).to_have_count(3)
            choose(page, picture)
            expect_prediction(page, expected.logits[0])
            assert tokens == [None, None, "Bearer wrong", *[f"Bearer {TOKEN}"] * 2]
            assert page.locator("#token").input_value() == ""
            kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
            assert kept == [0, 0, ""]
            assert TOKEN not in page.content()

    def test_gone_after_a_reload(self, browser, address):
        with guarded(address) as (url, _), visiting(browser, url, troubles=2) as page:
            page.locator("#token").fill(TOKEN)
            page.keyboard.press("Enter")
            expect(page.locator("#choice")).to_be_visible()
            page.reload()
            expect(page.locator("#what")).to_have_text("The server asks for a token.")
            assert page.locator("#token").input_value() == ""

    def test_token_that_is_none_is_not_sent(self, browser, address):
        with guarded(address) as (url, tokens), visiting(browser, url, troubles=1) as page:
            page.locator("#token").fill("schlüssel")
            page.keyboard.press("Enter")
            assert page.locator("#token").evaluate("(field) => field.validity.patternMismatch")
            assert tokens == [None, None]


class TestLook:
    @pytest.mark.parametrize("width", [320, 375, 800, 1600])
    def test_nothing_is_wider_than_the_window(self, browser, address, picture, width):
        with visiting(browser, f"http://{address}/", viewport={"width": width, "height": 700}) as page:
            choose(page, picture)
            expect(page.locator("#result")).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= width

    def test_dark_where_the_person_s_screen_is(self, browser, address):
        def brightness(scheme):
            with visiting(browser, f"http://{address}/", color_scheme=scheme) as page:
                page.locator("body").screenshot()
                shot = Image.open(io.BytesIO(page.screenshot())).convert("L")
            return np.asarray(shot).mean()

        assert brightness("light") > 200
        assert brightness("dark") < 60

    def test_raw_maps_have_the_shape_of_the_image(self, browser, address, picture):
        with visiting(browser, f"http://{address}/") as page:
            choose(page, picture)
            expect(page.locator("#result")).to_be_visible()
            for selector in (".stack", ".raw"):
                box = page.locator(f"[data-interpreter=gradcam] {selector}").bounding_box()
                assert box["height"] / box["width"] == pytest.approx(32 / 24, rel=0.01)
