"""A classifier as one file of weights that says by itself how it is run."""

import json

from safetensors.torch import save

from keyed_xai.models import CARD_KEY, Classifier, network_state

WEIGHTS_FILE = "model.safetensors"


def encode_weights(classifier: Classifier) -> bytes:
    """Return a safetensors file with a classifier's weights and, in its metadata, the card that loading reads.

    The classifier's own names for the tensors are kept.
    """
    spec = classifier.input
    card: dict[str, object] = {
        "architecture": classifier.architecture,
        "source": classifier.source,
        "num_classes": classifier.classes,
        "input_size": list(spec.shape),
        "mean": list(spec.mean),
        "std": list(spec.std),
        "label_names": list(classifier.label_names),
        "multi_label": classifier.multi_label,
    }
    if classifier.target_layer:
        card["target_layer"] = own_name(classifier.target_layer)
        card["taps"] = [[own_name(tap.layer), tap.kernel, tap.stride] for tap in classifier.taps]
    # One entry only: several come in random order, and the same model should give the same file.
    # Tensors that share memory (tied weights) are parted: safetensors stores each name on its own.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network_state(classifier).items()}
    return save(state, metadata={CARD_KEY: json.dumps(card)})


def own_name(layer: str) -> str:
    """Return a layer's name as the owner's own code knows it."""
    return layer.removeprefix("network.")
