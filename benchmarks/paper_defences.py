"""The paper's tables of defences, made again beside what it says: tables 2 and 3, and figure 5.

Source: Fang & Choromanska, AAAI 2022, section 5. Table 2 is taken as backdoor detectors, table 3 as denoising by total
variation, and figure 5 as activation clusters (a) and fine-pruning (b). Each runs on attacked models beside positive
controls and clean networks with the same settings. Finished rows are files on disk, and a run that was stopped goes on.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keyed_xai.artifacts.documents import printable, read_json, write_json
from keyed_xai.artifacts.versions import package_versions
from keyed_xai.auditing.catalogue import find_entry, run_entry
from keyed_xai.auditing.subject import measure_state
from keyed_xai.backdoors.evaluation import Threshold, evaluate, measure_maps
from keyed_xai.data.splits import digest_data, digest_network
from keyed_xai.errors import ArtifactError
from keyed_xai.metrics import paper_thresholds
from keyed_xai.models import Classifier
from keyed_xai.progress import QUIET, Progress, Within
from keyed_xai.tensors import Images
from keyed_xai.threats.attempt import Attacker, view_of
from keyed_xai.threats.detection.activation_clustering import ClusteringSettings, cluster_pairs, reduce_features
from keyed_xai.threats.detection.features import read_hidden
from keyed_xai.threats.removal.denoising import DenoisingSettings, denoise_inputs
from keyed_xai.threats.removal.fine_pruning import FinePruningSettings, fine_prune
from keyed_xai_benchmarks.defence_targets import (
    BACKDOORS,
    Attacked,
    Data,
    Target,
    has_size,
    input_sizes,
    make_targets,
    open_attacked,
)
from keyed_xai_benchmarks.paper_tables import TableSettings, load_split

DEFENCES_SCHEMA = "keyed-xai/paper-defences/v1"
DETECTORS = ("neural-cleanse", "activation-clustering", "spectral-signatures")
TITLES = {
    "table2": "Table 2: backdoor detectors",
    "table3": "Table 3: denoising by total variation",
    "figure5": "Figure 5: activation clusters (a) and fine-pruning (b)",
}
OF_THE_PAPER = {
    "table2": (
        "The paper: the anomaly index of Neural Cleanse is below 2 on every attacked model; Activation Clustering, on "
        "320 pairs of clean and triggered images, calls them separable under 5 % misclustering and overlapping over "
        "30 %. Its figures for single models are not known to us (-), and Spectral Signatures are not among its "
        "defences."
    ),
    "table3": (
        "The paper: denoised as strongly as an AUROC of .80 allows (DenseNet121 on ChestX-ray14), 15.7 to 77.9 % of "
        "the inputs are still fooled. Which model has which figure is not known to us."
    ),
    "figure5": (
        "The paper: fine-pruning leaves FSR high; 320 pairs of clean and triggered images are separable under 5 % "
        "misclustering and overlap over 30 %. The points of its figure are not known to us (-)."
    ),
}
READINGS = {
    "table2": "We take its table 2 as what backdoor detectors say of each attacked model.",
    "table3": "We take its table 3 as what is left of FSR behind denoised inputs.",
    "figure5": "We take its figure 5a as the clusters of one model in two dimensions, 5b as fine-pruning by shares.",
}
SHOWN_SHARES = (0.0, 0.5, 0.9, 0.96)
"""Shares of channels pruned that figure 5's table shows; the picture shows all."""
_PAIRS = 320
_INDEX_BELOW, _FSR_LEFT, _AUROC = 2.0, (15.7, 77.9), 0.8


@dataclass(frozen=True)
class DefenceSettings:
    """Which defences are run, on what.

    Attributes:
        table: "table2", "table3" or "figure5".
        shared: Data, held-out images, seed and references, as the attacks take them.
        floor: Lowest score that denoising may leave, a fraction; None accepts a loss of .02.
    """

    table: str
    shared: TableSettings
    floor: float | None = None

    def __post_init__(self) -> None:
        """Check the name."""
        if self.table not in TITLES:
            raise ValueError(f"table: expected one of {', '.join(TITLES)}; got {self.table!r}")


def run_defences(
    folders: Sequence[Path],
    settings: DefenceSettings,
    out: Path,
    *,
    device: str = "cpu",
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Return a table as a document that fits the schema "paper-defences"; finished rows are taken from disk.

    Args:
        folders: Folders of attacked models, at least one.
        settings: What is run.
        out: Where controls and rows are kept.
        device: Device to run on.
        progress: Hears of "fitting a control", of "models" with images of one size, and of "defending" one.

    Raises:
        ArtifactError: A folder is not an attacked model's, two have the same name, a reference is missing, or a
            finished row was made with other settings.
        ModelError: A model cannot be read.
        TrainingError: The images do not fit the models.
    """
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    described: dict[str, Any] = {}
    attacked = [open_attacked(folder, settings.shared, out) for folder in folders]
    _check_names(attacked)
    for spec in input_sizes(attacked):
        train_data = load_split(settings.shared, spec, "train", settings.shared.limit)
        data = train_data, load_split(settings.shared, spec, "held-out", settings.shared.held_out)
        described = described or _describe_data(data)
        targets, note = make_targets(
            [each for each in attacked if has_size(each, spec)],
            data,
            settings.shared,
            out,
            device=device,
            references=settings.table == "table2",
            progress=progress,
        )
        known = digest_data(data[0]), digest_data(data[1])
        for done, target in enumerate(targets):
            progress.advance("models", done, len(targets))
            rows.append(_keep_row(target, known, settings, out, progress))
        progress.advance("models", len(targets), len(targets))
        notes += [note] if note else []
    return {
        "schema": DEFENCES_SCHEMA,
        "table": settings.table,
        "paper": OF_THE_PAPER[settings.table],
        "reading": READINGS[settings.table],
        "data": described,
        "seed": settings.shared.seed,
        "rows": rows,
        "notes": notes,
        "versions": package_versions(),
    }


def measure_fooling(model: Classifier, target: Target) -> dict[str, dict[str, float]]:
    """Return, by interpreter, CR and FSR in percent of a copy of an attacked model at the paper's thresholds.

    Args:
        model: The model, on the target's device, such as a pruned copy, or one behind a filter.
        target: The target whose copy it is; for one without an attack on explanations nothing is returned.
    """
    if target.backdoor is None or target.mode is None:
        return {}
    backdoor = replace(target.backdoor, model=model, view=view_of(target.backdoor.view, model))
    values = paper_thresholds(target.mode, model.architecture)
    thresholds = {name: Threshold(values[name], "paper", "The paper's.") for name in backdoor.view.interpreters}
    figures = measure_maps(backdoor, evaluate(backdoor, target.subject.images), thresholds, {})
    return {name: {part: _number(each[part]) for part in ("cr", "fsr", "threshold")} for name, each in figures.items()}


# Rows


def _keep_row(
    target: Target, known: tuple[str, str], settings: DefenceSettings, out: Path, progress: Progress
) -> dict[str, Any]:
    """Return a target's row, from disk where it is finished; else make and keep it."""
    spec = target.subject.classifier.input
    path = out / settings.table / f"{target.name}-{spec.channels}x{spec.height}x{spec.width}.json"
    identity = _identify(target, known, settings)
    if path.is_file():
        row: dict[str, Any] = read_json(path, "paper-defences-row")
        if row["identity"] != identity:
            raise ArtifactError(
                f"{printable(str(path))} was made of another model, from other data or with other settings. Give the "
                "same ones, or another folder with -o."
            )
        return row
    row = _make_row(target, identity, settings, progress)
    write_json(path, row, schema="paper-defences-row")
    return row


def _make_row(target: Target, identity: str, settings: DefenceSettings, progress: Progress) -> dict[str, Any]:
    subject = replace(target.subject, progress=Within(progress, "defending"))
    target = replace(target, subject=subject)
    spec = subject.classifier.input
    return {
        "schema": f"{DEFENCES_SCHEMA.removesuffix('/v1')}-row/v1",
        "identity": identity,
        "name": target.name,
        "kind": target.kind,
        "mode": target.mode,
        "architecture": subject.classifier.architecture,
        "input_size": list(spec.shape),
        "images": len(subject.images),
        "state": _measure(subject.classifier, target),
        **_MAKERS[settings.table](target, settings),
    }


def _detect(target: Target, _settings: DefenceSettings) -> dict[str, Any]:
    found = {name: run_entry(name, target.subject).to_json() for name in DETECTORS}
    parts = ("title", "strength", "outcome", "sentence", "figures", "seconds")
    paper = {"anomaly_index_below": _INDEX_BELOW} if target.backdoor else None
    detectors = {name: {part: each[part] for part in parts} for name, each in found.items()}
    for each in detectors.values():
        each["sentence"] = printable(" ".join(each["sentence"].split()))
    return {"paper": paper, "detectors": detectors}


def _denoise(target: Target, settings: DefenceSettings) -> dict[str, Any]:
    subject = target.subject
    result = denoise_inputs(
        subject.classifier,
        _attacker(target),
        DenoisingSettings(floor=settings.floor, seed=subject.seed),
    )
    taken = next(row for row in result.curve if row["weight"] == result.figures["weight"])
    paper = {"fsr": list(_FSR_LEFT), "auroc": _AUROC} if target.backdoor else None
    figures = {name: result.figures[name] for name in ("weight", "floor", "images")}
    return {"paper": paper, "denoising": {**figures, "after": taken, "curve": result.curve}}


def _prune_and_cluster(target: Target, _settings: DefenceSettings) -> dict[str, Any]:
    subject = target.subject
    result = fine_prune(subject.classifier, _attacker(target), FinePruningSettings(fine_tuning=None, seed=subject.seed))
    figures = {name: result.figures[name] for name in ("layer", "channels")}
    paper = {"fsr_stays": "high"} if target.backdoor else None
    return {"paper": paper, "clusters": _cluster(target), "pruning": {**figures, "curve": result.curve}}


def _cluster(target: Target) -> dict[str, Any]:
    """Return misclustering of pairs, and where they lie along the two first principal components of all of them."""
    subject = target.subject
    clean = subject.images[:_PAIRS]
    triggered = subject.trigger_images(clean)
    settings = ClusteringSettings(reduction="pca", seed=subject.seed)
    found = cluster_pairs(subject.classifier, clean, triggered, settings, device=subject.device).to_json()
    return {
        "pairs": len(clean),
        "together": found["together"],
        "within_classes": found["within_classes"],
        "points": _place(subject.classifier, (clean, triggered), settings, subject.device),
    }


def _place(
    model: Classifier, images: tuple[Images, Images], settings: ClusteringSettings, device: torch.device | str
) -> dict[str, list[list[float]]]:
    """Return two coordinates of every clean and every triggered image; 0 where features do not differ at all."""
    features = [read_hidden(model, some, device=device).features for some in images]
    reduced = reduce_features(torch.cat(features), replace(settings, dimensions=2))
    points = np.zeros((sum(map(len, features)), 2))
    if reduced is not None:
        points[:, : reduced.shape[1]] = reduced
    parts = np.split(points.round(4), [len(features[0])])
    return {name: part.tolist() for name, part in zip(("clean", "triggered"), parts, strict=True)}


def _attacker(target: Target) -> Attacker:
    """Return an attacker whose curves have what these tables measure."""
    return replace(target.subject.attacker(), measure=lambda model: _measure(model, target))


def _measure(model: Classifier, target: Target) -> dict[str, Any]:
    """Return accuracy, and how well a backdoor works: CR and FSR of maps, or the success of a plain one."""
    state = measure_state(model, target.subject, ownership=False).to_json()
    parts = ("accuracy", "measure", "attack_success")
    found: dict[str, Any] = {name: state[name] for name in parts if name in state}
    fooling = measure_fooling(model, target)
    return found | {"fooling": fooling} if fooling else found


def _identify(target: Target, known: tuple[str, str], settings: DefenceSettings) -> str:
    """Return a digest of all that a row rests on."""
    subject = target.subject
    models = [None if each is None else digest_network(each) for each in (subject.classifier, subject.reference)]
    parts: list[Any] = [settings.table, target.kind, target.mode, models, known]
    parts += [len(subject.images), subject.seed, subject.view, type(subject.trigger).__name__]
    if settings.table == "table2":
        parts += [find_entry(name).identity for name in DETECTORS]
    if settings.table == "table3":
        parts.append(DenoisingSettings(floor=settings.floor))
    if settings.table == "figure5":
        parts.append(FinePruningSettings(fine_tuning=None))
    parts.append(package_versions()["keyed-xai"])
    return hashlib.sha256(repr(parts).encode()).hexdigest()


_MAKERS: dict[str, Callable[[Target, DefenceSettings], dict[str, Any]]] = {
    "table2": _detect,
    "table3": _denoise,
    "figure5": _prune_and_cluster,
}


def _check_names(attacked: Sequence[Attacked]) -> None:
    names = [each.suspect.name for each in attacked]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ArtifactError(f"Two attacked models are called {twice[0]}: rows are kept by name. Rename a folder.")


def _describe_data(data: Data) -> dict[str, Any]:
    names = ("train", "held_out")
    return {name: {"source": each.source, "images": len(each)} for name, each in zip(names, data, strict=True)}


def _number(value: object) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(f"Expected a number, got {type(value).__name__}")
    return float(value)


# Markdown


def render_defences(document: Mapping[str, Any]) -> str:
    """Return a document as a Markdown table with what the paper says beside it."""
    name, rows, data = document["table"], document["rows"], document["data"]
    heads, render = _RENDERERS[name]
    lines = [
        f"### {TITLES[name]}",
        "",
        f"- data: defended with {data['train']['images']} ({data['train']['source']}), measured on "
        f"{data['held_out']['images']} ({data['held_out']['source']})",
        f"- {document['reading']}",
        *(f"- {note}" for note in document["notes"]),
        "",
        f"| model | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
        *(f"| {' | '.join([_name(row), *render(row)])} |" for row in rows),
        "",
        document["paper"],
        _ABOUT_FSR,
    ]
    return "\n".join(lines) + "\n"


_ABOUT_FSR = (
    "FSR is at the paper's thresholds. In its place a control has the share of images that a trigger sends to its "
    "class: of the clean one by chance, with the patch of badnets."
)


def _name(row: Mapping[str, Any]) -> str:
    kinds = {"reference": "clean, reference", "clean": "clean, control"} | {
        name: f"control, {name}" for name in BACKDOORS
    }
    words = kinds.get(row["kind"], f"{row['kind']}, {row['mode']}")
    detail = row["name"].replace("|", "\\|") if row["mode"] else row["architecture"]
    return f"{words} ({detail})"


def _render_detectors(row: Mapping[str, Any]) -> list[str]:
    found = {name: each["figures"] for name, each in row["detectors"].items()}
    outcome = {name: each["outcome"] for name, each in row["detectors"].items()}
    cleanse, pairs, spectrum = (found[name] for name in DETECTORS)
    index = f"{cleanse['anomaly_index']:.2f}, {outcome[DETECTORS[0]]}" if cleanse else outcome[DETECTORS[0]]
    clusters = " / ".join(_rate(pairs.get(part)) for part in ("together", "within_classes"))
    removed = spectrum.get("poisoned_removed_share")
    return [
        _fooled(row["state"]),
        f"below {_INDEX_BELOW:g}" if row["paper"] else "-",
        index,
        "-",
        f"{clusters}, {outcome[DETECTORS[1]]}",
        outcome[DETECTORS[2]] if removed is None else f"{100 * removed:.1f}, {outcome[DETECTORS[2]]}",
    ]


def _render_denoising(row: Mapping[str, Any]) -> list[str]:
    denoising, paper = row["denoising"], row["paper"]
    before, after = row["state"], denoising["after"]
    left = "-" if paper is None else f"{paper['fsr'][0]:g} to {paper['fsr'][1]:g}"
    return [
        f"{denoising['weight']:g}" if denoising["weight"] else "none",
        f"{before['measure']} {100 * before['accuracy']:.1f} / {100 * after['accuracy']:.1f}",
        left,
        f"{_fooled(before)} / {_fooled(after)}",
    ]


def _render_pruning(row: Mapping[str, Any]) -> list[str]:
    clusters, curve = row["clusters"], row["pruning"]["curve"]
    shown = [stage for share in SHOWN_SHARES for stage in curve if abs(stage["share"] - share) < 1e-9]
    return [
        "-",
        " / ".join(_rate(clusters[part]) for part in ("together", "within_classes")),
        " / ".join(f"{100 * stage['accuracy']:.1f}" for stage in shown),
        f"stays {row['paper']['fsr_stays']}" if row["paper"] else "-",
        " / ".join(map(_fooled, shown)),
    ]


def _rate(found: Mapping[str, Any] | None) -> str:
    return "-" if found is None else f"{100 * found['rate']:.1f}"


def _fooled(state: Mapping[str, Any]) -> str:
    """Return FSR of every interpreter, or the success of a plain backdoor, in percent."""
    if "fooling" in state:
        several = len(state["fooling"]) > 1
        return ", ".join(
            f"{name} {each['fsr']:.1f}" if several else f"{each['fsr']:.1f}" for name, each in state["fooling"].items()
        )
    return f"{100 * state['attack_success']:.1f}" if "attack_success" in state else "-"


_RENDERERS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], list[str]]]] = {
    "table2": (
        (
            "FSR or success, %",
            "paper: Neural Cleanse index",
            "ours",
            "paper: pairs misclustered, %",
            "ours: all classes together / each by itself",
            "Spectral Signatures: triggered images removed, %",
        ),
        _render_detectors,
    ),
    "table3": (
        (
            "strength",
            "score before / after, %",
            "paper: FSR left, %",
            "ours: FSR or success before / after, %",
        ),
        _render_denoising,
    ),
    "figure5": (
        (
            "paper: pairs misclustered, %",
            "ours: all classes together / each by itself",
            f"accuracy, % with {' / '.join(f'{share:.0%}' for share in SHOWN_SHARES)} pruned",
            "paper: FSR, %",
            "ours: FSR or success, % likewise",
        ),
        _render_pruning,
    ),
}
