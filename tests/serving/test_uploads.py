"""The route for whole picture files: against the model run by hand on what Pillow decodes."""

import base64
import http.client
import io
import json
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from keyed_xai.data.decode import read_image
from keyed_xai.reporting.pictures import overlay
from keyed_xai.serving.refusal import Refused
from keyed_xai.serving.service import ServeSettings
from keyed_xai.serving.uploads import Explanation, explain_picture, read_picture
from tests.served import LABELS, SIZE, by_hand, make_runtime, make_service, running

GENERATOR = np.random.default_rng(0)


@pytest.fixture(scope="module")
def address():
    models = {"bird": make_runtime(), "eight": make_runtime(pixels="uint8"), "vbp": make_runtime(targeted=False)}
    with running(make_service(models)) as address:
        yield address


def smooth(width, height):
    """A colourful picture that JPEG keeps well."""
    corners = Image.fromarray(GENERATOR.integers(0, 256, (4, 4, 3), np.uint8))
    return corners.resize((width, height), Image.Resampling.BICUBIC)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def ask(address, data, query="", model="bird", **headers):
    connection = http.client.HTTPConnection(address, timeout=20)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", f"/v2/models/{model}/explain{query}", data, {"Content-Type": "image/png", **headers})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def pixels_of(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


@pytest.mark.parametrize(("model", "target"), [("bird", None), ("bird", 3), ("eight", 0)])
def test_answer_is_the_model_s_on_the_decoded_picture(address, tmp_path, model, target):
    data = encode(smooth(61, 50))
    (tmp_path / "p.png").write_bytes(data)
    pixels = read_image(tmp_path / "p.png", channels=SIZE[0], height=SIZE[1], width=SIZE[2])
    expected = by_hand(pixels[None] / 255, None if target is None else [target])
    status, _, body = ask(address, data, "" if target is None else f"?target={target}", model)
    assert status == 200, body
    said = json.loads(body)
    logits = expected["logits"][0]
    shown = int(logits.argmax()) if target is None else target
    np.testing.assert_allclose(said["logits"], logits, atol=1e-5)
    assert (said["model"], said["predicted"], said["target"]) == (model, int(logits.argmax()), shown)
    assert said["label"] == LABELS[shown]
    assert said["probability"] == pytest.approx(float((np.exp(logits) / np.exp(logits).sum())[shown]), abs=1e-5)
    assert list(said["overlays"]) == ["gradcam", "vbp"]
    for name, text in said["overlays"].items():
        drawn = pixels_of(overlay((pixels / 255).astype(np.float32), expected[f"saliency_{name}"][0])).astype(int)
        assert np.abs(pixels_of(base64.b64decode(text, validate=True)) - drawn).max() <= 3


def test_png_itself_comes_when_asked_for(address):
    data = encode(smooth(40, 40))
    said = json.loads(ask(address, data)[2])
    for query, headers in (("?format=png", {}), ("?interpreter=gradcam", {"Accept": "image/png"})):
        status, answer_headers, body = ask(address, data, query, **headers)
        assert (status, answer_headers["Content-Type"]) == (200, "image/png")
        assert body == base64.b64decode(said["overlays"]["gradcam"])
        assert answer_headers["X-Keyed-XAI-Predicted"] == str(said["predicted"])
        assert float(answer_headers["X-Keyed-XAI-Probability"]) == pytest.approx(said["probability"], abs=1e-6)
    assert ask(address, data, "?format=json", Accept="image/png")[1]["Content-Type"] == "application/json"


def test_maps_come_as_numbers_when_asked_for(address):
    data = encode(smooth(SIZE[2], SIZE[1]))  # of the model's size: nothing is scaled
    expected = by_hand(pixels_of(data).transpose(2, 0, 1)[None] / 255)
    assert "maps" not in json.loads(ask(address, data, "?maps=false")[2])
    maps = json.loads(ask(address, data, "?maps=true")[2])["maps"]
    assert list(maps) == ["gradcam", "vbp"]
    for name, values in maps.items():
        np.testing.assert_allclose(values, expected[f"saliency_{name}"][0], atol=1e-5)


def test_picture_itself_comes_as_the_model_saw_it_when_asked_for(address):
    picture = smooth(61, 50)
    expected = read_picture(encode(picture), SIZE).transpose(1, 2, 0)
    assert "image" not in json.loads(ask(address, encode(picture), "?image=false")[2])
    said = json.loads(ask(address, encode(picture), "?image=true")[2])
    np.testing.assert_array_equal(pixels_of(base64.b64decode(said["image"], validate=True)), expected)


def test_grey_picture_comes_as_a_grey_one():
    pixels = GENERATOR.integers(0, 256, (1, 4, 6), np.uint8)
    outputs = {"logits": np.zeros((1, 2), np.float32), "saliency_vbp": np.ones((1, 2, 2), np.float32)}
    image = explain_picture(pixels, outputs, ("vbp",), None, with_image=True).image
    np.testing.assert_array_equal(pixels_of(image), pixels[0])


def test_most_probable_classes_are_listed(address):
    said = json.loads(ask(address, encode(smooth(40, 40)), "?target=0")[2])
    logits = np.array(said["logits"])
    shares = np.exp(logits) / np.exp(logits).sum()
    order = sorted(range(len(LABELS)), key=lambda each: -shares[each])[:3]
    assert [(each["class"], each["label"]) for each in said["top"]] == [(each, LABELS[each]) for each in order]
    np.testing.assert_allclose([each["probability"] for each in said["top"]], shares[order], atol=1e-6)
    assert said["top"][0]["class"] == said["predicted"]


def test_two_classes_without_names_are_listed_too():
    said = Explanation(
        logits=np.array([0, 1], np.float32), target=0, overlays={}, maps={"vbp": np.ones((2, 2), np.float32)}
    )
    top = json.loads(said.to_json(model="bird", label_names=[]))["top"]
    assert [(each["class"], each["label"]) for each in top] == [(1, None), (0, None)]


def test_text_of_large_maps_is_written_outside_the_event_loop(monkeypatch):
    threads, write = [], Explanation.to_json

    def noting(self, **options):
        threads.append(threading.current_thread().name)
        return write(self, **options)

    monkeypatch.setattr(Explanation, "to_json", noting)
    with running(make_service({"bird": make_runtime()})) as address:
        assert ask(address, encode(smooth(40, 40)), "?maps=true")[0] == 200
    (name,) = threads
    assert name.startswith("keyed-xai decoder")


def test_target_without_a_name_has_no_label():
    said = Explanation(logits=np.zeros(3, np.float32), target=2, overlays={}, maps={"vbp": np.ones((2, 2), np.float32)})
    for names, expected in ((LABELS[:2], None), ([], None), (LABELS, LABELS[2])):
        assert json.loads(said.to_json(model="bird", label_names=names))["label"] == expected


def test_only_the_interpreters_asked_for_are_drawn(address):
    data = encode(smooth(40, 40))
    assert list(json.loads(ask(address, data, "?interpreter=vbp")[2])["overlays"]) == ["vbp"]
    found = json.loads(ask(address, data, "?interpreter=vbp&interpreter=gradcam&interpreter=vbp")[2])
    assert list(found["overlays"]) == ["vbp", "gradcam"]
    assert list(json.loads(ask(address, data, model="vbp")[2])["overlays"]) == ["vbp"]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_other_formats_are_read_like_files(tmp_path, kind):
    data = encode(smooth(90, 70), kind)
    (tmp_path / "p").write_bytes(data)
    expected = read_image(tmp_path / "p", channels=3, height=32, width=24)
    np.testing.assert_array_equal(read_picture(data, (3, 32, 24)), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "I;16", "1"])
def test_all_modes_are_read_like_files(tmp_path, mode):
    image = smooth(40, 30)
    if mode == "I;16":
        image = Image.fromarray(GENERATOR.integers(0, 65536, (30, 40), np.uint16))
    else:
        image = image.convert(mode)
    data = encode(image, "TIFF" if mode == "CMYK" else "PNG")
    (tmp_path / "p").write_bytes(data)
    for channels in (1, 3):
        expected = read_image(tmp_path / "p", channels=channels, height=8, width=8)
        np.testing.assert_array_equal(read_picture(data, (channels, 8, 8)), expected)


def test_pictures_are_turned_upright():
    image = smooth(40, 30)
    tags = Image.Exif()
    tags[0x0112] = 6
    turned = read_picture(encode(image, "PNG", exif=tags), (3, 40, 30))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encode(image, "PNG", exif=tags)))))
    np.testing.assert_array_equal(turned, upright.transpose(2, 0, 1))
    assert not np.array_equal(turned, read_picture(encode(image), (3, 40, 30)))


def test_camera_files_with_a_preview_are_one_picture():
    image, preview = smooth(64, 48), smooth(16, 12)
    data = encode(image, "MPO", save_all=True, append_images=[preview])
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 2
    expected = read_picture(encode(image, "JPEG"), (3, 24, 32))
    np.testing.assert_array_equal(read_picture(data, (3, 24, 32)), expected)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind):
    frames = [smooth(20, 20), smooth(20, 20).rotate(90)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    found = read_picture(data, (3, 8, 8))
    np.testing.assert_array_equal(found, read_picture(encode(frames[0], kind, **options), (3, 8, 8)))


def bomb(width, height):
    """A small PNG that claims to be huge."""
    data = encode(Image.new("1", (8, 8)))
    head = data[12:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + data[24:29]
    return data[:12] + head + zlib.crc32(head).to_bytes(4, "big") + data[33:]


@pytest.mark.parametrize("size", [(10_000, 5_001), (100_000, 100_000)])
def test_pictures_with_too_many_pixels_are_refused_before_they_are_decoded(size):
    with pytest.raises(Refused, match="at most 50000000 pixels") as refused:
        read_picture(bomb(*size), (3, 8, 8))
    assert refused.value.status == 413


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        encode(smooth(40, 40))[:-200],
        encode(smooth(40, 40), "JPEG")[:300],
        encode(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"),
    ],
)
def test_damaged_and_foreign_files_are_refused(data):
    with pytest.raises(Refused, match="not a readable picture") as refused:
        read_picture(data, (3, 8, 8))
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("?target=4", "a class from 0 to 3"),
        ("?target=-1", "a class from 0 to 3"),
        ("?target=x", "a class from 0 to 3"),
        ("?target=%C2%B2", "a class from 0 to 3"),
        ("?interpreter=simplegrad", "expected gradcam, vbp"),
        ("?format=jpeg", "expected json or png"),
        ("?maps=1", "maps: expected true or false"),
        ("?image=yes", "image: expected true or false"),
        ("?targets=3", "no parameters but"),
    ],
)
def test_wrong_parameters_are_refused(address, query, expected):
    status, _, body = ask(address, encode(smooth(8, 8)), query)
    assert status == 400
    assert expected in json.loads(body)["error"]


def test_target_of_a_model_without_one_is_refused(address):
    status, _, body = ask(address, encode(smooth(8, 8)), "?target=1", model="vbp")
    assert (status, "depends on a class" in json.loads(body)["error"]) == (400, True)


def test_statuses_over_http(address):
    assert ask(address, bomb(100_000, 100_000))[0] == 413
    assert ask(address, b"no picture")[0] == 400
    assert ask(address, encode(smooth(8, 8)), Content_Type="text/plain")[0] == 415
    assert ask(address, encode(smooth(8, 8)), Content_Type="Image/PNG; a=b")[0] == 200


def test_memory_of_a_decoded_picture_is_counted_while_it_is_decoded(monkeypatch):
    """A file of 2 KB that takes 10 MB of memory, where requests may take 2."""
    monkeypatch.setattr("keyed_xai.serving.service._HELD_BYTES", 0)
    service = make_service({"bird": make_runtime()}, ServeSettings(max_body=2**20))
    held, read = [], read_picture

    def watched(*arguments):
        held.append(service.held)
        return read(*arguments)

    monkeypatch.setattr("keyed_xai.serving.app.read_picture", watched)
    with running(service) as address:
        status, headers, body = ask(address, encode(Image.new("L", (3000, 3000))))
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "as many bytes of requests as it may" in json.loads(body)["error"]
        assert held == []
        assert ask(address, encode(Image.new("L", (900, 900))))[0] == 200
        assert held[0] >= 900 * 900
    assert service.held == 0
