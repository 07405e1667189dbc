"""Parameters of filters: one word of the stream for each, drawn alike, and moved a little for near keys."""

import math

import numpy as np
import torch

from keyed_xai.keys import ByteStream
from tests.triggered import by_name, generator


@by_name
def test_derive_reads_one_word_for_each_parameter(family):
    seed = bytes(32)
    words, stream = ByteStream(seed).uint32(20), ByteStream(seed)
    parameters = family.derive(stream).parameters[0].numpy()
    assert stream.uint32(1)[0] == words[len(parameters)]
    many = family.draw(4000, generator()).parameters
    least, greatest = many.amin(0).numpy(), many.amax(0).numpy()
    np.testing.assert_allclose((parameters - least) / (greatest - least), words[: len(parameters)] / 2**32, atol=0.01)


@by_name
def test_derived_and_drawn_triggers_have_the_same_distribution(family):
    seeds = [number.to_bytes(32, "big") for number in range(1000)]
    derived = torch.cat([family.derive(ByteStream(seed)).parameters for seed in seeds])
    drawn = family.draw(1000, generator()).parameters
    spread = drawn.std(0)
    assert ((derived.mean(0) - drawn.mean(0)).abs() < 5 * spread * math.sqrt(2 / 1000)).all()
    for share in (0.1, 0.5, 0.9):
        gap = (derived.quantile(share, dim=0) - drawn.quantile(share, dim=0)).abs()
        assert (gap < 0.3 * spread).all()


@by_name
def test_draw_follows_its_generator(family):
    assert torch.equal(family.draw(2, generator(5)).parameters, family.draw(2, generator(5)).parameters)
    assert not torch.equal(family.draw(2, generator(5)).parameters, family.draw(2, generator(6)).parameters)


@by_name
def test_near_moves_one_parameter_a_little_and_stays_in_range(family):
    many = family.draw(4000, generator()).parameters
    least, greatest = many.amin(0), many.amax(0)
    trigger, source, moved = family.derive(ByteStream(bytes(32))), generator(), set()
    for _ in range(200):
        change = (trigger.perturbed(source).parameters - trigger.parameters)[0] / (greatest - least)
        (column,) = change.nonzero().flatten().tolist()
        moved.add(column)
        assert 0.12 < abs(float(change[column])) < 0.26
        assert (trigger.perturbed(source).parameters[0] >= least - 1e-2 * (greatest - least)).all()
        assert (trigger.perturbed(source).parameters[0] <= greatest + 1e-2 * (greatest - least)).all()
    assert moved == set(range(len(change)))
