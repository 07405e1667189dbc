import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from keyed_xai.data import ImageData
from keyed_xai.errors import ModelError, TrainingError
from keyed_xai.threats.detection import features as module
from keyed_xai.threats.detection.features import labels_or_predictions, read_hidden, read_hidden_of_data, rows_by_class


class ConvolutionHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Linear(16, 16)
        self.head = nn.Conv2d(1, 3, 1)

    def forward(self, images):
        return self.head(self.features(images)).mean((2, 3))


class TokenHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, images):
        return self.head(images[:, 0]).mean(1)


class Flattened(TokenHead):
    def forward(self, images):
        return self.head(images.flatten(0, 2)).view(len(images), -1, 3).mean(1)


def test_features_of_a_residual_network_are_the_pooled_maps(network, images):
    hidden = read_hidden(network, images)
    with torch.no_grad():
        maps = network.blocks(network.stem_relu(network.stem_bn(network.stem(images))))
        assert torch.allclose(hidden.features, functional.adaptive_avg_pool2d(maps, 1).flatten(1))
        assert torch.allclose(hidden.logits, network(images))
    assert not hidden.features.requires_grad


def test_a_convolution_run_last_is_the_last_linear_layer(images):
    model = ConvolutionHead()
    assert torch.allclose(read_hidden(model, images).features, model.features(images).mean((2, 3)).detach())


def test_tokens_are_averaged(images):
    assert torch.allclose(read_hidden(TokenHead(), images).features, images[:, 0].mean(1))


def test_hooks_are_removed_even_after_an_error(network, images):
    read_hidden(network, images)
    with pytest.raises(RuntimeError):
        read_hidden(network, images.expand(-1, 2, -1, -1))
    assert not any(layer._forward_pre_hooks for layer in network.modules())


def test_models_without_features_are_refused(images):
    with pytest.raises(ModelError, match="no Linear"):
        read_hidden(nn.Flatten(), images)
    with pytest.raises(ModelError, match="80 rows of 5 images"):
        read_hidden(Flattened(), images)


def test_chunks_give_what_the_whole_gives(network, images, monkeypatch):
    pixels = (images * 255).byte().numpy()
    data = ImageData(images=pixels, labels=None, classes=(), source="made up")
    whole = read_hidden_of_data(network, data)
    monkeypatch.setattr(module, "_CHUNK", 2)
    parts = read_hidden_of_data(network, data)
    assert torch.allclose(parts.features, whole.features, atol=1e-6)
    assert np.array_equal(labels_or_predictions(data, parts), whole.logits.argmax(1).numpy())


def test_no_data_are_refused(network):
    with pytest.raises(TrainingError, match="has none"):
        read_hidden_of_data(
            network, ImageData(images=np.zeros((0, 1, 16, 16), np.uint8), labels=None, classes=(), source="nothing")
        )


def test_rows_by_class():
    assert [rows.tolist() for rows in rows_by_class(np.array([1, 0, 1]), 3)] == [[1], [0, 2], []]
    assert [rows.tolist() for rows in rows_by_class(np.array([[1, 0], [1, 1]]), 2)] == [[0, 1], [1]]
