"""The estimate of an audit counts what training and measuring cost, and leaves the model as it is."""

import pytest

from keyed_xai.auditing.catalogue import AUDITS
from keyed_xai.auditing.costs import estimate_seconds, seconds_to_train
from keyed_xai.threats.detection.controls import choose_control_fitting
from tests.audited import control_subject, keyed_subject


def test_a_step_takes_time_and_changes_nothing():
    subject = keyed_subject()
    before = {name: tensor.clone() for name, tensor in subject.classifier.state_dict().items()}
    assert seconds_to_train(subject.classifier, subject.images) > 0
    assert all(tensor.equal(before[name]) for name, tensor in subject.classifier.state_dict().items())


def test_estimate_adds_training_measuring_and_controls(monkeypatch):
    monkeypatch.setattr("keyed_xai.auditing.costs.seconds_to_train", lambda *_: 0.001)
    subject = control_subject(None)
    entries = [AUDITS[name] for name in ("int8", "ftal", "fine-prune")]
    count, passes = len(subject.data), 10 / 3
    alone = estimate_seconds(subject, entries, measuring=2.0, controls=0, widths=(8,))
    assert alone == pytest.approx(3 * 2.0 + 0.001 * count * 2 * passes)
    beside = estimate_seconds(subject, entries, measuring=2.0, controls=3, widths=(8,))
    fitted = 0.001 * count * (choose_control_fitting(count).epochs + passes)
    assert beside == pytest.approx(alone + 3 * (2.0 + fitted))
