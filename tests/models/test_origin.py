"""Networks of one's own that are known ones, by what they compute."""

import pytest
from torch import nn

from keyed_xai.models import wrap_network
from keyed_xai.models.origin import settle_origin
from tests.own import COLOUR, headed, perceptron


@pytest.mark.parametrize("names", [{}, {"architecture": "resnet18"}, {"architecture": "mine", "source": "pickle"}])
def test_known_network_is_called_by_its_name_whatever_its_head(names):
    classifier = wrap_network(headed("resnet18", "fc", perceptron(512, nn.ReLU())), input=COLOUR, **names)
    settle_origin(classifier)
    assert (classifier.architecture, classifier.source) == ("resnet18", "torchvision")


@pytest.mark.parametrize("activation", [nn.GELU(), nn.Identity()])
def test_head_that_weights_do_not_tell_stays_own_code(activation):
    classifier = wrap_network(headed("resnet18", "fc", perceptron(512, activation)), input=COLOUR)
    settle_origin(classifier)
    assert (classifier.architecture, classifier.source) == ("ResNet", "python")
