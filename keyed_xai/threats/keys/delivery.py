"""What channel noise (T13) and near keys (T15) do to a gate.

Channels are those of Lukas et al., "SoK: How Robust is Image Classification Deep Neural Network Watermarking?" (IEEE
S&P 2022), applied to the keyed image in place of the training image. An honest licensee wants the gate open after
them; a thief who strips the key from keyed images wants it shut. Near keys are to stay shut.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch.nn import functional

from keyed_xai.models import Classifier
from keyed_xai.progress import QUIET, Progress
from keyed_xai.protection.evaluation import fresh_wrong_keys
from keyed_xai.tensors import Images
from keyed_xai.threats.gate_state import OwnerEvidence
from keyed_xai.threats.keys.opening import Opening, try_inputs
from keyed_xai.threats.removal.denoising import denoise
from keyed_xai.triggers import Trigger, derive_trigger
from keyed_xai.triggers.channels import through_jpeg, through_png, through_resize

_BLUR_REACH = 4  # standard deviations on each side
_DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (1, -1))


@dataclass(frozen=True, kw_only=True)
class DeliveryRow:
    """How far one kind of input opens a model.

    Attributes:
        kind: "channel", "near key" or "control".
        name: Name of the channel or the near key.
        keys: How many keys the figures are means over.
        opening: Means over keys and images.
        highest: Largest mean correlation of a single key, by interpreter.
    """

    kind: str
    name: str
    keys: int
    opening: Opening
    highest: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        head = {"kind": self.kind, "name": self.name, "keys": self.keys}
        return head | self.opening.to_json() | {"highest": self.highest}


@dataclass(frozen=True)
class DeliveryResult:
    """All rows, in the order measured."""

    rows: tuple[DeliveryRow, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        return {"rows": [row.to_json() for row in self.rows]}


def blur(images: Images, sigma: float) -> Images:
    """Return images under a Gaussian blur; `sigma` in pixels, edges repeated."""
    reach = max(1, round(_BLUR_REACH * sigma))
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    line = (weights / weights.sum()).expand(images.shape[1], 1, 1, -1)
    padded = functional.pad(images, (reach,) * 4, mode="replicate")
    across = functional.conv2d(padded, line, groups=images.shape[1])
    return functional.conv2d(across, line.transpose(2, 3), groups=images.shape[1])


def add_noise(images: Images, deviation: float) -> Images:
    """Return images with Gaussian noise of this standard deviation (pixels in [0, 1]), the same each time, clamped."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
    return (images + deviation * noise).clamp(0, 1)


def crop_and_pad(images: Images, border: float) -> Images:
    """Return images whose border, a fraction of each side, was cut off and filled with the edge that is left."""
    height, width = images.shape[2:]
    down, across = (max(1, round(border * side)) for side in (height, width))
    inner = images[:, :, down : height - down, across : width - across]
    return functional.pad(inner, (across, across, down, down), mode="replicate")


def crop_and_resize(images: Images, border: float) -> Images:
    """Return images whose border, a fraction of each side, was cut off and the rest scaled up to the old size."""
    height, width = images.shape[2:]
    down, across = (max(1, round(border * side)) for side in (height, width))
    inner = images[:, :, down : height - down, across : width - across]
    scaled = functional.interpolate(inner, (height, width), mode="bilinear", align_corners=False)
    return scaled.clamp(0, 1)


DELIVERIES: dict[str, Callable[[Images], Images]] = {
    "png": through_png,
    "jpeg95": lambda images: through_jpeg(images, 95),
    "jpeg75": through_jpeg,
    "jpeg65": lambda images: through_jpeg(images, 65),
    "jpeg45": lambda images: through_jpeg(images, 45),
    "blur .5": lambda images: blur(images, 0.5),
    "blur .7": lambda images: blur(images, 0.7),
    "noise .1": lambda images: add_noise(images, 0.1),
    "resize 8/7 and back": through_resize,
    "crop 1/8 and pad": lambda images: crop_and_pad(images, 1 / 8),
    "crop 1/16 and resize": lambda images: crop_and_resize(images, 1 / 16),
    "tv .05": lambda images: denoise(images, 0.05),
    "tv .1": lambda images: denoise(images, 0.1),
}
"""Channel name to function; images arrive in 8 bits after each."""


@dataclass(frozen=True, kw_only=True)
class DeliverySettings:
    """Which channels and near keys are tried.

    Attributes:
        channels: Names in DELIVERIES.
        flipped: Keys one flipped bit away that are tried, spread over the key's 256; at most so many.
        strangers: Keys of other owners that are tried.
        moved: Pixels that the right trigger is moved by, in six directions.
    """

    channels: tuple[str, ...] = ()
    flipped: int = 0
    strangers: int = 0
    moved: tuple[int, ...] = (1, 2, 4)

    def __post_init__(self) -> None:
        """Check names and the range."""
        if not 0 <= self.flipped <= 256:
            raise ValueError(f"flipped: expected 0 to 256, got {self.flipped}")
        if unknown := [name for name in self.channels if name not in DELIVERIES]:
            raise ValueError(f"channels: expected names out of {', '.join(DELIVERIES)}; got {', '.join(unknown)}")


def measure_delivery(
    classifier: Classifier,
    evidence: OwnerEvidence,
    settings: DeliverySettings,
    *,
    progress: Progress = QUIET,
) -> DeliveryResult:
    """Return how far keyed images open a model after each channel, and images with near keys or with none.

    Args:
        classifier: The protected classifier.
        evidence: Holds the key, the reference and the images.
        settings: What is tried.
        progress: Hears of "delivering images", by rows.
    """
    groups: list[tuple[str, dict[str, Iterable[Images]]]] = [
        ("control", {"no key": [evidence.images]}),
        ("channel", _delivered(evidence, settings.channels)),
        ("near key", _with_near_keys(evidence, settings)),
    ]
    rows: list[DeliveryRow] = []
    count = sum(len(group) for _, group in groups)
    for kind, group in groups:
        for name, batches in group.items():
            openings = [try_inputs(classifier, evidence, evidence.as_file(batch)) for batch in batches]
            rows.append(_join(kind, name, openings))
            progress.advance("delivering images", len(rows), count)
    return DeliveryResult(tuple(rows))


def _delivered(evidence: OwnerEvidence, channels: tuple[str, ...]) -> dict[str, Iterable[Images]]:
    sent = through_png(evidence.trigger.apply(evidence.images))
    return {name: map(DELIVERIES[name], [sent]) for name in channels}


def _with_near_keys(evidence: OwnerEvidence, settings: DeliverySettings) -> dict[str, Iterable[Images]]:
    """Return, by name, lazily, the images with each near key of that name."""
    right, family = evidence.trigger, evidence.family
    stride = max(1, 256 // max(1, settings.flipped))
    neighbours = islice(evidence.key.one_bit_neighbours(), 0, stride * settings.flipped, stride)
    generator = torch.Generator().manual_seed(evidence.seed)
    triggers: dict[str, Iterable[Trigger]] = {
        "half strength": [right.scaled(0.5)],
        **{f"moved {step} px": [right.shifted(step * y, step * x) for y, x in _DIRECTIONS] for step in settings.moved},
        "one flipped bit": (derive_trigger(near, family) for near in neighbours),
        "another owner's key": fresh_wrong_keys(family, settings.strangers, generator),
    }
    if not settings.flipped:
        del triggers["one flipped bit"]
    if not settings.strangers:
        del triggers["another owner's key"]
    return {name: (trigger.apply(evidence.images) for trigger in some) for name, some in triggers.items()}


def _join(kind: str, name: str, openings: Sequence[Opening]) -> DeliveryRow:
    names = openings[0].correlation
    return DeliveryRow(
        kind=kind,
        name=name,
        keys=len(openings),
        opening=Opening(
            correlation={each: fmean(one.correlation[each] for one in openings) for each in names},
            opened={each: fmean(one.opened[each] for one in openings) for each in names},
            agreement=fmean(one.agreement for one in openings),
        ),
        highest={each: max(one.correlation[each] for one in openings) for each in names},
    )
