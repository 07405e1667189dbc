"""What a protect report says in short, on reports written by hand."""

import copy

import pytest

from keyed_xai.protection.verdict import judge

GOOD = {
    "interpreters": {
        name: {
            "opened": {"keyed": keyed, "clean": 0.0, "wrong_key": 0.004},
            "wrong_keys": {"tried": 1256, "opened": 1},
        }
        for name, keyed in (("gradcam", 1.0), ("vbp", 0.98))
    },
    "accuracy": {"reference": 0.9, "keyed": 0.895, "clean": 0.91, "measured_against": "labels"},
}


def report(path=(), value=None):
    changed = copy.deepcopy(GOOD)
    here = changed
    for name in path[:-1]:
        here = here[name]
    if path:
        here[path[-1]] = value
    return changed


def test_good_figures_are_protected_and_said():
    assert judge(GOOD) == {
        "answer": "protected",
        "sentence": "opens 98.0 %, stays closed 99.6 %, 1 of 1,256 wrong keys, accuracy 89.5 % after 90.0 %",
    }


@pytest.mark.parametrize(
    ("path", "value", "answer", "words"),
    [
        (
            ("interpreters", "vbp", "opened", "keyed"),
            0.89,
            "protected in part",
            "opens 89.0 % (90% wanted), stays closed",
        ),
        (("interpreters", "vbp", "opened", "keyed"), 0.49, "not protected", "opens 49.0 % (90% wanted), stays"),
        (
            ("interpreters", "vbp", "opened", "clean"),
            0.06,
            "protected in part",
            "stays closed 94.0 %, 1 of 1,256 wrong keys (",
        ),
        (("interpreters", "gradcam", "opened", "wrong_key"), 0.6, "not protected", "stays closed 40.0 %"),
        (
            ("interpreters", "gradcam", "wrong_keys", "opened"),
            2,
            "protected in part",
            "stays closed 99.6 %, 2 of 1,256 wrong keys (95% and 1",
        ),
        (
            ("interpreters", "gradcam", "wrong_keys", "opened"),
            700,
            "not protected",
            "stays closed 99.6 %, 700 of 1,256 wrong keys",
        ),
        (
            ("accuracy", "keyed"),
            0.889,
            "protected in part",
            "accuracy 88.9 % after 90.0 % (a loss of at most 1 % wanted)",
        ),
        (("accuracy", "clean"), 0.84, "not protected", "accuracy 84.0 % after 90.0 %"),
    ],
)
def test_what_falls_short_comes_first_with_what_was_wanted(path, value, answer, words):
    found = judge(report(path, value))
    assert found["answer"] == answer
    assert found["sentence"].startswith(words)


def test_agreement_is_said_without_labels():
    accuracy = {"reference": 1.0, "keyed": 0.992, "clean": 0.995, "measured_against": "reference predictions"}
    assert judge(report(("accuracy",), accuracy))["sentence"].endswith("predictions kept 99.2 %")


def test_no_wrong_keys_tried_is_said_of_none():
    tried = report()
    for figures in tried["interpreters"].values():
        figures["wrong_keys"] = {"tried": 0, "opened": 0}
    assert judge(tried)["answer"] == "protected"
    assert "wrong keys" not in judge(tried)["sentence"]
