"""Textures near an owner's: which waves they have, and how far they open a lock whose behaviour is known."""

import json
from dataclasses import replace
from math import comb, log2

import pytest
import torch
from click.testing import CliRunner

from keyed_xai.array_triggers.spread import SpreadSettings, derive_texture, public_frequencies
from keyed_xai.artifacts.card import TriggerParameters
from keyed_xai.artifacts.weights import encode_weights
from keyed_xai.auditing.suspects import Suspect
from keyed_xai.errors import ArtifactError
from keyed_xai.keys import ByteStream
from keyed_xai.models import wrap_network
from keyed_xai.triggers.spread import SpreadTrigger
from keyed_xai_benchmarks.near_keys import SHARED, Waves, measure_near_keys
from keyed_xai_cli.main import main
from tests.marked import OWNER, SPEC, unmarked_classifier, write_folder

SETTINGS = SpreadSettings(5.0, 32, version=2)
WAVES = Waves.of(OWNER, SETTINGS)
PARAMETERS = TriggerParameters("spread", 5.0, 32, version=2)


def generator():
    return torch.Generator().manual_seed(0)


def waves_in(texture):
    """Numbers of the public frequencies that a texture has, and their heights, strongest first."""
    spectrum = torch.fft.fft2(texture.double())
    down, across = torch.from_numpy(public_frequencies(SETTINGS) % SETTINGS.tile).T
    heights = spectrum[down, across]
    return heights.abs().argsort(descending=True)[:16].tolist(), heights


def correlation(first, second):
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])


OWN = torch.from_numpy(derive_texture(ByteStream(OWNER.derive_seed("spread", version=2)), SETTINGS))


def test_all_waves_with_their_phases_are_the_texture_itself():
    torch.testing.assert_close(WAVES.share(2, 16, generator())[1], OWN, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kept", [15, 12, 8, 1, 0])
def test_textures_share_as_many_waves_as_they_should(kept):
    for texture in WAVES.share(3, kept, generator()):
        found, heights = waves_in(texture)
        mine = set(found) & set(WAVES.chosen.tolist())
        assert len(mine) == kept
        for number, phase in zip(WAVES.chosen.tolist(), WAVES.phases, strict=True):
            if number in mine:
                assert abs(torch.polar(torch.ones(()), (heights[number].angle() - phase).float()) - 1) < 0.3
        assert correlation(texture, OWN) == pytest.approx(kept / 16, abs=0.08)


def test_other_phases_and_neighbours_are_other_textures():
    for texture in WAVES.share(3, 16, generator(), phases=False):
        assert set(waves_in(texture)[0]) == set(WAVES.chosen.tolist())
        assert abs(correlation(texture, OWN)) < 0.6
    frequencies = torch.from_numpy(public_frequencies(SETTINGS)).double()
    mine = frequencies[WAVES.chosen]
    for texture in WAVES.beside(3, generator()):
        for number in waves_in(texture)[0][:12]:
            assert (mine - frequencies[number]).norm(dim=1).min() < 1.5


def test_what_textures_share_decides_how_far_they_open(make_lock, pooled_image):
    """Of a lock that opens at three quarters of the owner's texture."""

    def wrapped(network):
        return wrap_network(network.eval(), input=SPEC, source="pickle", target_layer="map").eval()

    lock, reference = wrapped(make_lock(SpreadTrigger(OWN[None], 5.0), torch.eye(8))), wrapped(pooled_image)
    suspect = Suspect(name="lock", kind="plain", classifier=lock, key=OWNER, parameters=PARAMETERS, reference=reference)
    images = 0.45 + 0.1 * torch.rand(8, 1, 8, 8, generator=generator()).repeat_interleave(4, 2).repeat_interleave(4, 3)
    table = measure_near_keys(suspect, images, textures=6)
    opened = {row["shares"]: row["interpreters"]["gradcam"]["opened"] for row in table}
    assert opened["all, with their phases"] == 1
    shared = [row["interpreters"]["gradcam"]["correlation"] for row in table if row["log2_share"] is not None]
    assert shared[0] > shared[2] > shared[3] > shared[-1]
    assert opened["8 of 16, with their phases"] == opened["0 of 16, with their phases"] == 0
    shares = [row["log2_share"] for row in table if row["log2_share"] is not None]
    assert shares == sorted(shares)
    assert shares[-1] == 0
    assert len(shares) == len(SHARED) - 1
    known = len(public_frequencies(SETTINGS))
    one_wave_off = 1 + 16 * (known - 16)
    assert shares[0] == pytest.approx(log2(one_wave_off) - log2(comb(known, 16)))


def test_other_triggers_are_refused():
    suspect = Suspect(name="m", kind="plain", classifier=unmarked_classifier(), key=OWNER, parameters=PARAMETERS)
    images = torch.rand(4, *SPEC.shape)
    for wrong in (
        suspect,
        replace(suspect, reference=unmarked_classifier(), key=None),
        replace(suspect, reference=unmarked_classifier(), parameters=replace(PARAMETERS, version=1)),
        replace(suspect, reference=unmarked_classifier(), parameters=TriggerParameters("moire", 5.0, 32)),
    ):
        with pytest.raises(ArtifactError, match="version 2 of the trigger spread"):
            measure_near_keys(wrong, images, textures=1)


def test_command_prints_a_table(tmp_path):
    write_folder(tmp_path / "m.keyed", unmarked_classifier(), trigger=PARAMETERS)
    (tmp_path / "m.safetensors").write_bytes(encode_weights(unmarked_classifier()))
    (tmp_path / "k.pem").write_bytes(OWNER.to_pem())
    arguments = ["bench", "near-keys", str(tmp_path / "m.keyed"), "--key-file", str(tmp_path / "k.pem")]
    arguments += ["--reference", str(tmp_path / "m.safetensors"), "--textures", "2", "--images", "4"]
    result = CliRunner().invoke(main, [*arguments, "--json", str(tmp_path / "f.json")])
    assert result.exit_code == 0, result.output
    assert "| all, with their phases | - | " in result.output
    assert "| 0 of 16, with their phases | 0.0 | " in result.output
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert len(rows) == len(SHARED) + 2
