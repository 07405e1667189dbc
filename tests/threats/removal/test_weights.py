"""Re-BN, pruning and quantisation, by hand."""

import pytest
import torch
from torch import nn

from keyed_xai.errors import TrainingError
from keyed_xai.threats.removal.fine_pruning import FinePruningSettings
from keyed_xai.threats.removal.weights import (
    PruningSettings,
    QuantisationSettings,
    ReBNSettings,
    prune_weights,
    quantise,
    quantise_weights,
    reestimate_on_clean,
)
from tests.tuned import scaled_classifier

# Re-BN


def test_statistics_become_those_of_clean_images(forty):
    """Of the first layer, worked out from the convolution's outputs; no weight moves."""
    classifier = scaled_classifier()
    model = reestimate_on_clean(classifier, forty, ReBNSettings()).model
    outputs = classifier.network.stem((forty.images - 0.4) / 0.2).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.network.stem_bn.running_mean, outputs.mean(1))
    torch.testing.assert_close(model.network.stem_bn.running_var, outputs.var(1))
    for before, after in zip(classifier.parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after)
    assert model.network.stem_bn.momentum == classifier.network.stem_bn.momentum
    assert not model.training


def test_batch_norm_that_is_not_run_keeps_its_statistics(forty):
    classifier = scaled_classifier()
    classifier.network.aside = nn.BatchNorm2d(2)
    classifier.network.aside.running_mean += 3
    model = reestimate_on_clean(classifier, forty, ReBNSettings(share=0.2)).model
    assert model.network.aside.running_mean.tolist() == [3, 3]


# Magnitude pruning


@pytest.mark.parametrize("share", [0.0, 0.3, 0.75])
def test_smallest_weights_of_all_layers_together_go(share):
    classifier = scaled_classifier()
    result = prune_weights(classifier, PruningSettings(share))
    names = [name for name, w in classifier.named_parameters() if w.dim() > 1]
    before, after = (
        torch.cat([m.get_parameter(n).detach().flatten() for n in names]) for m in (classifier, result.model)
    )
    count = round(share * len(before))
    slow = before.clone()
    for index in sorted(range(len(before)), key=lambda i: abs(float(before[i])))[:count]:
        slow[index] = 0
    assert torch.equal(after, slow)
    assert result.figures == {"weights": len(before), "pruned": count}
    for name, tensor in classifier.state_dict().items():
        assert name in names or torch.equal(tensor, result.model.state_dict()[name])


# Quantisation


@pytest.mark.parametrize("bits", [8, 6, 5, 2])
def test_integers_and_one_scale_for_each_channel(bits):
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    found = quantise(weight, bits)
    largest = 2 ** (bits - 1) - 1
    for channel in (0, 1, 3):
        scale = float(weight[channel].abs().max()) / largest
        levels = found[channel] / scale
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
        assert float(levels.abs().max()) == pytest.approx(largest)
        assert float((found[channel] - weight[channel]).abs().max()) <= scale / 2 + 1e-6
    assert not found[2].any()


def test_quantised_model_keeps_biases_and_batch_norm():
    classifier = scaled_classifier()
    model = quantise_weights(classifier, QuantisationSettings(5)).model
    for name, tensor in model.state_dict().items():
        before = classifier.state_dict()[name]
        wanted = quantise(before, 5) if before.dim() >= 2 else before
        assert torch.equal(tensor, wanted), name
    assert not torch.equal(model.network.fc.weight, classifier.network.fc.weight)


def test_half_precision_rounds_everything_and_refuses_what_does_not_fit():
    classifier = scaled_classifier()
    model = quantise_weights(classifier, QuantisationSettings(16)).model
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.half().to(tensor) if tensor.is_floating_point() else tensor)
    with torch.no_grad():
        classifier.network.fc.bias[0] = 1e6
    with pytest.raises(TrainingError, match=r"fc\.bias"):
        quantise_weights(classifier, QuantisationSettings(16))


def test_settings_out_of_range_are_refused():
    for make in (
        lambda: QuantisationSettings(12),
        lambda: PruningSettings(1.0),
        lambda: ReBNSettings(0.0),
        lambda: FinePruningSettings(shares=(0.5, 0.2)),
        lambda: FinePruningSettings(shares=()),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()
