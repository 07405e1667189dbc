"""The page says what the figures say, in both settings, escapes all of it, and loads nothing."""

import re

import pytest

from keyed_xai.artifacts.documents import validate
from keyed_xai.backdoors.report import render_attack_report
from keyed_xai.errors import ArtifactError
from tests.attack_reports import GRADCAM, TOP1, a_multi_label_report, a_report, a_table_report, render
from tests.protection.test_report import HOSTILE, PNG, replaced, with_hostile_strings

REPORTS = [a_report(), a_table_report(), a_multi_label_report()]


@pytest.mark.parametrize("report", REPORTS, ids=["images", "table", "several labels"])
def test_examples_fit_the_schema(report):
    validate(report, "attack-report", origin="it")


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
