import json

import numpy as np
import pytest
import torch

from keyed_xai.threats.detection.activation_clustering import (
    ClusteringSettings,
    Misclustering,
    cluster_pairs,
    cluster_training_data,
    measure_misclustering,
    reduce_features,
)
from tests.poisoned import HELD_OUT, TARGET, TRAIN, control, training_data

PCA = ClusteringSettings(reduction="pca")


def normal(shape, seed, mean=0.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean


@pytest.mark.parametrize("reduction", ["ica", "pca"])
def test_misclustering_counts_rows_on_the_wrong_side(reduction):
    clean, triggered = normal((50, 12), 0), normal((50, 12), 1)
    clean[:, 0] -= 20
    triggered[:47, 0] += 20
    triggered[47:, 0] -= 20
    found = measure_misclustering(clean, triggered, ClusteringSettings(reduction=reduction))
    assert found.pairs == 50
    assert found.rate == pytest.approx(0.03)


def test_what_is_the_same_is_half_misclustered():
    features = normal((40, 12), 0)
    assert measure_misclustering(features, features, PCA).rate == 0.5
    assert measure_misclustering(torch.ones(4, 3), torch.ones(4, 3), PCA).rate == 0.5


@pytest.mark.parametrize(
    ("rate", "band"),
    [(0.049, "separable"), (0.05, "in between"), (0.3, "in between"), (0.301, "overlapping")],
)
def test_bands(rate, band):
    assert Misclustering(320, rate).band == band


def test_principal_components_are_those_of_the_covariance():
    rows = normal((60, 12), 0) * torch.arange(1, 13)
    reduced = reduce_features(rows, ClusteringSettings(reduction="pca", dimensions=3))
    values = np.linalg.eigvalsh(np.cov(rows.double().numpy().T))[::-1]
    assert np.allclose(np.cov(reduced.T), np.diag(values[:3]))


def test_independent_components_have_unit_variance_and_no_more_than_the_rank():
    rows = normal((200, 3), 0) @ normal((3, 12), 1)
    reduced = reduce_features(rows, ClusteringSettings())
    assert reduced.shape == (200, 3)
    assert np.allclose(reduced.std(0), 1, atol=1e-3)
    assert reduce_features(torch.ones(5, 4), ClusteringSettings()) is None


def test_pairs_of_a_backdoor_are_separable_and_of_a_clean_network_overlap():
    images, _ = HELD_OUT.batch(range(len(HELD_OUT)))
    triggered = training_data("badnets").trigger.apply(images)
    caught = cluster_pairs(control("badnets").model, images, triggered, PCA)
    alone = cluster_pairs(control(None).model, images, triggered, PCA)
    assert caught.within_classes.band == "separable"
    assert alone.within_classes.band == "overlapping"
    assert alone.together.band == "overlapping"
    pairs = [each.pairs for each in caught.by_class.values()]
    rates = [each.rate for each in caught.by_class.values()]
    assert caught.within_classes.rate == pytest.approx(np.average(rates, weights=pairs))
    assert json.loads(json.dumps(caught.to_json(), allow_nan=False))["within_classes"]["band"] == "separable"


def test_training_data_with_a_backdoor_are_suspicious_and_clean_ones_are_not():
    caught = cluster_training_data(control("badnets").model, training_data("badnets"))
    alone = cluster_training_data(control(None).model, TRAIN)
    assert caught.suspicious == (TARGET,)
    assert alone.suspicious == ()
    assert [each.rows for each in alone.classes] == [150] * 6
    json.dumps(caught.to_json(), allow_nan=False)


def test_silhouette_of_a_sample_is_near_that_of_all():
    model = control("badnets").model
    whole, part = (
        cluster_training_data(model, training_data("badnets"), ClusteringSettings(silhouette_rows=rows)).classes[TARGET]
        for rows in (5000, 100)
    )
    assert part.silhouette == pytest.approx(whole.silhouette, abs=0.1)
    assert part.smaller_share == whole.smaller_share


def test_wrong_arguments_are_refused():
    for wrong in ({"reduction": "x"}, {"dimensions": 0}, {"restarts": 0}, {"silhouette_rows": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ClusteringSettings(**wrong)
    images, _ = HELD_OUT.batch(range(1))
    with pytest.raises(ValueError, match="pairs"):
        cluster_pairs(control(None).model, images, images)
