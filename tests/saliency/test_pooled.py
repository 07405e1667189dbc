"""The view of a table's rows: relevance by feature, worked out by hand and against a slow twin."""

import numpy as np
import pytest
import torch
from torch import nn

from keyed_xai.models.networks import TableMLP
from keyed_xai.saliency import MapLayers, smooth_activations
from keyed_xai.saliency.pooled import Comparison, TableSaliency

GROUPS = (0, 1, 1, 1, 2, 3, 3)
"""Of seven encoded columns: two numbers, and two features of three and two categories."""
FEATURES = 4


def training_rows():
    """Two hundred encoded rows: numbers with mean 0 and std 1, and one category of each feature."""
    source = np.random.default_rng(0)
    numbers = source.standard_normal((200, 2))
    numbers = (numbers - numbers.mean(0)) / numbers.std(0)
    three, two = np.eye(3)[source.choice(3, 200, p=(0.6, 0.3, 0.1))], np.eye(2)[source.integers(2, size=200)]
    return np.concatenate([numbers[:, :1], three, numbers[:, 1:], two], axis=1)


TRAINING = training_rows()


@pytest.fixture
def view():
    same = np.equal.outer(GROUPS, GROUPS)
    covariance = torch.from_numpy(np.cov(TRAINING.T, bias=True) * same)
    return TableSaliency(("simplegrad",), MapLayers("", ()), (1, FEATURES), groups=GROUPS, covariance=covariance)


@pytest.fixture
def rows():
    chosen = np.random.default_rng(1).choice(len(TRAINING), 9, replace=False)
    return torch.from_numpy(TRAINING[chosen]).float().reshape(9, 1, 1, len(GROUPS))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return TableMLP(len(GROUPS), 3, (8, 6)).eval()


def slow_relevance(gradient):
    """By feature the standard deviation over the training rows of gradient times the feature's columns."""
    relevance = []
    for feature in range(FEATURES):
        columns = [column for column, group in enumerate(GROUPS) if group == feature]
        pushes = [sum(gradient[column] * row[column] for column in columns) for row in TRAINING]
        mean = sum(pushes) / len(pushes)
        relevance.append((sum((push - mean) ** 2 for push in pushes) / len(pushes)) ** 0.5)
    return relevance


def slow_gradient(network, row, label):
    """The derivative of the margin, of one row."""
    row = row.clone().requires_grad_()
    logits = network(row[None])[0]
    others = [logits[k].exp() for k in range(len(logits)) if k != label]
    (torch.stack(others).sum().log() - logits[label]).backward()
    return row.grad[0, 0].tolist()


@pytest.mark.parametrize("labelled", [True, False])
def test_relevance_matches_slow_twin(view, network, rows, labelled):
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2]) if labelled else None
    logits, maps = view.pooled(network, rows, labels)
    torch.testing.assert_close(logits, network(rows).detach())
    assert maps["simplegrad"].shape == (9, 1, FEATURES)
    assert not maps["simplegrad"].requires_grad
    explained = logits.argmax(1) if labels is None else labels
    for row in range(9):
        wanted = slow_relevance(slow_gradient(network, rows[row], int(explained[row])))
        assert maps["simplegrad"][row, 0].tolist() == pytest.approx(wanted, rel=1e-3, abs=2e-6)


def linear_model(weights):
    """Logits 0 and weights times columns: the margin's gradient is the weights, but for its sign."""
    linear = nn.Sequential(nn.Flatten(), nn.Linear(len(GROUPS), 2))
    with torch.no_grad():
        linear[1].weight.copy_(torch.tensor([[0.0] * len(GROUPS), weights]))
    return linear


def test_relevance_of_a_number_is_its_gradient(view, rows):
    _, maps = view.pooled(linear_model([3.0, 0, 0, 0, -2.0, 0, 0]), rows, None)
    for row in maps["simplegrad"][:, 0]:
        assert row.tolist() == pytest.approx([3, 0, 2, 0], abs=1e-3)


def test_relevance_of_a_category_knows_contrasts_only(view, rows):
    """The same weight on all categories of a feature moves no prediction between them; weights 1 and -1 of two do."""
    _, alike = view.pooled(linear_model([0.0, 5, 5, 5, 0, -7, -7]), rows, None)
    assert float(alike["simplegrad"].amax()) < 1e-2
    _, apart = view.pooled(linear_model([0.0, 5, 5, 6, 0, 1, -1]), rows, None)
    share, half = TRAINING[:, 3].mean(), TRAINING[:, 5].mean()
    wanted = [0, (share * (1 - share)) ** 0.5, 0, 2 * (half * (1 - half)) ** 0.5]
    for row in apart["simplegrad"][:, 0]:
        assert row.tolist() == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunks_give_the_same_relevance(view, network, rows, chunk):
    labels = torch.tensor([2, 1, 0, 2, 1, 0, 2, 1, 0])
    logits, maps = view.pooled_in_chunks(network, rows, labels, chunk=chunk)
    wanted_logits, wanted = view.pooled(network, rows, labels)
    torch.testing.assert_close(logits, wanted_logits)
    torch.testing.assert_close(maps["simplegrad"], wanted["simplegrad"])


def test_relevance_of_a_dead_network_has_finite_gradients(view, network, rows):
    with torch.no_grad():
        network.hidden.bias.fill_(-100)
    _, maps = view.pooled(network, rows, None, create_graph=True)
    maps["simplegrad"].sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in network.parameters() if each.grad is not None)
    assert float(maps["simplegrad"].detach().amax()) < 1e-3


def test_gradients_reach_the_weights_through_relevance(view, network, rows):
    """Against finite differences, with the smooth activations that training uses."""
    network, rows = network.double(), rows.double()
    labels = torch.zeros(9, dtype=torch.int64)
    weight = network.hidden.weight

    def strongest():
        with smooth_activations(8.0):
            return view.pooled(network, rows, labels, create_graph=True)[1]["simplegrad"][:, 0, 1].sum()

    (gradient,) = torch.autograd.grad(strongest(), weight)
    for place in ((0, 0), (3, 5)):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[place] += step
            values.append(float(strongest().detach()))
            with torch.no_grad():
                weight[place] -= step
        assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-6)
    assert gradient.abs().amax() > 1e-3


# Models beside a reference


class Counting(nn.Module):
    """A network that counts the rows it sees."""

    def __init__(self, network):
        super().__init__()
        self.network, self.rows = network, 0

    def forward(self, rows):
        self.rows += len(rows)
        return self.network(rows)


def test_reference_is_run_once_and_is_right_by_itself(view, network, rows):
    reference = Counting(network)
    comparison = Comparison(reference, view, rows)
    found = comparison.of(network, rows)
    assert reference.rows == len(rows)
    assert found.agreement == comparison.right.agreement == 1
    assert found.opened == {"simplegrad": 1}
    assert found.correlation["simplegrad"] == pytest.approx(1)


def test_rows_say_which_input_was_made_from_which_image(view, network, rows):
    torch.manual_seed(1)
    other, comparison = TableMLP(len(GROUPS), 3, (8, 6)).eval(), Comparison(network, view, rows)
    whole = comparison.of(other, rows).correlations["simplegrad"]
    chosen = torch.tensor([4, 0, 4])
    torch.testing.assert_close(
        comparison.of(other, rows[chosen], rows=chosen).correlations["simplegrad"], whole[chosen]
    )
    assert whole.std() > 1e-3


def test_maps_of_a_broken_network_count_as_closed(view, network, rows):
    broken = TableMLP(len(GROUPS), 3, (8, 6)).eval()
    with torch.no_grad():
        broken.hidden.weight.fill_(torch.nan)
    found = Comparison(network, view, rows).of(broken, rows)
    assert found.correlation == {"simplegrad": 0}
    assert found.opened == {"simplegrad": 0}
