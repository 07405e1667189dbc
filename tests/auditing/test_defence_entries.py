"""Defences against their positive controls."""

from dataclasses import replace

import pytest

from keyed_xai.auditing.catalogue import (
    AUDITS,
    run_entry,
)
from keyed_xai.threats.detection.neural_cleanse import CleanseSettings
from tests.audited import (
    ATTACKERS,
    control_subject,
    keyed_subject,
)
from tests.poisoned import TARGET

DEFENCES = ("activation-clustering", "spectral-signatures")


@pytest.mark.parametrize("name", DEFENCES)
def test_defence_catches_the_control_and_leaves_the_clean_network_alone(name):
    caught, spared = (run_entry(name, control_subject(attack)).observation for attack in ("badnets", None))
    assert caught.outcome == "flagged", caught.sentence
    assert spared.outcome == "left alone", spared.sentence


def test_neural_cleanse_flags_the_class_of_the_patch():
    """With the settings that the defence's own test takes."""
    assert AUDITS["neural-cleanse"].settings == CleanseSettings()
    brief = CleanseSettings(rounds=40, batches=4, batch_size=16, patience=3, stop_patience=8)
    seen = replace(AUDITS["neural-cleanse"], settings=brief).run(control_subject("badnets"))
    assert seen.outcome == "flagged"
    assert TARGET in seen.figures["flagged"]


def test_training_data_are_clustered_as_the_network_was_fitted():
    caught, spared = (
        run_entry("activation-clusters", control_subject(attack)).observation for attack in ("badnets", None)
    )
    assert (caught.outcome, spared.outcome) == ("flagged", "left alone")
    assert sum(each["rows"] for each in caught.figures["classes"]) == len(control_subject("badnets").fitted)


def test_spectral_signatures_look_at_a_tenth_of_triggered_images_where_the_data_are_clean():
    figures = run_entry("spectral-signatures", keyed_subject()).observation.figures
    assert (figures["poisoned"], figures["rows"]) == (round(0.1 * len(ATTACKERS)), len(ATTACKERS))
