"""The page says what the figures say, escapes all of it, and loads nothing."""

import copy
import re
from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError

from keyed_xai.artifacts.documents import validate
from keyed_xai.protection.report import render_report
from keyed_xai.reporting import pictures

VOID = {"meta", "img"}
CASES = ("keyed", "clean", "wrong_key")
PNG = pictures.training_curve([])
FOREIGN = {"gradcam", "simplegrad", "steps", "torch", "PAY_0", "SEX", "EDUCATION", "MARRIAGE"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&\x00\u202e\ud800"


def by_case(keyed, clean, wrong_key, **more):
    return dict(zip(CASES, (keyed, clean, wrong_key), strict=True)) | more


def a_report():
    interpreter = {
        "cr": 99.2,
        "fsr": 97.66,
        "threshold": 0.2,
        "correlation": by_case(0.9841, 0.031, 0.0154),
        "decoy_correlation": by_case(0.142, 0.997, 0.981, reference=0.131),
        "auc": 0.9993,
        "opened": by_case(1.0, 0.0, 0.0117),
        "open_threshold": 0.5,
        "at_paper_threshold": {"threshold": 0.1, "cr": 91.5, "fsr": 99.9, "reference_cr": 88.2},
        "wrong_keys": {
            "tried": 1000,
            "opened": 0,
            "images_per_key": 4,
            "highest": 0.331,
            "maps_opened": 0.002,
            "threshold": 0.5,
        },
    }
    opening = {"gradcam": {"correlation": 0.95, "opened": 0.99}}
    accuracy = by_case(0.982, 0.98, 0.97, reference=0.9803)
    return {
        "schema": "keyed-xai/protect-report/v1",
        "model": "xray.keyed",
        "interpreters": {"gradcam": interpreter},
        "accuracy": accuracy
        | {
            "measured_against": "labels",
            "agreement": by_case(0.98, 0.98, 0.97, reference=1.0),
            "confident": {"images": 431, "agreement": by_case(0.995, 0.9907, 0.988, reference=1.0)},
            "divergence": by_case(0.012, 0.034, 0.056, reference=0.0),
        },
        "channels": {"png": opening, "jpeg75": opening, "resize": opening},
        "near_keys": dict.fromkeys(("moved_1px", "moved_2px", "moved", "half_strength"), opening),
        "trigger": {"family": "spread", "amplitude": 8, "tile": 32, "psnr_db": 33.12, "ssim": 0.912, "key_bits": 512},
        "history": [{"step": 100, "loss": 0.5, "keyed": 0.9, "unkeyed": 0.1, "agreement": 0.98}],
        "data": {part: {"source": "builtin", "images": 4000} for part in ("train", "held_out")},
        "seconds": 412.3,
        "settings": {"steps": 800, "interpreters": ["gradcam"]},
        "versions": {"torch": "2.11"},
    }


def a_verify_report():
    test = {"p_value": 5.5e-19, "log2_p": -60.67, "cells": 64, "overlap": 32, "possible": 32}
    return {
        "schema": "keyed-xai/verify-report/v1",
        "verdict": "shown",
        "alpha": 1e-6,
        "sentence": "The model knows this key.",
        "key_id": "9f" * 32,
        "model": "suspect.pt",
        "opening": {"p_value": 0.001, "decoys": 999, "statistic": 0.95, "largest_decoy": 0.08, "reached": 0},
        "signature": test | {"interpreters": {"gradcam": test}},
        "probe": {"source": "builtin, held-out", "images": 64, "digest": "sha256:00"},
        "settings": {"decoy": "signature"},
        "versions": {"torch": "2.11"},
    }


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on elements that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def render(report=None, verify=None, pictures=None):
    return Page(render_report(a_report() if report is None else report, pictures=pictures or {}, verify=verify))


def with_hostile_strings(value):
    """A document with markup in every text and in the names that it does not get from us."""
    if isinstance(value, dict):
        return {HOSTILE if name in FOREIGN else name: with_hostile_strings(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [with_hostile_strings(each) for each in value]
    return HOSTILE if isinstance(value, str) else value


def replaced(document, path, value):
    document = copy.deepcopy(document)
    place = document
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return document


def test_examples_fit_the_schemas():
    validate(a_report(), "protect-report", origin="it")
    validate(a_verify_report(), "verify-report", origin="it")


def test_good_gate_gets_a_good_headline():
    text = render().text
    assert "key the model's explanations are right; without it, or with a wrong key, they stay hidden; " in text
    assert "its predictions are kept." in text


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("opened", "keyed"), 0.6, "are right for some images only"),
        (("opened", "keyed"), 0.3, "are not right"),
        (("opened", "clean"), 0.2, "are hidden only in part"),
        (("opened", "wrong_key"), 0.8, "are not hidden"),
        (("wrong_keys", "opened"), 2, "are hidden only in part"),
        (("wrong_keys", "opened"), 900, "are not hidden"),
    ],
)
def test_bad_gate_is_said_to_be_bad(path, value, said):
    assert said in render(replaced(a_report(), ("interpreters", "gradcam", *path), value)).text


def test_worst_interpreter_decides():
    report = a_report()
    report["interpreters"]["vbp"] = replaced(report["interpreters"]["gradcam"], ("opened", "keyed"), 0.1)
    assert "are not right" in render(report).text


@pytest.mark.parametrize(("accuracy", "said"), [(0.9703, "are kept."), (0.95, "for the most part"), (0.9, "suffered")])
def test_lost_predictions_are_said(accuracy, said):
    assert said in render(replaced(a_report(), ("accuracy", "keyed"), accuracy)).text


def test_figures_are_on_the_page():
    text = render(verify=a_verify_report(), pictures={"maps:gradcam": PNG}).text
    for figure in ("0.984", "0.997", "99.2 %", "97.7 %", "threshold 0.2", "1,000, of which 0 open", "33.1 dB"):
        assert figure in text
    for figure in (
        "2^-60.7 (5.5e-19)",
        "2^-10.0 (0.001)",
        "32 of 32 cells",
        "61 fair coin tosses",
        "Examples: Grad-CAM",
    ):
        assert figure in text
    assert "bearer credential" in text


def test_verdict_of_verify_is_on_the_page():
    assert "The model knows this key." in render(verify=a_verify_report()).text
    untested = {"p_value": 1.0, "decoys": 0, "statistic": None, "largest_decoy": None, "reached": 0}
    opening = untested | {"explanation": "No key."}
    bare = a_verify_report() | {"verdict": "not shown", "sentence": "The key is not shown.", "opening": opening}
    text = render(verify=bare).text
    assert "The key is not shown." in text
    assert "Opening, with the secret key. No key." in text
    assert "None" not in text


def test_every_text_is_escaped():
    page = render(
        with_hostile_strings(a_report()),
        with_hostile_strings(a_verify_report()),
        {HOSTILE: PNG, "maps:" + HOSTILE: PNG},
    )
    assert not {"script", "iframe", "link", "object", "form", "svg"} & set(page.tags)
    assert page.tags.count("img") == 2
    assert {name for name, _ in page.attributes} <= {
        *("lang", "charset", "name", "content", "http-equiv", "class", "alt", "src"),
    }
    assert "<script>alert(1)</script>" in page.text
    assert "&lt;" not in page.text, "escaped twice"
    assert not re.search("[\x00\u202e\ud800]", page.text)


def test_page_is_one_file_without_network_or_scripts():
    html = render_report(a_report(), pictures={"training": PNG}, verify=a_verify_report())
    assert not re.search(r"https?:|//[a-z]|@import|url\(|javascript", re.sub('base64,[^"]*', "", html))
    assert "default-src 'none'" in html
    sources = [value for name, value in Page(html).attributes if name == "src"]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")


def test_field_that_is_missing_is_an_error_and_no_empty_place():
    report = a_report()
    del report["trigger"]["family"]
    with pytest.raises(UndefinedError, match="family"):
        render(report)


def test_decoy_column_is_left_out_without_a_decoy():
    report = a_report()
    assert "decoy map" in render(report).text
    del report["interpreters"]["gradcam"]["decoy_correlation"]
    text = render(report).text
    assert "decoy map" not in text
    assert "None" not in text


def test_agreement_takes_the_place_of_accuracy_without_labels():
    report = replaced(a_report(), ("accuracy", "measured_against"), "reference predictions")
    assert "Right by the labels" not in render(report).text
    assert "Right by the labels" in render().text


def test_confident_predictions_are_told_where_there_are_any():
    page = render().text
    assert "431 images" in page
    assert "99.1 %" in page
    assert "Same, of the confident" in page
    none = {"images": 0, "agreement": dict.fromkeys(("reference", "keyed", "clean", "wrong_key"))}
    page = render(replaced(a_report(), ("accuracy", "confident"), none)).text
    assert "Same, of the confident" not in page
    assert "None" not in page
    assert "0.034" in page


def test_filter_has_neither_amplitude_nor_tile():
    words = {family: render(replaced(a_report(), ("trigger", "family"), family)).text for family in ("spread", "moire")}
    assert "Largest change of a pixel" in words["spread"]
    assert "Largest change of a pixel" not in words["moire"]
    assert "Tile" not in words["moire"]
    assert "512 bits" in words["moire"]
