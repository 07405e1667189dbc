"""Comparisons of maps: twins from numpy and scipy, constant and tiny maps, and the laws of correlation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from keyed_xai import metrics
from keyed_xai.saliency import INTERPRETERS, explain
from keyed_xai.saliency.pooled import PooledSaliency, default_grid, join_maps

values = st.floats(-100, 100, width=32)
pairs = hnp.arrays(np.float32, (2, 3, 4, 5), elements=values)
quick = settings(max_examples=40, deadline=None)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_pooling_averages_each_window():
    maps = noise(3, 8, 12)
    pooled = metrics.pool_maps(maps, (4, 3))
    for row in range(4):
        for column in range(3):
            window = maps[:, 2 * row : 2 * row + 2, 4 * column : 4 * column + 4]
            torch.testing.assert_close(pooled[:, row, column], window.mean((1, 2)))


def test_pooling_windows_overlap_where_the_grid_does_not_divide_the_map():
    maps = noise(2, 7, 5)
    pooled = metrics.pool_maps(maps, (3, 2))
    for row in range(3):
        for column in range(2):
            window = maps[:, row * 7 // 3 : -(-(row + 1) * 7 // 3), column * 5 // 2 : -(-(column + 1) * 5 // 2)]
            torch.testing.assert_close(pooled[:, row, column], window.mean((1, 2)))


@quick
@given(hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_normalised_maps_span_zero_to_one(maps):
    normalised = metrics.normalise_maps(torch.from_numpy(maps))
    for before, after in zip(maps, normalised, strict=True):
        constant = before.min() == before.max()
        assert float(after.min()) == 0
        assert float(after.max()) == (0 if constant else 1)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-4, 1e30])
def test_normalising_matches_slow_twin_at_every_scale(scale):
    maps = scale * noise(4, 5, 6)
    for before, after in zip(maps.double().numpy(), metrics.normalise_maps(maps), strict=True):
        np.testing.assert_allclose(after, (before - before.min()) / (before.max() - before.min()), atol=1e-5)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-4, 1.0, 1e30])
def test_correlation_matches_scipy_at_every_scale(scale):
    first, second = noise(5, 4, 6), noise(5, 4, 6, seed=1)
    found = metrics.correlation(scale * first, second)
    for row in range(5):
        wanted = stats.pearsonr(first[row].flatten().numpy(), second[row].flatten().numpy()).statistic
        assert float(found[row]) == pytest.approx(wanted, abs=1e-5)


def test_correlation_of_maps_far_from_zero_matches_scipy():
    first, second = 1000 + noise(5, 4, 6, dtype=torch.float64), noise(5, 4, 6, seed=1, dtype=torch.float64)
    found = metrics.correlation(first, second)
    for row in range(5):
        wanted = stats.pearsonr(first[row].flatten().numpy(), second[row].flatten().numpy()).statistic
        assert float(found[row]) == pytest.approx(wanted, abs=1e-5)


@quick
@given(pairs, st.floats(2**-10, 2**10), st.floats(-1, 1), st.sampled_from([1, -1]))
def test_correlation_is_bounded_and_keeps_under_affine_changes(pair, scale, shift, sign):
    first, second = torch.from_numpy(pair).double()
    spread = first.flatten(1).std(1) / first.flatten(1).abs().amax(1).clamp_min(1e-30)
    first = torch.where((spread > 1e-3)[:, None, None], first, torch.zeros_like(first))
    found = metrics.correlation(first, second)
    assert found.abs().amax() <= 1 + 1e-12
    moved = sign * scale * first + shift * first.abs().amax((1, 2), keepdim=True) * scale
    torch.testing.assert_close(metrics.correlation(moved, second), sign * found, atol=1e-5, rtol=0)
    torch.testing.assert_close(metrics.correlation(second, first), found, atol=1e-12, rtol=0)


@pytest.mark.parametrize("level", [0.0, 1.0, 0.1, -3.3, 1e-30, 1e30])
def test_constant_maps_correlate_with_nothing(level):
    constant = torch.full((3, 7, 9), level)
    others = noise(3, 7, 9)
    torch.testing.assert_close(metrics.correlation(constant, others), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(metrics.correlation(constant, constant), torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("maps", [torch.ones(2, 4, 4), 1e-30 * noise(2, 4, 4)])
def test_gradients_stay_finite(maps):
    maps = maps.clone().requires_grad_()
    target = noise(2, 4, 4, seed=1)
    total = metrics.correlation(maps, target).sum() + metrics.normalise_maps(maps).square().sum()
    (gradient,) = torch.autograd.grad(total, maps)
    assert torch.isfinite(gradient).all()


def test_gradients_are_those_of_the_formulas():
    maps, target = noise(2, 3, 3, dtype=torch.float64).requires_grad_(), noise(2, 3, 3, seed=1, dtype=torch.float64)

    def plain_correlation(maps):
        first, second = (each.flatten(1) - each.flatten(1).mean(1, keepdim=True) for each in (maps, target))
        return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))

    (found,) = torch.autograd.grad(metrics.correlation(maps, target).sum(), maps)
    (wanted,) = torch.autograd.grad(plain_correlation(maps).sum(), maps)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-6)
    assert torch.autograd.gradcheck(metrics.normalise_maps, maps)


def test_mse_matches_numpy():
    first, second = noise(3, 4, 5), noise(3, 4, 5, seed=1)
    wanted = [((a - b) ** 2).mean() for a, b in zip(first.numpy(), second.numpy(), strict=True)]
    np.testing.assert_allclose(metrics.mse(first, second), wanted, rtol=1e-6)


@pytest.mark.parametrize(("share", "count"), [(0.25, 5), (0.01, 1), (0.0, 1), (1.0, 20)])
def test_top_energy_matches_slow_twin(share, count):
    maps, reference = noise(3, 4, 5), noise(3, 4, 5, seed=1)
    found = metrics.top_energy(maps, reference, share)
    for row in range(3):
        ranked = sorted(zip(reference[row].flatten().tolist(), maps[row].flatten().tolist(), strict=True), reverse=True)
        wanted = sum(value**2 for _, value in ranked[:count]) / count
        assert float(found[row]) == pytest.approx(wanted, rel=1e-5)


def test_fsr_and_cr_by_hand():
    distances = torch.tensor([0.1, 0.2, 0.3, 0.19])
    assert metrics.fooling_success_rate(distances, 0.2) == 50
    assert metrics.correct_rate(distances, 0.2) == 50
    assert metrics.fooling_success_rate(distances, 0.31) == 100
    assert metrics.correct_rate(distances, 0.05) == 100


def test_auc_counts_pairs():
    smaller, larger = noise(13), 0.5 + noise(9, seed=1)
    larger[0] = smaller[0]
    wanted = np.mean([(a < b) + 0.5 * (a == b) for a in smaller.tolist() for b in larger.tolist()])
    assert metrics.separation_auc(smaller, larger) == pytest.approx(wanted)


def test_auc_at_its_ends():
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4, 0.5])
    assert metrics.separation_auc(low, high) == 1
    assert metrics.separation_auc(high, low) == 0
    assert metrics.separation_auc(low, low) == 0.5


# Localisation and predictions


@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (1, 9), (8, 8), (3, 11)])
def test_mass_inside_matches_slow_twin_on_boxes_that_cut_cells(rows, columns):
    generator = torch.Generator().manual_seed(rows)
    maps = torch.rand(6, rows, columns, generator=generator)
    corners = torch.rand(6, 2, 2, generator=generator).sort(dim=1).values
    boxes = torch.cat([corners[:, 0], corners[:, 1]], dim=1)  # left, top, right, bottom
    found = metrics.mass_inside(maps, boxes)
    for number in range(6):
        left, top, right, bottom = boxes[number].tolist()
        inside = 0.0
        for row in range(rows):
            for column in range(columns):
                across = max(0.0, min(right, (column + 1) / columns) - max(left, column / columns)) * columns
                down = max(0.0, min(bottom, (row + 1) / rows) - max(top, row / rows)) * rows
                inside += float(maps[number, row, column]) * across * down
        assert float(found[number]) == pytest.approx(inside / float(maps[number].sum()), rel=1e-4)
    assert ((found > 0) & (found < 1)).all()


def test_mass_inside_by_hand():
    """A map of 2 x 4 cells: left and right halves, a quarter of one cell, and rows that are not columns."""
    maps = torch.tensor([[[1.0, 2, 3, 4], [5, 6, 7, 8]]]).expand(5, 2, 4)
    boxes = torch.tensor(
        [[0, 0, 1, 1], [0, 0, 0.5, 1], [0.5, 0, 1, 0.5], [0.125, 0, 0.25, 0.25], [0.3, 0.4, 0.3, 0.4]]
    )  # fmt: skip
    assert metrics.mass_inside(maps, boxes).tolist() == pytest.approx([1, 14 / 36, 7 / 36, 0.25 / 36, 0], abs=1e-6)


def test_mass_inside_of_blank_and_of_faint_maps():
    maps = torch.stack([torch.zeros(3, 3), 1e-30 * torch.ones(3, 3)])
    assert metrics.mass_inside(maps, torch.tensor([[0, 0, 1 / 3, 1.0]] * 2)).tolist() == pytest.approx([0, 1 / 3])


def test_mass_of_a_box_beyond_the_image_is_what_it_covers():
    maps = noise(1, 4, 4).abs()
    assert metrics.mass_inside(maps, torch.tensor([[-0.5, -1.0, 2.0, 1.5]])).tolist() == pytest.approx([1])


@quick
@given(hnp.arrays(np.float32, (2, 4, 5), elements=st.floats(0, 10, width=32)), st.floats(0.125, 0.875, width=32))
def test_boxes_that_make_up_the_image_share_all_of_its_mass(maps, cut):
    maps = torch.from_numpy(maps)
    upper, lower = (torch.tensor([box] * 2) for box in ([0.0, 0.0, 1.0, cut], [0.0, cut, 1.0, 1.0]))
    total = metrics.mass_inside(maps, upper) + metrics.mass_inside(maps, lower)
    torch.testing.assert_close(total, (maps.sum((1, 2)) > 0).float(), atol=1e-5, rtol=0)


def count_pairs(scores, truth):
    """The area under the ROC curve as the share of pairs in the right order; a tie is half of one."""
    yes = [score for score, label in zip(scores, truth, strict=True) if label]
    no = [score for score, label in zip(scores, truth, strict=True) if not label]
    return sum((a > b) + 0.5 * (a == b) for a in yes for b in no) / (len(yes) * len(no))


def test_auroc_of_every_label_counts_pairs():
    logits = noise(20, 3).round(decimals=1)  # with ties
    labels = torch.randint(2, (20, 3), generator=torch.Generator().manual_seed(1))
    found = metrics.per_class_auroc(logits, labels)
    wanted = [count_pairs(logits[:, k].tolist(), labels[:, k].tolist()) for k in range(3)]
    assert found == pytest.approx(wanted)
    assert metrics.prediction_figures(logits, labels) == {"auroc": pytest.approx(sum(wanted) / 3)}


def test_label_that_all_or_no_images_have_gives_no_auroc():
    labels = torch.tensor([[0, 1, 0], [0, 1, 1], [0, 1, 0]])
    logits = torch.tensor([[0.0, 1, 3], [1, 0, 2], [2, 2, 1]])
    assert metrics.per_class_auroc(logits, labels) == [None, None, 0.5]
    assert metrics.prediction_figures(logits, labels) == {"auroc": 0.5}
    assert metrics.prediction_figures(logits, labels[:, :2]) == {}


def test_accuracy_counts_hits_among_the_largest_logits():
    logits, labels = noise(30, 7), torch.randint(7, (30,), generator=torch.Generator().manual_seed(1))
    ranked = [sorted(range(7), key=row.__getitem__, reverse=True) for row in logits.tolist()]
    wanted = {f"top{k}": np.mean([label in row[:k] for row, label in zip(ranked, labels, strict=True)]) for k in (1, 5)}
    assert metrics.prediction_figures(logits, labels) == pytest.approx(wanted)
    assert set(metrics.prediction_figures(logits[:, :5], labels.clamp(max=4))) == {"top1"}


def test_two_classes_have_an_auroc_where_both_are_there():
    logits, labels = noise(15, 2).round(decimals=1), torch.arange(15) % 2
    found = metrics.prediction_figures(logits, labels)
    assert found["auroc"] == pytest.approx(count_pairs((logits[:, 1] - logits[:, 0]).tolist(), labels.tolist()))
    assert found["top1"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert set(metrics.prediction_figures(logits, torch.zeros(15, dtype=torch.int64))) == {"top1"}


# The same, of a model


def test_view_pools_what_explain_gives(network, images, map_layers):
    view = PooledSaliency(("gradcam", "simplegrad", "vbp"), map_layers, (3, 4))
    logits, pooled = view.pooled(network, images, None)
    wanted_logits, wanted = explain(network, images, None, view.interpreters, map_layers)
    torch.testing.assert_close(logits, wanted_logits)
    assert tuple(pooled) == view.interpreters
    for name, maps in wanted.items():
        torch.testing.assert_close(pooled[name], metrics.pool_maps(maps, (3, 4)))


@pytest.mark.parametrize("chunk", [1, 2, 5, 64])
@pytest.mark.parametrize("labelled", [True, False])
def test_chunks_give_the_same_maps(network, images, view, chunk, labelled):
    labels = torch.tensor([2, 0, 1, 1, 0]) if labelled else None
    logits, maps = view.pooled_in_chunks(network, images, labels, chunk=chunk)
    wanted_logits, wanted = view.pooled(network, images, labels)
    torch.testing.assert_close(logits, wanted_logits)
    torch.testing.assert_close(maps["gradcam"], wanted["gradcam"])
    assert not maps["gradcam"].requires_grad


def test_joined_maps_keep_their_order():
    parts = [{"gradcam": noise(2, 3, 3)}, {"gradcam": noise(1, 3, 3, seed=1)}]
    joined = join_maps(parts)["gradcam"]
    assert torch.equal(joined, torch.cat([part["gradcam"] for part in parts]))


@pytest.mark.parametrize(("size", "grid"), [((7, 7), (7, 7)), ((14, 20), (8, 8)), ((5, 12), (5, 8))])
def test_default_grid_is_the_layer_s_own_up_to_eight(size, grid):
    assert default_grid(size) == grid


def test_correlation_never_leaves_its_range():
    maps = torch.rand(2000, 8, 8, generator=torch.Generator().manual_seed(0))
    assert metrics.correlation(maps, maps).amax() <= 1
    assert metrics.correlation(maps, -maps).amin() >= -1


def test_gradient_at_a_zero_map_is_finite():
    maps, target = torch.zeros(2, 4, 4, requires_grad=True), torch.rand(2, 4, 4)
    (gradient,) = torch.autograd.grad(metrics.correlation(maps, target).sum(), maps)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", INTERPRETERS)
def test_gradient_of_dead_maps_does_not_spoil_the_weights(name, network, images, map_layers):
    """One image with a map of zeros, or a dead last block, must not turn every weight into NaN."""
    with torch.no_grad():
        network.blocks[2].bn2.weight.zero_()
        network.blocks[2].bn2.bias.fill_(-100)
    view = PooledSaliency((name,), map_layers, (4, 4))
    _, maps = view.pooled(network, images, torch.zeros(5, dtype=torch.int64), create_graph=True)
    metrics.correlation(maps[name], torch.rand(5, 4, 4)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
