"""The page says what the figures say, escapes all of it, and loads nothing."""

import copy
import re
from html.parser import HTMLParser

import pytest

from keyed_xai import pictures
from keyed_xai.artifacts.documents import validate
from keyed_xai.markup import as_decimal, as_duration, as_p_value, as_plain, as_share, get_number
from keyed_xai.report import render_report

VOID = {"meta", "img"}
CASES = ("keyed", "clean", "wrong_key")
PNG = pictures.training_curve([])
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
        "accuracy": accuracy | {"measured_against": "labels", "agreement": by_case(0.98, 0.98, 0.97, reference=1.0)},
        "channels": {"png": opening, "jpeg75": opening, "resize": opening},
        "near_keys": {"moved": opening, "half_strength": opening},
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
    }


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on elements that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(self.words)

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
    """A document with markup in every text and every name of a field."""
    if isinstance(value, dict):
        return {k: with_hostile_strings(v) for k, v in value.items()} | {HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [with_hostile_strings(each) for each in value]
    return HOSTILE if isinstance(value, str) else value


def leaves(value, path=()):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (*path, name)
            yield from leaves(inner, (*path, name))


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


def test_mean_correlation_decides_where_shares_are_missing():
    report = a_report()
    del report["interpreters"]["gradcam"]["opened"]
    assert "are right; without it, or with a wrong key, they stay hidden" in render(report).text
    report["interpreters"]["gradcam"]["correlation"]["wrong_key"] = 0.7
    assert "are not hidden" in render(report).text


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
    bare = {
        "verdict": "not shown",
        "opening": {"p_value": 1.0, "decoys": 0, "statistic": None, "explanation": "No key."},
    }
    text = render(verify=bare).text
    assert "do not show that the model knows the key" in text
    assert "No key." in text


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
    assert not re.search("[\x00\u202e\ud800]", page.text)


def test_page_is_one_file_without_network_or_scripts():
    html = render_report(a_report(), pictures={"training": PNG}, verify=a_verify_report())
    html.encode()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|javascript", re.sub('base64,[^"]*', "", html))
    assert "default-src 'none'" in html
    sources = [value for name, value in Page(html).attributes if name == "src"]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")


@pytest.mark.parametrize("path", sorted(set(leaves(a_report()))), ids=".".join)
def test_field_that_is_missing_is_left_out(path):
    assert "None" not in render(replaced(a_report(), path, None)).text


@pytest.mark.parametrize("path", sorted(set(leaves(a_verify_report()))), ids=".".join)
def test_field_of_verify_that_is_missing_is_left_out(path):
    assert "None" not in render(verify=replaced(a_verify_report(), path, None)).text


def test_what_is_no_finite_number_is_no_figure():
    values = (None, True, "1", float("nan"), float("inf"), 10**400, [1])
    assert [get_number({"value": value}, "value") for value in values] == [None] * len(values)


def test_empty_report_still_warns_and_claims_nothing():
    text = render({}).text
    assert "no figures to judge the gate by" in text
    assert "does not protect against" in text
    assert "None" not in text
    assert "nan" not in text


def test_agreement_takes_the_place_of_accuracy_without_labels():
    report = replaced(a_report(), ("accuracy", "measured_against"), "reference predictions")
    assert "Right by the labels" not in render(report).text
    assert "Right by the labels" in render().text


@pytest.mark.parametrize(
    ("p_value", "log2_p", "said"),
    [
        (5.3e-19, None, "2^-60.7 (5.3e-19)"),
        (0.0, -2000.0, "2^-2000.0 (8.7e-603)"),
        (0.001, None, "2^-10.0 (0.001)"),
        (1.0, 0.0, "1"),
        (0.75, None, "0.75"),
        (0.0, None, ""),
        (None, None, ""),
    ],
)
def test_p_value_is_a_power_of_two_and_of_ten(p_value, log2_p, said):
    assert as_p_value(p_value, log2_p) == said


def test_figures_in_words():
    assert [as_decimal(each) for each in (None, 0.98412, -0.0002, 1.0)] == ["", "0.984", "0.000", "1.000"]
    assert [as_plain(each) for each in (None, 8.0, 33.1234, 1234567.0)] == ["", "8", "33.1", "1,234,567"]
    assert [as_share(each) for each in (None, 0.98765, 1.0)] == ["", "98.8 %", "100.0 %"]
    assert [as_duration(each) for each in (35.0, 412.3, 9000.0)] == ["35 seconds", "7 minutes", "2.5 hours"]


def test_filter_has_neither_amplitude_nor_tile():
    words = {}
    for family in ("spread", "moire"):
        trigger = {"family": family, "amplitude": 8.0, "tile": 32, "psnr_db": 21.0, "ssim": 0.8, "key_bits": 11}
        words[family] = render_report({"trigger": trigger}, pictures={})
    assert "Largest change of a pixel" in words["spread"]
    assert "Largest change of a pixel" not in words["moire"]
    assert "Tile" not in words["moire"]
    assert "11 bits" in words["moire"]
