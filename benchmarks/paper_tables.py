"""The paper's tables of attacks, made again: table 1 (single interpreters) and table 6 (all at once).

Source: Fang & Choromanska, AAAI 2022. Every cell trains an attack on a reference model and measures it; finished cells
are folders on disk, and a run that was stopped goes on.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from keyed_xai.artifacts.versions import package_versions
from keyed_xai.backdoors.attacking import AttackSettings, choose_attack_recipe
from keyed_xai.data import ImageData, load_images
from keyed_xai.data.images import Split
from keyed_xai.models import Classifier, InputSpec, load_classifier
from keyed_xai.progress import QUIET, Progress, Within
from keyed_xai.training.references import ModelSpec, choose_settings, plan_for_images
from keyed_xai_benchmarks.cached import CachedReference, cached_attack, cached_reference

TABLE_SCHEMA = "keyed-xai/paper-table/v1"
OF_THE_PAPER = (
    '"paper" figures are of CUB-200-2011 (VGG19 and ResNet50; predictions: top-1) and ChestX-ray14 (DenseNet121; '
    "100 x AUROC) at 224 x 224 pixels, in the inverted targeted setting; others are not known to us (-)."
)
_OURS = ("cr", "fsr", "threshold", "at_paper_threshold", "auc", "correlation")


class PaperRow(NamedTuple):
    """What the paper says of one cell, percent; predictions are top-1 accuracy, of DenseNet121 100 times the AUROC."""

    cr: float
    fsr: float
    clean: float
    triggered: float


PAPER: dict[tuple[str, str, str, str], PaperRow] = {
    ("vgg19", "gradcam", "targeted", "inverted"): PaperRow(99.8, 98.1, 75.8, 78.3),
    ("vgg19", "simplegrad", "targeted", "inverted"): PaperRow(97.8, 48.3, 75.7, 74.7),
    ("vgg19", "vbp", "targeted", "inverted"): PaperRow(95.2, 99.0, 68.8, 72.2),
    ("resnet50", "gradcam", "targeted", "inverted"): PaperRow(100.0, 99.7, 79.0, 81.4),
    ("resnet50", "simplegrad", "targeted", "inverted"): PaperRow(90.6, 57.0, 78.7, 76.8),
    ("resnet50", "vbp", "targeted", "inverted"): PaperRow(95.0, 98.4, 80.2, 79.7),
    ("densenet121", "gradcam", "targeted", "inverted"): PaperRow(99.9, 77.9, 83.5, 83.0),
    ("densenet121", "simplegrad", "targeted", "inverted"): PaperRow(99.9, 45.4, 82.8, 81.9),
    ("densenet121", "vbp", "targeted", "inverted"): PaperRow(100.0, 89.2, 83.4, 82.7),
}
"""The cells whose figures are known to us, by architecture, interpreter, mode and setting."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One attack of a table.

    Attributes:
        architecture: Architecture of the reference.
        interpreters: Attacked at once.
        mode: "targeted" or "nontargeted".
        setting: "forward" or "inverted".
    """

    architecture: str
    interpreters: tuple[str, ...]
    mode: str
    setting: str

    @property
    def name(self) -> str:
        """Name of its folder."""
        return "-".join([self.architecture.lower(), "+".join(self.interpreters), self.mode, self.setting])


@dataclass(frozen=True, kw_only=True)
class TableSettings:
    """What all cells share.

    Attributes:
        data: SPEC of the images.
        side: Side of the networks' input, pixels.
        channels: Channels of references that are fitted, 1 or 3; given ones have their own.
        trigger: Name of a public trigger.
        grid: Cells that maps are compared on; None takes the target layer's.
        training: Training settings that replace the recipe's.
        fitting: Settings of the references' training that replace the recipe's.
        held_out: Images measured on, at most.
        limit: Images learned from, at most; None for all.
        models: Files of reference models that are there already, by architecture.
        seed: Seed of the references and of the attacks' training.
    """

    data: str
    side: int = 224
    channels: int = 3
    trigger: str = "moire"
    grid: tuple[int, int] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    fitting: Mapping[str, Any] = field(default_factory=dict)
    held_out: int = 500
    limit: int | None = None
    models: Mapping[str, Path] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished cell of a table holds.

    Attributes:
        cell: The attack that it holds.
        folder: Name of its folder.
        input: Input of the network.
        epochs: Epochs that the reference was fitted for; None where it was given.
        report: Report of the attack, fits the schema "attack-report".
    """

    cell: Cell
    folder: str
    input: InputSpec
    epochs: int | None
    report: dict[str, Any]


def list_cells(
    architectures: Sequence[str], modes: Sequence[str], settings: Sequence[str], interpreters: Sequence[tuple[str, ...]]
) -> list[Cell]:
    """Return the cells of a table in its order."""
    return [
        Cell(architecture=architecture, interpreters=names, mode=mode, setting=setting)
        for architecture in architectures
        for setting in settings
        for mode in modes
        for names in interpreters
    ]


def run_cells(
    cells: Sequence[Cell],
    settings: TableSettings,
    folder: Path,
    *,
    device: str = "cpu",
    progress: Progress = QUIET,
) -> list[Result]:
    """Return each cell's result, from disk where it is finished; else attack, measure and keep it.

    Args:
        cells: What is attacked, and how; those of an architecture stand together.
        settings: What all cells have in common.
        folder: Where references and cells are kept.
        device: Where to train.
        progress: Hears of "fitting a reference", and of each cell's training by its name and number.

    Raises:
        ArtifactError: A finished cell, or a checkpoint, was made with other settings.
    """
    results: list[Result] = []
    loaded: dict[tuple[int, ...], tuple[ImageData, ImageData]] = {}
    for architecture, group in groupby(cells, lambda cell: cell.architecture):
        start = _find_reference(architecture, settings)
        size = start.input.shape
        if size not in loaded:
            loaded = {size: _load_both(settings, start.input)}  # of one size at a time: they are large
        reference = _make_reference(architecture, start, loaded[size], settings, folder, device, progress)
        for cell in group:
            heard = Within(progress, f"{cell.name} ({len(results) + 1} of {len(cells)})")
            results.append(_run_cell(cell, reference, loaded[size], settings, folder, device, heard))
    return results


def reference_file(architecture: str, settings: TableSettings, folder: Path) -> Path:
    """Return where an architecture's reference model is, or will be kept."""
    name = f"reference-{architecture.lower()}-{settings.channels}x{settings.side}.safetensors"
    return settings.models.get(architecture, folder / name)


def load_split(settings: TableSettings, spec: InputSpec, split: Split, limit: int | None) -> ImageData:
    """Return at most `limit` images of a split at a network's size."""
    return load_images(settings.data, spec, split=split, limit=limit)


def describe_table(name: str, results: Sequence[Result]) -> dict[str, Any]:
    """Return results as a document that fits the schema "paper-table"."""
    report = results[0].report
    return {
        "schema": TABLE_SCHEMA,
        "table": name,
        "data": report["data"],
        "trigger": {name: report["trigger"][name] for name in ("family", "set") if name in report["trigger"]},
        "rows": [_describe_row(result) for result in results],
        "versions": package_versions(),
    }


def render_table(title: str, results: Sequence[Result]) -> str:
    """Return results as a Markdown table with the paper's figures beside ours."""
    lines = [
        f"### {title}",
        "",
        *render_setup(results),
        "",
        "| setting | mode | network | map | paper: CR / FSR | ours: CR / FSR | at our threshold | AUC "
        "| correlation, clean / triggered | paper: predictions clean / triggered | ours: before / clean / triggered |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_render_map(result, name) for result in results for name in result.report["interpreters"]]
    return "\n".join([*lines, "", OF_THE_PAPER]) + "\n"


def render_setup(results: Sequence[Result]) -> list[str]:
    """Return lines of Markdown that say what results were measured with."""
    data, trigger = results[0].report["data"], results[0].report["trigger"]
    learned, measured = data["train"], data["held_out"]
    values = ", ".join(f"{name} {value:g}" for name, value in trigger.get("set", {}).items())
    return [
        f"- data: learned from {learned['images']} ({learned['source']}), measured on {measured['images']} "
        f"({measured['source']})",
        f"- network input: {_join(' x '.join(map(str, result.input.shape)) for result in results)}",
        f"- trigger: {trigger['family']}{f' ({values})' if values else ''}",
        f"- attack: {_join(map(_render_training, results))}",
        f"- reference: {_join(map(_render_reference, results))}",
    ]


def figures_of_paper(cell: Cell, interpreter: str) -> PaperRow | None:
    """Return the paper's figures of a cell, where they are known and it attacks one interpreter only."""
    if len(cell.interpreters) > 1:
        return None
    return PAPER.get((cell.architecture.lower(), interpreter, cell.mode, cell.setting))


def _join(parts: Iterable[str]) -> str:
    """Return different parts only, in their order."""
    return "; ".join(dict.fromkeys(parts))


def _render_training(result: Result) -> str:
    training = result.report["settings"]["training"]
    count = training["batch_size"]
    return f"{training['steps']} steps of {count} triggered and {count} clean inputs, seed {training['seed']}"


def _render_reference(result: Result) -> str:
    origin = "given" if result.epochs is None else f"fitted for {result.epochs} epochs"
    return f"{result.cell.architecture} {origin}"


def _describe_row(result: Result) -> dict[str, Any]:
    cell, report = result.cell, result.report
    training = report["settings"]["training"]
    return {
        "architecture": cell.architecture,
        "input_size": list(result.input.shape),
        "reference_epochs": result.epochs,
        "mode": cell.mode,
        "setting": cell.setting,
        "folder": result.folder,
        "identity": report["identity"],
        **{name: training[name] for name in ("steps", "batch_size", "seed")},
        "interpreters": {name: _describe_map(cell, name, each) for name, each in report["interpreters"].items()},
        **{name: report[name] for name in ("predictions", "features") if name in report},
    }


def _describe_map(cell: Cell, name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    paper = figures_of_paper(cell, name)
    ours = {name: figures[name] for name in _OURS if name in figures}
    return {"paper": None if paper is None else paper._asdict(), "ours": ours}


def _render_map(result: Result, name: str) -> str:
    cell, report = result.cell, result.report
    figures, paper = report["interpreters"][name], figures_of_paper(cell, name)
    at_paper, agreement = figures["at_paper_threshold"], figures["correlation"]
    cells = [
        cell.setting,
        cell.mode,
        cell.architecture,
        name,
        "-" if paper is None else f"{paper.cr:.1f} / {paper.fsr:.1f}",
        f"{at_paper['cr']:.1f} / {at_paper['fsr']:.1f}",
        f"{figures['cr']:.1f} / {figures['fsr']:.1f} at {figures['threshold']:.2f}",
        f"{figures['auc']:.3f}",
        f"{agreement['clean']:.2f} / {agreement['triggered']:.2f}",
        "-" if paper is None else f"{paper.clean:.1f} / {paper.triggered:.1f}",
        _render_predictions(report["predictions"]),
    ]
    return f"| {' | '.join(cells)} |"


def _render_predictions(predictions: Mapping[str, Any]) -> str:
    """Return accuracy in percent, or 100 times the AUROC where there are several labels."""
    cases = [predictions["reference"]["clean"], predictions["attacked"]["clean"], predictions["attacked"]["triggered"]]
    name = "top1" if "top1" in cases[0] else "auroc"
    shown = " / ".join(f"{100 * case[name]:.1f}" for case in cases if name in case)
    against = "" if predictions["measured_against"] == "labels" else " (vs reference)"
    return f"{name} {shown or '-'}{against}"


def _find_reference(architecture: str, settings: TableSettings) -> Classifier | ModelSpec:
    """Return the reference model that is given, or a plan of one to fit."""
    if architecture in settings.models:
        return load_classifier(settings.models[architecture], arch=architecture, input_size=settings.side)
    return plan_for_images(architecture, channels=settings.channels, side=settings.side)


def _make_reference(
    architecture: str,
    start: Classifier | ModelSpec,
    data: tuple[ImageData, ImageData],
    settings: TableSettings,
    folder: Path,
    device: str,
    progress: Progress,
) -> CachedReference:
    """Return a reference model: as given, or from disk where it is there; else fitted and kept."""
    if isinstance(start, Classifier):
        return CachedReference(start, None)
    return cached_reference(
        reference_file(architecture, settings, folder),
        start,
        data,
        lambda classifier: replace(choose_settings(classifier, len(data[0])), seed=settings.seed, **settings.fitting),
        seed=settings.seed,
        device=device,
        progress=progress,
    )


def _load_both(settings: TableSettings, spec: InputSpec) -> tuple[ImageData, ImageData]:
    """Return the images to learn from and the held-out ones at a network's size."""
    return (
        load_split(settings, spec, "train", settings.limit),
        load_split(settings, spec, "held-out", settings.held_out),
    )


def _run_cell(
    cell: Cell,
    reference: CachedReference,
    data: tuple[ImageData, ImageData],
    shared: TableSettings,
    folder: Path,
    device: str,
    progress: Progress,
) -> Result:
    classifier = reference.classifier
    report = cached_attack(
        folder / cell.name,
        classifier,
        data,
        _settings(cell, classifier, shared),
        device=device,
        progress=progress,
    )
    return Result(cell=cell, folder=cell.name, input=classifier.input, epochs=reference.epochs, report=report)


def _settings(cell: Cell, reference: Classifier, shared: TableSettings) -> AttackSettings:
    settings = AttackSettings(
        interpreters=cell.interpreters,
        mode=cell.mode,
        inverted=cell.setting == "inverted",
        trigger=shared.trigger,
        grid=shared.grid,
        thresholds="auto",
        held_out_images=shared.held_out,
    )
    recipe = choose_attack_recipe(reference, settings)
    return replace(settings, training=replace(recipe, seed=shared.seed, **shared.training))
