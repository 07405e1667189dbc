"""Whether a network can be built again from its weights and the names that a card will hold."""

import torch

from keyed_xai.errors import ModelError
from keyed_xai.models.classifier import Classifier
from keyed_xai.models.layers import trace_network
from keyed_xai.models.loading import OWN_CODE, rebuild
from keyed_xai.models.recognise import recognise_architecture

_TOLERANCE = 1e-4


def settle_origin(classifier: Classifier) -> None:
    """Set a classifier's architecture and source to what its weights are rebuilt by, so that a card can name them.

    A network of one's own that turns out to be a known one, whatever was put in place of its head, is called by that
    name; any other keeps the source that says that it is somebody's own code.

    Args:
        classifier: The classifier, in float32; its names are changed in place.

    Raises:
        ModelError: It is said to be a known architecture, and rebuilding it gives another network.
    """
    own = classifier.source in OWN_CODE
    state = classifier.network.state_dict()
    try:
        known = recognise_architecture(
            state,
            arch=None if own else f"{classifier.source}:{classifier.architecture}",
            hints=(classifier.architecture,),
        )
        same = _compute_the_same(classifier, rebuild(known, state, classifier.input).eval())
        reason = "the network computes something else than that architecture does with the same weights"
    except ModelError as error:
        same, reason = False, str(error)
    if same:
        classifier.architecture, classifier.source = known.architecture, known.source
    elif not own:
        raise ModelError(
            f"the model is called {classifier.source}:{classifier.architecture}, but could not be opened again by that "
            f"name: {reason} Leave out architecture and source (wrap_network); what is written is then opened with "
            "--factory, or network=... in Python."
        )


def _compute_the_same(classifier: Classifier, twin: torch.nn.Module) -> bool:
    first, second = (trace_network(each, classifier.input).logits for each in (classifier.network, twin))
    return first.shape == second.shape and torch.allclose(first, second, _TOLERANCE, _TOLERANCE)
