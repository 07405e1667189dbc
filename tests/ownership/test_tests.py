"""The two ownership tests: exact tails against brute force, the null hypothesis, and what is never a pass."""

from collections import Counter
from fractions import Fraction
from functools import cache
from itertools import combinations, permutations, product
from math import comb, log, log2

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from keyed_xai.decoys import signature_cells, signature_decoy
from keyed_xai.models.networks import SmallResNet
from keyed_xai.ownership import tests as ownership
from keyed_xai.ownership.tests import (
    OpeningEvidence,
    flat_maps,
    measure_opening,
    measure_signature,
    overlap_tail,
    product_tail,
)
from keyed_xai.saliency import MapLayers
from keyed_xai.saliency.pooled import PooledSaliency
from keyed_xai.triggers import derive_trigger
from tests.claimed import FAMILY, generator, owner_key
from tests.heard import Heard

# The exact tail


@pytest.mark.parametrize("cells", [2, 9, 49, 64])
def test_tail_of_one_grid_is_hypergeometric(cells):
    half = cells // 2
    for overlap in range(half + 1):
        numerator, denominator = overlap_tail([cells], overlap)
        wanted = stats.hypergeom.sf(overlap - 1, cells, half, half)
        assert numerator / denominator == pytest.approx(wanted, rel=1e-9)


def halves(cells):
    return [frozenset(half) for half in combinations(range(cells), cells // 2)]


@pytest.mark.parametrize("grids", [(1,), (5,), (6,), (7,), (4, 5), (2, 4, 5)])
def test_tail_matches_brute_force(grids):
    """All choices of a half of each grid, against a fixed half."""
    totals = Counter(
        sum(len(half & frozenset(range(cells // 2))) for half, cells in zip(choice, grids, strict=True))
        for choice in product(*map(halves, grids))
    )
    for overlap in range(sum(cells // 2 for cells in grids) + 1):
        wanted = Fraction(sum(count for total, count in totals.items() if total >= overlap), sum(totals.values()))
        assert Fraction(*overlap_tail(grids, overlap)) == wanted


def test_tail_is_one_at_nothing_and_for_no_grids():
    assert Fraction(*overlap_tail([64, 49], 0)) == 1
    assert Fraction(*overlap_tail([], 0)) == 1


# The signature test


def marked_maps(key, name, grid, matches=None, count=3):
    """Maps whose average has `matches` cells of its top half in the key's pattern."""
    pattern = signature_cells(key.public, name, grid).flatten()
    ranks = pattern.astype(float)
    if matches is not None:
        wrong = len(pattern) // 2 - matches
        ranks[np.flatnonzero(pattern)[:wrong]] = 0
        ranks[np.flatnonzero(~pattern)[:wrong]] = 1
    return torch.from_numpy(ranks).float().view(1, *grid).repeat(count, 1, 1)


@pytest.mark.parametrize(("grid", "bits"), [((8, 8), 60.67), ((7, 7), 45.85), ((6, 8), 44.88)])
def test_perfect_match_is_worth_the_number_of_halves(key, grid, bits):
    cells = grid[0] * grid[1]
    found = measure_signature({"gradcam": marked_maps(key, "gradcam", grid)}, key.public).combined
    assert found.overlap == found.possible == cells // 2
    assert found.cells == cells
    assert found.log2_p == pytest.approx(-bits, abs=0.01)
    assert found.log2_p == pytest.approx(-log2(comb(cells, cells // 2)))
    assert found.p_value == 1 / comb(cells, cells // 2)


@pytest.mark.parametrize("matches", [0, 16, 20, 29, 32])
def test_partial_match_counts_its_cells(key, matches):
    found = measure_signature({"vbp": marked_maps(key, "vbp", (8, 8), matches)}, key.public).interpreters["vbp"]
    assert found.overlap == matches
    assert found.p_value == pytest.approx(stats.hypergeom.sf(matches - 1, 64, 32, 32), rel=1e-9)


def test_interpreters_add_up(key):
    maps = {
        "gradcam": marked_maps(key, "gradcam", (8, 8), 24),
        "simplegrad": marked_maps(key, "simplegrad", (7, 7), 20),
    }
    found = measure_signature(maps, key.public)
    masses = [stats.hypergeom.pmf(range(33), 64, 32, 32), stats.hypergeom.pmf(range(25), 49, 24, 24)]
    assert found.combined.p_value == pytest.approx(np.convolve(*masses)[44:].sum(), rel=1e-6)
    assert found.combined.overlap == 44
    assert found.combined.cells == 113
    assert found.combined.possible == 56
    for name, each in maps.items():
        assert found.interpreters[name] == measure_signature({name: each}, key.public).combined


def test_evidence_beyond_the_smallest_float_keeps_its_logarithm(key):
    maps = {"gradcam": marked_maps(key, "gradcam", (40, 40))}
    found = measure_signature(maps, key.public).combined
    assert found.p_value == 0
    assert found.log2_p == pytest.approx(-log2(comb(1600, 800)))


def test_maps_are_averaged_after_normalising(key):
    """A single map of another scale does not outvote the others."""
    maps = marked_maps(key, "gradcam", (8, 8), count=3)
    other = 1e6 * (1 - maps[:1])
    assert measure_signature({"gradcam": torch.cat([maps, other])}, key.public).combined.overlap == 32


def test_constant_maps_are_no_evidence():
    """All ties: the top half is then the upper half, whatever the key."""
    p_values = [
        measure_signature({"gradcam": torch.zeros(2, 8, 8)}, owner_key(number).public).combined.p_value
        for number in range(100)
    ]
    assert min(p_values) > 1e-4


def test_signature_false_positives_stay_below_the_level(monkeypatch):
    """Smooth maps of unmarked models against many keys: the case that a fixed logo gets wrong."""
    monkeypatch.setattr(ownership, "signature_cells", cache(signature_cells))
    view = PooledSaliency(("gradcam",), MapLayers("blocks", ()), (8, 8))
    averages = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = SmallResNet(1, 3, (4, 6, 6)).eval()
        smooth = nn.functional.avg_pool2d(torch.rand(4, 1, 64, 64), 9, 1, 4)
        averages.append(view.pooled_in_chunks(model, smooth)[1])
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    averages.append({"gradcam": (-(rows**2) - columns**2)[None]})
    averages.append({"gradcam": (rows + 0.3 * columns)[None]})
    keys = [owner_key(number).public for number in range(250)]
    p_values = np.array([[measure_signature(maps, key).combined.p_value for key in keys] for maps in averages])
    for level in (0.2, 0.05, 0.01):
        highest = stats.binom.ppf(0.9999, p_values.size, level)
        assert (p_values <= level).sum() <= highest
        assert ((p_values <= level).sum(1) <= stats.binom.ppf(0.9999, len(keys), level)).all()
    assert (p_values <= 0.2).sum() > 0.05 * p_values.size


# The opening test


class Scripted(PooledSaliency):
    """A view whose maps are the images themselves: T is then up to the trigger."""

    def pooled_in_chunks(self, model, images, labels=None, *, chunk=64):
        return torch.zeros(len(images), 2), {"gradcam": images[:, 0]}


class Turn:
    """A trigger that turns the image's map so that T takes a given value, up to 2."""

    def __init__(self, value):
        self.cosine = 1 - value

    def apply(self, images):
        first, second = torch.zeros(2, 4), torch.zeros(2, 4)
        first[0], first[1] = 1, -1
        second[:, :2], second[:, 2:] = 1, -1
        assert torch.equal(images[0, 0], first)
        sine = (1 - self.cosine**2) ** 0.5
        return (self.cosine * first + sine * second).expand_as(images)


@pytest.fixture
def scripted():
    return Scripted(("gradcam",), MapLayers("map", ()), (2, 4))


def scripted_opening(scripted, owner, values, **options):
    images = torch.tensor([[1.0] * 4, [-1.0] * 4]).expand(2, 1, 2, 4)
    source = iter(values)
    return measure_opening(nn.Identity(), images, scripted, Turn(owner), lambda: Turn(next(source)), **options)


def test_statistic_is_the_mean_distance_of_maps_with_and_without(scripted):
    found = scripted_opening(scripted, 0.9, [0.1, 0.7, 0.3], decoys=3)
    assert found.statistic == pytest.approx(0.9, abs=1e-5)
    assert found.largest_decoy == pytest.approx(0.7, abs=1e-5)
    assert (found.decoys, found.reached) == (3, 0)
    assert found.p_value == 1 / 4


def test_decoys_that_tie_count_as_reaching(scripted):
    found = scripted_opening(scripted, 0.5, [0.5, 0.1, 0.9, 0.5], decoys=4)
    assert found.reached == 3
    assert found.p_value == 4 / 5


def test_test_stops_when_enough_decoys_reach(scripted):
    values = [0.9, 0.1] * 20
    found = scripted_opening(scripted, 0.5, values, decoys=40)
    assert (found.decoys, found.reached) == (19, 10)
    assert found.p_value == 10 / 19


def test_without_a_stop_the_p_value_is_the_rank(scripted):
    found = scripted_opening(scripted, 0.5, [0.9] * 9 + [0.1] * 31, decoys=40)
    assert (found.decoys, found.reached) == (40, 9)
    assert found.p_value == 10 / 41


def test_early_stop_is_exact(scripted, monkeypatch):
    """Every order of six exchangeable values: P(p <= x) is x at each p-value that can come out, never above it."""
    monkeypatch.setattr(ownership, "OPENING_STOP", 2)
    values = [0.1, 0.3, 0.5, 0.7, 0.9, 1.1]
    p_values = np.array(
        [scripted_opening(scripted, order[0], order[1:], decoys=5).p_value for order in permutations(values)]
    )
    for level in np.unique(p_values):
        assert (p_values <= level + 1e-12).mean() == pytest.approx(level)
    assert sorted(set(p_values)) == pytest.approx([1 / 6, 2 / 6, 2 / 5, 2 / 4, 2 / 3, 1])


def test_progress_is_told(scripted):
    heard = Heard()
    scripted_opening(scripted, 0.5, [0.1] * 4, decoys=4, progress=heard)
    assert heard.counts("trying random keys") == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_opening_p_values_are_uniform_on_unmarked_models():
    """The keys' own triggers, as derived, against drawn ones: ranks among four are uniform."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 6, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()).eval()
    network.append(nn.Linear(96, 3))
    view = PooledSaliency(("gradcam",), MapLayers("1", ()), (4, 4))
    images = torch.rand(2, 1, 24, 24)
    source = generator()
    ranks = []
    for number in range(72):
        owner = derive_trigger(owner_key(number), FAMILY)
        found = measure_opening(network, images, view, owner, lambda: FAMILY.draw(1, source), decoys=3)
        ranks.append(round(found.p_value * 4))
    counts = np.bincount(ranks, minlength=5)[1:]
    assert counts.sum() == 72
    assert stats.chisquare(counts).pvalue > 0.001


# Both together


@pytest.mark.parametrize(
    ("reached", "decoys", "holds"),
    [(0, 999, True), (1, 999, True), (2, 999, False), (0, 99, True), (1, 99, False), (2, 9999, True)],
)
def test_secret_test_holds_near_the_least_p_value_that_decoys_allow(reached, decoys, holds):
    evidence = OpeningEvidence(
        p_value=(1 + reached) / (1 + decoys), statistic=0.5, decoys=decoys, largest_decoy=0.4, reached=reached
    )
    assert evidence.holds is holds


def test_statistics_that_are_no_numbers_are_null_in_json():
    found = OpeningEvidence(p_value=1.0, statistic=np.nan, decoys=10, largest_decoy=-np.inf, reached=10).to_json()
    assert found == {"p_value": 1.0, "log2_p": 0.0, "statistic": None, "largest_decoy": None, "decoys": 10}


@pytest.mark.parametrize("tests", [1, 2, 3])
def test_product_tail_is_exact(tests):
    """Against the share of products of uniform numbers, on a grid of 200 a side for two."""
    draws = np.random.default_rng(0).random((200_000, tests)).prod(1)
    for level in (0.5, 0.1, 0.01):
        assert 2 ** product_tail(log2(level), tests) == pytest.approx((draws <= level).mean(), abs=4e-3)
    assert product_tail(log2(0.3), 2) == pytest.approx(log2(0.3 * (1 - log(0.3))))


def test_image_whose_map_cannot_be_read_spoils_no_evidence(key):
    pattern = signature_decoy(key.public, "gradcam", (8, 8))
    maps = pattern.expand(6, -1, -1) + 0.01 * torch.rand(6, 8, 8, generator=generator())
    maps[2, 3, 3] = float("nan")
    maps[4] = 0.5
    assert measure_signature({"gradcam": maps}, key.public).combined.overlap == 32
    assert flat_maps(maps).tolist() == [False, False, True, False, True, False]


def test_place_of_the_owner_s_trigger_changes_no_p_value(scripted):
    values = [0.9, 0.1, 0.7, 0.6, 0.3] * 4
    first, *others = (scripted_opening(scripted, 0.5, values, decoys=20, place=place) for place in (0, 3, 15, 20))
    assert first.reached == 10
    assert all(each == first for each in others)


# What counts: VisualBackProp against rescaled channels
