"""Audits run what can be run, keep what they find, go on where they stopped, and give no secret away."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from keyed_xai.artifacts.documents import read_json, validate
from keyed_xai.auditing import running as auditing
from keyed_xai.auditing.catalogue import AUDITS
from keyed_xai.auditing.entries import Observation
from keyed_xai.auditing.running import AuditSettings, audit
from keyed_xai.data.splits import digest_network
from keyed_xai.errors import ArtifactError, TrainingError
from keyed_xai.threats.removal.weights import QuantisationSettings
from tests.audited import ATTACKERS, OTHERS, SECRETS, backdoored_suspect, example, keyed_suspect, make_image_data, quick
from tests.heard import Heard, StopAt
from tests.poisoned import HELD_OUT, TRAIN
from tests.threatened import OWNER, protected, surrogate


def run(folder=None, *against, suspect=None, **changes):
    options = {name: changes.pop(name) for name in ("resume", "progress") if name in changes}
    settings = quick(*(against or ("int8", "fp16")), **changes)
    return audit(suspect or keyed_suspect(), ATTACKERS, OTHERS, settings, folder=folder, **options).report


def outcomes(report):
    return {each["name"]: each["outcome"] for each in report["findings"]}


@pytest.fixture
def counted(monkeypatch):
    """Names of entries in the order in which they are run."""
    names = []

    def run_entry(name, subject):
        names.append(name)
        return actual(name, subject)

    actual = auditing.run_entry
    monkeypatch.setattr(auditing, "run_entry", run_entry)
    return names


def test_audit_writes_a_report_that_fits_and_leaves_the_model_as_it_was(tmp_path):
    before = digest_network(protected())
    report = run(tmp_path / "a", "int8", "activation-clustering")
    assert read_json(tmp_path / "a" / "audit.json", "audit-report") == json.loads(json.dumps(report))
    assert "8-bit weights" in (tmp_path / "a" / "audit.html").read_text()
    found = {each["name"]: each for each in report["findings"]}
    assert found["int8"]["outcome"] == "survives"
    assert found["int8"]["before"]["ownership"]["log2_p"] < -30  # 36 cells, which cannot reach 2^-40
    assert found["int8"] == read_json(tmp_path / "a" / "findings" / "int8.json", "audit-finding")
    assert report["model"]["known"] == ["key", "labels", "reference", "trigger"]
    assert report["model"]["key_id"] == OWNER.public.key_id
    assert report["model"]["before"]["accuracy"] == found["int8"]["before"]["accuracy"]
    assert report["data"]["held_out"] == {"source": "blobs 3", "images": 32}
    assert digest_network(protected()) == before == report["model"]["digest"]


def test_no_file_holds_a_secret(tmp_path):
    run(tmp_path / "a", "denoise", "spectral-signatures", "int8")
    texts = [path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(texts) >= 5
    forbidden = [secret.encode() for secret in SECRETS] + [bytes(range(32)), OWNER.derive_seed("spread")]
    assert not [secret for secret in forbidden if any(secret in text for text in texts)]
    assert "Spread" not in repr(keyed_suspect())
    assert "OwnerKey" not in repr(keyed_suspect())


def test_same_seed_finds_the_same():
    first, second = (run(None, "ftal-mild") for _ in range(2))
    for report in (first, second):
        del report["seconds"], report["findings"][0]["seconds"]
    assert first == second
    other = run(None, "ftal-mild", seed=1)
    assert other["findings"][0]["after"] != first["findings"][0]["after"]


def test_how_long_it_takes_is_said_first():
    heard = Heard()
    run(None, "int8", progress=heard)
    assert heard.lines == ["About 1 minute on this machine, as timed on this model."]
    assert heard.steps == [("audit", 0, 1), (AUDITS["int8"].title, 0, None), ("audit", 1, 1)]


def test_audit_goes_on_where_it_stopped(tmp_path, counted):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", progress=StopAt(1, KeyboardInterrupt, "audit"))
    assert [path.name for path in (tmp_path / "a" / "findings").iterdir()] == ["int8.json"]
    assert not (tmp_path / "a" / "audit.json").exists()
    report = run(tmp_path / "a", resume=True)
    assert counted == ["int8", "fp16"]
    assert outcomes(report) == {"int8": "survives", "fp16": "survives"}
    assert run(tmp_path / "a", resume=True)["findings"] == report["findings"]
    assert counted == ["int8", "fp16"]


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("model", {"suspect": keyed_suspect(classifier=surrogate())}),
        ("reference", {"suspect": keyed_suspect(reference=surrogate())}),
        ("without the key", {"suspect": keyed_suspect(key=None, inverted=False)}),
        ("seed", {"seed": 1}),
        ("decoys", {"decoys": 8}),
    ],
)
def test_finding_of_another_model_or_setting_is_made_anew(tmp_path, counted, what, changes):
    name = "activation-clusters"
    run(tmp_path / "a", name, controls=False)
    run(tmp_path / "a", name, controls=False, resume=True)
    assert counted == [name]
    run(tmp_path / "a", name, controls=False, resume=True, **changes)
    assert counted == [name, name], what


def test_finding_of_other_images_is_made_anew(tmp_path, counted):
    for data in (ATTACKERS, make_image_data(64, 6)):
        audit(keyed_suspect(), data, OTHERS, quick("int8"), folder=tmp_path / "a", resume=True)
    audit(keyed_suspect(), data, make_image_data(48, 7), quick("int8"), folder=tmp_path / "a", resume=True)
    assert counted == ["int8"] * 3


def test_entry_of_other_settings_or_version_or_damaged_file_is_run_anew(tmp_path, counted, monkeypatch):
    run(tmp_path / "a", "int8")
    monkeypatch.setitem(AUDITS, "int8", replace(AUDITS["int8"], words=lambda _: "8 bits"))
    run(tmp_path / "a", "int8", resume=True)
    assert counted == ["int8"]
    same_words = replace(AUDITS["int8"], settings=QuantisationSettings(7), words=lambda _: "8 bits")
    for entry in (replace(AUDITS["int8"], version=3), same_words):
        monkeypatch.setitem(AUDITS, "int8", entry)
        run(tmp_path / "a", "int8", resume=True)
    (tmp_path / "a" / "findings" / "int8.json").write_text("{}")
    run(tmp_path / "a", "int8", resume=True)
    assert counted == ["int8"] * 4


def test_attack_that_fails_is_recorded_and_tried_again(tmp_path, monkeypatch):
    def fail(*_):
        raise TrainingError("The loss\nis no longer finite.")

    monkeypatch.setitem(AUDITS, "broken", example(fail))
    report = run(tmp_path / "a", "broken", "int8")
    assert outcomes(report) == {"broken": "failed", "int8": "survives"}
    failed = next(each for each in report["findings"] if each["name"] == "broken")
    assert failed["sentence"] == "The loss is no longer finite."
    monkeypatch.setitem(AUDITS, "broken", example(lambda *_: Observation(outcome="resists", sentence="Mended.")))
    assert outcomes(run(tmp_path / "a", "broken", "int8", resume=True))["broken"] == "resists"


def test_what_cannot_be_run_is_listed_or_refused_by_name():
    stranger = keyed_suspect(key=None, trigger=None, reference=None)
    report = run(None, "quick", suspect=stranger, controls=False)
    assert "activation-clusters" in outcomes(report)
    why = {each["name"]: each["why"] for each in report["not_run"]}
    assert why["int8"] == "needs the owner's key and the reference model"
    assert "the trigger" in why["spectral-signatures"]
    assert set(why).isdisjoint(outcomes(report))
    with pytest.raises(TrainingError, match="int8 cannot be run on this model: it needs the owner's key"):
        run(None, "quick", "int8", suspect=stranger)
    with pytest.raises(TrainingError, match="Nothing that was asked for"):
        run(None, "removal", suspect=stranger)


def test_defences_are_tested_on_positive_controls(tmp_path):
    settings = quick("activation-clustering", "spectral-signatures", held_out_images=240)
    heard = Heard()
    first = audit(backdoored_suspect(), TRAIN, HELD_OUT, settings, folder=tmp_path / "a", progress=heard).report
    assert outcomes(first) == {"activation-clustering": "flagged", "spectral-signatures": "flagged"}
    assert list(first["controls"]) == ["clean", "badnets", "blended"]
    assert first["controls"]["badnets"]["before"]["attack_success"] > 0.7
    assert first["controls"]["clean"]["before"]["attack_success"] < 0.2
    judged = {each["name"]: each for each in first["defences"]}
    assert judged["spectral-signatures"]["outcomes"]["badnets"] == "flagged"
    assert judged["activation-clustering"]["outcomes"]["clean"] == "left alone"
    assert judged["activation-clustering"]["verdict"] != "proves nothing here"
    weights = sorted((tmp_path / "a" / "controls").iterdir())
    stamps = [path.stat().st_mtime_ns for path in weights]
    second = audit(backdoored_suspect(), TRAIN, HELD_OUT, settings, folder=tmp_path / "a", resume=True).report
    assert second["controls"] == first["controls"]
    assert [path.stat().st_mtime_ns for path in weights] == stamps
    assert len(weights) == 3
    total = 2 * 4
    assert heard.counts("audit") == [(done, total) for done in range(total + 1)]
    told = list(dict.fromkeys(task for task, _, _ in heard.steps))
    assert [task for task in told if task.startswith("fitting")] == [
        f"fitting the control {name}" for name in ("clean", "badnets", "blended")
    ]
    assert told[-2:] == [f"{AUDITS[name].title} (blended)" for name in outcomes(first)]


def test_control_that_is_poisoned_otherwise_is_fitted_anew(tmp_path, monkeypatch):
    settings = quick("activation-clustering")
    audit(backdoored_suspect(), TRAIN, HELD_OUT, settings, folder=tmp_path / "a")
    monkeypatch.setattr(auditing, "PoisonSettings", partial(auditing.PoisonSettings, share=0.15))
    changed = audit(backdoored_suspect(), TRAIN, HELD_OUT, settings, folder=tmp_path / "a", resume=True).report
    names = sorted(path.name.partition("-")[0] for path in (tmp_path / "a" / "controls").iterdir())
    assert names == ["badnets", "badnets", "blended", "blended", "clean"]
    fresh = audit(backdoored_suspect(), TRAIN, HELD_OUT, settings).report
    for name, control in fresh["controls"].items():
        figures = [each["figures"] for each in control["findings"]]
        assert [each["figures"] for each in changed["controls"][name]["findings"]] == figures


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder in which the controls are fitted once."""
    return tmp_path_factory.mktemp("shared") / "a"


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (("left alone", "flagged", "removed"), "works here"),
        (("left alone", "flagged", "left alone"), "proves little here"),
        (("left alone", "left alone", "unclear"), "proves nothing here"),
        (("left alone", "left alone", "failed"), "proves nothing here"),
        (("flagged", "flagged", "flagged"), "proves nothing here"),
    ],
)
def test_defence_is_worth_what_it_finds_on_the_controls(monkeypatch, shared, found, verdict):
    answers = iter(("flagged", *found))
    entry = example(lambda *_: Observation(outcome=next(answers), sentence="."), group="defences", controlled=True)
    monkeypatch.setitem(AUDITS, "guess", replace(entry, version=hash(found)))
    report = audit(backdoored_suspect(), TRAIN, HELD_OUT, quick("guess"), folder=shared, resume=True).report
    assert report["defences"][0]["verdict"] == verdict
    validate(json.loads(json.dumps(report)) | {"findings": []}, "audit-report", origin="it")


def test_without_labels_or_by_wish_there_are_no_controls_and_a_note_says_so():
    unlabelled = make_image_data(64, 5, labelled=False)
    report = audit(keyed_suspect(), unlabelled, OTHERS, quick("activation-clustering")).report
    assert report["controls"] == {}
    assert any("no labels" in note for note in report["notes"])
    report = run(None, "activation-clustering", controls=False)
    assert any("proves nothing" in note for note in report["notes"])
    assert not any("proves nothing" in note for note in run(None, "int8")["notes"])


def test_labels_of_other_classes_are_left_aside():
    foreign = replace(OTHERS, labels=np.asarray(OTHERS.labels) * 0, classes=("a", "b", "c"))
    report = audit(keyed_suspect(), ATTACKERS, foreign, quick("int8")).report
    assert report["model"]["before"]["measure"] == "agreement"
    assert "labels" not in report["model"]["known"]


def test_folder_with_an_audit_or_something_else_is_left_alone(tmp_path):
    run(tmp_path / "a")
    with pytest.raises(ArtifactError, match="--resume"):
        run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("")
    with pytest.raises(ArtifactError, match="not an audit's folder"):
        run(tmp_path / "b", resume=True)
    (tmp_path / "c").mkdir()
    assert run(tmp_path / "c", "int8")["findings"]


def test_images_of_another_size_are_refused():
    with pytest.raises(TrainingError, match="1 x 24 x 24"):
        audit(keyed_suspect(), TRAIN, OTHERS, quick("int8"))


@pytest.mark.parametrize("changes", [{"against": ("nothing",)}, {"against": ()}, {"decoys": 0}, {"held_out_images": 1}])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=r"xpected|nothing to run"):
        AuditSettings(**changes)
