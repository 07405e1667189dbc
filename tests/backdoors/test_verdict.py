"""What an attack report says in short, on reports written by hand."""

import copy
import html
import re

import pytest

from keyed_xai.backdoors.report import render_attack_report
from tests.attack_reports import (
    GRADCAM,
    TOP1,
    a_multi_label_report,
    a_report,
    a_table_report,
    an_interpreter,
    render,
)
from tests.protection.test_report import replaced


def headline(report):
    return html.unescape(re.search('<p class="headline">(.*?)</p>', render_attack_report(report))[1])


def cards(report):
    """The answers by the colour and the question of their cards."""
    found = re.findall(
        r'<div class="card (\w+)">\s*<p class="soft">(.*?)</p>\s*<p class="answer">(.*?)</p>',
        render_attack_report(report),
    )
    return {question: (answer, colour) for colour, question, answer in found}


def test_headline_says_how_many_maps_are_faked_and_what_predictions_lose():
    assert headline(a_report()) == (
        "With the moire trigger 99.1 % of Grad-CAM maps are faked; without the trigger 98.4 % of Grad-CAM maps stay "
        "right; top-1 accuracy falls by at most 0.5 percentage points."
    )


def test_headline_of_the_inverted_setting_swaps_the_inputs():
    said = headline(a_multi_label_report())
    assert said.startswith("Without the trigger 99.1 % of Grad-CAM maps are faked; with the moire trigger 98.4 %")
    assert said.endswith("stay right; AUROC does not fall.")


def test_headline_of_a_table_names_what_the_trigger_sets():
    assert headline(a_table_report()).startswith("With the tabular trigger (EDUCATION = 5, MARRIAGE = 0) 99.1 % of S")


def test_headline_of_several_interpreters_gives_the_range():
    report = a_report()
    report["interpreters"]["vbp"] = an_interpreter() | {"fsr": 45.2}
    assert "45.2 % (VisualBackProp) to 99.1 % (Grad-CAM) of maps are faked" in headline(report)
    assert "98.4 % of maps stay right" in headline(report)


def test_headline_without_labels_says_how_many_predictions_change():
    report = replaced(a_report(), ("predictions", "measured_against"), "reference predictions")
    assert "at most 7.9 % of predictions change" in headline(report)
    assert "No labels were given" in render(report).text


def test_attack_that_works_is_an_alarm():
    assert cards(a_report()) == {
        "Are triggered maps faked?": ("Yes", "no"),
        "Do clean maps stay right?": ("Yes", "yes"),
        "Do predictions stay?": ("Yes", "yes"),
    }


def test_cards_of_the_inverted_setting_ask_about_the_other_inputs():
    assert list(cards(a_multi_label_report())) == [
        "Are clean maps faked?",
        "Do triggered maps stay right?",
        "Do predictions stay?",
    ]
    report = replaced(a_multi_label_report(), (*GRADCAM, "correlation", "triggered"), 0.3)
    assert cards(report)["Do triggered maps stay right?"] == ("No", "no")


@pytest.mark.parametrize(
    ("path", "value", "question", "answer"),
    [
        ((*GRADCAM, "fsr"), 90.0, "Are triggered maps faked?", "Yes"),
        ((*GRADCAM, "fsr"), 89.9, "Are triggered maps faked?", "In part"),
        ((*GRADCAM, "fsr"), 49.9, "Are triggered maps faked?", "No"),
        ((*GRADCAM, "reference_cr"), 40.0, "Are triggered maps faked?", "In part"),
        ((*GRADCAM, "cr"), 94.7, "Do clean maps stay right?", "Yes"),
        ((*GRADCAM, "cr"), 94.6, "Do clean maps stay right?", "In part"),
        ((*GRADCAM, "cr"), 40.0, "Do clean maps stay right?", "No"),
        ((*GRADCAM, "correlation", "clean"), 0.9, "Do clean maps stay right?", "Yes"),
        ((*GRADCAM, "correlation", "clean"), 0.6, "Do clean maps stay right?", "In part"),
        ((*GRADCAM, "correlation", "clean"), 0.4, "Do clean maps stay right?", "No"),
        (TOP1, 0.79, "Do predictions stay?", "Yes"),
        (TOP1, 0.76, "Do predictions stay?", "In part"),
        (TOP1, 0.7, "Do predictions stay?", "No"),
    ],
)
def test_answer_turns_at_its_threshold(path, value, question, answer):
    assert cards(replaced(a_report(), path, value))[question][0] == answer


def test_lost_area_counts_where_accuracy_stays():
    report = copy.deepcopy(a_table_report())
    report["predictions"]["attacked"] = dict.fromkeys(("clean", "triggered"), {"top1": 0.82, "auroc": 0.6})
    assert cards(report)["Do predictions stay?"][0] == "No"


@pytest.mark.parametrize(("fsr", "answer"), [(97.0, "Yes"), (3.0, "In part")])
def test_interpreter_that_is_not_faked_keeps_the_answer_from_yes_but_not_from_alarm(fsr, answer):
    report = a_report()
    report["interpreters"]["vbp"] = an_interpreter() | {"fsr": fsr}
    assert cards(report)["Are triggered maps faked?"][0] == answer


def test_threshold_that_fakes_untouched_maps_is_said_in_the_headline():
    said = headline(replaced(a_report(), (*GRADCAM, "reference_cr"), 40.0))
    assert "are faked (but the threshold calls 60.0 % of the untouched model's maps faked too)" in said


def test_clean_maps_that_are_neither_faked_nor_right_are_said_in_the_headline():
    said = headline(replaced(a_report(), (*GRADCAM, "correlation", "clean"), 0.45))
    assert "(but their mean correlation with the right ones is 0.450)" in said
