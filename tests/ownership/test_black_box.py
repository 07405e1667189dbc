"""Suspects that only answer: ONNX files and served models, tested as the same networks are from inside."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from keyed_xai.artifacts.documents import validate
from keyed_xai.errors import ModelError
from keyed_xai.export.exporting import ExportSettings, Provenance, export_onnx
from keyed_xai.inference.runtime import Runtime
from keyed_xai.keys import write_owner_key
from keyed_xai.ownership.black_box import BlackBox, BlackBoxView, is_black_box, open_black_box, view_black_box
from keyed_xai.ownership.verifying import Claim, load_probe, read_claim, verify
from keyed_xai.saliency import MapLayers
from keyed_xai.saliency.pooled import make_view
from keyed_xai_cli import main as cli
from tests.marked import GRID, OWNER, STRANGER, TRIGGER, card_of, marked_classifier, unmarked_classifier, write_folder
from tests.served import make_service, running, write_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The owner's folder and keys, and ONNX files of the marked network and of another."""
    place = tmp_path_factory.mktemp("black-box")
    marked, other = marked_classifier(), unmarked_classifier()
    other.network.fc.weight.data.abs_()  # so that Grad-CAM's maps are not empty
    write_folder(place / "owner.keyed", marked)
    for name, classifier, card, eight_bits in (
        ("marked", marked, card_of(marked), False),
        ("eight", marked, None, True),
        ("unmarked", other, None, False),
    ):
        export_onnx(
            classifier, place / f"{name}.onnx", ExportSettings(eight_bits=eight_bits), provenance=Provenance(card)
        )
    write_owner_key(place / "k.pem", OWNER)
    write_owner_key(place / "other.pem", STRANGER)
    (place / "k.pub.pem").write_bytes(OWNER.public.to_pem())
    return place


@pytest.fixture(scope="module")
def address(place):
    service = make_service({"stolen": Runtime.open(place / "marked.onnx", device="cpu", threads=1)})
    with running(service) as address:
        yield f"http://{address}"


@pytest.fixture
def claim():
    return Claim(key=OWNER, trigger=TRIGGER, grid=GRID)


@pytest.fixture(scope="module")
def probe():
    return load_probe(marked_classifier().input, count=16)


def run(suspect, *arguments, standard_input=None):
    command = ["verify", suspect, *arguments, "--count", 16, "--decoys", 99, "--seed", 3, "--device", "cpu"]
    return CliRunner().invoke(cli.main, [str(argument) for argument in command], input=standard_input)


class TestVerify:
    def test_onnx_file_shows_what_the_network_shows(self, place, probe, claim):
        inside = verify(marked_classifier(), claim, probe, decoys=99, seed=1)
        outside = verify(open_black_box(str(place / "marked.onnx"), device="cpu"), claim, probe, decoys=99, seed=1)
        assert outside.verdict.shown
        assert outside.verdict.signature == inside.verdict.signature
        assert outside.verdict.opening.p_value == inside.verdict.opening.p_value == 0.01
        assert outside.verdict.opening.statistic == pytest.approx(inside.verdict.opening.statistic, rel=1e-5)
        assert (outside.target_layer, outside.grid) == ("", GRID)
        validate(json.loads(json.dumps(outside.to_json("m"))), "verify-report", origin="it")

    def test_eight_bits_are_enough(self, place, probe, claim):
        result = verify(open_black_box(str(place / "eight.onnx"), device="cpu"), claim, probe, decoys=99, seed=1)
        assert result.verdict.shown
        assert result.verdict.opening.p_value == 0.01

    def test_other_model_and_other_key_are_not_shown(self, place, probe, claim):
        other = verify(open_black_box(str(place / "unmarked.onnx"), device="cpu"), claim, probe, decoys=99, seed=1)
        assert not other.verdict.shown
        black_box = open_black_box(str(place / "marked.onnx"), device="cpu")
        assert not verify(
            black_box, Claim(key=STRANGER, trigger=TRIGGER, grid=GRID), probe, decoys=99, seed=1
        ).verdict.shown

    def test_maps_that_are_not_returned_are_left_out_with_a_note(self, place, probe):
        claim = Claim(key=OWNER, trigger=TRIGGER, interpreters=("gradcam", "simplegrad"), grid=GRID)
        result = verify(open_black_box(str(place / "marked.onnx"), device="cpu"), claim, probe, decoys=99, seed=1)
        assert result.verdict.shown
        assert result.claim.interpreters == ("gradcam",)
        assert any("returns no maps of simplegrad" in note for note in result.claim.notes)

    def test_claim_comes_from_the_card_that_it_shows(self, place):
        black_box = open_black_box(str(place / "marked.onnx"), device="cpu")
        claim = read_claim(black_box.card, key=OWNER)
        assert (claim.origin, claim.trigger, claim.grid) == ("suspect", TRIGGER, GRID)
        assert open_black_box(str(place / "eight.onnx"), device="cpu").card is None
        assert read_claim(None, key=OWNER).origin == "defaults"


class TestView:
    def test_pooled_maps_are_those_of_the_network(self, place):
        classifier = marked_classifier()
        images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        labels = torch.tensor([1, 0, 1])
        black_box = BlackBox(Runtime.open(place / "marked.onnx", device="cpu"))
        found = view_black_box(black_box, ("gradcam",), None)
        expected = make_view(classifier, ("gradcam",), None)
        assert found.grid == expected.grid == GRID
        for one, other in zip(
            found.pooled_in_chunks(black_box, images, labels, chunk=2),
            expected.pooled_in_chunks(classifier, images, labels),
            strict=True,
        ):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(black_box(images), classifier(images))

    def test_nothing_that_was_claimed_is_an_error(self, place):
        with pytest.raises(ModelError, match="returns maps of gradcam, and the claim is about vbp"):
            view_black_box(BlackBox(Runtime.open(place / "marked.onnx", device="cpu")), ("vbp",), None)

    def test_network_in_place_of_a_black_box_is_refused(self):
        view = BlackBoxView(("gradcam",), MapLayers("", ()), GRID)
        with pytest.raises(TypeError, match="Expected a black box"):
            view.pooled(marked_classifier(), torch.zeros(1, 1, 32, 32), None)

    def test_model_without_gradcam_is_compared_on_8_by_8(self, tmp_path):
        black_box = BlackBox(Runtime.open(write_model(tmp_path / "m.onnx", targeted=False), device="cpu"))
        view = view_black_box(black_box, ("vbp",), None)
        assert view.grid == (8, 8)
        labels = torch.zeros(2, dtype=torch.int64)  # no class can be chosen
        _, maps = view.pooled(black_box, torch.full((2, 3, 32, 24), 0.5), labels)
        assert maps["vbp"].shape == (2, 8, 8)


class TestCommand:
    def test_onnx_file_is_shown_with_0_by_licence(self, place):
        license_path = place / "owner.keyed" / "license.json"
        result = run(
            place / "marked.onnx", "--key-file", place / "k.pem", "--license", license_path, "--json", place / "v.json"
        )
        assert result.exit_code == 0, result.output
        document = json.loads((place / "v.json").read_text())
        assert (document["verdict"], document["settings"]["claim_from"]) == ("shown", "licence")
        assert "asked from outside" in result.output
        assert "Warning" not in result.output

    def test_endpoint_is_shown_with_0_and_a_warning(self, place, address):
        for where in (address, f"{address}/v2", f"{address}/v2/models/stolen"):
            result = run(where, "--key-file", place / "k.pem")
            assert result.exit_code == 0, result.output
            assert "can learn the trigger" in result.stderr

    def test_public_test_of_an_endpoint_gives_nothing_away(self, place, address):
        result = run(address, "--public-key", place / "k.pub.pem")
        assert result.exit_code == 0, result.output
        assert "32 of 32 cells" in " ".join(result.output.split())
        assert "Warning" not in result.output

    def test_other_key_is_not_shown_with_3(self, place, address):
        assert run(address, "--key-file", place / "other.pem").exit_code == 3
        assert run(place / "unmarked.onnx", "--key-file", place / "k.pem").exit_code == 3

    def test_options_about_weights_are_a_usage_error(self, place):
        result = run(place / "marked.onnx", "--key-file", place / "k.pem", "--arch", "resnet50")
        assert result.exit_code == 2
        assert "--arch: the suspect only answers" in result.output

    @pytest.mark.parametrize(
        ("suspect", "code", "said"),
        [
            ("http://127.0.0.1:1", 1, "127.0.0.1:1"),
            ("http://127.0.0.1:1/below/v2/models/m", 1, "127.0.0.1:1/below"),
            ("http://127.0.0.1:1/v2/models/m?x=1", 1, "expected http://HOST:PORT"),
            ("http://h:notaport", 1, "address"),
            ("http://h:99999", 1, "address"),
            ("http://[::1", 1, "address"),
            ("nowhere.onnx", 2, "neither a file or folder nor an address"),
        ],
    )
    def test_suspect_that_cannot_be_reached_is_an_error(self, place, suspect, code, said):
        result = run(suspect, "--public-key", place / "k.pub.pem")
        assert result.exit_code == code
        assert said in " ".join(result.output.split())

    @pytest.mark.parametrize("header", ["", "Authorization", ": secret", "Authorization:"])
    def test_malformed_header_is_a_usage_error_that_does_not_repeat_it(self, place, address, header):
        result = run(address, "--public-key", place / "k.pub.pem", "--header", header)
        assert result.exit_code == 2
        assert "expected a name, a colon and a value" in result.output
        assert "secret" not in result.output

    @pytest.mark.parametrize(
        "content", [b"Authorization", b"A: b\n: secret\n", b"\xffsecret: a", b"A: secret" * 10_000, None]
    )
    def test_malformed_header_file_is_a_usage_error_that_does_not_repeat_it(self, place, address, content):
        if content is not None:
            (place / "headers").write_bytes(content)
        result = run(address, "--public-key", place / "k.pub.pem", "--header-file", place / "headers")
        assert result.exit_code == 2
        assert "--header-file" in result.output
        assert "secret" not in result.output

    @pytest.mark.parametrize("option", ["--header", "--header-file"])
    def test_header_for_a_file_is_a_usage_error(self, place, option):
        (place / "headers").write_text("A: b\n")
        value = "A: b" if option == "--header" else place / "headers"
        result = run(place / "owner.keyed", "--public-key", place / "k.pub.pem", option, value)
        assert result.exit_code == 2
        assert "they are for a server's address" in result.output

    def test_help_says_who_sees_a_header(self):
        said = " ".join(CliRunner().invoke(cli.main, ["verify", "--help"]).output.split())
        assert "in the list of processes: put a token into" in said

    @pytest.mark.parametrize("way", ["--header", "--header-file", "-", "both"])
    def test_headers_reach_the_server(self, place, way):
        (place / "headers").write_text("\nAuthorization: Bearer abc\nX-Other: d\n\n")
        words = {
            "--header": ["--header", "Authorization: Bearer abc"],
            "--header-file": ["--header-file", place / "headers"],
            "-": ["--header-file", "-"],
            "both": ["--header-file", place / "headers", "--header", "X-Other: e"],
        }[way]
        seen = []

        class Guarded(BaseHTTPRequestHandler):
            def do_GET(self):
                seen.append((self.headers["Authorization"], self.headers["X-Other"]))
                self.send_error(403)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        with HTTPServer(("127.0.0.1", 0), Guarded) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            where = f"http://127.0.0.1:{server.server_port}"
            sent = (place / "headers").read_text()
            result = run(where, "--public-key", place / "k.pub.pem", *words, standard_input=sent)
            server.shutdown()
        assert result.exit_code == 1
        other = {"--header": None, "--header-file": "d", "-": "d", "both": "e"}[way]
        assert set(seen) == {("Bearer abc", other)}

    def test_model_that_is_not_served_is_named(self, place, address):
        result = run(f"{address}/v2/models/other", "--public-key", place / "k.pub.pem")
        assert result.exit_code == 1
        assert "other" in result.output


def test_black_boxes_are_known_by_name():
    assert is_black_box("http://h:1")
    assert is_black_box("m.ONNX")
    assert not is_black_box("m.onnx.pt")


def test_pixels_reach_an_eight_bit_model_rounded(place):
    black_box = open_black_box(str(place / "eight.onnx"), device="cpu")
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    rounded = np.round(255 * images.numpy()).astype(np.uint8)
    np.testing.assert_array_equal(black_box.ask(images, None)["logits"], black_box.oracle.run(rounded)["logits"])
