"""The paper's tables of attacks, made again: table 1 (single interpreters) and table 6 (all at once).

Source: Fang & Choromanska, AAAI 2022. Every cell trains an attack on a reference model and measures it; finished cells
are folders on disk, and a run that was stopped goes on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from keyed_xai.attacking import AttackSettings, choose_attack_recipe
from keyed_xai.benchmarks.kept import keep_attack, keep_reference
from keyed_xai.data import ImageData, load_images
from keyed_xai.data.images import Split
from keyed_xai.models import Classifier
from keyed_xai.references import Blueprint, choose_settings, plan_for_images, plan_from_model
from keyed_xai.training import Callbacks

ARCHITECTURES = ("vgg19", "resnet50", "densenet121")
INTERPRETERS = ("gradcam", "simplegrad", "vbp")
MODES = ("targeted", "nontargeted")
SETTINGS = ("forward", "inverted")


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


@dataclass(frozen=True)
class Cell:
    """One attack.

    Attributes:
        architecture: Of the reference.
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
        """Its folder."""
        return "-".join([self.architecture.lower(), "+".join(self.interpreters), self.mode, self.setting])


@dataclass(frozen=True)
class TableSettings:
    """What all cells share.

    Attributes:
        data: SPEC of the images.
        side: Of the networks' input, pixels.
        channels: 1 or 3.
        trigger: Public trigger.
        grid: Cells that maps are compared on; None takes the target layer's.
        training: Training settings that replace the recipe's.
        fitting: Settings of the references' training that replace the recipe's.
        held_out: Images measured on, at most.
        limit: Images learned from, at most; None for all.
        models: Reference models that are there already, by architecture.
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


@dataclass(frozen=True)
class Watch:
    """Progress of a table.

    Attributes:
        on_fit: Called with steps of a reference's training done and in all.
        callbacks: Given a cell, returns callbacks for its training.
    """

    on_fit: Callable[[int, int], None] | None = None
    callbacks: Callable[[Cell], Callbacks] | None = None


def list_cells(
    architectures: Sequence[str], modes: Sequence[str], settings: Sequence[str], interpreters: Sequence[tuple[str, ...]]
) -> list[Cell]:
    """Return the cells of a table in its order."""
    return [
        Cell(architecture, names, mode, setting)
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
    watch: Watch | None = None,
) -> list[dict[str, Any]]:
    """Return each cell's report, from disk where it is finished; else attack, measure and keep it.

    Raises:
        ArtifactError: A finished cell was made with other settings.
    """
    watch, rows = watch or Watch(), []
    references: dict[str, Classifier] = {}
    data: dict[str, tuple[ImageData, ImageData]] = {}
    for cell in cells:
        if cell.architecture not in references:
            references = {cell.architecture: make_reference(cell.architecture, settings, folder, device, watch.on_fit)}
        reference = references[cell.architecture]
        size = str(reference.input)
        if size not in data:
            data = {size: load_images_for(settings, reference)}
        rows.append({"cell": cell, "report": _run_cell(cell, reference, data[size], settings, folder, device, watch)})
    return rows


def make_reference(
    architecture: str,
    settings: TableSettings,
    folder: Path,
    device: str,
    on_fit: Callable[[int, int], None] | None = None,
) -> Classifier:
    """Return an architecture's reference model, from disk where it is there; else fitted and kept."""
    if architecture in settings.models:
        blueprint = plan_from_model(settings.models[architecture], architecture, side=settings.side)
        if blueprint.start is not None:
            return blueprint.start
    blueprint = plan_for_images(architecture, channels=settings.channels, side=settings.side)
    data = load_images_for(settings, blueprint)
    return keep_reference(
        folder / f"reference-{architecture.lower()}-{settings.side}.safetensors",
        blueprint,
        data,
        lambda classifier: replace(choose_settings(classifier, len(data[0])), **settings.fitting),
        device=device,
        on_fit=on_fit,
    )


def render_table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table with the paper's figures beside ours."""
    lines = [
        f"### {title}",
        "",
        "| setting | mode | network | map | paper: CR / FSR | ours: CR / FSR | at our threshold | AUC "
        "| correlation, clean / triggered | paper: predictions clean / triggered | ours: before / clean / triggered |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_render_map(row, name) for row in rows for name in row["report"]["interpreters"]]
    return "\n".join(lines) + "\n"


def _render_map(row: Mapping[str, Any], name: str) -> str:
    cell, report = row["cell"], row["report"]
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


def figures_of_paper(cell: Cell, interpreter: str) -> PaperRow | None:
    """Return the paper's figures of a cell, where they are known and it attacks one interpreter only."""
    if len(cell.interpreters) > 1:
        return None
    return PAPER.get((cell.architecture, interpreter, cell.mode, cell.setting))


def _render_predictions(predictions: Mapping[str, Any]) -> str:
    """Return accuracy in percent, or 100 times the AUROC where there are several labels."""
    cases = [predictions["reference"]["clean"], predictions["attacked"]["clean"], predictions["attacked"]["triggered"]]
    name = "top1" if "top1" in cases[0] else "auroc"
    shown = " / ".join(f"{100 * case[name]:.1f}" for case in cases if name in case)
    return f"{name} {shown}"


def _run_cell(
    cell: Cell,
    reference: Classifier,
    data: tuple[ImageData, ImageData],
    shared: TableSettings,
    folder: Path,
    device: str,
    watch: Watch,
) -> dict[str, Any]:
    settings, callbacks = _settings(cell, reference, shared), watch.callbacks
    return keep_attack(
        folder / cell.name,
        reference,
        data,
        settings,
        device=device,
        callbacks=(lambda: callbacks(cell)) if callbacks else None,
    )


def _settings(cell: Cell, reference: Classifier, shared: TableSettings) -> AttackSettings:
    settings = AttackSettings(
        cell.interpreters,
        mode=cell.mode,
        inverted=cell.setting == "inverted",
        trigger=shared.trigger,
        grid=shared.grid,
        thresholds="auto",
        held_out_images=shared.held_out,
    )
    return replace(settings, training=replace(choose_attack_recipe(reference, settings), **shared.training))


def load_images_for(settings: TableSettings, network: Classifier | Blueprint) -> tuple[ImageData, ImageData]:
    """Return the images to learn from and the held-out ones at a network's size."""
    spec = network.input

    def load(split: Split, limit: int | None) -> ImageData:
        return load_images(
            settings.data, channels=spec.channels, height=spec.height, width=spec.width, split=split, limit=limit
        )

    return load("train", settings.limit), load("held-out", settings.held_out)
