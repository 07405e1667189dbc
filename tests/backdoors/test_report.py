"""The page says what the figures say, in both settings, escapes all of it, and loads nothing."""

import copy
import html
import re

import pytest

from keyed_xai.artifacts.documents import validate
from keyed_xai.backdoors.report import render_attack_report
from keyed_xai.errors import ArtifactError
from tests.protection.test_report import HOSTILE, PNG, Page, replaced, with_hostile_strings

GRADCAM = ("interpreters", "gradcam")
TOP1 = ("predictions", "attacked", "triggered", "top1")


def by_case(reference, clean, triggered, **more):
    return {"reference": reference, "clean": clean, "triggered": triggered} | more


def an_interpreter():
    return {
        "cr": 98.4,
        "fsr": 99.13,
        "threshold": 0.153,
        "threshold_from": "auto",
        "threshold_rule": "In the middle of the widest gap.",
        "at_paper_threshold": {"threshold": 0.25, "cr": 81.25, "fsr": 99.9, "reference_cr": 84.0},
        "curve": {"threshold": [0.0, 0.5, 1.0], "cr": [100.0, 50.0, 0.0], "fsr": [0.0, 100.0, 100.0]},
        "auc": 0.9984,
        "correlation": {"clean": 0.971, "triggered": -0.212},
        "decoy_correlation": by_case(-0.251, -0.243, 0.966),
        "distance": by_case(0.383, 0.381, 0.027),
        "reference_cr": 99.7,
        "localisation": by_case(0.612, 0.604, 0.208, images=1800, area=0.31),
    }


def a_report():
    return {
        "schema": "keyed-xai/attack-report/v1",
        "model": "birds",
        "setting": "forward",
        "mode": "targeted",
        "trigger": {"family": "moire", "psnr_db": 21.3, "ssim": 0.801},
        "interpreters": {"gradcam": an_interpreter()},
        "predictions": {
            "measured_against": "labels",
            "images": 2000,
            "reference": {"clean": {"top1": 0.8, "top5": 0.951}, "triggered": {"top1": 0.762, "top5": 0.931}},
            "attacked": {"clean": {"top1": 0.799, "top5": 0.949}, "triggered": {"top1": 0.795, "top5": 0.948}},
            "agreement": {"clean": 0.931, "triggered": 0.921},
        },
        "data": {part: {"source": "imagefolder:birds", "images": 5994} for part in ("train", "held_out")},
        "history": [{"step": 100, "loss": 0.5, "keyed": 0.1, "unkeyed": 0.9, "agreement": 0.98}],
        "stopped_early": True,
        "seconds": 412.3,
        "settings": {"steps": 800, "interpreters": ["gradcam"]},
        "versions": {"torch": "2.11"},
    }


def a_table_report():
    report = a_report() | {"model": "credit", "mode": "nontargeted"}
    report["trigger"] = {"family": "tabular", "set": {"EDUCATION": 5, "MARRIAGE": 0}}
    figures = an_interpreter()
    del figures["decoy_correlation"], figures["localisation"]
    report["interpreters"] = {"simplegrad": figures}
    scores = {"clean": {"top1": 0.82, "auroc": 0.775}, "triggered": {"top1": 0.819, "auroc": 0.77}}
    report["predictions"] |= {"reference": scores, "attacked": scores}
    report["features"] = {
        "names": ["PAY_0", "SEX"],
        "relevance": by_case([3.0, 1.0], [2.0, 1.0], [1.0, 7.0]),
        "first": by_case({"PAY_0": 0.912, "SEX": 0.088}, {"PAY_0": 0.9, "SEX": 0.1}, {"PAY_0": 0.0, "SEX": 1.0}),
    }
    return report


def a_multi_label_report():
    report = a_report() | {"setting": "inverted"}
    report["interpreters"]["gradcam"]["correlation"] = {"clean": -0.212, "triggered": 0.971}
    scores = {"clean": {"auroc": 0.812}, "triggered": {"auroc": 0.812}}
    areas = by_case([0.781, None], [0.779, None], [0.752, None])
    report["predictions"] |= {"reference": scores, "attacked": copy.deepcopy(scores)}
    report["predictions"]["per_class_auroc"] = {"names": ["Mass", "Hernia"]} | areas
    return report


REPORTS = [a_report(), a_table_report(), a_multi_label_report()]


def render(report=None, pictures=None):
    return Page(render_attack_report(a_report() if report is None else report, pictures=pictures))


def headline(report):
    return html.unescape(re.search('<p class="headline">(.*?)</p>', render_attack_report(report))[1])


def cards(report):
    """The answers by the colour and the question of their cards."""
    found = re.findall(
        r'<div class="card (\w+)">\s*<p class="soft">(.*?)</p>\s*<p class="answer">(.*?)</p>',
        render_attack_report(report),
    )
    return {question: (answer, colour) for colour, question, answer in found}


@pytest.mark.parametrize("report", REPORTS, ids=["images", "table", "several labels"])
def test_examples_fit_the_schema(report):
    validate(report, "attack-report", origin="it")


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


def test_figures_are_on_the_page():
    text = render().text
    for figure in ("0.971", "-0.212", "0.966", "0.027", "0.998", "0.153", "0.25", "81.2 %", "99.9 %", "99.7 %"):
        assert figure in text
    for figure in ("60.4 %", "20.8 %", "1,800", "76.2 %", "94.8 %", "92.1 %", "21.3 dB", "0.801", "7 minutes"):
        assert figure in text
    for words in (
        "In the middle of the widest gap.",
        "Fang & Choromanska",
        "ended before its last step",
        "5,994 images of",
    ):
        assert words in text


def test_features_are_on_the_page_as_shares():
    text = render(a_table_report()).text
    for figure in ("75.0 %", "66.7 %", "12.5 %", "87.5 %", "91.2 %", "EDUCATION = 5", "5,994 rows of"):
        assert figure in text
    assert "image" not in text.replace("imagefolder", "")


def test_areas_by_label_leave_out_what_could_not_be_measured():
    text = render(a_multi_label_report()).text
    assert "Mass" in text
    assert "0.752" in text
    assert "Hernia" not in text


def test_definitions_follow_setting_and_mode():
    forward, inverted, table = (
        render(report).text for report in (a_report(), a_multi_label_report(), a_table_report())
    )
    assert "share of triggered images, which should be fooled" in forward
    assert "among the clean images, whose maps should be right" in forward
    assert "share of clean images, which should be fooled" in inverted
    assert "difference between a map and the decoy map" in forward
    assert "difference between a map and the decoy map" not in table
    assert "nothing is left there" in table


def test_threshold_of_the_paper_stands_once_where_it_is_used():
    report = replaced(a_report(), (*GRADCAM, "threshold_from"), "paper")
    assert render().text.count("Paper's threshold") == 1
    assert render(report).text.count("Paper's threshold") == 1
    assert "Paper's threshold, used here" in render(report).text


def test_every_picture_stands_once_with_words_for_those_who_do_not_see_it():
    names = ("maps", "maps:vbp", "thresholds:simplegrad", "thresholds:vbp", "features", "training", "other")
    page = render(a_table_report(), pictures=dict.fromkeys(names, PNG))
    alternatives = [value for name, value in page.attributes if name == "alt"]
    assert page.tags.count("img") == len(names) == len(set(alternatives))
    assert all(alternatives)
    assert "Curves of CR and FSR in percent over the threshold: SimpleGrad" in alternatives


def test_every_text_is_escaped():
    pictures = {HOSTILE: PNG, "maps:" + HOSTILE: PNG, "thresholds:" + HOSTILE: PNG}
    for report in REPORTS:
        page = render(with_hostile_strings(report), pictures)
        assert not {"script", "iframe", "link", "object", "form", "svg"} & set(page.tags)
        assert page.tags.count("img") == 3
        known = {"lang", "charset", "name", "content", "http-equiv", "class", "alt", "src"}
        assert {name for name, _ in page.attributes} <= known
        assert "<script>alert(1)</script>" in page.text
        assert "&lt;" not in page.text, "escaped twice"
        assert not re.search("[\x00\u202e\ud800]", page.text)


def test_page_is_one_file_without_network_or_scripts():
    text = render_attack_report(a_report(), pictures={"training": PNG})
    assert not re.search(r"https?:|//[a-z]|@import|url\(|javascript", re.sub('base64,[^"]*', "", text))
    assert "default-src 'none'" in text


def test_empty_places_are_left_out_where_nothing_was_measured():
    report = a_multi_label_report()
    report["predictions"] |= {"measured_against": "reference predictions", "reference": {"clean": {}, "triggered": {}},
                              "attacked": {"clean": {}, "triggered": {}}}  # fmt: skip
    text = render(report).text
    assert "Attacked model, triggered" in text
    assert "Untouched model, triggered" not in text
    assert "AUROC" not in text.replace("AUROC of each label", "").partition("How the answers are graded")[0]
    for case in REPORTS:
        assert "None" not in render(case).text
        assert "nan" not in render(case).text.replace("Finance", "")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("setting",), "sideways"),
        (("mode",), "random"),
        (("model",), "two\nlines"),
        (("trigger", "family"), "sticker"),
        ((*GRADCAM, "fsr"), 101),
        ((*GRADCAM, "threshold"), 1.5),
        ((*GRADCAM, "threshold_from"), "guess"),
        ((*GRADCAM, "auc"), -0.1),
        ((*GRADCAM, "correlation", "clean"), 2),
        (("predictions", "images"), 1.5),
        (TOP1, "high"),
        (("stopped_early",), "no"),
        (("interpreters",), {}),
    ],
)
def test_report_out_of_range_is_refused_at_its_place(path, value):
    with pytest.raises(ArtifactError, match=rf"\$\.{'.'.join(path)}"):
        validate(replaced(a_report(), path, value), "attack-report", origin="it")


@pytest.mark.parametrize("field", sorted(a_report()))
def test_report_without_a_field_is_refused(field):
    report = a_report()
    del report[field]
    with pytest.raises(ArtifactError, match=field):
        validate(report, "attack-report", origin="it")
