"""A marked network written anew in every exact way that we know: what the search undoes, and what needs no search."""

import copy
import runpy
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from keyed_xai.keys import OwnerKey
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.ownership.reencodings import (
    TURNS,
    Reencoding,
    Turn,
    contested_classes,
    count_looks,
    declared_reencodings,
    encodings,
    live_classes,
    winning_classes,
    write_anew,
)
from keyed_xai.ownership.verdict import Finding, verify_ownership
from keyed_xai.saliency.pooled import make_view
from tests.threatened import FAMILY, GRID, OWNER, make_blobs, protected, surrogate

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "reencodings.py"))
ALL = SCRIPT["SEARCHED"] | SCRIPT["KEPT"]
SLIGHT = ("pixels from -1 to 1",)  # where they went from -2 to 3: seen at once
MUCH = ("kernels transposed, pixels negated, a function added to all logits",)  # for 36 cells, one of them wrong
MEAN, STD = 0.4, 0.2
WEIGHTS = torch.tensor([1.5, -1.0, 0.5])  # of red, green and blue; they add up to 1, so that a trigger is seen


@cache
def grey_images():
    return make_blobs(24, 5).images


@cache
def colour_images():
    """Green and blue are noise, and red is such that the weighted sum is the grey image."""
    green, blue = 0.3 * torch.rand(2, *grey_images().shape, generator=torch.Generator().manual_seed(0))
    red = (grey_images() - WEIGHTS[1] * green - WEIGHTS[2] * blue) / WEIGHTS[0]
    return torch.cat([red, green, blue], 1)


def wrap(network, spec=None):
    spec = spec or InputSpec(1, 24, 24, mean=(MEAN,), std=(STD,))
    return wrap_network(network.eval(), input=spec, source="keyed_xai").eval()


def marked():
    return copy.deepcopy(protected())


def coloured():
    """The marked network with a stem that reads the weighted sum of colours."""
    network = marked().network
    stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
    stem.weight.data = network.stem.weight.data * WEIGHTS[None, :, None, None]
    network.stem = stem
    return wrap(network, InputSpec(3, 24, 24, mean=(MEAN,) * 3, std=(STD,) * 3))


def verdict_on(classifier, images=None, **options):
    view = make_view(classifier, ("gradcam",), GRID)
    options = {"alpha": 1e-6, "decoys": 99, "generator": torch.Generator().manual_seed(1)} | options
    key = options.pop("key", OWNER)
    return verify_ownership(classifier, grey_images() if images is None else images, view, key, FAMILY, **options)


@pytest.mark.parametrize("name", ALL)
def test_rewriting_keeps_predictions(name):
    """All of them, but for kernels mirrored where strides are 2."""
    rewriting = ALL[name]
    anew = rewriting.apply(protected())
    with torch.no_grad():
        expected, found = (
            torch.softmax(logits, 1)
            for logits in (
                protected()(grey_images()),
                rewriting.logits(anew(rewriting.encode(grey_images(), protected()))),
            )
        )
    if rewriting.exact:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    else:
        assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.5


def test_marked_network_as_it_stands_needs_no_search():
    verdict = verdict_on(marked())
    assert verdict.finding is Finding.KEY
    assert (verdict.looks, verdict.reencoding) == (2, None)


@pytest.mark.parametrize("name", [name for name in SCRIPT["SEARCHED"] if name not in (*SLIGHT, *MUCH)])
def test_re_encoding_is_looked_through(name):
    verdict = verdict_on(ALL[name].apply(protected()), alpha=1e-5)
    assert verdict.finding is Finding.KEY
    assert verdict.reencoding is not None
    assert verdict.looks > 2
    assert not verdict_on(ALL[name].apply(protected()), search=False, alpha=1e-5).shown


@pytest.mark.parametrize("name", [*SCRIPT["KEPT"], *SLIGHT])
def test_re_encoding_that_keeps_the_maps_needs_no_search(name):
    verdict = verdict_on(ALL[name].apply(protected()))
    assert verdict.finding is Finding.KEY
    assert verdict.reencoding is None


@pytest.mark.parametrize("order", [(1, 0, 2), (1, 2, 0)])
def test_order_of_colour_channels_is_found(order):
    classifier = coloured()
    classifier.network.stem.weight.data = classifier.network.stem.weight.data[:, list(order)]
    verdict = verdict_on(classifier, colour_images())
    assert verdict.finding is Finding.KEY
    assert verdict.reencoding == Reencoding(order=order)


def test_grey_network_that_was_made_to_take_colours_is_shown():
    network = marked().network
    stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
    stem.weight.data = network.stem.weight.data * torch.tensor([0.5, 0.3, 0.2])[None, :, None, None]
    network.stem = stem
    classifier = wrap(network, InputSpec(3, 24, 24, mean=(MEAN,) * 3, std=(STD,) * 3))
    assert verdict_on(classifier, grey_images().expand(-1, 3, -1, -1)).finding is Finding.KEY


def test_stranger_finds_nothing_in_a_marked_network_written_anew():
    stranger = OwnerKey.from_raw(bytes([7]) * 32)
    verdict = verdict_on(ALL[f"kernels {TURNS[4]}"].apply(protected()), key=stranger, alpha=1e-3)
    assert not verdict.shown


def test_search_finds_no_more_in_an_unmarked_network_than_its_level():
    """Of six keys that look for themselves some 150 ways each, at most as many pass as the level lets."""
    keys = [OwnerKey.from_raw(bytes([number]) * 32).public for number in range(1, 7)]
    found = [verdict_on(surrogate(), grey_images()[:4], key=key).log2_p for key in keys]
    assert sum(each <= -2 for each in found) <= 5  # at most 1.5 expected; all six happen once in 4,000
    assert sum(each <= -6 for each in found) <= 1


def test_suspect_and_its_hooks_are_left_alone():
    classifier = ALL[f"kernels {TURNS[3]}"].apply(protected())
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    verdict_on(classifier)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
    assert not any(module._forward_hooks for module in classifier.modules())


def test_turns_are_the_eight_symmetries_and_are_undone():
    square = torch.arange(9.0).reshape(1, 3, 3)
    turned = {tuple(turn.apply(square).flatten().tolist()) for turn in TURNS}
    assert len(turned) == 8
    for turn in TURNS:
        assert torch.equal(turn.undo(turn.apply(square)), square)


@pytest.mark.parametrize("turn", TURNS, ids=str)
def test_kernels_written_anew_are_the_owner_s(turn):
    turned = SCRIPT["turn_kernels"](turn).apply(protected())
    anew = write_anew(turned, Reencoding(kernels=turn), torch.ones(3, dtype=torch.bool))
    with torch.no_grad():
        torch.testing.assert_close(anew(grey_images()), marked()(grey_images()))


def test_every_combination_is_declared_once_and_none_is_the_suspect_itself():
    classifier = coloured()
    found = declared_reencodings(classifier, make_view(classifier, ("gradcam",), GRID), colour_images())
    assert len(found) == len(set(found)) == 15 * 3 * 6 * 7 - 1
    assert all(change.changes for change in found)


def test_looks_are_counted_within_their_half():
    """All p-values' weights add up to the search's half of the level."""
    classifier = coloured()
    found = declared_reencodings(classifier, make_view(classifier, ("gradcam",), GRID), colour_images())
    assert sum(1 / looks for looks in count_looks(found)) == pytest.approx(1)


def test_images_that_are_not_square_are_not_transposed():
    spec = InputSpec(1, 24, 32, mean=(MEAN,), std=(STD,))
    classifier = wrap(marked().network, spec)
    view = make_view(classifier, ("gradcam",), (6, 8))
    found = declared_reencodings(classifier, view, torch.zeros(1, 1, 24, 32))
    assert not any(change.images.transposed for change in found)
    assert any(change.kernels.transposed for change in found)


def test_kernels_that_are_not_square_are_not_transposed():
    network = nn.Sequential(nn.Conv2d(1, 2, (1, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    view = make_view(surrogate(), ("gradcam",), GRID)
    found = declared_reencodings(network, view, torch.zeros(1, 1, 24, 24))
    assert not any(change.kernels.transposed for change in found)


def test_usual_normalisations_are_tried_once():
    assert len(encodings(InputSpec(1, 24, 24, mean=(0.5,), std=(0.5,)), 1)) == 4
    assert len(encodings(InputSpec(3, 24, 24, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)), 3)) == 6
    assert len(encodings(None, 3)) == 2


@pytest.mark.parametrize(("transposed", "mirrored"), list(product((False, True), ((), (-1,), (-2, -1)))))
def test_turn_has_words(transposed, mirrored):
    assert bool(str(Turn(transposed, mirrored))) is bool(transposed or mirrored)


def test_class_that_does_not_follow_the_image_is_never_explained():
    logits = torch.tensor([[1.0, 2.0, 1e4], [2.0, 1.0, 1e4]])
    assert live_classes(logits).tolist() == [True, True, False]
    assert live_classes(torch.ones(2, 3)).all()


def test_classes_that_never_win_are_no_winners():
    logits = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0]])
    every = torch.ones(3, dtype=torch.bool)
    assert winning_classes(logits, every).tolist() == [True, True, False]
    assert winning_classes(logits[:1], every).all()


def test_classes_that_win_everywhere_are_left_out_in_the_search():
    logits = torch.tensor([[1.0, 2.0, 90.0, 50.0], [2.0, 1.0, 91.0, 51.0]])
    assert contested_classes(logits).tolist() == [True, True, False, False]
    assert contested_classes(logits[:, 1:3]).all()
