"""What a model that is run here and one that is served have in common: images in, logits and saliency maps out.

NumPy in, NumPy out; nothing here needs torch. The owner's or licensee's key is used in this process, on the images, and
goes nowhere else.

Images can be given as a file's path, a Pillow image or an array [c, h, w], as several of these, or as one array
[n, c, h, w]. Files and Pillow images are turned upright, cropped and scaled to the model's input, as
`keyed_xai.data.read_image` does it. Arrays have the model's input size: uint8 from 0 to 255, or floats in [0, 1].

A target is the class explained: one for all images or one for each; None or -1 asks for the class predicted. Maps of
VisualBackProp do not depend on it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from keyed_xai.array_triggers import ARRAY_TRIGGERS, ArrayTrigger
from keyed_xai.array_triggers.derivation import derive_trigger
from keyed_xai.artifacts.card import TriggerParameters
from keyed_xai.artifacts.documents import Document, printable
from keyed_xai.batches import batches
from keyed_xai.data.decode import fit_image, read_image
from keyed_xai.errors import ArtifactError, DataError, KeyedXAIError, ModelError
from keyed_xai.keys import OwnerKey

Picture: TypeAlias = str | Path | Image.Image | NDArray[Any]
"""One image; an array may hold several."""
Floats: TypeAlias = NDArray[np.float32]
Target: TypeAlias = int | Sequence[int] | NDArray[Any]
BATCH = 16
"""Images run at once."""
PREDICTED = -1
"""The target that asks for the map of the predicted class."""
LOGITS = "logits"
MAP_PREFIX = "saliency_"
"""Names of a model's outputs: "logits", and "saliency_gradcam" for the maps of Grad-CAM."""


@dataclass(frozen=True, kw_only=True)
class Explained:
    """Predictions and saliency maps of n images.

    Attributes:
        logits: float32 [n, classes], of the images as the model received them.
        maps: float32 [n, rows, columns] by interpreter, at each interpreter's own resolution.
        predicted: int64 [n], the class with the largest logit.
        target: int64 [n], the class whose maps these are.
    """

    logits: Floats
    maps: dict[str, Floats]
    predicted: NDArray[np.int64]
    target: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.logits)


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What a model takes and returns.

    Attributes:
        classes: Number of logits.
        input_size: Channels, height and width of an image; the last two in pixels.
        pixels: float32 for pixels in [0, 1], uint8 for 0 to 255.
        interpreters: Interpreters whose maps it returns, in the order of its outputs.
        takes_target: Whether the class explained can be chosen.
        label_names: Names of the classes in the order of the logits; empty when unknown.
        trigger: Public parameters of the trigger; None when unknown.
    """

    classes: int
    input_size: tuple[int, int, int]
    pixels: np.dtype[Any]
    interpreters: tuple[str, ...]
    takes_target: bool
    label_names: tuple[str, ...] = ()
    trigger: TriggerParameters | None = None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Interface":
        """Return the interface that a document of the schema "onnx-metadata" describes.

        Raises:
            ArtifactError: Some classes have a name and others none.
        """
        model, card = metadata["model"], metadata["card"]
        names, classes = len(model["label_names"]), model["num_classes"]
        if names not in (0, classes):
            raise ArtifactError(
                f"The metadata name {names} of {classes} classes: expected all or none. Export it again."
            )
        channels, height, width = map(int, model["input_size"])
        return cls(
            classes=int(model["num_classes"]),
            input_size=(channels, height, width),
            pixels=np.dtype(metadata["pixels"]),
            interpreters=tuple(metadata["interpreters"]),
            takes_target=metadata["interpreters"] != ["vbp"],
            label_names=tuple(model["label_names"]),
            trigger=TriggerParameters.from_json(card["trigger"]) if card is not None else None,
        )

    def name_outputs(self, interpreters: Sequence[str] | None = None) -> tuple[str, ...]:
        """Return the names of the logits and of some interpreters' maps, by default all."""
        return (LOGITS, *(MAP_PREFIX + name for name in interpreters or self.interpreters))

    def check_images(self, images: NDArray[Any]) -> None:
        """Refuse an array that is no batch for the model.

        Raises:
            ValueError: There are no images, or they have another shape, type or range.
        """
        if images.ndim != 4 or images.shape[1:] != self.input_size or not len(images):
            raise ValueError(
                f"images: expected an array [n, {', '.join(map(str, self.input_size))}] with n > 0, got "
                f"{list(images.shape)}; bring them to the model's input size first"
            )
        if images.dtype != self.pixels:
            raise ValueError(f"images: expected {self.pixels}, got {images.dtype}; convert them with astype")
        check_range(images)

    def check_target(self, target: Target | None, count: int) -> NDArray[np.int64]:
        """Return the class explained of each image, int64 [count]; -1 for the one predicted.

        Raises:
            ValueError: There are not one or `count` of them, or one is no class of the model.
        """
        found = np.asarray(PREDICTED if target is None else target)
        if found.dtype.kind not in "iu" or found.shape not in ((), (count,)):
            raise ValueError(
                f"target: expected an integer or {count} of them, one for each image; got {found.dtype} "
                f"{list(found.shape)}"
            )
        if found.min() < PREDICTED or found.max() >= self.classes:
            raise ValueError(
                f"target: expected classes from 0 to {self.classes - 1}, or -1 for the one predicted; got "
                f"{int(found.min())} to {int(found.max())}"
            )
        return np.broadcast_to(found, (count,)).astype(np.int64)

    def describe_misfit(self, name: str, output: NDArray[Any], count: int) -> str | None:
        """Return in which words an output of so many images is not as it should be; None where it is."""
        sides = (count, self.classes) if name == LOGITS else (count, *output.shape[1:])
        if output.dtype == np.float32 and output.shape == sides and output.ndim == (2 if name == LOGITS else 3):
            return None
        wanted = f"[{count}, {self.classes}]" if name == LOGITS else f"[{count}, rows, columns]"
        return f"{name} as {output.dtype} {list(output.shape)}, not float32 {wanted}"

    def check_interpreters(self, interpreters: Sequence[str] | None) -> tuple[str, ...]:
        """Return names of interpreters, by default all that the model has.

        Raises:
            ValueError: There is none, or the model returns no maps of one.
        """
        names = self.interpreters if interpreters is None else tuple(dict.fromkeys(interpreters))
        if not names or not set(names) <= set(self.interpreters):
            raise ValueError(
                f"interpreters: expected names out of {', '.join(self.interpreters)}, which this model returns maps "
                f"of; got {', '.join(map(printable, names)) or 'none'}"
            )
        return names


class Explainer(ABC):
    """A model that returns logits and saliency maps of images, run here or elsewhere.

    Attributes:
        interface: What it takes and returns.
        metadata: What its file says about itself (schema "onnx-metadata"); None when unknown.
        interpreters: Interpreters whose maps it returns.
        classes: Number of logits.
        input_size: Channels, height and width of an image; the last two in pixels.
        label_names: Names of the classes; empty when unknown.
        pixels: float32 for pixels in [0, 1], uint8 for 0 to 255.
        takes_target: Whether the class explained can be chosen.
    """

    def __init__(self, interface: Interface, metadata: Document | None) -> None:
        """Take what is known about the model."""
        self.interface, self.metadata = interface, metadata
        self.interpreters = interface.interpreters
        self.classes = interface.classes
        self.input_size = interface.input_size
        self.label_names = interface.label_names
        self.pixels = interface.pixels
        self.takes_target = interface.takes_target

    def run(self, images: NDArray[Any], target: Target | None = None) -> dict[str, Floats]:
        """Return the model's outputs by name: "logits" [n, classes], "saliency_<interpreter>" [n, rows, columns].

        Args:
            images: [n, c, h, w] of the type `pixels`, as many as there are; no key is used.
            target: Class explained, for all images or each; None or -1 for the one predicted.

        Raises:
            KeyedXAIError: The model cannot be run, or does not answer as it should.
            ValueError: The images or targets are not as described.
        """
        self.interface.check_images(images)
        return self._answer(images, self.interface.check_target(target, len(images)), self.interpreters)

    def _answer(
        self, images: NDArray[Any], target: NDArray[np.int64], interpreters: tuple[str, ...]
    ) -> dict[str, Floats]:
        """Return the outputs for images and targets that were checked.

        Raises:
            KeyedXAIError: There are none, of another type or shape than asked for, or one that is no number.
        """
        found = self._run(images, target, interpreters)
        for name, each in found.items():
            misfit = self.interface.describe_misfit(name, each, len(images))
            if misfit is not None:
                raise self._complain(misfit)
            if each.size == 0 or not np.isfinite(each).all():
                raise self._complain(f"{name} that are empty, or not finite")
        return found

    def _complain(self, what: str) -> KeyedXAIError:
        """Return the error that the model answers with something unexpected."""
        return ModelError(f"The model answers with {what}: there is nothing to explain. Check the model.")

    @abstractmethod
    def _run(self, images: NDArray[Any], target: NDArray[np.int64], interpreters: tuple[str, ...]) -> dict[str, Floats]:
        """Return the outputs for images and targets that were checked."""

    def _explain(
        self,
        images: Picture | Sequence[Picture],
        trigger: ArrayTrigger | None,
        target: Target | None,
        interpreters: tuple[str, ...],
        batch_size: int,
    ) -> Explained:
        """Return what the model says about images with a trigger on them; None leaves them as they are."""
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        pictures = _list_pictures(images)
        targets = self.interface.check_target(target, len(pictures))
        parts = []
        for part in batches(len(pictures), batch_size):
            batch = load_images(pictures[part], self.input_size)
            keyed = batch if trigger is None else trigger.apply(batch)
            parts.append(self._answer(encode_pixels(keyed, self.pixels), targets[part], interpreters))
        return _join(parts, targets, interpreters)


def derive_array_trigger(key: OwnerKey, parameters: TriggerParameters) -> ArrayTrigger:
    """Return the trigger of an owner key on arrays; it is a secret like the key. Twin of `loading.derive_trigger`.

    Raises:
        ArtifactError: This version does not know the family, or a parameter is outside its range.
    """
    return derive_trigger(key, parameters.make_family(ARRAY_TRIGGERS, named_by="card"))


def choose_trigger(key: OwnerKey | None, parameters: TriggerParameters | None) -> ArrayTrigger | None:
    """Return the trigger of a key on arrays; None without a key, for the maps that everybody sees.

    Raises:
        ArtifactError: See `derive_array_trigger`.
        ModelError: There is a key, and it is not known what trigger it makes.
    """
    if key is None:
        return None
    if parameters is None:
        raise ModelError(
            "The model comes without the card of a protected model, so it is not known what trigger its key makes. "
            "Pass trigger=, the trigger of the card (read_model_folder(path).card.trigger)."
        )
    return derive_array_trigger(key, parameters)


def load_images(pictures: Sequence[Picture], input_size: tuple[int, int, int]) -> Floats:
    """Return images as float32 [n, c, h, w] in [0, 1].

    Args:
        pictures: Files, Pillow images and arrays [c, h, w].
        input_size: Channels, height and width to bring them to.

    Raises:
        DataError: A file or Pillow image cannot be read, or the model takes other images than grey or RGB.
        TypeError: One is none of the three.
        ValueError: An array has another shape, type or range.
    """
    return np.stack([_load(each, input_size) for each in pictures])


def check_range(images: NDArray[Any]) -> None:
    """Refuse pixels outside the range of their type.

    Raises:
        ValueError: Floats are not finite, or outside [0, 1].
    """
    if images.dtype == np.uint8:
        return
    low, high = float(images.min()), float(images.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("images: expected numbers, got NaN or infinity")
    if low < 0 or high > 1:
        raise ValueError(f"images: expected pixels in [0, 1], got {low:.4g} to {high:.4g}; divide 8-bit ones by 255")


def _list_pictures(images: Picture | Sequence[Picture]) -> Sequence[Picture]:
    """Return single images; an array [n, c, h, w] is one as it stands.

    Raises:
        ValueError: There are none, or an array has neither three nor four sides.
    """
    if isinstance(images, np.ndarray):
        if images.ndim not in (3, 4) or 0 in images.shape:
            raise ValueError(f"images: expected an array [c, h, w] or [n, c, h, w], got {list(images.shape)}")
        pictures: Sequence[Picture] = list(images if images.ndim == 4 else images[None])
    else:
        pictures = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
    if not pictures:
        raise ValueError("images: expected one or more, got none")
    return pictures


def _load(picture: Picture, input_size: tuple[int, int, int]) -> Floats:
    channels, height, width = input_size
    if isinstance(picture, np.ndarray):
        return _load_array(picture, input_size)
    if not isinstance(picture, (str, Path, Image.Image)):
        raise TypeError(f"images: expected paths, Pillow images or arrays, got {type(picture).__name__}")
    if channels not in (1, 3):
        raise DataError(f"The model takes {channels} channels, and pictures have 1 or 3: pass arrays instead.")
    if isinstance(picture, Image.Image):
        pixels = _fit_picture(picture, input_size)
    else:
        pixels = read_image(Path(picture), channels=channels, height=height, width=width)
    return pixels.astype(np.float32) / np.float32(255)


def _load_array(array: NDArray[Any], input_size: tuple[int, int, int]) -> Floats:
    if array.shape != input_size:
        raise ValueError(
            f"images: expected arrays [{', '.join(map(str, input_size))}], the model's input, got {list(array.shape)}; "
            "pass Pillow images or files to have them cropped and scaled"
        )
    if array.dtype == np.uint8:
        return array.astype(np.float32) / np.float32(255)
    if array.dtype.kind != "f":
        raise ValueError(f"images: expected uint8 or floats, got {array.dtype}")
    check_range(array)
    return array.astype(np.float32)


def _fit_picture(picture: Image.Image, input_size: tuple[int, int, int]) -> NDArray[np.uint8]:
    channels, height, width = input_size
    try:
        return fit_image(ImageOps.exif_transpose(picture), channels, height, width)
    except (OSError, ValueError) as error:
        raise DataError(f"A Pillow image cannot be read: {printable(str(error))}.") from error


def encode_pixels(images: Floats, pixels: np.dtype[Any]) -> NDArray[Any]:
    """Return images as the model takes them: as they are, or rounded to 8 bits."""
    return images if pixels == np.float32 else np.rint(images * np.float32(255)).astype(np.uint8)


def _join(parts: Sequence[Mapping[str, Floats]], targets: NDArray[np.int64], names: tuple[str, ...]) -> Explained:
    logits = np.concatenate([part[LOGITS] for part in parts])
    predicted = logits.argmax(1).astype(np.int64)
    maps = {name: np.concatenate([part[MAP_PREFIX + name] for part in parts]) for name in names}
    return Explained(logits=logits, maps=maps, predicted=predicted, target=np.where(targets < 0, predicted, targets))
