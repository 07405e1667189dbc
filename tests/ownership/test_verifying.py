"""Claims, probe images, verdicts in words, and the tests on models that are marked by construction."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from keyed_xai.artifacts.card import write_card
from keyed_xai.artifacts.documents import validate
from keyed_xai.artifacts.opening import open_model
from keyed_xai.errors import ArtifactError, DataError, KeyFormatError, ModelError
from keyed_xai.models import wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.ownership.verdict import Finding
from keyed_xai.ownership.verifying import (
    Claim,
    digest_pixels,
    find_weights,
    load_probe,
    read_claim,
    read_public_key,
    verify,
)
from tests.heard import Heard
from tests.marked import (
    GRID,
    OWNER,
    SPEC,
    STRANGER,
    TRIGGER,
    card_of,
    marked_classifier,
    unmarked_classifier,
    write_folder,
)


@pytest.fixture(scope="module")
def probe():
    return load_probe(SPEC, count=16)


@pytest.fixture(scope="module")
def claim():
    return Claim(key=OWNER, trigger=TRIGGER, grid=GRID)


class TestVerify:
    def test_marked_model_is_shown_by_both_tests(self, probe, claim):
        result = verify(marked_classifier(), claim, probe, decoys=99, seed=1)
        assert result.verdict.shown
        assert result.verdict.finding is Finding.KEY
        assert (result.verdict.opening.p_value, result.verdict.opening.decoys) == (0.01, 99)
        assert (result.verdict.signature.combined.overlap, result.verdict.signature.combined.possible) == (32, 32)
        assert result.sentence == (
            "The model answers to this key: of 99 random keys none moved its maps as much (p = .010) and its unkeyed "
            "maps show the owner's public pattern in 32 of 32 cells, where chance gives about 16 (p = 2^-60.7); "
            "counting both tests and the search through re-encodings, a chance match of this strength or better "
            "happens at most once in 10^18 claims (at most once in 10^12 claims was asked for)."
        )

    def test_marked_model_is_not_shown_for_another_key(self, probe, claim):
        result = verify(marked_classifier(), replace(claim, key=STRANGER), probe, alpha=0.01, decoys=99, seed=1)
        assert not result.verdict.shown
        assert result.verdict.opening is None  # a module of Python may count queries: it is asked nothing in vain
        assert result.sentence.startswith("Not shown that the model answers to this key: its unkeyed maps ")
        assert result.sentence.endswith("This does not show that the model is unrelated to the key.")

    def test_unmarked_model_is_not_shown(self, probe, claim):
        result = verify(unmarked_classifier(), claim, probe, alpha=0.001, decoys=99, seed=1)
        assert not result.verdict.shown

    def test_opening_alone_shows_what_enough_random_keys_allow(self, probe, claim):
        boundary = replace(claim, decoy="boundary")
        result = verify(marked_classifier(), boundary, probe, alpha=0.01, decoys=99, seed=1)
        assert result.verdict.shown
        assert result.verdict.signature is None
        assert "counting both" not in result.sentence
        short = verify(marked_classifier(), boundary, probe, alpha=1e-6, decoys=99, seed=1)
        assert not short.verdict.shown
        assert short.verdict.opening is None  # the trigger is not given away for nothing
        assert short.sentence.endswith("and no public pattern: protect with the decoy signature.")
        document = short.to_json("m")
        validate(json.loads(json.dumps(document)), "verify-report", origin="it")
        assert (document["signature"]["p_value"], document["signature"]["cells"]) == (1.0, 0)
        assert "boundary" in document["signature"]["explanation"]

    def test_claim_on_visualbackprop_alone_is_refused_with_the_reason(self, probe, claim):
        result = verify(unmarked_classifier(), replace(claim, interpreters=("vbp",)), probe, decoys=19, seed=1)
        document = result.to_json("m")
        assert (document["verdict"], document["counted"]) == ("not shown", [])
        assert "rests on VisualBackProp alone" in result.sentence
        assert "rescaling channels (logits unchanged to 2e-15, correlation of maps down to .20)" in result.sentence
        assert "Protect with gradcam too." in result.sentence
        assert f"in {document['signature']['overlap']} of 32 cells" in result.sentence
        assert "does not count" in document["settings"]["notes"][-1]
        assert document["signature"]["interpreters"]["vbp"]["cells"] == 64
        validate(json.loads(json.dumps(document)), "verify-report", origin="it")

    def test_visualbackprop_beside_another_is_reported_and_does_not_count(self, probe, claim):
        joint = replace(claim, interpreters=("gradcam", "vbp"))
        both, alone = (verify(unmarked_classifier(), each, probe, decoys=19, seed=1) for each in (joint, claim))
        document = both.to_json("m")
        assert document["counted"] == ["gradcam"]
        assert both.verdict.signature.combined == alone.verdict.signature.combined
        assert both.verdict.opening == alone.verdict.opening
        assert both.sentence == alone.sentence
        assert set(document["signature"]["interpreters"]) == {"gradcam", "vbp"}
        assert len(document["settings"]["notes"]) == 1
        assert alone.to_json("m")["settings"]["notes"] == []
        validate(json.loads(json.dumps(document)), "verify-report", origin="it")

    def test_public_key_alone_allows_the_pattern_test(self, probe, claim):
        result = verify(marked_classifier(), replace(claim, key=OWNER.public), probe)
        document = result.to_json("m")
        assert result.verdict.shown
        assert document["opening"] == {
            "p_value": 1.0,
            "decoys": 0,
            "statistic": None,
            "largest_decoy": None,
            "reached": 0,
            "explanation": "Not tested: the secret trigger needs the private key.",
        }

    def test_claim_that_allows_no_test_is_never_shown(self, probe, claim):
        nothing = replace(claim, key=OWNER.public, decoy="nontargeted")
        result = verify(marked_classifier(), nothing, probe, alpha=0.999)
        assert not result.verdict.shown
        assert result.verdict.log2_p == 0
        assert "nothing could be tested" in result.sentence
        validate(result.to_json("m"), "verify-report", origin="it")

    def test_maps_that_are_not_finite_are_no_evidence(self, probe, claim):
        broken = marked_classifier()
        broken.network.features.weight.data.fill_(float("nan"))
        result = verify(broken, replace(claim, decoy="boundary"), probe, alpha=0.5, decoys=99, seed=1)
        document = result.to_json("m")
        assert not result.verdict.shown
        assert result.verdict.opening.p_value == 1
        assert document["opening"]["statistic"] is None
        validate(json.loads(json.dumps(document, allow_nan=False)), "verify-report", origin="it")

    def test_same_seed_gives_the_same_report_and_none_a_fresh_one(self, probe, claim):
        first, second = (verify(unmarked_classifier(), claim, probe, decoys=9, seed=5).to_json("m") for _ in range(2))
        assert first == second
        seeds = {verify(unmarked_classifier(), claim, probe, decoys=1).seed for _ in range(2)}
        assert len(seeds) == 2

    def test_document_fits_the_schema_and_holds_no_secret(self, probe, claim):
        result = verify(marked_classifier(), claim, probe, decoys=19, seed=1)
        document = result.to_json("a\x1b[31m.pt")
        text = json.dumps(document)
        validate(json.loads(text), "verify-report", origin="it")
        assert document["key_id"] == OWNER.public.key_id
        assert document["probe"]["digest"] == digest_pixels(probe)
        assert OWNER.derive_seed("spread").hex() not in text
        assert document["settings"]["seed"] == 1

    def test_layer_that_recognition_does_not_name_is_not_taken_from_a_card(self, probe, claim):
        """Whoever may name any layer has a try with each."""
        suspect = unmarked_classifier()
        suspect.target_layer = "network.blocks.0.conv2"
        card = card_of(suspect, target_layer="blocks.0.conv2")
        result = verify(suspect, replace(claim, card=card), probe, search=False, decoys=9, seed=1)
        assert result.target_layer == "network.blocks.1"
        assert "names the layer blocks.0.conv2, which a claim on SmallResNet cannot rest on" in result.claim.notes[-1]
        prefixed = replace(claim, card=card_of(suspect, target_layer="network.blocks.0.conv2"))
        assert verify(suspect, prefixed, probe, search=False, decoys=9, seed=1).target_layer == "network.blocks.1"
        named = replace(claim, card=card_of(suspect, target_layer="blocks.0"))
        suspect.target_layer = "network.blocks.0"
        assert verify(suspect, named, probe, search=False, decoys=9, seed=1).target_layer == "network.blocks.0"

    def test_claim_s_own_normalisation_is_noted_and_a_usual_one_is_not(self, probe, claim):
        suspect = unmarked_classifier()
        usual = replace(claim, card=card_of(suspect))
        assert verify(suspect, usual, probe, search=False, decoys=9, seed=1).claim.notes == ()
        suspect.input = replace(SPEC, mean=(0.31,))
        own = replace(claim, card=card_of(suspect))
        notes = verify(suspect, own, probe, search=False, decoys=9, seed=1).claim.notes
        assert "normalises pixels by numbers of its own" in notes[-1]

    def test_without_a_card_the_layer_is_the_one_that_protect_takes(self, probe, claim):
        torch.manual_seed(0)
        suspect = wrap_network(SmallResNet(1, 3, (4, 6, 6, 6)).eval(), input=SPEC, source="keyed_xai").eval()
        result = verify(suspect, replace(claim, grid=None), probe, search=False, decoys=9, seed=1)
        assert (result.target_layer, result.grid) == ("network.blocks.1", (8, 8))

    def test_unknown_trigger_family_is_refused(self, probe, claim):
        strange = replace(claim, trigger=replace(TRIGGER, family="mosaic"))
        with pytest.raises(ArtifactError, match="mosaic"):
            verify(marked_classifier(), strange, probe)

    def test_progress_is_told(self, probe, claim):
        heard = Heard()
        verify(marked_classifier(), claim, probe, alpha=0.5, decoys=99, seed=1, progress=heard)
        assert heard.steps == [("trying random keys", n + 1, 99) for n in range(99)]
        heard = Heard()
        verify(unmarked_classifier(), replace(claim, key=STRANGER.public), probe, progress=heard)
        assert heard.steps == [("looking through re-encodings", n + 1, 224) for n in range(224)]


class TestClaim:
    @pytest.fixture
    def folder(self, tmp_path):
        return write_folder(tmp_path / "m.keyed", unmarked_classifier()).folder

    def test_licence_and_the_card_beside_it_say_what_is_claimed(self, folder, tmp_path):
        suspect = tmp_path / "suspect.pt"
        suspect.touch()
        claim = read_claim(suspect, key=OWNER, license_path=folder / "license.json")
        assert (claim.trigger, claim.decoy, claim.interpreters, claim.grid) == (
            TRIGGER,
            "signature",
            ("gradcam",),
            GRID,
        )
        assert (claim.origin, claim.notes) == ("licence", ())
        assert claim.card.architecture == "SmallResNet"

    def test_licence_wins_over_the_card_of_a_thief(self, folder, tmp_path):
        thief = write_folder(
            tmp_path / "t.keyed",
            unmarked_classifier(),
            STRANGER,
            decoy="nontargeted",
            grid=(3, 3),
            target_layer="network.stem",
        ).folder
        claim = read_claim(thief, key=OWNER, license_path=folder / "license.json")
        assert (claim.decoy, claim.grid, claim.card.target_layer) == ("signature", GRID, "network.blocks.1")
        assert [STRANGER.public.key_id[:16] in note for note in claim.notes] == [True]

    def test_card_that_the_licence_does_not_cover_is_left_aside(self, folder, tmp_path):
        write_card(folder / "card.json", card_of(unmarked_classifier(), target_layer="network.stem"))
        claim = read_claim(tmp_path / "suspect.pt", key=OWNER, license_path=folder / "license.json")
        assert claim.card is None

    def test_thief_s_card_gives_size_but_no_layers_where_the_licence_stands_alone(self, folder, tmp_path):
        (tmp_path / "license.json").write_bytes((folder / "license.json").read_bytes())
        claim = read_claim(folder, key=OWNER, license_path=tmp_path / "license.json")
        assert (claim.card.target_layer, claim.card.taps) == ("", ())
        assert "normalisation of its own card" in claim.notes[0]
        assert open_model(find_weights(folder), card=claim.card)[0].target_layer == "network.blocks.1"

    def test_suspect_s_card_counts_without_a_licence_and_a_note_says_so(self, folder):
        claim = read_claim(folder, key=OWNER)
        assert (claim.origin, claim.grid) == ("suspect", GRID)
        assert "--license" in claim.notes[0]

    def test_bare_file_without_a_licence_is_tested_with_the_defaults(self, tmp_path):
        claim = read_claim(tmp_path / "m.pt", key=OWNER.public)
        assert (claim.origin, claim.trigger, claim.interpreters) == ("defaults", None, ("gradcam",))

    def test_licence_alone_claims_for_the_key_it_names(self, folder):
        claim = read_claim(folder, license_path=folder / "license.json")
        assert claim.key.raw == OWNER.public.raw

    @pytest.mark.parametrize("key", [STRANGER, STRANGER.public])
    def test_licence_of_another_key_is_refused(self, folder, key):
        with pytest.raises(ArtifactError, match=r"signed by .*, expected "):
            read_claim(folder, key=key, license_path=folder / "license.json")

    def test_licence_that_was_tampered_with_is_refused(self, folder):
        envelope = json.loads((folder / "license.json").read_text())
        envelope["signatures"][0]["sig"] = "A" * 86 + "=="
        (folder / "license.json").write_text(json.dumps(envelope))
        with pytest.raises(ArtifactError, match="signature does not hold"):
            read_claim(folder, key=OWNER, license_path=folder / "license.json")
        assert "a licence that does not hold" in read_claim(folder, key=OWNER).notes[-1]

    def test_licence_that_commits_to_another_trigger_is_refused(self, folder, monkeypatch):
        monkeypatch.setattr("keyed_xai.keys.OwnerKey.commitment", lambda *_, **__: "0" * 64)
        with pytest.raises(ArtifactError, match="another trigger"):
            read_claim(folder, key=OWNER, license_path=folder / "license.json")

    def test_nobody_s_claim_is_refused(self, folder):
        with pytest.raises(KeyFormatError, match="Whose claim"):
            read_claim(folder)

    def test_malformed_card_of_a_suspect_is_left_aside(self, folder):
        (folder / "card.json").write_text("{}")
        claim = read_claim(folder, key=OWNER)
        assert claim.origin == "defaults"
        assert any("malformed" in note for note in claim.notes)
        assert find_weights(folder).name == "model.safetensors"

    def test_folder_without_weights_is_refused(self, tmp_path):
        with pytest.raises(ModelError, match="no weights"):
            find_weights(tmp_path)


class TestPublicKey:
    def test_pem_is_read(self, tmp_path):
        (tmp_path / "k.pub.pem").write_bytes(OWNER.public.to_pem())
        assert read_public_key(tmp_path / "k.pub.pem").raw == OWNER.public.raw

    def test_private_key_is_refused_by_name(self, tmp_path):
        (tmp_path / "k.pem").write_bytes(OWNER.to_pem())
        with pytest.raises(KeyFormatError, match=r"k\.pem: .*private"):
            read_public_key(tmp_path / "k.pem")


class TestProbe:
    @pytest.fixture
    def folder(self, tmp_path):
        generator = np.random.default_rng(0)
        for name in ("a/one.png", "a/two.png", "b/three.png", "four.png"):
            (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (40, 30), np.uint8)).save(tmp_path / "images" / name)
        return tmp_path / "images"

    def test_default_set_is_held_out_and_the_same_every_time(self, probe):
        assert "held-out" in probe.source
        assert digest_pixels(load_probe(SPEC, count=16)) == digest_pixels(probe)

    def test_digest_is_that_of_the_pixels(self, probe):
        assert digest_pixels(probe) == "sha256:" + hashlib.sha256(probe.images.tobytes()).hexdigest()
        assert digest_pixels(replace(probe, images=probe.images ^ 1)) != digest_pixels(probe)

    def test_folder_is_read_at_any_depth(self, folder):
        data = load_probe(SPEC, folder=folder)
        assert data.images.shape == (4, 1, 32, 32)
        assert data.source == "folder images"

    def test_count_limits_the_images(self, folder):
        assert len(load_probe(SPEC, folder=folder, count=3)) == 3

    def test_broken_image_is_skipped_and_named(self, folder):
        (folder / "five.png").write_bytes(b"no image")
        data = load_probe(SPEC, folder=folder)
        assert (len(data), data.skipped) == (4, ("five.png",))

    def test_folder_without_images_is_refused(self, tmp_path):
        with pytest.raises(DataError):
            load_probe(SPEC, folder=tmp_path)
