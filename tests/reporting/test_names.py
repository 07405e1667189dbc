"""Classes are found by name in any case that is clear, and by number; what is not found is told what is near."""

import pytest

from keyed_xai.reporting.names import find_class, name_class, say_probability

BIRDS = ("BARN OWL", "DUCK", "Duck", "SNOWY OWL", "0")


@pytest.mark.parametrize(
    ("asked", "names", "index"),
    [
        ("DUCK", BIRDS, 1),
        ("Duck", BIRDS, 2),
        ("snowy owl", BIRDS, 3),
        ("3", BIRDS, 3),
        ("0", BIRDS, 4),
        ("2", (), 2),
        ("stra\u00dfe", ("STRASSE",), 0),
    ],
)
def test_class_is_found(asked, names, index):
    assert find_class(asked, names, 5) == index


@pytest.mark.parametrize(
    ("asked", "names", "words"),
    [
        ("duck", BIRDS, "duck may be any of DUCK .1., Duck .2.: give the number"),
        ("owl", BIRDS, "no class owl; near it are BARN OWL .0., SNOWY OWL .3."),
        ("SNOWI OWL", BIRDS, "near it are SNOWY OWL .3.,"),
        ("xyzzy", BIRDS, "one of 5 names, such as BARN OWL, or a number from 0 to 4"),
        ("5", BIRDS, "no class 5"),
        ("-1", (), "only the numbers 0 to 4"),
        ("\u00b2", (), "only the numbers 0 to 4"),
        ("a", ("a", "a"), "may be any of"),
        ("", BIRDS, "no class"),
    ],
)
def test_class_that_is_not_clear_is_refused(asked, names, words):
    with pytest.raises(ValueError, match=words):
        find_class(asked, names, 5)


def test_words():
    assert (name_class(1, BIRDS), name_class(1, ())) == ("DUCK", "class 1")
    assert [say_probability(each) for each in (0.834, 1.0, 0.0, 0.996)] == [".83", "1.00", ".00", "1.00"]
