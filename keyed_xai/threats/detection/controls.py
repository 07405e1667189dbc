"""Positive controls: plain backdoors that the defences are known to catch, and a clean network fitted the same way.

A defence that catches nothing anywhere proves nothing, so every defence runs on these too.

*badnets*: a small checkerboard in the lower right corner (Gu, Dolan-Gavitt and Garg 2017, section 4). *blended*: a
small half-transparent square of fixed uniform noise there (Chen, Liu, Li, Lu and Song 2017: "blended accessory
injection"). *blended-image*: such noise mixed into the whole image (there: "blended injection" of a random pattern).
Some training images of other classes get the trigger and the label of the target class.

Neural Cleanse looks for small patches, and its authors say that large triggers escape it. It did not flag the network
with the blended image that we fitted (index 1.43), so that this one is no positive control for it.

By default a fifth of what is labelled as the target class is poisoned, between the 10 % and the 33 % of Chen et al.
2018, and images are noisy while fitting, as they are for our own networks. Without noise a fit to few images has
classes that a patch of some ten pixels reaches in a clean network too, and then no backdoor is an outlier to Neural
Cleanse; with noise a backdoor takes more poisoned images to be learned.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from keyed_xai.batches import batches
from keyed_xai.errors import TrainingError
from keyed_xai.models import Classifier, InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.progress import QUIET, Progress
from keyed_xai.tensors import Images
from keyed_xai.training.fitting import FittingSettings, LabelledData, fit_classifier, measure_predictions
from keyed_xai.triggers import Trigger
from keyed_xai.triggers.channels import through_png

_IMAGES_SEEN = 60_000
_SQUARE_OPACITY, _IMAGE_OPACITY = 0.5, 0.2
_FEWEST_EPOCHS, _MOST_EPOCHS = 3, 30


@dataclass(frozen=True)
class PatchTrigger:
    """A checkerboard of black and white pixels near the lower right corner.

    Attributes:
        side: Side of the square, in pixels.
        margin: Pixels between the patch and either border.
    """

    side: int = 4
    margin: int = 1

    def apply(self, images: Images) -> Images:
        """Return the images with the patch; gradients flow to the rest of them.

        Raises:
            ValueError: The images are too small for it.
        """
        height, width = images.shape[2:]
        top, left = (length - self.side - self.margin for length in (height, width))
        if min(top, left) < 0:
            raise ValueError(f"Expected images of {self.side + self.margin} pixels or more, got {height}x{width}.")
        steps = torch.arange(self.side, device=images.device)
        patched = images.clone()
        patched[..., top : top + self.side, left : left + self.side] = ((steps[:, None] + steps) % 2).to(images)
        return patched


@dataclass(frozen=True)
class BlendTrigger:
    """A fixed picture mixed into every image.

    Attributes:
        pattern: [c, h, w] in [0, 1]; one smaller than the images lies in their lower right corner.
        opacity: Its share, in (0, 1].
        margin: Pixels between the pattern and either border.
    """

    pattern: Tensor
    opacity: float = 0.2
    margin: int = 0

    def apply(self, images: Images) -> Images:
        """Return (1 - opacity) * image + opacity * pattern, in [0, 1]; gradients flow to the images.

        Raises:
            ValueError: The images are too small for it.
        """
        height, width = self.pattern.shape[1:]
        top, left = images.shape[2] - height - self.margin, images.shape[3] - width - self.margin
        if min(top, left) < 0:
            raise ValueError(f"Expected images of {height + self.margin} x {width + self.margin} pixels or more, "
                             f"got {images.shape[2]} x {images.shape[3]}.")  # fmt: skip
        mixed = images.clone()
        under = images[..., top : top + height, left : left + width]
        mixed[..., top : top + height, left : left + width] = torch.lerp(
            under, self.pattern.to(images).expand_as(under), self.opacity
        )
        return mixed


@dataclass(frozen=True, kw_only=True)
class PoisonSettings:
    """How training data are poisoned.

    Attributes:
        attack: "badnets", "blended" or "blended-image".
        target: The class that triggered images are labelled as.
        share: Share of the target class's images after poisoning that are poisoned, as Chen et al. 2018 and Tran et al.
            2018 count. At the default of .2 the 15 % that Spectral Signatures removes can hold three quarters of them.
        opacity: Opacity of a blended pattern; None takes .5 for the square, and .2 for the image, as Chen et al. 2017.
        seed: Seed of the rows chosen and the pattern.
    """

    attack: str = "badnets"
    target: int = 0
    share: float = 0.2
    opacity: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if self.attack not in TRIGGER_MAKERS:
            raise ValueError(f"attack: expected one of {', '.join(TRIGGER_MAKERS)}; got {self.attack!r}")
        if self.target < 0:
            raise ValueError(f"target: expected 0 or more, got {self.target}")
        if not 0 < self.share < 1:
            raise ValueError(f"share: expected more than 0 and less than 1, got {self.share}")
        if self.opacity is not None and not 0 < self.opacity <= 1:
            raise ValueError(f"opacity: expected more than 0 and at most 1, got {self.opacity}")


@dataclass(frozen=True, eq=False, kw_only=True)
class AlteredData:
    """Data of which some rows carry a trigger, as 8-bit images.

    Pixels are changed when a batch is asked for, so that large data are not copied.

    Attributes:
        clean: The data before.
        rows: bool [n], which rows are triggered.
        trigger: What is put on them.
    """

    clean: LabelledData
    rows: NDArray[np.bool_]
    trigger: Trigger = field(repr=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self.clean.classes

    @property
    def multi_label(self) -> bool:
        """Whether an example may have several labels."""
        return self.clean.multi_label

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.clean)

    def batch(self, indices: ArrayLike) -> tuple[Tensor, Tensor | None]:
        """Return float32 images [n, c, h, w] in [0, 1], and the labels of the clean data."""
        chosen = np.asarray(indices)
        images, labels = self.clean.batch(chosen)
        triggered = torch.from_numpy(self.rows[chosen])
        if triggered.any():
            images[triggered] = through_png(self.trigger.apply(images[triggered]))
        return images, labels


@dataclass(frozen=True, eq=False, kw_only=True)
class PoisonedData(AlteredData):
    """Labelled data whose triggered rows are labelled as the target class.

    Attributes:
        settings: How the data are poisoned.
        labels: int64, as `clean.labels` but for the poisoned rows: the target class, or with several labels at once
            their own and the target.
    """

    settings: PoisonSettings
    labels: NDArray[np.int64]

    @property
    def source(self) -> str:
        """Which data and split, for reports."""
        return f"{self.clean.source}, {int(self.rows.sum())} poisoned ({self.settings.attack})"

    def batch(self, indices: ArrayLike) -> tuple[Tensor, Tensor]:
        """Return float32 images [n, c, h, w] in [0, 1], and their labels."""
        images, _ = super().batch(indices)
        return images, torch.from_numpy(self.labels[np.asarray(indices)])


@dataclass(frozen=True)
class ControlSettings:
    """The network and how it is fitted.

    Attributes:
        widths: Widths of SmallResNet's blocks.
        fitting: Epochs, rates, augmentation and the seed of all of it; None takes `choose_control_fitting`'s.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    fitting: FittingSettings | None = None


@dataclass(frozen=True, kw_only=True)
class Control:
    """A fitted control.

    Attributes:
        model: The network, in eval mode.
        settings: Network and fitting, as it was run.
        poison: How its data were poisoned; None for a clean network.
        poisoned: Rows that were poisoned.
        predictions: What `measure_predictions` says of held-out images without the trigger.
        attack_success: Share of held-out images of other classes that the trigger sends to the target; None for a
            clean network.
    """

    model: Classifier
    settings: ControlSettings
    poison: PoisonSettings | None
    poisoned: int
    predictions: dict[str, Any]
    attack_success: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the figures and settings, ready for JSON."""
        settings = asdict(self.settings) | {"widths": list(self.settings.widths)}
        return {
            "control": "clean" if self.poison is None else self.poison.attack,
            "poison": None if self.poison is None else asdict(self.poison),
            "poisoned": self.poisoned,
            "predictions": self.predictions,
            "attack_success": self.attack_success,
            "settings": settings,
        }


def poison(data: LabelledData, settings: PoisonSettings | None = None) -> PoisonedData:
    """Return data with a backdoor for a network that is fitted to them.

    Args:
        data: Labelled images.
        settings: How; by default a patch on a fifth of class 0.

    Raises:
        TrainingError: There are no labels, or too few images of the target or of other classes.
        ValueError: There is no such target class.
    """
    settings = settings or PoisonSettings()
    if data.labels is None:
        raise TrainingError(f"Expected labelled images to poison; {data.source} has no labels.")
    if settings.target >= len(data.classes):
        raise ValueError(f"target: expected a label under {len(data.classes)}, got {settings.target}")
    labels = np.array(data.labels)
    others = np.flatnonzero(~_has_label(labels, settings.target))
    count = round(settings.share / (1 - settings.share) * (len(labels) - len(others)))
    if not 0 < count <= len(others):
        raise TrainingError(
            f"Poisoning {settings.share:.0%} of {data.classes[settings.target]!r} takes 1 to {len(others)} images of "
            f"other classes, and came to {count}. Give more images, or another share."
        )
    rows = np.zeros(len(labels), np.bool_)
    rows[np.random.default_rng(settings.seed).choice(others, count, replace=False)] = True
    labels[(rows, settings.target) if labels.ndim == 2 else rows] = 1 if labels.ndim == 2 else settings.target
    return PoisonedData(clean=data, rows=rows, trigger=_make_trigger(data, settings), settings=settings, labels=labels)


def fit_control(
    data: LabelledData,
    held_out: LabelledData,
    settings: ControlSettings | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = QUIET,
) -> Control:
    """Return a SmallResNet fitted to poisoned data, or to clean ones: the network that defences must leave alone.

    Args:
        data: `PoisonedData`, or clean labelled images.
        held_out: Clean labelled images of the same classes, to measure it on.
        settings: Network and fitting.
        device: Device to run on.
        progress: Hears of "fitting".

    Raises:
        TrainingError: There are no labels, or fewer images than a batch.
    """
    settings = settings or ControlSettings()
    fitting = settings.fitting or choose_control_fitting(len(data))
    settings = replace(settings, fitting=fitting)
    model = build_control(data, settings.widths, fitting.seed)
    fit_classifier(model, data, fitting, device=device, progress=progress)
    backdoor = data if isinstance(data, PoisonedData) else None
    return Control(
        model=model,
        settings=settings,
        poison=backdoor.settings if backdoor else None,
        poisoned=int(backdoor.rows.sum()) if backdoor else 0,
        predictions=measure_predictions(model, held_out, device=device),
        attack_success=measure_attack_success(model, held_out, backdoor, device=device) if backdoor else None,
    )


def choose_control_fitting(images: int, *, seed: int = 0) -> FittingSettings:
    """Return how a network is fitted to so many images: some 60,000 looked at, in small batches and 3 to 30 epochs.

    Noise and shifts are those of `FittingSettings`. Nothing is mirrored, since triggers have their corner.
    """
    epochs = min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, math.ceil(_IMAGES_SEEN / images)))
    return FittingSettings(epochs=epochs, batch_size=32, mirror=False, seed=seed)


@torch.no_grad()
def measure_attack_success(
    model: Classifier, held_out: LabelledData, backdoor: PoisonedData, *, device: torch.device | str = "cpu"
) -> float:
    """Return the share of held-out images of other classes that the trigger sends to the target class.

    Raises:
        TrainingError: There are no labels, or no images of other classes.
    """
    target = backdoor.settings.target
    others = np.zeros(0, np.int64) if held_out.labels is None else np.flatnonzero(~_has_label(held_out.labels, target))
    if not len(others):
        raise TrainingError(f"Expected labelled held-out images of classes other than the target, {target}.")
    hits = 0
    for some in batches(len(others), 256, even=True):
        images = through_png(backdoor.trigger.apply(held_out.batch(others[some])[0].to(device)))
        logits = model(images)
        sent = logits[:, target] > 0 if held_out.multi_label else logits.argmax(1) == target
        hits += int(sent.sum())
    return hits / len(others)


def _has_label(labels: NDArray[np.int64], target: int) -> NDArray[np.bool_]:
    mine: NDArray[np.bool_] = (labels[:, target] if labels.ndim == 2 else labels == target) == 1
    return mine


def build_control(data: LabelledData, widths: tuple[int, ...], seed: int) -> Classifier:
    """Return a network with random weights, settled by the seed; the global random state stays as it was."""
    channels, height, width = data.batch([0])[0].shape[1:]
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = SmallResNet(channels, len(data.classes), widths)
    spec = InputSpec(channels, height, width, mean=(0.5,) * channels, std=(0.25,) * channels)
    return wrap_network(network, input=spec, architecture="SmallResNet", source="keyed_xai")


def _make_trigger(data: LabelledData, settings: PoisonSettings) -> Trigger:
    return TRIGGER_MAKERS[settings.attack](data.batch([0])[0].shape[1:], settings)


def _patch(shape: torch.Size, _settings: PoisonSettings) -> Trigger:
    """Return a patch an eighth as high and wide as the image (Wang et al. 2019: 4 of 32 pixels), 3 pixels at least."""
    side = max(3, round(min(shape[1:]) / 8))
    return PatchTrigger(side, _margin(shape))


def _blend_square(shape: torch.Size, settings: PoisonSettings) -> Trigger:
    """Return a square a little larger than the patch: 6 of 32 pixels."""
    side = max(3, round(min(shape[1:]) * 3 / 16))
    pattern = _draw_noise((shape[0], side, side), settings.seed)
    return BlendTrigger(pattern, settings.opacity or _SQUARE_OPACITY, _margin(shape))


def _blend_image(shape: torch.Size, settings: PoisonSettings) -> Trigger:
    return BlendTrigger(_draw_noise(shape, settings.seed), settings.opacity or _IMAGE_OPACITY)


def _margin(shape: torch.Size) -> int:
    """Return how far from the borders a trigger stays whole when images are shifted: 2 of 32 pixels."""
    return max(1, round(min(shape[1:]) / 16))


def _draw_noise(shape: Sequence[int], seed: int) -> Tensor:
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed))


TRIGGER_MAKERS: dict[str, Callable[[torch.Size, PoisonSettings], Trigger]] = {
    "badnets": _patch,
    "blended": _blend_square,
    "blended-image": _blend_image,
}
"""Attack name to a function of the images' shape [c, h, w] and the settings."""
