"""Exporting: a model with its saliency maps as one ONNX file that is only written once it agrees with PyTorch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from keyed_xai.artifacts.card import Card
from keyed_xai.artifacts.documents import printable
from keyed_xai.artifacts.onnx_file import METADATA_SCHEMA, OnnxFile, encode_onnx, read_onnx, write_onnx
from keyed_xai.artifacts.versions import package_versions
from keyed_xai.artifacts.weights import own_name
from keyed_xai.data import load_images
from keyed_xai.errors import ArtifactError, ModelError
from keyed_xai.export.building import ExportSettings, build_model, digest_weights
from keyed_xai.export.parity import IMAGES, Figures, Runner, check_agreement, compare, open_session, random_images
from keyed_xai.inference.runtime import Runtime
from keyed_xai.inference.sessions import first_line
from keyed_xai.models import Classifier
from keyed_xai.models.copying import copy_network
from keyed_xai.models.modes import evaluating, plain_torch
from keyed_xai.progress import QUIET, Progress
from keyed_xai.tensors import Images


@dataclass(frozen=True)
class Provenance:
    """Where an exported model comes from.

    Attributes:
        card: Card of the protected model; None without one.
        license_sha256: Digest of its license.json, hex; None without one.
    """

    card: Card | None = None
    license_sha256: str | None = None


@dataclass(frozen=True)
class ExportResult:
    """An ONNX model that agrees with PyTorch.

    Attributes:
        file: The model as it stands on the disk.
        parity: How well it agreed in this run.
    """

    file: OnnxFile = field(repr=False)
    parity: tuple[Figures, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what a document of the schema "export" says about the file."""
        return {
            "sha256": self.file.sha256,
            "bytes": len(self.file.data),
            "parity": [each.to_json() for each in self.parity],
            "metadata": self.file.metadata,
        }


@plain_torch()
def export_onnx(
    classifier: Classifier,
    path: Path,
    settings: ExportSettings | None = None,
    *,
    images: Images | None = None,
    provenance: Provenance | None = None,
    force: bool = False,
    progress: Progress = QUIET,
) -> ExportResult:
    """Write a classifier and its saliency maps as one ONNX model.

    Args:
        classifier: The classifier, in any mode, on the CPU; evaluation mode is what is exported.
        path: The file to write.
        settings: What the model is to hold; Grad-CAM in float32 by default.
        images: 12 or more real images of the classifier's size, in [0, 1], for the parity check; the first 12 are
            rounded to 8 bits. By default some that come with the package; rows of a table are random ones only.
        provenance: Goes into the metadata.
        force: Replace a file that is there.
        progress: Hears a line at each stage, and of "comparing" batches.

    Raises:
        ArtifactError: The file is there already, or cannot be written.
        ModelError: The network cannot be exported, or onnxruntime and PyTorch disagree; nothing is written then.
        ValueError: There are too few images.
    """
    classifier = copy_network(classifier)
    settings, provenance = settings or ExportSettings(), provenance or Provenance()
    _check_place(path, force=force)
    _check_images(images)
    progress.say(["Writing the gradients as operators; deep networks take a minute ..."])
    model = build_model(classifier, settings)
    progress.say(["Comparing onnxruntime with PyTorch ..."])
    parity = _measure(open_session(model.SerializeToString()), classifier, settings, images, progress)
    check_agreement(parity, settings.precision)
    progress.say(["They agree."])
    file = encode_onnx(model, _metadata(classifier, settings, provenance, parity))
    write_onnx(path, file)
    return ExportResult(file, parity)


@plain_torch()
def check_onnx(
    path: Path,
    classifier: Classifier,
    *,
    images: Images | None = None,
    progress: Progress = QUIET,
) -> ExportResult:
    """Compare an ONNX model again with the classifier it was made of, on fresh images.

    Args:
        path: File of the graph.
        classifier: The classifier, in any mode, on the CPU; evaluation mode is what is exported.
        images: Images to compare on, as for `export_onnx`.
        progress: Hears of "comparing" batches.

    Raises:
        ArtifactError: The file cannot be read, or was made of another network or other weights.
        ModelError: onnxruntime and PyTorch disagree.
    """
    _check_images(images)
    file = read_onnx(path)
    if file.metadata["weights_sha256"] != digest_weights(classifier):
        raise ArtifactError(f"{printable(str(path))} was made of other weights than the model given has.")
    runtime, settings = Runtime(file, device="cpu"), settings_of(file)

    def run(inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        return list(runtime.run(inputs["image"], inputs.get("target")).values())

    parity = _measure(run, classifier, settings, images, progress)
    check_agreement(parity, settings.precision)
    return ExportResult(file, parity)


def load_real_images(classifier: Classifier, spec: str = "builtin") -> Images:
    """Return held-out images of a classifier's size for the parity check, others each time.

    Raises:
        DataError: They cannot be read.
    """
    seed = int(torch.randint(2**31, ()).item())
    loaded = load_images(spec, classifier.input, split="held-out", limit=IMAGES, seed=seed)
    return torch.from_numpy(loaded.images).float() / 255


def settings_of(file: OnnxFile) -> ExportSettings:
    """Return what an ONNX model says that it holds."""
    said = file.metadata
    return ExportSettings(
        interpreters=tuple(said["interpreters"]),
        normalised=said["maps"] == "normalised",
        eight_bits=said["pixels"] == "uint8",
        precision=said["precision"],
    )


def _check_place(path: Path, *, force: bool) -> None:
    if path.exists() and not force:
        raise ArtifactError(f"{printable(str(path))} is there already and was left as it was: choose another name, or "
                            "pass --force (force=True in Python).")  # fmt: skip


def _check_images(images: Images | None) -> None:
    if images is not None and len(images) < IMAGES:
        raise ValueError(f"images: expected {IMAGES} or more, got {len(images)}")


def _measure(
    run: Runner,
    classifier: Classifier,
    settings: ExportSettings,
    images: Images | None,
    progress: Progress,
) -> tuple[Figures, ...]:
    generator = torch.Generator()
    generator.seed()  # fresh images each time
    compared: Mapping[str, Images] = {"random": random_images(classifier, generator)}
    if images is None and classifier.target_layer:
        images = load_real_images(classifier)
    if images is not None:
        compared = {**compared, "real": (images[:IMAGES].float() * 255).round() / 255}
    try:
        with evaluating(classifier):
            return tuple(
                compare(
                    run,
                    classifier,
                    settings.interpreters,
                    compared,
                    normalised=settings.normalised,
                    eight_bits=settings.eight_bits,
                    generator=generator,
                    progress=progress,
                )
            )
    except RuntimeError as error:  # torch's
        raise ModelError(
            f"{classifier.architecture} cannot be run in float64, which the graph is compared with: "
            f"{first_line(error)}. Its forward must keep the type of the images: no float(), and constants as buffers."
        ) from error


def _metadata(
    classifier: Classifier, settings: ExportSettings, provenance: Provenance, parity: tuple[Figures, ...]
) -> dict[str, Any]:
    spec = classifier.input
    return {
        "schema": METADATA_SCHEMA,
        "model": {
            "architecture": classifier.architecture,
            "source": classifier.source,
            "num_classes": classifier.classes,
            "input_size": list(spec.shape),
            "target_layer": own_name(classifier.target_layer),
            "label_names": list(classifier.label_names),
        },
        "interpreters": list(settings.interpreters),
        "maps": "normalised" if settings.normalised else "raw",
        "pixels": "uint8" if settings.eight_bits else "float32",
        "precision": settings.precision,
        "weights_sha256": digest_weights(classifier),
        "card": provenance.card.to_json() if provenance.card is not None else None,
        "license_sha256": provenance.license_sha256,
        "parity": [each.to_json() for each in parity],
        "versions": {**package_versions(), "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
    }
