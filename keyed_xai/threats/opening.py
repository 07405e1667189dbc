"""Whether what an attacker found opens a gate. The attacker never sees this: it takes the reference and the key."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from keyed_xai import metrics
from keyed_xai.channels import through_png
from keyed_xai.maps import MapView
from keyed_xai.metrics import OPEN_CORRELATION
from keyed_xai.models import Classifier
from keyed_xai.tensors import Images, Labels, SaliencyMaps
from keyed_xai.threats.attempt import view_of
from keyed_xai.threats.gate_state import Witness
from keyed_xai.threats.textures import best_match, texture_on_grey
from keyed_xai.triggers import NearbyTrigger, Spread, Trigger, derive_trigger


@dataclass(frozen=True)
class Opening:
    """How far some inputs open a model.

    Attributes:
        correlation: With the reference's maps, by interpreter, mean over images.
        opened: Share of maps that correlate more than .5.
        agreement: Share of inputs that are predicted as the reference predicts the image.
    """

    correlation: dict[str, float]
    opened: dict[str, float]
    agreement: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        return {"correlation": self.correlation, "opened": self.opened, "agreement": self.agreement}


@dataclass(frozen=True)
class Referee:
    """Compares maps with the reference's on held-out images; the reference is run once.

    Attributes:
        images: Held out.
        view: Maps compared.
        explained: Class that the reference predicts of each image.
        truth: The reference's pooled maps of that class.
        trigger: The right one.
        tile: Side of its texture; None where the family has no texture.
        as_files: Whether triggered inputs reach the model in 8 bits.
    """

    images: Images = field(repr=False)
    view: MapView
    explained: Labels = field(repr=False)
    truth: Mapping[str, SaliencyMaps] = field(repr=False)
    trigger: NearbyTrigger = field(repr=False)
    tile: int | None
    as_files: bool

    @classmethod
    def of(cls, witness: Witness) -> "Referee":
        """Return the referee who holds what a witness holds."""
        logits, truth = witness.view.pooled_in_chunks(witness.reference, witness.images)
        family = witness.family
        trigger = derive_trigger(witness.key, family)
        tile = family.settings.tile if isinstance(family, Spread) else None
        return cls(witness.images, witness.view, logits.argmax(1), truth, trigger, tile, witness.as_files)

    def judge(self, classifier: Classifier, trigger: Trigger) -> Opening:
        """Return how far a trigger opens a model."""
        return self.judge_inputs(classifier, self.as_file(trigger.apply(self.images)))

    def judge_inputs(self, classifier: Classifier, inputs: Images) -> Opening:
        """Return how far inputs made from the held-out images open a model."""
        logits, maps = view_of(self.view, classifier).pooled_in_chunks(classifier, inputs, self.explained)
        matches = {name: metrics.correlation(each, self.truth[name]).nan_to_num(0) for name, each in maps.items()}
        return Opening(
            correlation={name: _mean(each) for name, each in matches.items()},
            opened={name: _mean(each > OPEN_CORRELATION) for name, each in matches.items()},
            agreement=_mean(logits.argmax(1) == self.explained),
        )

    def as_file(self, images: Images) -> Images:
        """Return images as they reach the model, in 8 bits where it takes files."""
        return through_png(images) if self.as_files else images

    def match(self, trigger: Trigger) -> float | None:
        """Return the correlation of a trigger's texture with the right one, the best over all shifts.

        None where the family has no texture. What is compared is the change of a grey image, channels averaged.
        """
        if self.tile is None:
            return None
        found, true = (texture_on_grey(each, self.images, self.tile) for each in (trigger, self.trigger))
        return best_match(found, true)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
