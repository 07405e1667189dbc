"""From image files to files that show their saliency maps.

A trigger is a bearer credential: whoever sees one keyed image next to its original can subtract them. Pictures are
therefore drawn over the original, arrays hold logits and maps alone, and a keyed image is written only when a job asks
for it by name.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from keyed_xai.artifacts.documents import printable, write_atomically, write_openly
from keyed_xai.batches import batches
from keyed_xai.data import list_images, read_image
from keyed_xai.errors import DataError, KeyedXAIError
from keyed_xai.explanation.explaining import BATCH, Explanation, explain, maps_as_shown
from keyed_xai.models import Classifier
from keyed_xai.outputs import prepare_folder
from keyed_xai.progress import QUIET, Progress
from keyed_xai.reporting import pictures
from keyed_xai.reporting.names import INTERPRETER_NAMES, say_probability
from keyed_xai.tensors import SaliencyMaps
from keyed_xai.triggers import Trigger

_PANEL_PIXELS = 256.0
_LONGEST_NAME = 32  # letters, in a picture's heading
_OWN_SCALE = "Each map has a scale of its own, from its lowest to its highest value (in fine maps but for .5 %)."
_EVENED = "VisualBackProp is drawn without the checkerboard that its scaling up leaves; the .npz has the raw map."
_Pixels = NDArray[np.uint8]
_Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class MapJob:
    """What is to be written.

    Attributes:
        folder: Folder to write to; made if it is not there. Files of an earlier run are replaced.
        interpreters: Interpreters whose maps are written.
        trigger: Trigger of the key; None for the maps that everybody sees.
        target: Class explained; None for each image's predicted one.
        write_keyed: Also write the keyed image. It gives the trigger away to whoever has the original.
    """

    folder: Path
    interpreters: tuple[str, ...]
    trigger: Trigger | None = field(default=None, repr=False)
    target: int | None = None
    write_keyed: bool = False

    def __post_init__(self) -> None:
        """Check that what needs a trigger has one."""
        if self.trigger is None and self.write_keyed:
            raise ValueError("write_keyed needs a trigger")


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
    progress: Progress = QUIET,
) -> WrittenMaps:
    """Explain image files and write their maps; images that cannot be read are reported and the others done.

    For each image there are `<stem>.npz` (raw maps by interpreter, `logits` and `target`) and `<stem>.png`, a picture
    of the image and its maps; where the job has a trigger, of those with it and without.

    Args:
        classifier: The classifier, in evaluation mode.
        images: Image files.
        job: What to write.
        progress: Hears of "explaining" images.

    Raises:
        ArtifactError: A file cannot be written.
        KeyedXAIError: An image lies where a result would, or the model takes other images than grey or RGB.
        ModelError: The model lacks a layer that the maps need, or its logits are not finite.
        ValueError: An interpreter or the target is unknown.
    """
    stems = unique_stems(images)
    _check_new(images, stems, job)
    if classifier.input.channels not in (1, 3):
        raise KeyedXAIError(f"The model takes {classifier.input.channels} channels, and picture files have 1 or 3: "
                            "explain arrays in Python with keyed_xai.explain.")  # fmt: skip
    prepare_folder(job.folder)
    written = WrittenMaps([], [])
    for some in batches(len(images), BATCH):
        paths = images[some]
        pixels = _read_batch(paths, classifier, written.broken)
        if pixels:
            names = {path: stem for path, stem in zip(paths, stems[some], strict=True)}
            written.images.extend(_write_batch(classifier, pixels, names, job))
        progress.advance("explaining", some.stop, len(images))
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
    explanations = {"saliency map": found}
    if job.trigger is not None:
        unkeyed = explain(classifier, originals, interpreters=job.interpreters, labels=found.explained)
        explanations = {"with the key": found, "without the key": unkeyed}
    shown = {title: maps_as_shown(classifier, each.maps) for title, each in explanations.items()}
    if job.write_keyed and job.trigger is not None:
        for path, keyed in zip(pixels, job.trigger.apply(originals).numpy(), strict=True):
            write_openly(job.folder / f"{stems[path]}.keyed.png", _encode_image(keyed))
    entries = []
    for index, path in enumerate(pixels):
        entry = _describe(path, found, index, classifier)
        arrays, picture = (job.folder / f"{stems[path]}.{ending}" for ending in ("npz", "png"))
        write_atomically(arrays, _encode_arrays(found, index))
        panels = {title: _one_image(maps, index) for title, maps in shown.items()}
        write_atomically(
            picture, _draw(originals[index].numpy(), panels, f"{_shorten(path.name)}: {describe_entry(entry)}")
        )
        entries.append(entry | {"interpreters": list(job.interpreters), "picture": str(picture), "arrays": str(arrays)})
    return entries


def _one_image(maps: Mapping[str, SaliencyMaps], index: int) -> dict[str, _Floats]:
    return {name: each[index].cpu().numpy() for name, each in maps.items()}


def _shorten(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _draw(image: _Floats, panels: Mapping[str, Mapping[str, _Floats]], heading: str) -> bytes:
    """Return a picture of an image and, by title and interpreter, of its maps over it."""
    names = list(next(iter(panels.values())))
    rows: list[tuple[str, list[NDArray[Any]]]] = [
        (INTERPRETER_NAMES[name], [image, *(pictures.blend(image, maps[name]) for maps in panels.values())])
        for name in names
    ]
    notes = [_OWN_SCALE, *([_EVENED] if "vbp" in names else [])]
    return pictures.strip(rows, titles=["image", *panels], heading=heading, notes=notes, panel=_PANEL_PIXELS)


def describe_entry(entry: Mapping[str, Any]) -> str:
    """Return in words what was predicted of an image, and what was explained where that is another class."""
    predicted, explained = (_in_words(entry[role]) for role in ("predicted", "explained"))
    same = entry["predicted"]["index"] == entry["explained"]["index"]
    return f"predicted {predicted}" if same else f"explained {explained}, predicted {predicted}"


def _in_words(found: Mapping[str, Any]) -> str:
    words = found.get("name", f"class {found['index']}")
    return f"{words} ({say_probability(found['probability'])})"


def _describe(path: Path, found: Explanation, index: int, classifier: Classifier) -> dict[str, Any]:
    logits = found.logits[index].double()
    probabilities = logits.sigmoid() if classifier.multi_label else logits.softmax(0)

    def describe(number: int) -> dict[str, Any]:
        name = {"name": classifier.label_names[number]} if classifier.label_names else {}
        return {"index": number, **name, "probability": float(probabilities[number])}

    predicted, explained = describe(int(found.predicted[index])), describe(int(found.explained[index]))
    return {"image": printable(str(path)), "predicted": predicted, "explained": explained}


def _encode_arrays(found: Explanation, index: int) -> bytes:
    buffer = io.BytesIO()
    arrays: dict[str, NDArray[Any]] = {**_one_image(found.maps, index)}
    arrays |= {"logits": found.logits[index].cpu().numpy(), "target": np.array(int(found.explained[index]))}
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type] # numpy's stub takes the first for a flag
    return buffer.getvalue()


def _encode_image(image: _Floats) -> bytes:
    pixels = np.round(255 * image).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _check_new(images: Sequence[Path], stems: Sequence[str], job: MapJob) -> None:
    """Refuse a job whose results would land on its own images."""
    endings = (".npz", ".png", ".keyed.png")
    sources = {path.resolve() for path in images}
    folder = job.folder.resolve()
    for stem in stems:
        hit = next((folder / f"{stem}{ending}" for ending in endings if folder / f"{stem}{ending}" in sources), None)
        if hit is not None:
            raise KeyedXAIError(f"{printable(str(hit))} is one of the images and would be written over: choose another "
                                "--out folder, or leave out the results of an earlier run.")  # fmt: skip
