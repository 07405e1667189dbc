"""Running defences and attacks on a model, with positive controls, and keeping every finding as it is made."""

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from keyed_xai.artifacts.documents import printable, read_json, write_atomically, write_json
from keyed_xai.artifacts.opening import make_family
from keyed_xai.artifacts.versions import package_versions
from keyed_xai.auditing.catalogue import AUDITS, GROUPS, choose_entries, find_entry, run_entry
from keyed_xai.auditing.control_files import cached_control
from keyed_xai.auditing.costs import estimate_seconds
from keyed_xai.auditing.entries import CAUGHT, is_closed
from keyed_xai.auditing.pictures import stage_curve
from keyed_xai.auditing.report import render_audit_report
from keyed_xai.auditing.subject import Subject, state_before, to_device
from keyed_xai.auditing.suspects import Suspect
from keyed_xai.data import ImageData
from keyed_xai.data.splits import check_shape, digest_data, digest_network, first_images, has_several_labels
from keyed_xai.errors import ArtifactError, TrainingError
from keyed_xai.models import Classifier
from keyed_xai.outputs import sweep
from keyed_xai.progress import QUIET, Progress, Within
from keyed_xai.saliency.pooled import make_view
from keyed_xai.threats.detection.controls import (
    ControlSettings,
    PoisonedData,
    PoisonSettings,
    poison,
)
from keyed_xai.threats.gate_state import OwnerEvidence

REPORT_SCHEMA = "keyed-xai/audit-report/v1"
FINDING_SCHEMA = "keyed-xai/audit-finding/v1"
REPORT_NAME, PAGE_NAME = "audit.json", "audit.html"
CONTROLS = ("clean", "badnets", "blended")
"""A network that defences must leave alone, and two with plain backdoors that they must catch."""
_FINDINGS, _CONTROLS = "findings", "controls"
_CURVES_FROM = 3  # stages; fewer make no curve


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """What is run, and on what.

    Attributes:
        against: Names and groups of `threats.catalogue`.
        controls: Whether defences also run on positive controls, where the images have labels.
        control: How those networks are fitted.
        held_out_images: Images that states are measured on, at most.
        decoys: Random keys of each opening test of ownership, at most.
        seed: Seed of everything random.
    """

    against: tuple[str, ...] = ("quick",)
    controls: bool = True
    control: ControlSettings = field(default_factory=ControlSettings)
    held_out_images: int = 500
    decoys: int = 999
    seed: int = 0

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if not choose_entries(self.against):
            raise ValueError(f"against: nothing to run in {', '.join(self.against) or 'an empty list'}")
        for name, least in (("held_out_images", 2), ("decoys", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        report: Fits the schema "audit-report".
        pictures: PNG files by name, for the HTML report: "curve:" and the name of a finding, "curve:<control>:" and it.
    """

    report: dict[str, Any]
    pictures: dict[str, bytes] = field(repr=False)


def audit(
    suspect: Suspect,
    train_data: ImageData,
    held_out: ImageData,
    settings: AuditSettings | None = None,
    *,
    folder: Path | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress = QUIET,
) -> Audit:
    """Return what defences and attacks find on a model; the model stays as it is.

    Args:
        suspect: The model, and what is known about it.
        train_data: Images of an attacker or defender; positive controls need labels.
        held_out: Others, for what is measured.
        settings: What is run.
        folder: Findings are kept in it as they are made, and the report at the end; None keeps nothing.
        resume: Take findings that are there and rest on the same model, data and settings.
        device: Device to run on.
        progress: Hears a line about how long all will take, where nothing slow is run; of "audit", by what is run; and
            of each of these by its title.

    Raises:
        TrainingError: There are too few images or of another size, or something that was asked for by name needs what
            is not known.
        ArtifactError: The folder holds an audit and `resume` is not given, or it cannot be written.
        ModelError: The model lacks a layer that the maps need.
    """
    settings, started = settings or AuditSettings(), time.monotonic()
    if folder is not None:
        check_same_audit(folder, resume=resume)
        for part in (".", _CONTROLS, _FINDINGS, *(f"{_FINDINGS}/{name}" for name in CONTROLS)):
            sweep(folder / part)
    for data in (train_data, held_out):
        check_shape(suspect.classifier, data)
    subject = _make_subject(suspect, train_data, held_out, settings, device)
    names = choose_entries(settings.against)
    lacking = {name: find_entry(name).lacks(subject) for name in names}
    _check_runnable(lacking, settings.against)
    run = [name for name in names if not lacking[name]]
    defences = [name for name in run if find_entry(name).controlled]
    controls, note = _choose_controls(train_data, settings, defences)
    total = len(run) + len(controls) * len(defences)
    cache = _Cache(folder, _identify(suspect, train_data, held_out, settings), total, progress)
    measuring = time.monotonic()
    subject = replace(subject, before=state_before(subject))
    seconds = time.monotonic() - measuring
    progress.say(_say_how_long(subject, run, seconds, len(controls), settings.control.widths))
    findings = [cache.find(name, subject) for name in run]
    tested = _run_controls(controls, defences, subject, train_data, held_out, settings, cache)
    progress.advance("audit", total, total)
    report = {
        "schema": REPORT_SCHEMA,
        "model": _describe_model(suspect, subject),
        "findings": findings,
        "not_run": [_describe_entry(name) | {"why": f"needs {lacking[name]}"} for name in names if lacking[name]],
        "controls": tested,
        "defences": [_judge_defence(name, tested) for name in defences] if tested else [],
        "notes": [each for each in (_say_baseline(subject), note) if each],
        "data": {
            "train": {"source": train_data.source, "images": len(train_data)},
            "held_out": {"source": held_out.source, "images": len(subject.images)},
        },
        "settings": {"against": list(settings.against), "controls": settings.controls, "decoys": settings.decoys,
                     "held_out_images": settings.held_out_images, "seed": settings.seed},
        "seconds": time.monotonic() - started,
        "versions": package_versions(),
    }  # fmt: skip
    result = Audit(report, _draw(findings, tested))
    if folder is not None:
        _write(result, folder)
    return result


def check_same_audit(folder: Path, *, resume: bool) -> None:
    """Say so before hours of work that a folder has something in it.

    Raises:
        ArtifactError: It holds an audit that nobody asked to go on with, or something else.
    """
    if not folder.exists():
        return
    name = printable(str(folder))
    if not folder.is_dir() or not (_is_empty(folder) or (folder / _FINDINGS).is_dir()):
        raise ArtifactError(f"{name} is there and is not an audit's folder: choose another name.")
    if (folder / _FINDINGS).is_dir() and not resume:
        raise ArtifactError(
            f"{name} holds an audit. Go on with it by --resume, which keeps what is done on the same model, data and "
            "settings; or choose another name."
        )


def _is_empty(folder: Path) -> bool:
    """Return whether nothing is in a folder but hidden files, such as what says that a run is about to write there."""
    return all(path.name.startswith(".") for path in folder.iterdir())


class _Cache:
    """Findings on disk, each with a digest of all that it rests on."""

    def __init__(self, folder: Path | None, base: str, total: int, progress: Progress) -> None:
        """Remember where findings are, what all of them rest on, how many there will be, and who hears of them."""
        self.folder, self.base, self.total, self.done, self.progress = folder, base, total, 0, progress

    def find(self, name: str, subject: Subject, *, control: str = "") -> dict[str, Any]:
        """Return the finding of an entry on a subject, from disk where it is there and not a failure."""
        entry = find_entry(name)
        title = f"{entry.title} ({control})" if control else entry.title
        self.progress.advance("audit", self.done, self.total)
        self.progress.advance(title, 0, None)
        self.done += 1
        tested = digest_network(subject.classifier) if control else ""
        parts = (self.base, control, tested, name, entry.identity)
        identity = hashlib.sha256(repr(parts).encode()).hexdigest()
        path = self.folder and self.folder / _FINDINGS / control / f"{name}.json"
        found = _read_finding(path, identity) if path else None
        if found is None:
            found = {
                "schema": FINDING_SCHEMA,
                "identity": identity,
                **run_entry(name, replace(subject, progress=Within(self.progress, title))).to_json(),
            }
            found["sentence"] = printable(" ".join(found["sentence"].split()))
            if path:
                write_json(path, found, schema="audit-finding")
        return found


def _read_finding(path: Path, identity: str) -> dict[str, Any] | None:
    """Return a finding on disk if it is of this identity; one that failed, or is damaged, is made anew."""
    if not path.is_file():
        return None
    try:
        found = read_json(path, "audit-finding")
    except ArtifactError:
        return None
    return found if found["identity"] == identity and found["outcome"] != "failed" else None


def _make_subject(
    suspect: Suspect,
    train_data: ImageData,
    held_out: ImageData,
    settings: AuditSettings,
    device: torch.device | str,
) -> Subject:
    classifier = to_device(suspect.classifier, device)
    reference = None if suspect.reference is None else to_device(suspect.reference, device)
    surrogate = None if suspect.surrogate is None else to_device(suspect.surrogate, device)
    count = min(settings.held_out_images, len(held_out))
    images, labels = first_images(held_out, count, reference or classifier, classifier.classes, device)
    if labels is None:
        train_data, held_out = (replace(data, labels=None, classes=()) for data in (train_data, held_out))
    classifier.multi_label = has_several_labels(classifier, train_data)
    subject = Subject(
        classifier=classifier,
        view=make_view(classifier, suspect.interpreters, suspect.grid),
        data=train_data,
        held_out=held_out,
        images=images,
        labels=labels,
        reference=reference,
        trigger=suspect.trigger,
        keyed=suspect.key is not None,
        inverted=suspect.inverted,
        surrogate=surrogate,
        device=device,
        seed=settings.seed,
    )
    return replace(subject, evidence=_make_evidence(suspect, subject, settings))


def _make_evidence(suspect: Suspect, subject: Subject, settings: AuditSettings) -> OwnerEvidence | None:
    if suspect.key is None or subject.reference is None:
        return None
    return OwnerEvidence(
        reference=subject.reference,
        view=make_view(subject.reference, suspect.interpreters, subject.view.grid),
        key=suspect.key,
        family=make_family(suspect.parameters),
        images=subject.images,
        labels=subject.labels,
        signature=suspect.signature,
        decoys=settings.decoys,
        seed=settings.seed,
        licensed=suspect.licensed,
    )


def _check_runnable(lacking: dict[str, str], against: Iterable[str]) -> None:
    """Refuse what was asked for by its own name; what a group brought along is listed as not run."""
    for name in against:
        if name not in GROUPS and lacking[name]:
            raise TrainingError(f"{name} cannot be run on this model: it needs {lacking[name]}.")
    if all(lacking.values()):
        needs = dict.fromkeys(lacking.values())
        raise TrainingError(f"Nothing that was asked for can be run on this model: it needs {'; or '.join(needs)}.")


def _identify(suspect: Suspect, train_data: ImageData, held_out: ImageData, settings: AuditSettings) -> str:
    """Return a digest of all that every finding rests on; a key enters by its public half."""
    models = [suspect.classifier, suspect.reference, suspect.surrogate]
    parts = [None if model is None else digest_network(model) for model in models]
    asked = replace(settings, against=("all",), controls=True)
    public = None if suspect.key is None else (suspect.key.public.key_id, suspect.parameters)
    known = (suspect.kind, suspect.interpreters, suspect.grid, suspect.inverted, suspect.signature, public)
    parts += [digest_data(train_data), digest_data(held_out), repr(asked), repr(known), _digest_public(suspect)]
    parts.append(package_versions()["keyed-xai"])
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _digest_public(suspect: Suspect) -> str:
    if suspect.trigger is None or suspect.key is not None:
        return ""
    grey = torch.full((1, suspect.classifier.input.channels, 32, 32), 0.5)
    return hashlib.sha256(suspect.trigger.apply(grey).numpy().tobytes()).hexdigest()


def _say_how_long(
    subject: Subject, names: Sequence[str], measuring: float, controls: int, widths: tuple[int, ...]
) -> Iterator[str]:
    """Yield a line about how long what is run will take; none where something slow is, for which nothing is timed."""
    entries = [find_entry(name) for name in names]
    if not any(entry.slow for entry in entries):
        seconds = estimate_seconds(subject, entries, measuring=measuring, controls=controls, widths=widths)
        minutes = max(1, round(seconds / 60))
        yield f"About {minutes} minute{'s' * (minutes > 1)} on this machine, as timed on this model."


# Positive controls


def _choose_controls(
    data: ImageData, settings: AuditSettings, defences: list[str]
) -> tuple[dict[str, PoisonedData | None], str]:
    """Return the data of each control (None: clean ones), or none and the reason why not."""
    if not defences or not settings.controls:
        return {}, "No positive controls were asked for: what a defence misses proves nothing." if defences else ""
    try:
        poisoned = [poison(data, PoisonSettings(attack=name, seed=settings.seed)) for name in CONTROLS[1:]]
    except TrainingError as error:
        return {}, f"There are no positive controls, so what a defence misses proves nothing. {error}"
    return {"clean": None, **{each.settings.attack: each for each in poisoned}}, ""


def _run_controls(
    controls: dict[str, PoisonedData | None],
    defences: list[str],
    subject: Subject,
    data: ImageData,
    held_out: ImageData,
    settings: AuditSettings,
    cache: _Cache,
) -> dict[str, dict[str, Any]]:
    """Return, by control, its accuracy, how well its backdoor works, and what the defences find."""
    tested = {}
    for name, poisoned in controls.items():
        model = cached_control(
            name,
            poisoned or data,
            held_out,
            settings.control,
            folder=cache.folder and cache.folder / _CONTROLS,
            seed=settings.seed,
            device=subject.device,
            progress=Within(cache.progress, f"fitting the control {name}"),
        )
        control = _control_subject(subject, model, poisoned, poisoned or poison(data), data, held_out)
        control = replace(control, before=state_before(control))
        before = control.before.to_json() if control.before else {}
        found = [cache.find(each, control, control=name) for each in defences]
        tested[name] = {
            "poisoned": 0 if poisoned is None else int(poisoned.rows.sum()),
            "before": before,
            "findings": found,
        }
    return tested


def _control_subject(
    subject: Subject,
    model: Classifier,
    fitted: PoisonedData | None,
    backdoor: PoisonedData,
    data: ImageData,
    held_out: ImageData,
) -> Subject:
    """Return a control as defences see a model: on the same images, with a plain trigger and labels of its own."""
    images, labels = held_out.batch(range(len(subject.images)))
    return replace(
        subject,
        classifier=model,
        view=make_view(model, ("gradcam",), None),
        data=data,
        held_out=held_out,
        images=images.to(subject.device),
        labels=None if labels is None else labels.to(subject.device),
        reference=None,
        evidence=None,
        surrogate=None,
        trigger=backdoor.trigger,
        keyed=False,
        inverted=False,
        backdoor=backdoor,
        fitted=fitted,
        before=None,
    )


def _judge_defence(name: str, tested: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what a defence's findings are worth, given what it found on the controls."""
    outcomes = {
        control: next(each["outcome"] for each in result["findings"] if each["name"] == name)
        for control, result in tested.items()
    }
    caught = [control for control in CONTROLS[1:] if outcomes[control] in CAUGHT]
    if outcomes["clean"] in CAUGHT:
        verdict, why = "proves nothing here", "It also flags a clean network."
    elif not caught:
        verdict, why = "proves nothing here", "It misses both plain backdoors."
    elif len(caught) < len(CONTROLS) - 1:
        missed = next(control for control in CONTROLS[1:] if control not in caught)
        verdict, why = "proves little here", f"It catches one plain backdoor and misses the other, {missed}."
    else:
        verdict, why = "works here", "It catches both plain backdoors and leaves the clean network alone."
    return {"name": name, "title": AUDITS[name].title, "outcomes": outcomes, "verdict": verdict, "sentence": why}


# The report


def _describe_model(suspect: Suspect, subject: Subject) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": suspect.name,
        "kind": suspect.kind,
        "architecture": suspect.classifier.architecture,
        "interpreters": list(subject.view.interpreters),
        "grid": list(subject.view.grid),
        "inverted": suspect.inverted,
        "digest": digest_network(suspect.classifier),
        "known": sorted(subject.has - {"state"}),
        "before": state_before(subject).to_json(),
    }
    return described if suspect.key is None else described | {"key_id": suspect.key.public.key_id}


def _say_baseline(subject: Subject) -> str:
    """Return what there is to remove before anything is tried; empty where nothing is known of it."""
    before = state_before(subject)
    if not before.correlation:
        return ""
    maps = f"maps correlate {before.keyed:.2f} with the right ones with the trigger, {before.unkeyed:.2f} without it"
    if subject.evidence is None:
        return f"Before any attack {maps}."
    shown = bool(before.ownership and before.ownership["shown"])
    there = [*(["a closed gate"] if is_closed(before) else []), *(["an ownership mark"] if shown else [])]
    found = " and ".join(there) or "neither a closed gate nor an ownership mark, so nothing to remove"
    return f"Before any attack there is {found}: {maps}, and ownership is {'shown' if shown else 'not shown'}."


def _describe_entry(name: str) -> dict[str, Any]:
    entry = find_entry(name)
    return {"name": name} | {part: getattr(entry, part) for part in ("group", "threat", "title", "strength")}


def _draw(findings: list[dict[str, Any]], tested: dict[str, dict[str, Any]]) -> dict[str, bytes]:
    """Return the curves of all findings that have one."""
    drawn = {f"curve:{each['name']}": each["curve"] for each in findings}
    for control, result in tested.items():
        drawn |= {f"curve:{control}:{each['name']}": each["curve"] for each in result["findings"]}
    return {name: stage_curve(curve) for name, curve in drawn.items() if len(curve) >= _CURVES_FROM}


def _write(result: Audit, folder: Path) -> None:
    write_json(folder / REPORT_NAME, result.report, schema="audit-report")
    write_atomically(folder / PAGE_NAME, render_audit_report(result.report, pictures=result.pictures).encode())
