"""One run of all figures of serving: graphs, a loaded server, image files. Finished parts are kept on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from keyed_xai.artifacts.documents import read_json, write_json
from keyed_xai.artifacts.folder import LICENSE_FILE
from keyed_xai.artifacts.license import digest
from keyed_xai.artifacts.opening import derive_trigger, open_model
from keyed_xai.artifacts.versions import package_versions
from keyed_xai.data import ImageData, load_images
from keyed_xai.demo import demo_classifier, run_demo
from keyed_xai.export.building import ExportSettings
from keyed_xai.export.exporting import export_onnx
from keyed_xai.keys import OwnerKey, read_owner_key
from keyed_xai.models import Classifier, InputSpec, load_classifier
from keyed_xai.progress import QUIET, Progress
from keyed_xai.saliency import MapLayers
from keyed_xai.saliency.pooled import PooledSaliency
from keyed_xai.training.references import choose_settings, plan_for_images
from keyed_xai_benchmarks.cached import cached_reference
from keyed_xai_benchmarks.serving import ServingSettings, measure_network, render_networks
from keyed_xai_benchmarks.serving_load import (
    LoadSettings,
    measure_files,
    measure_load,
    render_files,
    render_load,
    running_server,
)

SCHEMA = "keyed-xai/serving-figures/v1"
PARTS = ("graphs", "load", "files")
_SIDE = 224
_FITTED_SIDE = 64
_SERVED_IMAGES = 200


@dataclass(frozen=True)
class Served:
    """A protected model that is served.

    Attributes:
        folder: Folder of the model.
        reference: Weights before protection.
        key: The owner's key.
    """

    folder: Path
    reference: Path
    key: OwnerKey = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class ServingRun:
    """What is measured, and where results go.

    Attributes:
        folder: Where results are kept; it exists.
        graphs: How graphs are measured.
        load: How the server is loaded.
        architectures: Networks whose graphs are measured.
        models: Weights of some of them; the others are fitted to the images for one pass at 64 px.
        data: SPEC of the images that graphs are compared on.
        served: What is served; None has the demo made first.
        served_data: SPEC of the images that the server is asked about.
    """

    folder: Path
    graphs: ServingSettings
    load: LoadSettings
    architectures: Sequence[str]
    models: Mapping[str, Path]
    data: str
    served: Served | None
    served_data: str


def measure(run: ServingRun, parts: Sequence[str] = PARTS, *, progress: Progress = QUIET) -> dict[str, Any]:
    """Return a document of the schema "serving-figures", with parts of earlier runs with the same settings.

    Args:
        run: What to measure.
        parts: Names in PARTS.
        progress: Hears what is done next.
    """
    document = _start(run)
    if "graphs" in parts:
        for arch in run.architectures:
            if arch not in document["networks"]:
                document["networks"][arch] = _measure_graphs(run, arch, progress)
                _keep(run, document)
    missing = [part for part in ("load", "files") if part in parts and document[part] is None]
    if missing:
        document.update(_measure_server(run, missing, progress))
        _keep(run, document)
    return document


def render(document: Mapping[str, Any]) -> str:
    """Return a document's figures as Markdown."""
    pieces = []
    if document["networks"]:
        pieces.append(render_networks(document["networks"], ServingSettings(**document["settings"]["graphs"])))
    if document["load"] is not None:
        pieces.append(f"### Many clients at once\n\n{render_load(document['load'])}")
    if document["files"] is not None:
        pieces.append(f"### Image files through the server\n\n{render_files(document['files'])}")
    return "\n".join(pieces)


def _start(run: ServingRun) -> dict[str, Any]:
    """Return the document of an earlier run with the same settings, or an empty one."""
    settings = {
        "graphs": run.graphs.to_json(),
        "load": asdict(run.load),
        "data": run.data,
        "models": {arch: digest(path) for arch, path in sorted(run.models.items())},
        "served": digest(run.served.folder / LICENSE_FILE) if run.served else "demo",
        "served_data": run.served_data,
    }
    path = run.folder / "serving.json"
    if path.exists():
        cached = read_json(path, "serving-figures")
        if cached["settings"] == settings and cached["versions"] == package_versions():
            return cached
    return {
        "schema": SCHEMA,
        "networks": {},
        "load": None,
        "files": None,
        "settings": settings,
        "versions": package_versions(),
    }


def _keep(run: ServingRun, document: Mapping[str, Any]) -> None:
    write_json(run.folder / "serving.json", document, schema="serving-figures")


def _measure_graphs(run: ServingRun, arch: str, progress: Progress) -> dict[str, Any]:
    progress.advance(f"{arch}: weights", 0, None)
    classifier = _trained(run, arch)
    data = _load(run.data, classifier.input, run.graphs.images)
    images, _ = data.batch(np.arange(min(len(data), run.graphs.images)))
    return measure_network(classifier, images, run.graphs, progress=progress)


def _trained(run: ServingRun, arch: str) -> Classifier:
    path = run.models.get(arch)
    if path is None:
        path = run.folder / f"{arch}-{_FITTED_SIDE}.safetensors"
        model_spec = plan_for_images(arch, side=_FITTED_SIDE)
        spec = model_spec.input
        train = load_images(run.data, spec, split="train")
        held_out = _load(run.data, spec, 200)
        cached_reference(
            path,
            model_spec,
            (train, held_out),
            lambda classifier: replace(choose_settings(classifier, len(train)), epochs=1),
            device=run.graphs.device,
        )
    return load_classifier(path, arch=arch, input_size=_SIDE)


def _measure_server(run: ServingRun, parts: Sequence[str], progress: Progress) -> dict[str, Any]:
    served = run.served
    if served is None:
        progress.advance("making the demo's protected model", 0, None)
        served = _demo(run.folder / "demo")
    classifier, card = open_model(served.folder)
    reference = demo_classifier() if run.served is None else load_classifier(served.reference)
    assert card is not None  # a protected model has one
    data = _load(run.served_data, classifier.input, _SERVED_IMAGES)
    images, _ = data.batch(np.arange(len(data)))
    model = run.folder / "served.onnx"
    export_onnx(classifier, model, ExportSettings(interpreters=card.interpreters), images=images, force=True)
    trigger = derive_trigger(served.key, card.trigger)
    found: dict[str, Any] = {}
    with running_server(model, threads=run.load.threads, device=run.graphs.device) as address:
        if "files" in parts:
            progress.advance("sending image files", 0, None)
            view = PooledSaliency(card.interpreters, MapLayers(reference.target_layer, reference.taps), card.grid)
            found["files"] = measure_files(address, model.stem, reference, view, data, trigger)
        if "load" in parts:
            progress.advance(f"{run.load.clients} clients for {run.load.seconds:.0f} seconds", 0, None)
            found["load"] = measure_load(address, model.stem, images, run.load)
    return found


def _demo(folder: Path) -> Served:
    protected = folder / "fashion-mnist.keyed"
    if not (folder / "report.html").exists():  # written last
        run_demo(folder, wrong_keys=0)
    return Served(protected, protected, read_owner_key(folder / "owner.pem"))


def _load(spec: str, images: InputSpec, count: int) -> ImageData:
    return load_images(spec, images, split="held-out", limit=count)
