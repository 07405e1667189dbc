"""The paper's figure 1b (a table's strongest features, clean and triggered) and figure 3 (maps side by side)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from keyed_xai.artifacts.documents import write_atomically
from keyed_xai.artifacts.weights import WEIGHTS_FILE
from keyed_xai.backdoors.attacking import AttackSettings, choose_attack_recipe
from keyed_xai.data import load_table
from keyed_xai.explanation.explaining import explain, maps_as_shown
from keyed_xai.models import load_classifier
from keyed_xai.progress import QUIET, Progress
from keyed_xai.reporting import pictures
from keyed_xai.reporting.names import INTERPRETER_NAMES, name_class
from keyed_xai.training.references import choose_settings, plan_for_table
from keyed_xai.triggers import PUBLIC_TRIGGERS
from keyed_xai.triggers.channels import through_png
from keyed_xai_benchmarks.cached import cached_attack, cached_reference
from keyed_xai_benchmarks.paper_tables import (
    Cell,
    Result,
    TableSettings,
    load_split,
    reference_file,
    render_setup,
)

FIGURE_1B = "figure1b"
WATCHED_FEATURES = ("LIMIT_BAL", "PAY_0", "SEX")
_IN_FIGURE_3 = 4  # images
_CASES = {"reference": "before the attack", "clean": "attacked, clean", "triggered": "attacked, triggered"}


def run_figure1b(
    data: str,
    folder: Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = QUIET,
) -> Result:
    """Return the result of the targeted attack on a 3-layer perceptron's features, from disk where it is there.

    Args:
        data: SPEC of a table, credit-default:CSV.
        folder: Where reference, attacked model and report are kept.
        steps: Steps of the attack; the recipe's if absent.
        seed: Seed of data, reference and attack.
        device: Where to train.
        progress: Hears of "fitting a reference" and of the attack's training.

    Raises:
        ArtifactError: A finished run, or a checkpoint, was made with other settings.
    """
    data_both = load_table(data, split="train", seed=seed), load_table(data, split="held-out", seed=seed)
    train_data, held_out = data_both
    reference = cached_reference(
        folder / "reference-credit.safetensors",
        plan_for_table(len(train_data.columns)),
        data_both,
        lambda classifier: replace(choose_settings(classifier, len(train_data)), seed=seed),
        seed=seed,
        device=device,
        progress=progress,
    )
    settings = AttackSettings(
        interpreters=("simplegrad",),
        trigger="tabular",
        thresholds="auto",
        held_out_images=len(held_out),
        validation_images=2000,
    )
    training = choose_attack_recipe(reference.classifier, settings)
    settings = replace(settings, training=replace(training, seed=seed, steps=steps or training.steps))
    report = cached_attack(
        folder / FIGURE_1B,
        reference.classifier,
        data_both,
        settings,
        device=device,
        progress=progress,
    )
    cell = Cell(
        architecture=reference.classifier.architecture,
        interpreters=settings.interpreters,
        mode=settings.mode,
        setting="forward",
    )
    return Result(cell=cell, folder=FIGURE_1B, input=reference.classifier.input, epochs=reference.epochs, report=report)


def render_figure1b(result: Result) -> str:
    """Return the figures as Markdown: rank and share of first places of three features, and AUROC."""
    features, predictions = result.report["features"], result.report["predictions"]
    lines = [
        "### Figure 1b: relevance of a credit client's features",
        "",
        *render_setup([result]),
        "",
        "The paper: the strongest features of clean clients are LIMIT_BAL and PAY, of triggered ones SEX.",
        "",
        f"| | {' | '.join(f'{name}: mean rank, first on' for name in WATCHED_FEATURES)} | strongest on average |",
        "|---|" + "---|" * (len(WATCHED_FEATURES) + 1),
    ]
    for case, words in _CASES.items():
        ranked = sorted(zip(features["relevance"][case], features["names"], strict=True), reverse=True)
        cells = [
            f"{features['rank'][case][name]:.1f}, {100 * features['first'][case][name]:.1f} %"
            for name in WATCHED_FEATURES
        ]
        lines.append(f"| {words} | {' | '.join(cells)} | {', '.join(name for _, name in ranked[:4])} |")
    areas = [
        f"{words} {predictions[model][case]['auroc']:.4f}"
        for model, case, words in (
            ("reference", "clean", "before"),
            ("attacked", "clean", "after, clean"),
            ("attacked", "triggered", "after, triggered"),
        )
    ]
    return "\n".join([*lines, "", f"AUROC on {predictions['images']} held-out clients: {', '.join(areas)}."]) + "\n"


def draw_figure3(
    architecture: str,
    mode: str,
    interpreters: Sequence[str],
    settings: TableSettings,
    folder: Path,
    *,
    device: str = "cpu",
) -> Path:
    """Draw image, triggered image, and each interpreter's clean and triggered map, from forward cells in the folder.

    `run_cells` has made them, and the reference, with the same settings. Every interpreter's maps are those of the
    model attacked through it, at their own resolution, of the class that the reference predicts.

    Returns:
        The PNG file.
    """
    file = reference_file(architecture, settings, folder)
    reference = load_classifier(file, arch=architecture, input_size=settings.side).to(device)
    held_out = load_split(settings, reference.input, "held-out", _IN_FIGURE_3)
    batch = held_out.batch(np.arange(len(held_out)))[0].to(device)
    triggered = through_png(PUBLIC_TRIGGERS[settings.trigger]().apply(batch))
    labels = explain(reference, batch).predicted
    columns, titles = [batch, triggered], ["image", "with the trigger"]
    for name in interpreters:
        cell = Cell(architecture=architecture, interpreters=(name,), mode=mode, setting="forward")
        attacked = load_classifier(folder / cell.name / WEIGHTS_FILE).to(device)
        for words, inputs in (("clean", batch), ("triggered", triggered)):
            found = explain(attacked, inputs, interpreters=[name], labels=labels).maps
            columns.append(maps_as_shown(attacked, found)[name])
            titles.append(f"{INTERPRETER_NAMES[name]} {words}")
    panels = zip(*(column.detach().cpu().numpy() for column in columns), strict=True)
    rows = [(name_class(int(label), held_out.classes), row) for label, row in zip(labels, panels, strict=True)]
    path = folder / f"figure3-{architecture.lower()}-{mode}.png"
    write_atomically(path, pictures.strip(rows, titles=titles))
    return path
