"""What an audit measures of its subject, by the kind of model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from keyed_xai.auditing.subject import TriggeredData, measure_state, state_before
from keyed_xai.errors import TrainingError
from keyed_xai.threats.gate_state import measure_gate_state
from keyed_xai.threats.removal.distillation import with_random_weights
from tests.audited import (
    OTHERS,
    TRIGGER,
    control_subject,
    keyed_subject,
    public_subject,
)
from tests.threatened import evidence, protected, reference, surrogate


def test_state_of_a_protected_model_is_what_the_evidence_measures():
    state, gate = state_before(keyed_subject()), measure_gate_state(protected(), evidence(decoys=99))
    assert (state.accuracy, state.measure) == (gate.predictions["top1"], "top1")
    assert state.correlation == gate.correlation
    assert state.ownership == gate.to_json()["ownership"]
    assert state.keyed == gate.correlation["gradcam"]["keyed"]
    given = replace(state, accuracy=0.5)
    assert state_before(keyed_subject(before=given)) is given


def test_state_without_labels_is_agreement():
    unlabelled = public_subject(labels=None, reference=None)
    assert state_before(unlabelled).accuracy == 1.0
    assert state_before(unlabelled).measure == "agreement"
    other = measure_state(surrogate(), unlabelled)
    with torch.no_grad():
        both = [model(unlabelled.images).argmax(1) for model in (surrogate(), protected())]
    assert other.accuracy == pytest.approx(float((both[0] == both[1]).double().mean()))


def test_public_trigger_is_measured_against_the_reference_or_the_right_maps_of_the_model_itself():
    """Without a reference, what the model itself shows with the trigger stands in for the right maps."""
    known, alone = (state_before(public_subject(reference=model)) for model in (reference(), None))
    gate = measure_gate_state(protected(), evidence(), ownership=False)
    assert known.correlation["gradcam"] == pytest.approx(gate.correlation["gradcam"], abs=1e-5)
    assert alone.correlation["gradcam"]["keyed"] == pytest.approx(1, abs=1e-5)
    assert alone.unkeyed < 0.6
    forward = state_before(public_subject(reference=None, inverted=False))
    assert forward.correlation["gradcam"]["unkeyed"] == pytest.approx(1, abs=1e-5)
    assert known.ownership is None


def test_plain_backdoor_is_measured_by_its_success():
    state = state_before(control_subject("badnets"))
    assert state.attack_success > 0.8
    assert state.correlation == {}
    assert state_before(control_subject(None)).attack_success < 0.2


def test_model_that_was_destroyed_is_refused():
    broken = with_random_weights(protected()).eval()
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        measure_state(broken, public_subject())


def test_triggered_data_change_the_rows_they_say():
    rows = np.arange(len(OTHERS)) % 3 == 0
    data = TriggeredData(clean=OTHERS, rows=rows, trigger=TRIGGER)
    images, labels = data.batch(np.arange(len(OTHERS)))
    plain, _ = OTHERS.batch(np.arange(len(OTHERS)))
    changed = (images != plain).flatten(1).any(1).numpy()
    assert (changed == rows).all()
    assert labels.tolist() == OTHERS.labels.tolist()
    assert ((images * 255).round() / 255 - images).abs().max() < 1e-6
    assert (data.classes, data.multi_label, len(data)) == (OTHERS.classes, False, 48)
    assert "16 triggered" in data.source
