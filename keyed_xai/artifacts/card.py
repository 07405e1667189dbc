"""The card of a protected model: all that is public about running it and reading its maps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from keyed_xai.artifacts.documents import Document, printable, read_json, validate, write_json
from keyed_xai.errors import ArtifactError
from keyed_xai.limits import describe_excess

SCHEMA = "keyed-xai/card/v1"
LARGEST_CARD = 4 * 1024 * 1024
"""Bytes of a card.json."""
Family = TypeVar("Family")
TapFields = tuple[str, int, int]
"""Layer, kernel, stride: a `keyed_xai.tensors.Tap` is one. Spelt out, so that reading a card does not load torch."""


@dataclass(frozen=True)
class TriggerParameters:
    """Public parameters of a trigger; the seed is a secret and never stands beside them.

    Attributes:
        family: Name in `TRIGGERS`, such as "spread".
        amplitude: Largest change of a pixel, 1/255 units.
        tile: Side of the repeated tile, pixels of the model's input.
        version: Version of the family's triggers; 1 where a file names none.
    """

    family: str
    amplitude: float
    tile: int
    version: int = 1

    def to_json(self) -> Document:
        """Return the parameters as they stand in a card and a licence."""
        document: Document = {"family": self.family, "amplitude": self.amplitude, "tile": self.tile}
        return document if self.version == 1 else document | {"version": self.version}

    def make_family(self, families: Mapping[str, Callable[[float, int, int], Family]], *, named_by: str) -> Family:
        """Return the family with these parameters.

        Args:
            families: What makes one of an amplitude, a tile and a version, by name.
            named_by: What messages call the place of the parameters: "card".

        Raises:
            ArtifactError: This version does not know the family or its version, or a parameter is outside its range.
        """
        if self.family not in families:
            raise ArtifactError(
                f"This version knows the trigger families {', '.join(families)}; the {named_by} names "
                f"{printable(self.family)!r}. Use the version that protected the model."
            )
        try:
            return families[self.family](self.amplitude, self.tile, self.version)
        except ValueError as error:
            raise ArtifactError(f"The trigger in the {named_by} cannot be made: {error}.") from error

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "TriggerParameters":
        """Return the parameters of a document that fits its schema."""
        return cls(
            document["family"], float(document["amplitude"]), int(document["tile"]), int(document.get("version", 1))
        )


@dataclass(frozen=True, kw_only=True)
class Card:
    """How to run a protected model and how its maps are read. Field names are timm's where it has them.

    Attributes:
        architecture: Name of the network.
        source: "torchvision", "timm", "keyed_xai", "python" or "pickle".
        num_classes: Number of logits.
        input_size: Channels, height, width; the last two in pixels.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, likewise.
        target_layer: Dotted name, inside the owner's network, of the module whose feature maps Grad-CAM reads.
        taps: Feature maps that VisualBackProp reads; `Tap(*fields)` makes each a Tap.
        grid: Rows and columns of the pooled map.
        interpreters: Names in `INTERPRETERS` that were protected.
        decoy: "signature", "boundary" or "nontargeted".
        thresholds: Correlation with the reference map above which a map counts as opened, by interpreter.
        trigger: Public parameters of the trigger.
        weights_file: Name of the weights, beside the card.
        label_names: Names of the classes in the order of the logits; empty when unknown.
    """

    architecture: str
    source: str
    num_classes: int
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    target_layer: str
    taps: tuple[TapFields, ...]
    grid: tuple[int, int]
    interpreters: tuple[str, ...]
    decoy: str
    thresholds: Mapping[str, float]
    trigger: TriggerParameters
    weights_file: str = "model.safetensors"
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what no schema can: the input's size as a whole, and what belongs together.

        Raises:
            ArtifactError: They do not fit each other.
        """
        excess = describe_excess(*self.input_size)
        if excess is not None:
            raise ArtifactError(f"The card's input_size is out of range: {excess}.")
        channels = self.input_size[0]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise ArtifactError(f"The card's {name} has {len(values)} values, expected one for each of the "
                                    f"{channels} channels.")  # fmt: skip
        if self.label_names and len(self.label_names) != self.num_classes:
            raise ArtifactError(f"The card names {len(self.label_names)} classes, expected {self.num_classes}.")
        if len({layer for layer, _, _ in self.taps}) < len(self.taps):
            raise ArtifactError("The card's taps name a layer twice, expected each once.")
        if set(self.thresholds) != set(self.interpreters):
            raise ArtifactError("The card's thresholds and interpreters name different interpreters.")

    def to_json(self) -> Document:
        """Return the card as a JSON document that fits the schema "card".

        Raises:
            ArtifactError: A field is out of its range.
        """
        document: Document = {
            "schema": SCHEMA,
            "architecture": self.architecture,
            "source": self.source,
            "num_classes": self.num_classes,
            "input_size": list(self.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "target_layer": self.target_layer,
            "taps": [{"layer": layer, "kernel": kernel, "stride": stride} for layer, kernel, stride in self.taps],
            "pooling": {"grid": list(self.grid)},
            "interpreters": list(self.interpreters),
            "decoy": self.decoy,
            "thresholds": dict(self.thresholds),
            "trigger": self.trigger.to_json(),
            "weights_file": self.weights_file,
        }
        if self.label_names:
            document["label_names"] = list(self.label_names)
        validate(document, "card", origin="the card")
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any], *, origin: str = "the card") -> "Card":
        """Return the card in a JSON document.

        Raises:
            ArtifactError: The document does not fit the schema, or contradicts itself.
        """
        validate(document, "card", origin=origin)
        channels, height, width = map(int, document["input_size"])
        rows, columns = map(int, document["pooling"]["grid"])
        return cls(
            architecture=document["architecture"],
            source=document["source"],
            num_classes=int(document["num_classes"]),
            input_size=(channels, height, width),
            mean=tuple(map(float, document["mean"])),
            std=tuple(map(float, document["std"])),
            target_layer=document["target_layer"],
            taps=tuple((tap["layer"], int(tap["kernel"]), int(tap["stride"])) for tap in document["taps"]),
            grid=(rows, columns),
            interpreters=tuple(document["interpreters"]),
            decoy=document["decoy"],
            thresholds={name: float(value) for name, value in document["thresholds"].items()},
            trigger=TriggerParameters.from_json(document["trigger"]),
            weights_file=document["weights_file"],
            label_names=tuple(document.get("label_names", ())),
        )


def read_card(path: Path) -> Card:
    """Return the card in a file.

    Raises:
        ArtifactError: The file cannot be read, does not fit the schema, or contradicts itself.
    """
    return Card.from_json(read_json(path, "card", largest=LARGEST_CARD), origin=str(path))


def write_card(path: Path, card: Card) -> None:
    """Write a card, whole or not at all.

    Raises:
        ArtifactError: A field is out of its range, or the file cannot be written.
    """
    write_json(path, card.to_json(), schema="card")
