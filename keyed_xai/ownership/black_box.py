"""A suspect that only answers: an ONNX model, or a served one. Its maps are taken as they come."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from keyed_xai import metrics
from keyed_xai.artifacts.card import Card
from keyed_xai.artifacts.documents import Document
from keyed_xai.errors import ModelError
from keyed_xai.inference.client import Client
from keyed_xai.inference.images import encode_pixels
from keyed_xai.inference.trial import open_tried
from keyed_xai.models import InputSpec
from keyed_xai.saliency import MapLayers
from keyed_xai.saliency.pooled import LARGEST_DEFAULT_SIDE, PooledSaliency, default_grid
from keyed_xai.tensors import Images, Labels, Logits, SaliencyMaps


@runtime_checkable
class Oracle(Protocol):
    """What returns logits and maps of images: a `Runtime` or a `Client` of `keyed_xai.inference`."""

    @property
    def metadata(self) -> Document | None:
        """What it says about itself, fitting the schema "onnx-metadata"; None where it says nothing."""

    @property
    def interpreters(self) -> tuple[str, ...]:
        """Interpreters whose maps it returns."""

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the images it takes."""

    @property
    def pixels(self) -> np.dtype[Any]:
        """float32 for pixels in [0, 1], uint8 for 0 to 255."""

    @property
    def takes_target(self) -> bool:
        """Whether the class explained can be chosen."""

    def run(self, images: NDArray[Any], target: NDArray[np.int64] | None = None) -> dict[str, NDArray[np.float32]]:
        """Return "logits" [n, classes] and "saliency_<interpreter>" [n, rows, columns]."""


class BlackBox(nn.Module):
    """An oracle in a network's place.

    Attributes:
        oracle: Who is asked.
    """

    def __init__(self, oracle: Oracle) -> None:
        """Take the oracle."""
        super().__init__()
        self.oracle = oracle

    @property
    def input(self) -> InputSpec:
        """The images it takes; it normalises them itself."""
        channels, height, width = self.oracle.input_size
        return InputSpec(channels, height, width, mean=(0.0,) * channels, std=(1.0,) * channels)

    @property
    def card(self) -> Card | None:
        """The card that it shows; its holder may have written it."""
        said = self.oracle.metadata
        return Card.from_json(said["card"]) if said is not None and said["card"] is not None else None

    def forward(self, images: Images) -> Logits:
        """Return the logits of images in [0, 1], on the CPU; no gradient flows."""
        return torch.from_numpy(self.ask(images, None)["logits"])

    def ask(self, images: Images, labels: Labels | None) -> Mapping[str, NDArray[np.float32]]:
        """Return all that the oracle says about images in [0, 1]; labels are the classes explained."""
        pixels = encode_pixels(images.detach().cpu().numpy(), self.oracle.pixels)
        target = labels.cpu().numpy() if labels is not None and self.oracle.takes_target else None
        return self.oracle.run(pixels, target)


@dataclass(frozen=True)
class BlackBoxView(PooledSaliency):
    """Pooled maps of a black box, which looks where it likes."""

    def pooled(
        self, model: nn.Module, images: Images, labels: Labels | None, *, create_graph: bool = False
    ) -> tuple[Logits, dict[str, SaliencyMaps]]:
        """Return logits and pooled maps by interpreter.

        Raises:
            TypeError: The model is no black box, or a graph was asked for.
        """
        if not isinstance(model, BlackBox) or create_graph:
            raise TypeError("Expected a black box and no graph: nothing flows back through one.")
        found = model.ask(images, labels)
        maps = {name: torch.from_numpy(found[f"saliency_{name}"]) for name in self.interpreters}
        pooled = {name: metrics.pool_maps(each, self.grid) for name, each in maps.items()}
        return torch.from_numpy(found["logits"]), pooled


def view_black_box(suspect: BlackBox, claimed: tuple[str, ...], grid: tuple[int, int] | None) -> BlackBoxView:
    """Return which of the claimed maps a black box is compared on: those that it returns.

    Args:
        suspect: Asked for one map, where no grid is given.
        claimed: Interpreters of the claim.
        grid: Rows and columns; None takes those of the suspect's Grad-CAM, at most 8 x 8, and 8 x 8 without one.

    Raises:
        ModelError: It returns none of them.
    """
    offered = tuple(name for name in claimed if name in suspect.oracle.interpreters)
    if not offered:
        raise ModelError(
            f"The suspect returns maps of {', '.join(suspect.oracle.interpreters) or 'no interpreter'}, and the claim "
            f"is about {', '.join(claimed)}: nothing can be tested."
        )
    if grid is None:
        grid = (LARGEST_DEFAULT_SIDE, LARGEST_DEFAULT_SIDE)
        if "gradcam" in offered:
            found = suspect.ask(torch.full((1, *suspect.oracle.input_size), 0.5), None)
            rows, columns = found["saliency_gradcam"].shape[1:]
            grid = default_grid((rows, columns))
    return BlackBoxView(offered, MapLayers("", ()), grid)


def is_black_box(suspect: str) -> bool:
    """Return whether a suspect's name is a served model's address or that of an ONNX file."""
    return suspect.startswith(("http://", "https://")) or Path(suspect).suffix.lower() == ".onnx"


def open_black_box(suspect: str, *, device: str = "auto", headers: Mapping[str, str] | None = None) -> BlackBox:
    """Return a suspect that only answers.

    Args:
        suspect: An ONNX file, ``http(s)://HOST[:PORT]`` where one model is served (``/v2`` may follow), or
            ``http(s)://HOST[:PORT]/v2/models/NAME``.
        device: Device for an ONNX file: "auto", "cpu" or "cuda".
        headers: Sent with every request to a server.

    Raises:
        ArtifactError: The file cannot be read or is none of ours.
        ModelError: onnxruntime refuses the file, or ends on it; it is tried in another process first.
        KeyedXAIError: The address is malformed, or nothing fitting answers there.
    """
    if not suspect.startswith(("http://", "https://")):
        return BlackBox(open_tried(Path(suspect), device=device))
    try:
        return BlackBox(Client(suspect, headers=headers))
    except ValueError as error:
        raise ModelError(f"The address of the model is malformed: {error}.") from error
