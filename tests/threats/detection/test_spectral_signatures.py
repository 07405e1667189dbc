import json

import numpy as np
import pytest
import torch

from keyed_xai.threats.detection.controls import PoisonSettings, poison
from keyed_xai.threats.detection.spectral_signatures import SpectralSettings, find_spectral_outliers, spectral_scores
from tests.poisoned import TARGET, TRAIN, control, training_data


def test_scores_are_those_of_the_covariance():
    features = torch.from_numpy(np.random.default_rng(0).normal(3, np.arange(1, 6), (40, 5))).float()
    rows = features.double().numpy()
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    direction = vectors[:, values.argmax()]
    slow = [(row - rows.mean(0)) @ direction for row in rows]
    assert np.allclose(spectral_scores(features), np.square(slow))


def test_a_backdoor_is_removed():
    data = training_data("badnets")
    result = find_spectral_outliers(control("badnets").model, data, poisoned=data.rows)
    assert result.poisoned_removed_share > 0.7
    target = result.classes[TARGET]
    assert target.auc > 0.9
    assert target.poisoned == data.rows.sum()
    assert target.poisoned_removed == (result.removed & data.rows).sum()


def test_of_a_clean_network_what_is_removed_is_by_chance():
    model, shares = control(None).model, []
    for seed in range(12):
        rows = poison(TRAIN, PoisonSettings(target=TARGET, seed=seed)).rows
        shares.append(find_spectral_outliers(model, TRAIN, poisoned=rows).poisoned_removed_share)
    assert np.mean(shares) < 0.25


def test_a_share_of_each_class_is_removed():
    result = find_spectral_outliers(control(None).model, TRAIN, SpectralSettings(percentile=80.0))
    assert [each.removed for each in result.classes] == [30] * 6
    assert result.removed_share == 0.2
    assert result.poisoned_removed_share is None
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["rows"] == 900


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="percentile"):
        SpectralSettings(percentile=101.0)
    with pytest.raises(ValueError, match="poisoned of shape"):
        find_spectral_outliers(control(None).model, TRAIN, poisoned=np.zeros(3, np.bool_))
