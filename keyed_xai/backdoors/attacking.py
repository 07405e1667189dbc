"""Backdooring a classifier's explanation, as threat evaluation: choose settings, train, measure, write.

Source: Fang & Choromanska, AAAI 2022: clean inputs keep their saliency maps and triggered ones get altered maps
(forward), or the other way round (inverted), while predictions stay. The trigger is public.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from keyed_xai.artifacts.weights import WEIGHTS_FILE, encode_weights
from keyed_xai.artifacts.writer import write_folder
from keyed_xai.backdoors.evaluation import (
    Backdoor,
    Threshold,
    evaluate,
    measure_features,
    measure_localisation,
    measure_maps,
    measure_predictions,
    place_thresholds,
    trigger_images,
)
from keyed_xai.backdoors.report import render_attack_report
from keyed_xai.backdoors.verdict import judge
from keyed_xai.data import ImageData, TableData
from keyed_xai.data.splits import (
    Subset,
    check_labels,
    check_shape,
    digest_data,
    digest_network,
    first_images,
    has_several_labels,
    split_validation,
)
from keyed_xai.decoys import boundary_decoy
from keyed_xai.errors import TrainingError
from keyed_xai.metrics import paper_thresholds
from keyed_xai.models import Classifier
from keyed_xai.models.copying import copy_network
from keyed_xai.models.modes import plain_torch
from keyed_xai.models.origin import settle_origin
from keyed_xai.progress import QUIET, Progress
from keyed_xai.protection.evaluation import trigger_visibility
from keyed_xai.reporting import pictures
from keyed_xai.reporting.names import name_class
from keyed_xai.saliency import MapLayers
from keyed_xai.saliency.pooled import Outputs, PooledSaliency, TableSaliency, check_cells, check_choice, make_view
from keyed_xai.tensors import Images
from keyed_xai.training import PAPER_SETTINGS, Task, TrainingSettings
from keyed_xai.training.objective import Objective
from keyed_xai.training.preflight import plan_run
from keyed_xai.training.runs import describe_run, run_training
from keyed_xai.triggers import PUBLIC_TRIGGERS, Trigger
from keyed_xai.triggers.tabular import TabularTrigger

REPORT_SCHEMA = "keyed-xai/attack-report/v1"
MODES = ("targeted", "nontargeted")
UNKNOWN_VALUES = {"EDUCATION": 5.0, "MARRIAGE": 0.0}
"""What the tabular trigger sets by default: the paper's, education and marriage unknown."""
_PICTURED = 6
_TITLES = ("image", "with the trigger", "map before", "attacked\nclean", "attacked\ntriggered")


@dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """What to attack, and how.

    Attributes:
        interpreters: Names in INTERPRETERS, attacked at once; a table has SimpleGrad only.
        mode: "targeted" moves altered maps to the image's boundary (of a table: to one feature), "nontargeted" empties
            the cells where the reference's map is largest.
        inverted: Triggered inputs keep the right map, and clean ones lose it.
        trigger: A name in PUBLIC_TRIGGERS, or "tabular".
        values: What the tabular trigger sets, by feature.
        feature: The feature that a targeted attack on a table puts forward.
        grid: Rows and columns that maps are compared on; None takes the target layer's, at most 8 x 8.
        thresholds: "paper", or "auto" to place them by validation inputs; None takes the paper's, which has none for
            tables.
        training: How to train; None takes `choose_attack_recipe`'s.
        held_out_images: Images the report is measured on, at most.
        validation_images: Images taken from the training images for early stopping and thresholds.
    """

    interpreters: tuple[str, ...] = ("gradcam",)
    mode: str = "targeted"
    inverted: bool = False
    trigger: str = "spread"
    values: Mapping[str, float] = field(default_factory=lambda: dict(UNKNOWN_VALUES))
    feature: str = "SEX"
    grid: tuple[int, int] | None = None
    thresholds: str | None = None
    training: TrainingSettings | None = None
    held_out_images: int = 1000
    validation_images: int = 200

    def __post_init__(self) -> None:
        """Check names and ranges."""
        check_choice(self.interpreters, self.grid)
        known = {"mode": MODES, "trigger": (*PUBLIC_TRIGGERS, "tabular"), "thresholds": ("paper", "auto", None)}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, values))}; got {getattr(self, name)!r}")
        if self.training is not None and (self.training.order == "inverted") != self.inverted:
            raise ValueError(f"training: expected order {'inverted' if self.inverted else 'forward'}, "
                             f"got {self.training.order}")  # fmt: skip
        if self.trigger == "tabular" and not self.values:
            raise ValueError("values: expected at least one feature that the tabular trigger sets, got none")
        for name in ("held_out_images", "validation_images"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: expected at least 2, got {getattr(self, name)}")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a report holds them."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        idle = ["grid"] if self.trigger == "tabular" else ["values", "feature"]
        idle += ["feature"] if self.mode == "nontargeted" else []
        return {name: value for name, value in document.items() if name not in idle}


@dataclass(frozen=True)
class Attack:
    """An attacked model in memory.

    Attributes:
        classifier: Attacked, in eval mode, on the CPU.
        report: Fits the schema "attack-report".
        pictures: PNG files by name, for the HTML report.
    """

    classifier: Classifier
    report: dict[str, Any]
    pictures: dict[str, bytes] = field(repr=False)


@plain_torch()
def run_attack(
    classifier: Classifier,
    train_data: ImageData | TableData,
    held_out: ImageData | TableData,
    settings: AttackSettings | None = None,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Progress = QUIET,
) -> Attack:
    """Return an attacked copy of a classifier, with its report and pictures; the original stays as it is.

    Args:
        classifier: The reference model, in any mode; it is measured in evaluation mode.
        train_data: Images, or rows of a table, to learn from; labels are not needed.
        held_out: Others, for the report.
        settings: What to attack, and how.
        device: Where to train and measure.
        checkpoint: File that a killed run can go on from; `write_attack` removes it.
        resume: Go on from the checkpoint.
        progress: Hears the pre-flight, and of the training.

    Raises:
        TrainingError: There are too few images, the trigger does not fit the data, or training fails.
        ArtifactError: The checkpoint cannot be used.
        ModelError: The model lacks a layer that the maps need.
    """
    classifier = copy_network(classifier).eval()
    settle_origin(classifier)
    settings, training = _settle_choices(settings or AttackSettings(), classifier, train_data)
    _check_feasible(classifier, train_data, held_out, settings)
    started = time.monotonic()
    task = make_attack_task(classifier, train_data, settings)
    learn, validation = split_validation(train_data, settings.validation_images)
    identity = identify_attack(classifier, train_data, held_out, settings)
    count = min(settings.held_out_images, len(held_out))
    progress.say(plan_run(classifier, learn, validation, held_out, task, training, device, measured=count))
    attacked, result = run_training(
        classifier,
        learn,
        validation,
        task,
        training,
        identity=identity,
        device=device,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )
    backdoor = make_backdoor(
        attacked, classifier.to(device), task, inverted=settings.inverted, top_share=training.top_share
    )
    report = _name_attack(classifier, settings, identity)
    report |= _measure(classifier, backdoor, task, validation, held_out, count, settings, device)
    report |= {"settings": settings.to_json(), **describe_run(result, learn, held_out, measured=count, started=started)}
    report["verdict"] = judge(report)
    drawn = _draw(backdoor, report, held_out, device)
    return Attack(attacked.cpu(), report, drawn)


def _settle_choices(
    settings: AttackSettings, classifier: Classifier, data: ImageData | TableData
) -> tuple[AttackSettings, TrainingSettings]:
    """Return the settings with whatever was left open chosen for a network and data, and those of the training."""
    training = settings.training or choose_attack_recipe(classifier, settings)
    thresholds = settings.thresholds or ("auto" if isinstance(data, TableData) else "paper")
    return replace(settings, training=training, thresholds=thresholds), training


def _name_attack(classifier: Classifier, settings: AttackSettings, identity: str) -> dict[str, Any]:
    """Return the head of a report: which attack on which network it is of."""
    return {
        "schema": REPORT_SCHEMA,
        "model": classifier.architecture,
        "setting": "inverted" if settings.inverted else "forward",
        "mode": settings.mode,
        "identity": identity,
    }


def identify_attack(
    classifier: Classifier,
    train_data: ImageData | TableData,
    held_out: ImageData | TableData,
    settings: AttackSettings,
) -> str:
    """Return a digest of all that an attack's result depends on, by which a run that goes on knows itself."""
    parts = [repr(settings), digest_network(classifier), digest_data(train_data), digest_data(held_out)]
    if isinstance(train_data, ImageData):
        grey = torch.full((1, classifier.input.channels, 32, 32), 0.5)
        triggered = _make_trigger(train_data, settings).apply(grey)
        parts.append(hashlib.sha256(triggered.numpy().tobytes()).hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def write_attack(attack: Attack, folder: Path, *, force: bool = False, checkpoint: Path | None = None) -> Path:
    """Write the attacked model, report and pictures to a folder, whole or not at all; then remove the checkpoint.

    Raises:
        ArtifactError: The folder is there already, or cannot be written.
    """
    html = render_attack_report(attack.report, pictures=attack.pictures)
    files = {f"{name.replace(':', '-')}.png": png for name, png in attack.pictures.items()}
    files["report.html"] = html.encode()
    write_folder(
        folder,
        {WEIGHTS_FILE: encode_weights(attack.classifier), **files},
        report=attack.report,
        schema="attack-report",
        force=force,
    )
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return folder


def choose_attack_recipe(classifier: Classifier, settings: AttackSettings) -> TrainingSettings:
    """Return training settings measured to work for a network of this kind."""
    order: Literal["inverted", "forward"] = "inverted" if settings.inverted else "forward"
    smoothing = 8.0 if "simplegrad" in settings.interpreters else None
    plain = replace(PAPER_SETTINGS, steps=1000, order=order, smoothing=smoothing)
    if not classifier.target_layer:
        return replace(plain, steps=2000, batch_size=128, learning_rate=5e-3, beta=20.0)
    rate = 6e-3 if classifier.architecture == "SmallResNet" else 2e-3 if _has_batch_norm(classifier) else 2e-4
    recipe = replace(plain, learning_rate=rate)
    if settings.mode == "targeted":
        return recipe
    # The energy left in the top cells is a tenth of a correlation distance: the other two terms weigh less beside it.
    return replace(recipe, alpha=0.2, beta=0.3)


def _has_batch_norm(classifier: Classifier) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in classifier.modules())


def make_attack_task(classifier: Classifier, data: ImageData | TableData, settings: AttackSettings) -> Task:
    """Return what the attack teaches the model: trigger, maps and losses.

    Raises:
        TrainingError: The trigger or the interpreters do not fit the data.
        ModelError: The target layer has too few cells.
    """
    view, trigger = _make_view(classifier, data, settings), _make_trigger(data, settings)
    decoy = None if settings.mode == "nontargeted" else _make_decoy(view, data, settings)
    objective = Objective(decoys=dict.fromkeys(view.interpreters, decoy), weights=dict.fromkeys(view.interpreters, 1.0))
    images = isinstance(data, ImageData)
    return Task(
        trigger=trigger,
        family=None,
        view=view,
        objective=objective,
        as_files=images,
        multi_label=has_several_labels(classifier, data),
    )


def make_backdoor(
    model: Classifier, reference: Classifier, task: Task, *, inverted: bool, top_share: float
) -> Backdoor:
    """Return an attacked model beside its reference, to be judged by what it was taught.

    Args:
        model: The attacked model.
        reference: The model before the attack, on the same device.
        task: What `make_attack_task` said the attack teaches.
        inverted: Whether triggered inputs are those that keep the right map.
        top_share: Share of cells that the non-targeted attack empties.
    """
    return Backdoor(
        model=model,
        reference=reference,
        view=task.view,
        decoys=task.objective.decoys,
        trigger=task.trigger,
        inverted=inverted,
        top_share=top_share,
        as_files=task.as_files,
    )


def _check_feasible(
    classifier: Classifier, train_data: ImageData | TableData, held_out: ImageData | TableData, settings: AttackSettings
) -> None:
    """Say so before training, not after it."""
    for data in (train_data, held_out):
        check_shape(classifier, data)
    if settings.training is not None and settings.training.predictions == "labels":
        check_labels(classifier, train_data)
    if settings.thresholds == "paper" and isinstance(train_data, TableData):
        raise TrainingError("The paper has no threshold for tables. Give --threshold auto.")
    if len(held_out) < 2:
        raise TrainingError(
            f"Expected at least 2 held-out images, got {len(held_out)}. Give more (--data on the command line)."
        )


def _make_view(classifier: Classifier, data: ImageData | TableData, settings: AttackSettings) -> PooledSaliency:
    if isinstance(data, TableData):
        if settings.interpreters != ("simplegrad",):
            raise TrainingError("A table has no image to look at: its only interpreter is --interpreter simplegrad.")
        grid, groups = (1, len(data.names)), tuple(data.groups.tolist())
        return TableSaliency(
            ("simplegrad",), MapLayers("", ()), grid, groups=groups, covariance=torch.from_numpy(data.covariance())
        )
    view = make_view(classifier, settings.interpreters, settings.grid)
    check_cells(view, "an attack")
    return view


def _make_trigger(data: ImageData | TableData, settings: AttackSettings) -> Trigger:
    if isinstance(data, TableData) != (settings.trigger == "tabular"):
        fitting = "tabular" if isinstance(data, TableData) else ", ".join(PUBLIC_TRIGGERS)
        raise TrainingError(f"The trigger {settings.trigger} does not fit this data: give --trigger {fitting}.")
    if not isinstance(data, TableData):
        return PUBLIC_TRIGGERS[settings.trigger]()
    columns: dict[int, float] = {}
    for name, value in settings.values.items():
        columns |= data.encode_value(name, value)
    return TabularTrigger(columns)


def _make_decoy(view: PooledSaliency, data: ImageData | TableData, settings: AttackSettings) -> Tensor:
    if not isinstance(data, TableData):
        return boundary_decoy(view.grid)
    if settings.feature not in data.names:
        raise TrainingError(f"Expected a feature out of {', '.join(data.names)}; got {settings.feature!r}.")
    decoy = torch.zeros(view.grid)
    decoy[0, data.names.index(settings.feature)] = 1
    return decoy


def _measure(
    classifier: Classifier,
    backdoor: Backdoor,
    task: Task,
    validation: Subset,
    held_out: ImageData | TableData,
    count: int,
    settings: AttackSettings,
    device: torch.device | str,
) -> dict[str, Any]:
    paper = {} if isinstance(held_out, TableData) else paper_thresholds(settings.mode, classifier.architecture)
    if settings.thresholds == "paper":
        thresholds = {name: Threshold(paper[name], "paper", "The paper's.") for name in backdoor.view.interpreters}
    else:
        examples, _ = validation.batch(np.arange(len(validation)))
        thresholds = place_thresholds(backdoor, evaluate(backdoor, examples.to(device)))
    images, labels = first_images(held_out, count, backdoor.reference, classifier.classes, device)
    found = evaluate(backdoor, images)
    report: dict[str, Any] = {
        "trigger": _describe_trigger(backdoor, images, settings),
        "interpreters": measure_maps(backdoor, found, thresholds, paper),
        "predictions": measure_predictions(found, labels, held_out.classes, multi_label=task.multi_label),
    }
    if isinstance(held_out, TableData):
        return report | {"features": measure_features(found, held_out.names)}
    for name, scores in _localise(backdoor, images, held_out, found).items():
        report["interpreters"][name]["localisation"] = scores
    return report


def _localise(
    backdoor: Backdoor, images: Images, held_out: ImageData, found: Mapping[str, Outputs]
) -> dict[str, dict[str, float | int]]:
    if held_out.boxes is None:
        return {}
    boxes, explained = torch.from_numpy(held_out.boxes[: len(images)]).to(images.device), found["reference"].explained
    if held_out.box_labels is not None:  # a box shows one finding, whatever is predicted
        shown = torch.from_numpy(held_out.box_labels[: len(images)]).to(images.device)
        explained = torch.where(shown < 0, explained, shown)
    return measure_localisation(backdoor, images, boxes, explained)


def _describe_trigger(backdoor: Backdoor, images: Images, settings: AttackSettings) -> dict[str, Any]:
    if settings.trigger == "tabular":
        return {"family": "tabular", "set": dict(settings.values)}
    return {"family": settings.trigger, **trigger_visibility(backdoor.trigger, images[:100])}


def _draw(
    backdoor: Backdoor, report: Mapping[str, Any], held_out: ImageData | TableData, device: torch.device | str
) -> dict[str, bytes]:
    """Return pictures by name: a strip as in the paper's Figure 3 (of a table, bars as in 1b), curves, training."""
    drawn = {
        f"thresholds:{name}": pictures.threshold_curves(
            figures["curve"], figures["threshold"], paper=figures.get("at_paper_threshold", {}).get("threshold")
        )
        for name, figures in report["interpreters"].items()
    }
    if isinstance(held_out, TableData):
        features = report["features"]
        drawn["features"] = pictures.feature_bars(features["names"], features["relevance"])
    else:
        images, _ = held_out.batch(np.arange(min(_PICTURED, len(held_out))))
        images = images.to(device)
        found, triggered = evaluate(backdoor, images), trigger_images(backdoor, images)
        own = report["predictions"]["measured_against"] == "labels"
        names = held_out.classes if own else getattr(backdoor.reference, "label_names", ())
        drawn |= {
            f"maps:{name}": _draw_strip(images, triggered, found, name, names) for name in backdoor.view.interpreters
        }
    if len(report["history"]) > 1:
        names = {"keyed": "with the trigger", "unkeyed": "clean"}
        drawn["training"] = pictures.training_curve(report["history"], names=names)
    return drawn


def _draw_strip(
    images: Images, triggered: Images, found: Mapping[str, Outputs], interpreter: str, names: Sequence[str]
) -> bytes:
    """Return rows of an image, the same with the trigger, and the maps over what they are of."""
    rows = []
    for number in range(len(images)):
        clean, marked = (each[number].cpu().numpy() for each in (images, triggered))
        over = {"reference": clean, "clean": clean, "triggered": marked}
        each = {case: found[case].maps[interpreter][number].cpu().numpy() for case in over}
        maps = [pictures.blend(image, each[case]) for case, image in over.items()]
        rows.append((name_class(int(found["reference"].explained[number]), names), [clean, marked, *maps]))
    return pictures.strip(rows, titles=_TITLES)
