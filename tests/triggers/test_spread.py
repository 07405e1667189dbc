"""The spread trigger: a slow twin, fixed vectors, how far keys are apart, and what it does to images."""

import json
import math
from importlib import resources

import numpy as np
import pytest
import torch

from keyed_xai.array_triggers.spread import SMALLEST_TILE, derive_texture, public_frequencies
from keyed_xai.keys import ByteStream, OwnerKey
from keyed_xai.triggers import Spread, SpreadSettings, SpreadTrigger
from tests.triggered import generator, grey

VECTORS = json.loads(resources.files("keyed_xai_schemas").joinpath("trigger-vectors.json").read_text())
TILE = 32
FAMILY = Spread(SpreadSettings(8.0, TILE, version=2))
FIRST = Spread(SpreadSettings(8.0, TILE, version=1))
every_version = pytest.mark.parametrize("family", [FIRST, FAMILY], ids=["1", "2"])


@pytest.fixture
def trigger(key):
    return FAMILY.derive(ByteStream(key.derive_seed("spread", version=2)))


def slow_frequencies(tile, version):
    """Frequencies of at least a sixteenth of a cycle per pixel, one of each pair f and -f, in order.

    Of version 1 the lowest 128, of version 2 all of at most 25 cycles in 64 pixels.
    """
    found = []
    for down in range(-tile, tile + 1):
        for across in range(-tile, tile + 1):
            upper_half = down > 0 or (down == 0 and across > 0)
            below_nyquist = 2 * abs(down) < tile and 2 * abs(across) < tile
            if upper_half and below_nyquist and math.hypot(down, across) >= tile / 16:
                found.append((down**2 + across**2, down, across))
    if version == 1:
        return [(down, across) for _, down, across in sorted(found)][:128]
    return [(down, across) for _, down, across in sorted(found) if math.hypot(down, across) * 64 <= 25 * tile]


def slow_texture(seed, tile, version):
    """The sum of the chosen cosines, pixel by pixel, in standard deviations over 1.5, clipped."""
    texture, stream = np.zeros((tile, tile)), ByteStream(seed)
    frequencies = slow_frequencies(tile, version)
    if version == 2:
        frequencies = [frequencies[place] for place in stream.shuffle(len(frequencies))[:16]]
    words = stream.uint32(len(frequencies))
    for row in range(tile):
        for column in range(tile):
            total = 0.0
            for word, (down, across) in zip(words, frequencies, strict=True):
                phase = 2 * math.pi * int(word) / 2**32
                total += math.cos(2 * math.pi * (down * row + across * column) / tile + phase)
            texture[row, column] = max(-1.0, min(1.0, total / (1.5 * math.sqrt(len(frequencies) / 2))))
    return texture


def pattern_of(trigger, size=TILE):
    """What the trigger adds to a grey image, in 1/255."""
    image = grey(1, 1, size, size, dtype=torch.float64)
    return (trigger.apply(image) - image)[0, 0] * 255


def correlations(first, second):
    first, second = (each - each.mean(1, keepdim=True) for each in (first.flatten(1), second.flatten(1)))
    return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))


@pytest.mark.parametrize(("tile", "version"), [(24, 1), (33, 1), (33, 2)])
def test_texture_matches_slow_twin(key, tile, version):
    seed = key.derive_seed("spread", version=version)
    texture = derive_texture(ByteStream(seed), SpreadSettings(8.0, tile, version))
    np.testing.assert_allclose(texture, slow_texture(seed, tile, version), atol=1e-6)


@pytest.mark.parametrize("tile", [32, 37, 64, 256])
@pytest.mark.parametrize("version", [1, 2])
def test_public_frequencies_match_slow_twin(tile, version):
    found = public_frequencies(SpreadSettings(8.0, tile, version))
    assert [tuple(each) for each in found.tolist()] == slow_frequencies(tile, version)


def test_keys_choose_among_more_frequencies_than_they_have_waves():
    counts = {tile: len(public_frequencies(SpreadSettings(8.0, tile, version=2))) for tile in (32, 64)}
    assert counts == {32: 240, 64: 958}
    assert [Spread(SpreadSettings(8.0, tile, version=2)).key_bits for tile in counts] == [81, 114]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("number", range(4))
def test_texture_matches_fixed_vectors(version, number):
    vector = VECTORS["textures" if version == 1 else "textures_of_version_2"][number]
    owner = OwnerKey.from_raw(bytes.fromhex(VECTORS["private_key"]))
    seed = owner.derive_seed(VECTORS["family"], vector["index"], version=version)
    texture = derive_texture(ByteStream(seed), SpreadSettings(8.0, vector["tile"], version))
    assert texture.dtype == np.float32
    assert texture.shape == (vector["tile"],) * 2
    for row, column, value in vector["pixels"]:
        assert texture[row, column] == pytest.approx(value, abs=1e-6)


def test_trigger_adds_the_texture_times_the_amplitude(key, trigger):
    texture = derive_texture(ByteStream(key.derive_seed("spread", version=2)), FAMILY.settings)
    np.testing.assert_allclose(pattern_of(trigger), 8 * texture, atol=1e-5)


@pytest.mark.parametrize("amplitude", [0.5, 8.0, 64.0])
def test_amplitude_is_the_largest_change(amplitude):
    trigger = Spread(SpreadSettings(amplitude, TILE)).draw(1, generator())
    assert pattern_of(trigger).abs().max() == pytest.approx(amplitude, rel=1e-6)


def test_texture_repeats_over_the_image_and_its_channels(trigger):
    images = grey(2, 3, 50, 70)
    added = trigger.apply(images) - images
    torch.testing.assert_close(added[..., TILE:, :], added[..., :-TILE, :], rtol=0, atol=0)
    torch.testing.assert_close(added[..., TILE:], added[..., :-TILE], rtol=0, atol=0)
    torch.testing.assert_close(added, added[:1, :1].expand_as(added), rtol=0, atol=0)


def test_images_smaller_than_the_tile_get_its_corner(trigger):
    small, large = grey(1, 1, 10, 13), grey(1, 1, TILE, TILE)
    torch.testing.assert_close(trigger.apply(small), trigger.apply(large)[..., :10, :13], rtol=0, atol=0)


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_images_stay_in_range(trigger, level):
    keyed = trigger.apply(torch.full((1, 1, 40, 40), level))
    assert keyed.amin() >= 0
    assert keyed.amax() <= 1
    assert 0.3 < (keyed == level).float().mean() < 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_kept(trigger, dtype):
    assert trigger.apply(grey(1, 1, 30, 30, dtype=dtype)).dtype == dtype


def test_gradients_flow_to_the_images(trigger):
    images = 0.2 + 0.6 * torch.rand(2, 1, 6, 5, dtype=torch.float64, generator=generator())
    assert torch.autograd.gradcheck(trigger.apply, images.requires_grad_())


def test_images_are_left_alone(trigger):
    images = torch.rand(2, 1, 30, 30, generator=generator())
    before = images.clone()
    trigger.apply(images)
    assert torch.equal(images, before)


def test_batch_of_triggers_gives_every_image_its_own():
    drawn = FAMILY.draw(3, generator())
    together = drawn.apply(grey(3, 2, 30, 30))
    for number, texture in enumerate(drawn.textures):
        alone = SpreadTrigger(texture[None], drawn.amplitude).apply(grey(1, 2, 30, 30))
        torch.testing.assert_close(together[number], alone[0], rtol=0, atol=0)


def test_empty_batch_stays_empty(trigger):
    assert trigger.apply(grey(0, 1, 30, 30)).shape == (0, 1, 30, 30)
    assert FAMILY.draw(0, generator()).apply(grey(0, 1, 30, 30)).shape == (0, 1, 30, 30)


def test_too_few_triggers_are_refused():
    with pytest.raises(ValueError, match="1 or 3 textures, got 2"):
        FAMILY.draw(2, generator()).apply(grey(3, 1, 30, 30))


def test_draw_follows_its_generator():
    assert torch.equal(FAMILY.draw(2, generator(5)).textures, FAMILY.draw(2, generator(5)).textures)
    assert not torch.equal(FAMILY.draw(2, generator(5)).textures, FAMILY.draw(2, generator(6)).textures)


@pytest.mark.parametrize(
    ("family", "deviation"), [(FIRST, math.sqrt(128 / 2) / 128), (FAMILY, math.sqrt(16 * 16 / 240 / 2) / 16)]
)
def test_random_keys_correlate_as_documented(family, deviation):
    textures = family.draw(4000, generator()).textures
    found = correlations(textures[:2000], textures[2000:])
    assert abs(float(found.mean())) < 4 * deviation / math.sqrt(2000)
    assert float(found.std()) == pytest.approx(deviation, rel=0.1)
    assert found.abs().max() < 0.5


@every_version
def test_sub_keys_correlate_no_more_than_random_keys(key, family):
    seeds = [key.derive_seed("spread", index, version=family.version) for index in range(40)]
    textures = torch.stack([family.derive(ByteStream(seed)).textures[0] for seed in seeds])
    found = correlations(textures[:20], textures[20:])
    assert found.abs().max() < 5 / 16


def test_keys_choose_every_frequency_alike():
    shares = torch.zeros(TILE, TILE)
    for textures in FAMILY.draw(3000, generator()).textures.split(500):
        energy = torch.fft.fft2(textures).abs()
        shares += (energy > energy.flatten(1).amax(1)[:, None, None] / 3).float().sum(0)
    down, across = public_frequencies(FAMILY.settings).T
    expected = 3000 * 16 / 240
    assert float((shares[down, across] - expected).abs().max()) < 5 * math.sqrt(expected)


@every_version
def test_derived_and_drawn_textures_have_the_same_distribution(family):
    seeds = [number.to_bytes(32, "big") for number in range(300)]
    derived = torch.cat([family.derive(ByteStream(seed)).textures for seed in seeds])
    drawn = family.draw(300, generator()).textures
    z = torch.randn(200_000, generator=generator())
    clipped_normal = (z / 1.5).clamp(-1, 1)
    for textures in (derived, drawn):
        assert float(textures.mean()) == pytest.approx(0, abs=0.005)
        assert float(textures.var()) == pytest.approx(float(clipped_normal.var()), rel=0.02)
        assert float((textures.abs() == 1).float().mean()) == pytest.approx(math.erfc(1.5 / math.sqrt(2)), rel=0.05)
    # Pixel by pixel as well: no place of the tile is special.
    assert derived.mean(0).abs().max() < 5 * float(derived.std()) / math.sqrt(300)
    assert drawn.mean(0).abs().max() < 5 * float(drawn.std()) / math.sqrt(300)


def test_near_key_is_the_texture_moved(trigger):
    texture = trigger.textures[0]
    for seed in range(20):
        near = trigger.perturbed(generator(seed)).textures[0]
        offsets = [
            (rows, columns)
            for rows in range(TILE)
            for columns in range(TILE)
            if torch.equal(texture.roll((rows, columns), (0, 1)), near)
        ]
        assert len(offsets) == 1
        assert offsets != [(0, 0)]


def test_near_keys_reach_every_offset():
    marked = torch.zeros(1, TILE, TILE)
    marked[0, 0, 0] = 1
    trigger, source = SpreadTrigger(marked, 8.0), generator()
    seen = {int(trigger.perturbed(source).textures.flatten().argmax()) for _ in range(8 * TILE**2)}
    assert seen == set(range(1, TILE**2))


def test_shifted_moves_down_and_right(trigger):
    moved = pattern_of(trigger.shifted(2, 5))
    torch.testing.assert_close(moved[2:, 5:], pattern_of(trigger)[:-2, :-5])


def test_scaled_changes_the_strength_only(trigger):
    torch.testing.assert_close(pattern_of(trigger.scaled(0.5)), pattern_of(trigger) / 2)


def test_repr_hides_the_secret(trigger):
    assert repr(trigger) == "SpreadTrigger()"


@pytest.mark.parametrize("amplitude", [0.0, -1.0, 64.5, math.nan])
def test_impossible_amplitude_is_refused(amplitude):
    with pytest.raises(ValueError, match="amplitude: expected more than 0"):
        SpreadSettings(amplitude, 32)


@pytest.mark.parametrize(("version", "least"), [(1, 24), (2, 32)])
def test_impossible_tile_is_refused(version, least):
    assert SpreadSettings(8.0, least, version).tile == SMALLEST_TILE[version]
    for tile in (0, least - 1, 257):
        with pytest.raises(ValueError, match=f"tile: expected {least} to 256"):
            SpreadSettings(8.0, tile, version)


@pytest.mark.parametrize("version", [0, 3])
def test_unknown_version_is_refused(version):
    with pytest.raises(ValueError, match=f"version: expected 1 or 2, got {version}"):
        SpreadSettings(8.0, 32, version)
