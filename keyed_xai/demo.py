"""The main job on images and a network that come with the package: key, protect, explain, verify."""

from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keyed_xai.artifacts.card import TriggerParameters
from keyed_xai.artifacts.documents import write_atomically, write_json
from keyed_xai.artifacts.folder import LICENSE_FILE
from keyed_xai.artifacts.opening import derive_trigger, open_model
from keyed_xai.data import ImageData, load_images
from keyed_xai.explanation.explaining import explain, maps_as_shown
from keyed_xai.keys import OwnerKey, cached_owner_key
from keyed_xai.models import Classifier, load_classifier
from keyed_xai.outputs import prepare_folder
from keyed_xai.ownership.verifying import read_claim, verify
from keyed_xai.progress import QUIET, Progress
from keyed_xai.protection.protecting import ProtectSettings, choose_recipe, protect, write_protection
from keyed_xai.protection.report import render_report
from keyed_xai.reporting import pictures
from keyed_xai.reporting.names import INTERPRETER_NAMES

INTERPRETERS = ("gradcam", "vbp")
_PROBE_IMAGES = 16
_EXPLAINED = 8
_STEPS = 4000


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """What the demo leaves behind.

    Attributes:
        folder: The folder that holds it.
        report: Report of the protection.
        verify: Report of verify on the protected model.
        control: Report of verify on the unprotected model.
    """

    folder: Path
    report: dict[str, Any]
    verify: dict[str, Any]
    control: dict[str, Any]


def demo_classifier() -> Classifier:
    """Return the small Fashion-MNIST network that comes with the package."""
    with resources.as_file(resources.files("keyed_xai") / "assets" / "fashion-mnist.safetensors") as path:
        return load_classifier(path)


def run_demo(
    folder: Path,
    *,
    steps: int | None = None,
    wrong_keys: int = 1000,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = QUIET,
) -> Demonstration:
    """Run the main job and leave every file in a folder; an owner key that is there is used again.

    Args:
        folder: Made if need be; files of an earlier demo are replaced.
        steps: Training steps; by default as many as two cores do in two minutes.
        wrong_keys: Fresh wrong keys tried in the report; with some, the 256 one-bit neighbours of the key too.
        seed: Seed of training.
        device: Where to train.
        progress: Hears of protecting and of verifying, as `protect` and `verify` tell it.

    Raises:
        KeyedXAIError: The folder cannot be written.
    """
    prepare_folder(folder)
    key = cached_owner_key(folder / "owner.pem")
    classifier = demo_classifier()
    train_data, held_out = (_load(classifier, "train"), _load(classifier, "held-out"))
    training = choose_recipe(classifier, INTERPRETERS, train_data)
    settings = ProtectSettings(
        interpreters=INTERPRETERS,
        training=replace(training, steps=steps or _STEPS, seed=seed),
        wrong_keys=wrong_keys,
        flipped_keys=256 if wrong_keys else 0,
        held_out_images=len(held_out),
    )
    protection = protect(
        classifier,
        key,
        train_data,
        held_out,
        settings,
        device=device,
        progress=progress,
    )
    written = write_protection(protection, folder / "fashion-mnist.keyed", key, force=True)
    protected, _ = open_model(written.folder)
    claim = read_claim(written.folder, key=key, license_path=written.folder / LICENSE_FILE)
    probe = replace(held_out, images=held_out.images[-_PROBE_IMAGES:], labels=None)
    shown = verify(protected, claim, probe, progress=progress).to_json("fashion-mnist.keyed")
    control = verify(classifier, claim, probe).to_json("the unprotected network")
    write_json(folder / "verify.json", shown, schema="verify-report")
    write_json(folder / "verify-unprotected.json", control, schema="verify-report")
    drawn = protection.pictures | {"explanations": _explain(protected, key, held_out, protection.card.trigger)}
    write_atomically(folder / "explanations.png", drawn["explanations"])
    html = render_report(protection.report, pictures=drawn, verify=shown)
    write_atomically(folder / "report.html", html.encode())
    return Demonstration(folder=folder, report=protection.report, verify=shown, control=control)


def _load(classifier: Classifier, split: Literal["train", "held-out"]) -> ImageData:
    return load_images("builtin", classifier.input, split=split)


def _explain(classifier: Classifier, key: OwnerKey, data: ImageData, trigger: TriggerParameters) -> bytes:
    """Return a picture of what a licensee sees beside what everybody else sees, at each interpreter's resolution."""
    images, _ = data.batch(np.arange(_EXPLAINED))
    with_key = explain(classifier, images, trigger=derive_trigger(key, trigger), interpreters=INTERPRETERS)
    without = explain(classifier, images, interpreters=INTERPRETERS, labels=with_key.explained)
    shown = [maps_as_shown(classifier, each.maps) for each in (with_key, without)]
    rows = []
    for number, image in enumerate(images.numpy()):
        maps = [each[name][number].numpy() for name in INTERPRETERS for each in shown]
        label = data.classes[int(with_key.predicted[number])]
        rows.append((label, [image, *(pictures.blend(image, each) for each in maps)]))
    titles = ["image", *(f"{INTERPRETER_NAMES[name]}\n{how}" for name in INTERPRETERS for how in ("key", "no key"))]
    return pictures.strip(rows, titles=titles)
