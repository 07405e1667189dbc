"""From image files to files that show their saliency maps.

A trigger is a bearer credential: whoever sees one keyed image next to its original can subtract them. Pictures are
therefore drawn over the original, arrays hold logits and maps alone, and a keyed image is written only when a job asks
for it by name.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from keyed_xai import pictures
from keyed_xai.artifacts.documents import printable, write_atomically, write_openly
from keyed_xai.claims import prepare_folder
from keyed_xai.data import list_images, read_image
from keyed_xai.errors import DataError, KeyedXAIError
from keyed_xai.explanation import BATCH, Explanation, explain
from keyed_xai.models import Classifier
from keyed_xai.triggers import Trigger

_Pixels = NDArray[np.uint8]
_Floats = NDArray[np.float32]


@dataclass(frozen=True)
class MapJob:
    """What to write.

    Attributes:
        folder: Where to; made if it is not there. Files of an earlier run are replaced.
        interpreters: Whose maps.
        trigger: Of the key; None for the maps that everybody sees.
        target: Class explained; None for each image's predicted one.
        compare: Also draw keyed and unkeyed maps side by side.
        write_keyed: Also write the keyed image. It gives the trigger away to whoever has the original.
        label_names: Names of the classes, where they are known.
    """

    folder: Path
    interpreters: tuple[str, ...]
    trigger: Trigger | None = field(default=None, repr=False)
    target: int | None = None
    compare: bool = False
    write_keyed: bool = False
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that what needs a trigger has one."""
        if self.trigger is None and (self.compare or self.write_keyed):
            raise ValueError("compare and write_keyed need a trigger")


@dataclass(frozen=True)
class WrittenMaps:
    """What came of a job.

    Attributes:
        images: One entry for each image explained, as in the schema "explain".
        broken: A sentence for each image that could not be read.
    """

    images: list[dict[str, Any]]
    broken: list[str]


def write_maps(
    classifier: Classifier,
    images: Sequence[Path],
    job: MapJob,
    *,
    on_image: Callable[[int, int], None] | None = None,
) -> WrittenMaps:
    """Explain image files and write their maps; images that cannot be read are reported and the others done.

    For each image there are `<stem>.npz` (raw maps by interpreter, `logits` and `target`), and by interpreter
    `<stem>.<interpreter>.png` (the map over the image) and, in comparison, `<stem>.<interpreter>.compare.png`.

    Args:
        classifier: In evaluation mode.
        images: Files.
        job: What to write.
        on_image: Called with images done and in all.

    Raises:
        ArtifactError: A file cannot be written.
        KeyedXAIError: An image lies where a result would, or the model takes other images than grey or RGB.
        ModelError: The model lacks a layer that the maps need, or its logits are not finite.
        ValueError: An interpreter or the target is unknown.
    """
    stems = unique_stems(images)
    _refuse_to_overwrite(images, stems, job)
    if classifier.input.channels not in (1, 3):
        raise KeyedXAIError(f"The model takes {classifier.input.channels} channels, and picture files have 1 or 3: "
                            "explain arrays in Python with keyed_xai.explain.")  # fmt: skip
    prepare_folder(job.folder)
    written = WrittenMaps([], [])
    for start in range(0, len(images), BATCH):
        paths = images[start : start + BATCH]
        pixels = _read_batch(paths, classifier, written.broken)
        if pixels:
            names = {path: stem for path, stem in zip(paths, stems[start : start + BATCH], strict=True)}
            written.images.extend(_write_batch(classifier, pixels, names, job))
        if on_image is not None:
            on_image(start + len(paths), len(images))
    return written


def find_images(paths: Sequence[Path], *, follow_links: bool = False) -> list[Path]:
    """Return files as they are, and the images in folders and below; each file once, in this order.

    Raises:
        DataError: A folder has no image, or a link out of it and links are not to be followed.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        for each in list_images(path, follow_links=follow_links) if path.is_dir() else [path]:
            found.setdefault(each.resolve(), each)
    return list(found.values())


def unique_stems(images: Sequence[Path]) -> list[str]:
    """Return a name for each image, different without regard to case: its stem, with a number where that is taken."""
    taken: set[str] = set()
    stems = []
    for image in images:
        stem, number = image.stem, 1
        while stem.casefold() in taken:
            number += 1
            stem = f"{image.stem}-{number}"
        taken.add(stem.casefold())
        stems.append(stem)
    return stems


def _read_batch(paths: Sequence[Path], classifier: Classifier, broken: list[str]) -> dict[Path, _Pixels]:
    spec, pixels = classifier.input, {}
    for path in paths:
        try:
            pixels[path] = read_image(path, channels=spec.channels, height=spec.height, width=spec.width)
        except DataError as error:
            broken.append(str(error))
    return pixels


def _write_batch(
    classifier: Classifier, pixels: Mapping[Path, _Pixels], stems: Mapping[Path, str], job: MapJob
) -> list[dict[str, Any]]:
    originals = torch.from_numpy(np.stack(list(pixels.values()))).float() / 255
    labels = None if job.target is None else torch.full((len(originals),), job.target)
    found = explain(classifier, originals, trigger=job.trigger, interpreters=job.interpreters, labels=labels)
    unkeyed = None
    if job.compare:
        unkeyed = explain(classifier, originals, interpreters=job.interpreters, labels=found.explained)
    if job.write_keyed and job.trigger is not None:
        for path, keyed in zip(pixels, job.trigger.apply(originals).numpy(), strict=True):
            write_openly(job.folder / f"{stems[path]}.keyed.png", _encode_image(keyed))
    return [
        _describe(path, found, index, job)
        | {"interpreters": _write_image(originals[index].numpy(), stems[path], found, unkeyed, index, job)}
        for index, path in enumerate(pixels)
    ]


def _write_image(
    image: _Floats, stem: str, found: Explanation, unkeyed: Explanation | None, index: int, job: MapJob
) -> dict[str, dict[str, str | None]]:
    """Write one image's files; return their names by interpreter."""
    maps = {name: found.maps[name][index].cpu().numpy() for name in job.interpreters}
    arrays = job.folder / f"{stem}.npz"
    write_atomically(arrays, _encode_arrays(maps, found.logits[index].cpu().numpy(), int(found.explained[index])))
    files: dict[str, dict[str, str | None]] = {}
    for name, each in maps.items():
        overlay = job.folder / f"{stem}.{name}.png"
        comparison: Path | None = None
        write_atomically(overlay, pictures.overlay(image, each))
        if unkeyed is not None:
            comparison = job.folder / f"{stem}.{name}.compare.png"
            panels = [image, each, unkeyed.maps[name][index].cpu().numpy()]
            drawn = pictures.strip([(name, panels)], titles=["image", "with the key", "without the key"])
            write_atomically(comparison, drawn)
        files[name] = {
            "overlay": str(overlay),
            "map": str(arrays),
            "comparison": str(comparison) if comparison else None,
        }
    return files


def _describe(path: Path, found: Explanation, index: int, job: MapJob) -> dict[str, Any]:
    target, predicted = int(found.explained[index]), int(found.predicted[index])
    name = {"label_name": job.label_names[target]} if job.label_names else {}
    return {
        "image": printable(str(path)),
        "target": target,
        "predicted": predicted,
        "probability": float(found.logits[index].double().softmax(0)[predicted]),
        **name,
    }


def _encode_arrays(maps: Mapping[str, _Floats], logits: _Floats, target: int) -> bytes:
    buffer = io.BytesIO()
    arrays: dict[str, NDArray[Any]] = {**maps, "logits": logits, "target": np.array(target)}
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type] # numpy's stub takes the first for a flag
    return buffer.getvalue()


def _encode_image(image: _Floats) -> bytes:
    pixels = np.round(255 * image).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _refuse_to_overwrite(images: Sequence[Path], stems: Sequence[str], job: MapJob) -> None:
    """Refuse a job whose results would land on its own images."""
    endings = [f".{name}{ending}" for name in job.interpreters for ending in (".png", ".compare.png")]
    endings += [".npz", ".keyed.png"]
    sources = {path.resolve() for path in images}
    folder = job.folder.resolve()
    for stem in stems:
        hit = next((folder / f"{stem}{ending}" for ending in endings if folder / f"{stem}{ending}" in sources), None)
        if hit is not None:
            raise KeyedXAIError(f"{printable(str(hit))} is one of the images and would be written over: choose another "
                                "--out folder, or leave out the results of an earlier run.")  # fmt: skip
