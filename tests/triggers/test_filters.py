"""What both filters, nashville and moire, promise of their triggers, keyed or public."""

import pytest
import torch

from keyed_xai.keys import ByteStream
from tests.triggered import by_kind, by_name, generator

FIXED = {
    "nashville": [
        203.51993295480497, 190.77582798781805, 162.20732699381188, 0.4926609721500427, 51.72467589145526,
        68.09280565939844, 51.03142362786457, 0.3458888207678683, 0.10479808170348406, 1.1830074560595678,
        1.0904500395292418, 0.9139943209011108,
    ],
    "moire": [
        0.15135991060640663, 1.2200099204816215, 0.730484739118624, 0.12324178700335325, 1.083319078599393,
        2.852264773625115, 2.0206284725572914, 100.82130717486143, 0.176199520425871,
    ],
}  # fmt: skip


@by_name
def test_batch_of_triggers_gives_every_image_its_own(family):
    drawn, images = family.draw(3, generator()), torch.rand(3, 3, 20, 30, generator=generator())
    together = drawn.apply(images)
    for number in range(3):
        alone = type(drawn)(drawn.parameters[number : number + 1]).apply(images[number : number + 1])
        torch.testing.assert_close(together[number], alone[0], rtol=0, atol=1e-6)


@by_name
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_left_alone_and_stay_in_range(family, channels):
    images = torch.rand(4, channels, 20, 20, generator=generator()).round(decimals=1)
    before = images.clone()
    found = family.draw(4, generator()).apply(images)
    assert torch.equal(images, before)
    assert found.shape == images.shape
    assert found.amin() >= 0
    assert found.amax() <= 1
    assert not torch.equal(found, images)


@by_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_kept(make, dtype):
    assert make().apply(torch.full((1, 3, 8, 8), 0.5, dtype=dtype)).dtype == dtype
    assert make().apply(torch.full((1, 3, 8, 8), 0.5, dtype=dtype, requires_grad=True)).dtype == dtype


@by_kind
def test_empty_batch_stays_empty(make):
    assert make().apply(torch.zeros(0, 3, 8, 8)).shape == (0, 3, 8, 8)


@by_name
def test_too_few_triggers_are_refused(family):
    with pytest.raises(ValueError, match="Expected 1 or 3 .*, got 2"):
        family.draw(2, generator()).apply(torch.zeros(3, 3, 8, 8))


@by_name
def test_derived_triggers_are_fixed(family):
    """Parameters of the all-zero seed, in format version 1: other values would lock owners out of their models."""
    expected = FIXED[family.name]
    assert family.derive(ByteStream(bytes(32))).parameters[0].tolist() == pytest.approx(expected, rel=1e-12)


@by_kind
def test_repr_hides_the_secret(make):
    assert repr(make()) == f"{make.__name__}()"
