"""Pictures that a client sends as files, and the answer to them: class, probability, and maps over the picture.

Files are untrusted: only common raster formats are opened, of at most `LARGEST_PICTURE` pixels.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image

from keyed_xai.data.decode import FORMATS, measure_image, read_image_bytes
from keyed_xai.errors import DataError
from keyed_xai.inference.images import LOGITS, MAP_PREFIX
from keyed_xai.reporting.pictures import overlay
from keyed_xai.serving.refusal import Refused, malformed

LARGEST_PICTURE = 50_000_000
"""Pixels; checked before any is decoded."""
_TOP = 3


@dataclass(frozen=True, eq=False, kw_only=True)
class Explanation:
    """What a model says about one picture.

    Attributes:
        logits: Logits of the classes named, float32 [k].
        target: The class that the maps explain.
        overlays: PNG files by interpreter: the map over the picture as the model saw it.
        maps: The same as numbers, [rows, columns] by interpreter.
        image: PNG file: the picture as the model saw it, pixel by pixel. None where it was not asked for.
    """

    logits: NDArray[np.float32]
    target: int
    overlays: Mapping[str, bytes]
    maps: Mapping[str, NDArray[np.float32]]
    image: bytes | None = None

    @property
    def predicted(self) -> int:
        """The class with the largest logit."""
        return int(self.logits.argmax())

    @property
    def probability(self) -> float:
        """Probability of the target, by the softmax of the logits."""
        return float(self._probabilities()[self.target])

    def _probabilities(self) -> NDArray[np.float64]:
        shares: NDArray[np.float64] = np.exp(self.logits.astype(np.float64) - self.logits.max())
        shares /= shares.sum()
        return shares

    def to_json(self, *, model: str, label_names: Sequence[str], with_maps: bool = False) -> bytes:
        """Return it as the answer's JSON text; `label` is null where a class's name is unknown."""
        document: dict[str, Any] = {
            "model": model,
            "predicted": self.predicted,
            "target": self.target,
            "label": _name(self.target, label_names),
            "probability": self.probability,
            "top": self._find_top(label_names),
            "logits": np.ascontiguousarray(self.logits),
            "overlays": {name: base64.b64encode(png).decode() for name, png in self.overlays.items()},
        }
        if with_maps:
            document["maps"] = {name: np.ascontiguousarray(each) for name, each in self.maps.items()}
        if self.image is not None:
            document["image"] = base64.b64encode(self.image).decode()
        return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)

    def _find_top(self, label_names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the most probable classes, the predicted one first."""
        probabilities = self._probabilities()
        classes = np.argsort(-self.logits, kind="stable")[:_TOP].tolist()
        return [
            {"class": each, "label": _name(each, label_names), "probability": float(probabilities[each])}
            for each in classes
        ]


def _name(label: int, label_names: Sequence[str]) -> str | None:
    return label_names[label] if label < len(label_names) else None


def read_picture(data: bytes, input_size: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return a picture as uint8 [c, h, w]: upright, centre-cropped and scaled as `read_image` does it with files.

    Args:
        data: The file: PNG, JPEG, WebP, BMP, GIF, TIFF or PPM; of several frames the first counts.
        input_size: c, h, w.

    Raises:
        Refused: It is no such picture, is damaged, or too large.
    """
    channels, height, width = input_size
    with _refusing():
        return read_image_bytes(data, channels=channels, height=height, width=width, largest=LARGEST_PICTURE)


def measure_picture(data: bytes, input_size: tuple[int, int, int]) -> int:
    """Return how many bytes of memory `read_picture` takes for a file, about, by its header.

    Raises:
        Refused: As `read_picture` does.
    """
    channels, height, width = input_size
    with _refusing():
        return measure_image(data, channels=channels, height=height, width=width, largest=LARGEST_PICTURE)


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn what is wrong with a picture into a refusal."""
    try:
        yield
    except DataError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise Refused(413, f"Expected a picture of at most {LARGEST_PICTURE} pixels.") from error
        raise malformed(f"The body is not a readable picture: expected {', '.join(FORMATS)}.") from error


def explain_picture(
    pixels: NDArray[np.uint8],
    outputs: Mapping[str, NDArray[np.float32]],
    interpreters: Sequence[str],
    target: int | None,
    *,
    with_image: bool = False,
) -> Explanation:
    """Return what a model's outputs for one picture say.

    Args:
        pixels: [c, h, w], as the model saw it.
        outputs: Outputs of the graph, [1, ...].
        interpreters: Interpreters whose maps are drawn.
        target: The class asked for; the predicted one if None.
        with_image: Add the picture itself.
    """
    logits = outputs[LOGITS][0]
    image = pixels.astype(np.float32) / 255
    maps = {name: outputs[MAP_PREFIX + name][0] for name in interpreters}
    overlays = {name: overlay(image, each) for name, each in maps.items()}
    return Explanation(
        logits=logits,
        target=int(logits.argmax()) if target is None else target,
        overlays=overlays,
        maps=maps,
        image=_encode(pixels) if with_image else None,
    )


def _encode(pixels: NDArray[np.uint8]) -> bytes:
    """Return pixels [c, h, w], of one channel or three, as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()
