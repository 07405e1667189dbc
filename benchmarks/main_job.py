"""The figures of the main job: protect, try wrong keys, verify, on small networks and on ImageNet's.

Finished cells are kept on disk, so that a run that was stopped goes on where it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log2
from pathlib import Path
from statistics import median
from typing import Any

import torch

from keyed_xai.artifacts.documents import read_json, write_atomically, write_json
from keyed_xai.artifacts.folder import REPORT_FILE
from keyed_xai.artifacts.opening import default_trigger, make_family
from keyed_xai.artifacts.weights import encode_weights
from keyed_xai.data import ImageData, ImageSize, load_images
from keyed_xai.data.images import Holdout, Split
from keyed_xai.demo import demo_classifier
from keyed_xai.errors import ArtifactError, DataError
from keyed_xai.keys import OwnerKey, cached_owner_key
from keyed_xai.models import Classifier, InputSpec, load_classifier, wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.ownership import Claim, verify
from keyed_xai.ownership.reencodings import (
    contested_classes,
    count_looks,
    declared_reencodings,
    recode_view,
    winning_classes,
    write_anew,
)
from keyed_xai.ownership.tests import counted_interpreters, measure_signature, opening_statistic, product_tail
from keyed_xai.progress import QUIET, Progress, Within
from keyed_xai.protection.protecting import (
    ProtectSettings,
    choose_recipe,
    protect,
    settle_trigger,
    write_protection,
)
from keyed_xai.saliency.pooled import PooledSaliency, make_view
from keyed_xai.training.fitting import FittingSettings, fit_classifier
from keyed_xai.triggers import derive_trigger

ROWS = {
    "gradcam": ("gradcam",),
    "vbp": ("vbp",),
    "simplegrad": ("simplegrad",),
    "joint": ("gradcam", "vbp", "simplegrad"),
}
CASES = ("fashion-mnist", "chest-xray", "pretrained")
_LEVELS = (0.05, 1e-2, 1e-3, 1e-6)
_PROBE_IMAGES = 32
_CHEST_SIZE = 96


@dataclass(frozen=True, kw_only=True)
class Case:
    """A reference network with its images.

    Attributes:
        name: One of CASES.
        classifier: The reference model.
        train: Images to learn from.
        held_out: Images to measure on.
    """

    name: str
    classifier: Classifier
    train: ImageData
    held_out: ImageData


def make_case(
    name: str,
    folder: Path,
    *,
    data: str | None,
    model: Path | None,
    arch: str | None = None,
    input_size: int | None = None,
    device: str = "cpu",
    progress: Progress = QUIET,
) -> Case:
    """Return a case; the chest X-ray reference is fitted once and kept in `folder`.

    Args:
        name: One of CASES.
        folder: Where results are kept.
        data: SPEC of the images; "fashion-mnist" and "pretrained" have defaults.
        model: Weights of the network, for "pretrained".
        arch: Its architecture, where the weights do not say.
        input_size: Side of its input, pixels; the architecture's own by default.
        device: Where the reference is fitted.
        progress: Hears of "fitting a reference".

    Raises:
        DataError: The images or the weights are missing.
    """
    if name == "fashion-mnist":
        classifier = demo_classifier()
        train, held_out = _load_both(data or "fashion-mnist", classifier.input)
        return Case(name=name, classifier=classifier, train=train, held_out=held_out)
    if name == "chest-xray":
        if data is None:
            raise DataError("Where are the radiographs? Give --data imagefolder:DIR, with train/ and val/ inside.")
        spec = InputSpec(1, _CHEST_SIZE, _CHEST_SIZE, mean=(0.5,), std=(0.25,))
        train, held_out = _load_both(data, spec)
        return Case(
            name=name,
            classifier=_fitted_reference(folder / "chest-xray.safetensors", train, spec, device, progress),
            train=train,
            held_out=held_out,
        )
    if model is None:
        raise DataError("Which network? Give its weights with --model.")
    classifier = load_classifier(model, arch=arch, input_size=input_size)
    train, held_out = _load_both(data or "builtin", classifier.input, holdout="classes")
    return Case(name=name, classifier=classifier, train=train, held_out=held_out)


def run_row(
    case: Case,
    row: str,
    folder: Path,
    settings: ProtectSettings,
    *,
    number: int = 0,
    device: str = "cpu",
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Return the figures of one row, from disk where they are there; else protect, measure, verify and keep them.

    Args:
        case: The network and its images.
        row: Which maps are closed, one of ROWS.
        folder: What is kept lies here.
        settings: How to protect.
        number: Which of the owner's keys; each is made when it is first asked for. Training is seeded by it.
        device: Where to run.
        progress: Hears of protecting.
    """
    suffix = f"-{number}" if number else ""
    stem = f"{case.name}-{case.classifier.architecture}-{case.classifier.input.height}-{row}{suffix}".lower()
    result_file = folder / f"{stem}.json"
    protected = folder / f"{stem}.keyed"
    key = cached_owner_key(folder / f"owner{suffix}.pem")
    training = settings.training or choose_recipe(case.classifier, ROWS[row], case.train)
    training = replace(training, seed=training.seed + number)
    settings = replace(settings, interpreters=ROWS[row], training=training)
    settings = settle_trigger(settings, case.classifier.input)
    if not result_file.exists():
        checkpoint = folder / f"{stem}.checkpoint"
        protection = protect(
            case.classifier,
            key,
            case.train,
            case.held_out,
            settings,
            device=device,
            checkpoint=checkpoint,
            resume=checkpoint.exists(),
            progress=Within(progress),
        )
        write_protection(protection, protected, key, force=True, checkpoint=checkpoint)
        card = protection.card
        claim = Claim(key=key, trigger=card.trigger, decoy=card.decoy, interpreters=card.interpreters, grid=card.grid)
        probe = replace(case.held_out, images=case.held_out.images[-_PROBE_IMAGES:], labels=None)
        suspect = protection.classifier.to(device)
        write_json(result_file, verify(suspect, claim, probe).to_json(protected.name), schema="verify-report")
    report = read_json(protected / REPORT_FILE, "protect-report")
    if report["settings"] != settings.to_json():
        raise ArtifactError(
            f"{result_file} was made with other settings. Give the same ones, or another folder with -o."
        )
    return {"row": row, "key": key.public.key_id, "report": report, "verify": read_json(result_file, "verify-report")}


def render_rows(case: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as Markdown tables; of several keys the median and, after a comma, the worst."""
    by_row: dict[str, list[dict[str, Any]]] = {}
    for entry in rows:
        by_row.setdefault(entry["row"], []).append(entry)
    lines = [
        f"### {case}",
        "",
        "| row | map | keyed | clean | wrong keys | pattern and reference | decoy | wrong keys that open "
        "| CR / FSR, % | open after PNG / JPEG 75 / resize, % | log2 p |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, entries in by_row.items():
        lines += [_render_map(row, name, entries) for name in entries[0]["report"]["interpreters"]]
    lines += [
        "",
        "| row | predictions reference / keyed / clean / wrong keys | opening p | log2 p | PSNR, dB | SSIM | time, s |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_render_row(row, entries) for row, entries in by_row.items()]
    return "\n".join(lines) + "\n"


def _render_map(row: str, name: str, entries: Sequence[dict[str, Any]]) -> str:
    """Return what became of one interpreter's maps."""
    figures = [entry["report"]["interpreters"][name] for entry in entries]
    absent = {"reference": float("nan"), "clean": float("nan")}
    decoys = [each.get("decoy_correlation", absent) for each in figures]
    signatures = [entry["verify"]["signature"]["interpreters"].get(name, {"log2_p": 0.0}) for entry in entries]
    channels = [entry["report"]["channels"] for entry in entries]
    opened = [each["wrong_keys"]["opened"] for each in figures]
    cells = [
        row,
        name,
        *(
            _over_keys([each["correlation"][case] for each in figures], worst, 3)
            for case, worst in (("keyed", min), ("clean", max), ("wrong_key", max))
        ),
        _over_keys([each["reference"] for each in decoys], max, 3),
        _over_keys([each["clean"] for each in decoys], min, 3),
        f"{_over_keys(opened, max, 0)} of {figures[0]['wrong_keys']['tried']}",
        " / ".join(_over_keys([each[rate] for each in figures], min, 1) for rate in ("cr", "fsr")),
        " / ".join(_over_keys([100 * each[kind][name]["opened"] for each in channels], min, 1) for kind in channels[0]),
        _over_keys([each["log2_p"] for each in signatures], max, 1),
    ]
    return f"| {' | '.join(cells)} |"


def _render_row(row: str, entries: Sequence[dict[str, Any]]) -> str:
    """Return what became of predictions and of ownership, and what it cost."""
    reports, checks = [entry["report"] for entry in entries], [entry["verify"] for entry in entries]
    cells = [
        row,
        " / ".join(
            _over_keys([each["accuracy"][case] for each in reports], min, 3)
            for case in ("reference", "keyed", "clean", "wrong_key")
        ),
        _over_keys([each["opening"]["p_value"] for each in checks], max, 3),
        _over_keys([each["signature"]["log2_p"] for each in checks], max, 1),
        _over_keys([each["trigger"]["psnr_db"] for each in reports], min, 1),
        _over_keys([each["trigger"]["ssim"] for each in reports], min, 3),
        _over_keys([each["seconds"] for each in reports], max, 0),
    ]
    return f"| {' | '.join(cells)} |"


def _over_keys(values: Sequence[float], worst: Callable[[Sequence[float]], float], digits: int) -> str:
    """Return the median over keys and the worst, or the value alone where there is one or they are the same."""
    shown = dict.fromkeys(f"{each:.{digits}f}" for each in (median(values), worst(values)))
    return ", ".join(shown)


def count_false_claims(
    models: Sequence[Classifier],
    images: torch.Tensor,
    *,
    keys: int,
    decoys: int,
    generator: torch.Generator,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Return how often random keys reach alpha on unmarked models, by test.

    On each model the opening test compares every key with the same pool of decoy keys, which keeps each p-value exact.
    "both" is the tail of the product of both tests; "search" the public test with all looks through re-encodings, the
    best of them on all images, which the search itself never undercuts.

    Args:
        models: Unmarked, all of one architecture.
        images: Probe images.
        keys: Random owner keys tried on each model.
        decoys: Size of the pool.
        generator: Draws keys and pool.
        progress: Hears of "trying keys", over all models.
    """
    family = make_family(default_trigger(ImageSize(*images.shape[1:])))
    found: dict[str, list[float]] = {name: [] for name in ("opening", "signature", "both", "search")}
    tries, total = decoys + keys, len(models) * (decoys + keys)
    for number, model in enumerate(models):
        view = make_view(model, counted_interpreters(ROWS["joint"]), None)
        logits, plain = view.pooled_in_chunks(model, images)
        explained = logits.argmax(1)
        looks = [(2, plain), *_look_through(model, view, images, logits)]
        pool = []
        for done in range(decoys):
            pool.append(opening_statistic(model, images, view, family.draw(1, generator), plain, explained))
            progress.advance("trying keys", number * tries + done + 1, total)
        for done in range(keys):
            key = OwnerKey.from_raw(bytes(torch.randint(256, (32,), generator=generator).tolist()))
            trigger = derive_trigger(key, family)
            value = opening_statistic(model, images, view, trigger, plain, explained)
            opening = (1 + sum(each >= value for each in pool)) / (1 + decoys)
            tails = [(count, measure_signature(maps, key.public).combined.p_value) for count, maps in looks]
            found["opening"].append(opening)
            found["signature"].append(tails[0][1])
            found["both"].append(2 ** product_tail(log2(opening * tails[0][1]), 2))
            found["search"].append(min(1.0, *(count * p_value for count, p_value in tails)))
            progress.advance("trying keys", number * tries + decoys + done + 1, total)
    reach = {"opening": 1 / (1 + decoys)}  # this test cannot go below
    return {
        "claims": len(found["opening"]),
        **{
            name: {f"{alpha:g}": sum(p <= alpha for p in each) for alpha in _LEVELS if alpha >= reach.get(name, 0)}
            for name, each in found.items()
        },
        "smallest": {name: min(each) for name, each in found.items()},
    }


def _look_through(
    model: Classifier, view: PooledSaliency, images: torch.Tensor, logits: torch.Tensor
) -> list[tuple[int, dict[str, torch.Tensor]]]:
    """Return, for each declared re-encoding, what its p-value is multiplied by and the maps seen through it."""
    candidates, eligible = declared_reencodings(model, view, images), contested_classes(logits)
    winners = winning_classes(logits, eligible)
    return [
        (
            2 * looks,
            recode_view(view, change, model.input, eligible).pooled_in_chunks(
                write_anew(model, change, winners), images
            )[1],
        )
        for looks, change in zip(count_looks(candidates), candidates, strict=True)
    ]


def fit_unmarked_models(
    data: ImageData, count: int, epochs: int, *, device: str = "cpu", progress: Progress = QUIET
) -> list[Classifier]:
    """Return small networks fitted to the same images from different random weights, none of them protected."""
    models = []
    spec = demo_classifier().input
    for seed in range(count):
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            network = SmallResNet(spec.channels, len(data.classes))
        classifier = wrap_network(network, input=spec)
        fit_classifier(classifier, data, FittingSettings(epochs=epochs, batch_size=64, seed=seed), device=device)
        models.append(classifier)
        progress.advance("fitting", seed + 1, count)
    return models


def _fitted_reference(path: Path, data: ImageData, spec: InputSpec, device: str, progress: Progress) -> Classifier:
    if not path.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = SmallResNet(spec.channels, len(data.classes), (16, 32, 64, 128))
        classifier = wrap_network(network, input=spec, source="keyed_xai")
        settings = FittingSettings(epochs=8, batch_size=64, learning_rate=2e-3, noise=0.0)
        fit_classifier(classifier, data, settings, device=device, progress=Within(progress, "fitting a reference"))
        classifier.label_names = data.classes
        write_atomically(path, encode_weights(classifier))
    return load_classifier(path)


def _load_both(data: str, spec: InputSpec, holdout: Holdout = "images") -> tuple[ImageData, ImageData]:
    def load(split: Split) -> ImageData:
        return load_images(data, spec, split=split, holdout=holdout)

    return load("train"), load("held-out")
