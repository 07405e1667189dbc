"""Loading classifiers, recognising their architecture, and finding the layers that the interpreters read."""

from keyed_xai.models.catalogue import build_network
from keyed_xai.models.classifier import Classifier, InputSpec, network_state
from keyed_xai.models.files import CARD_KEY
from keyed_xai.models.layers import derive_taps, find_target_layer
from keyed_xai.models.loading import as_classifier, load_classifier, wrap_network
from keyed_xai.models.recognise import Recognised, recognise_architecture

__all__ = [
    "as_classifier",
    "CARD_KEY",
    "Classifier",
    "InputSpec",
    "Recognised",
    "build_network",
    "derive_taps",
    "find_target_layer",
    "load_classifier",
    "network_state",
    "recognise_architecture",
    "wrap_network",
]
