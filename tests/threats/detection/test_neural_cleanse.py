import json
import statistics

import numpy as np
import pytest
import torch
from torch import nn

from keyed_xai.threats.detection.neural_cleanse import (
    CleanseSettings,
    _Weights,
    anomaly_indices,
    cleanse,
    flag_small,
)
from tests.heard import Heard
from tests.poisoned import HELD_OUT, TARGET, control

SETTINGS = CleanseSettings(rounds=40, batches=4, batch_size=16, patience=3, stop_patience=8)
SHORT = CleanseSettings(rounds=2, batches=2, batch_size=4, patience=1)


class WeightTwin:
    """One class's weight, by the rules as the paper's authors apply them, one round after the other."""

    def __init__(self, settings):
        self.settings, self.weight, self.best = settings, 0.0, float("inf")
        self.set = self.up = self.down = self.stale = 0
        self.went_up = self.went_down = False

    def round(self, enough, norm):
        s, before = self.settings, self.best
        if enough and norm < self.best:
            self.best = norm
        if self.best < float("inf"):
            self.stale = self.stale + 1 if self.best >= before else 0
        if self.went_up and self.went_down and self.stale >= s.stop_patience:
            return True
        if self.weight == 0:
            self.set = self.set + 1 if enough else 0
            if self.set >= s.patience:
                self.weight, self.up, self.down, self.went_up, self.went_down = s.weight, 0, 0, False, False
                self.up = 1
                return False
        self.up, self.down = (self.up + 1, 0) if enough else (0, self.down + 1)
        if self.up >= s.patience:
            self.up, self.weight, self.went_up = 0, self.weight * s.weight_factor, True
        elif self.down >= s.patience:
            self.down, self.weight, self.went_down = 0, self.weight / s.weight_factor**1.5, True
        return False


def test_weights_follow_the_authors_rules():
    settings = CleanseSettings(patience=3, stop_patience=6)
    generator = np.random.default_rng(0)
    count, rounds = 40, 150
    enough = generator.random((rounds, count)) < generator.uniform(0.3, 0.95, count)
    norms = generator.uniform(1, 50, (rounds, count)).astype(np.float32)
    twins, weights = [WeightTwin(settings) for _ in range(count)], _Weights.start(count)
    best, ended = torch.full((count,), float("inf")), np.zeros(count, bool)
    for number in range(rounds):
        success, norm = torch.from_numpy(enough[number]), torch.from_numpy(norms[number])
        better = success & (norm < best)
        best = torch.where(better, norm, best)
        over = weights.update(success, better, best.isfinite(), settings).numpy()
        for k in np.flatnonzero(~ended):
            ended[k] = twins[k].round(bool(enough[number, k]), float(norms[number, k]))
            assert bool(over[k]) == ended[k]
            if not ended[k]:
                assert float(weights.value[k]) == pytest.approx(twins[k].weight)
    assert 0 < ended.sum() < count


def test_anomaly_index_is_the_distance_in_deviations():
    norms = [10.0, 12.0, 11.0, 2.0, 13.0, 40.0]
    median = statistics.median(norms)
    deviation = 1.4826 * statistics.median(abs(norm - median) for norm in norms)
    assert anomaly_indices(norms) == pytest.approx([abs(norm - median) / deviation for norm in norms])
    assert flag_small(norms) == (3,)


def test_index_without_spread_is_finite():
    assert anomaly_indices([5.0, 5.0, 5.0]) == [0, 0, 0]
    assert anomaly_indices([0.0, 0.0, 0.0]) == [0, 0, 0]
    assert flag_small([5.0, 5.0, 5.0, 1.0]) == (3,)
    assert np.isfinite(anomaly_indices([0.0, 0.0, 0.0, 7.0])).all()


def smallest_share(norms):
    """The smallest norm, as a share of the others' median: six classes are too few for the rule of outliers alone."""
    *others, smallest = sorted(norms, reverse=True)
    return smallest / statistics.median(others)


def test_a_backdoor_has_by_far_the_smallest_mask():
    result = cleanse(control("badnets").model, HELD_OUT, SETTINGS)
    assert int(np.argmin(result.norms)) == TARGET
    assert smallest_share(result.norms) < 0.6
    assert result.flagged == flag_small(result.norms)
    assert result.anomaly_index == pytest.approx(anomaly_indices(result.norms)[TARGET])
    assert all(result.succeeded)
    images, _ = HELD_OUT.batch(range(len(HELD_OUT)))
    mask, pattern = result.masks[TARGET], result.patterns[TARGET]
    with torch.no_grad():
        sent = control("badnets").model((1 - mask) * images + mask * pattern).argmax(1) == TARGET
    assert sent.double().mean() > 0.85
    assert mask[-4:, -4:].sum() > 0.5 * mask.sum()  # where the patch is


def test_a_clean_network_has_no_such_mask():
    result = cleanse(control(None).model, HELD_OUT, SETTINGS)
    assert smallest_share(result.norms) > 0.6
    json.dumps(result.to_json(), allow_nan=False)


def test_classes_one_by_one_give_what_all_at_once_give():
    model = control(None).model
    together, apart = (
        cleanse(model, HELD_OUT, CleanseSettings(rounds=3, batches=2, batch_size=8, patience=1, classes_at_once=some))
        for some in (6, 4)
    )
    assert torch.allclose(together.masks, apart.masks, atol=1e-3)
    assert torch.allclose(together.patterns, apart.patterns, atol=1e-3)
    assert together.rounds == apart.rounds


def test_model_and_its_mode_are_left_and_steps_are_told(network, images):
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    heard = Heard()

    class Data:
        def __len__(self):
            return len(images)

        def batch(self, indices):
            return images[indices], None

    result = cleanse(network, Data(), SHORT, progress=heard)
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert heard.counts("searching for patches") == [(3, 6), (6, 6)]
    assert result.masks.shape == (3, 16, 16)
    assert result.patterns.shape == (3, 1, 16, 16)
    assert 0 <= result.masks.min() <= result.masks.max() <= 1


def test_several_labels_are_searched_as_yes_or_no(images):
    class Bright(nn.Module):
        """Class 0 is a yes for bright images, class 1 never."""

        multi_label = True

        def forward(self, x):
            mean = x.mean((1, 2, 3))
            return torch.stack([20 * (mean - 0.8), mean - 50], 1)

    class Data:
        def __len__(self):
            return len(images)

        def batch(self, indices):
            return images[indices], None

    result = cleanse(Bright(), Data(), CleanseSettings(rounds=60, batches=2, batch_size=4))
    assert result.succeeded == (True, False)
    assert not result.conclusive
    assert result.to_json()["conclusive"] is False


def test_bad_settings_are_refused():
    for wrong in ({"rounds": 0}, {"weight": 0.0}, {"success": 1.5}, {"weight_factor": 1.0}, {"learning_rate": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CleanseSettings(**wrong)
