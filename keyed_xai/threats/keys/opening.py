"""Whether what an attacker found opens a gate. The attacker never sees this: it takes the reference and the key."""

from dataclasses import dataclass
from typing import Any

from keyed_xai.models import Classifier
from keyed_xai.tensors import Images
from keyed_xai.threats.gate_state import OwnerEvidence
from keyed_xai.threats.keys.textures import best_match, texture_on_grey
from keyed_xai.triggers import Spread, Trigger


@dataclass(frozen=True)
class Opening:
    """How far some inputs open a model.

    Attributes:
        correlation: Correlation with the reference's maps, by interpreter, mean over images.
        opened: Share of maps that correlate more than .5.
        agreement: Share of inputs that are predicted as the reference predicts the image.
    """

    correlation: dict[str, float]
    opened: dict[str, float]
    agreement: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        return {"correlation": self.correlation, "opened": self.opened, "agreement": self.agreement}


def try_trigger(classifier: Classifier, evidence: OwnerEvidence, trigger: Trigger) -> Opening:
    """Return how far a trigger opens a model."""
    return try_inputs(classifier, evidence, evidence.as_file(trigger.apply(evidence.images)))


def try_inputs(classifier: Classifier, evidence: OwnerEvidence, inputs: Images) -> Opening:
    """Return how far inputs made from the held-out images open a model."""
    found = evidence.evaluate(classifier, inputs)
    return Opening(found.correlation, found.opened, found.agreement)


def match_texture(evidence: OwnerEvidence, trigger: Trigger) -> float | None:
    """Return the correlation of a trigger's texture with the right one, the best over all shifts.

    None where the family has no texture. What is compared is the change of a grey image, channels averaged.
    """
    if not isinstance(evidence.family, Spread):
        return None
    tile = evidence.family.settings.tile
    found, true = (texture_on_grey(each, evidence.images, tile) for each in (trigger, evidence.trigger))
    return best_match(found, true)
