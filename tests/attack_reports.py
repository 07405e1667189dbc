"""Reports of attacks, written by hand."""

import copy

from keyed_xai.backdoors.report import render_attack_report
from tests.protection.test_report import Page

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


def render(report=None, pictures=None):
    return Page(render_attack_report(a_report() if report is None else report, pictures=pictures))
