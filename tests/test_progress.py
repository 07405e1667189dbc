"""Who hears of long work: lines, and parts of other work."""

import pytest

from keyed_xai.progress import QUIET, Progress, Within
from tests.heard import FIGURES, Heard


@pytest.mark.parametrize("listener", [QUIET, Within(Heard())])
def test_lines_that_nobody_reads_are_not_worked_out(listener):
    def work():
        raise AssertionError("worked out")
        yield ""

    assert isinstance(listener, Progress)
    listener.say(work())


def test_part_of_other_work_goes_by_the_name_of_the_whole():
    heard = Heard()
    Within(Within(heard, "fitting a reference"), "training resnet50").advance("fitting", 3, 4, FIGURES)
    Within(heard).advance("training", 1, 2)
    assert heard.steps == [("fitting a reference", 3, 4), ("training", 1, 2)]
    assert heard.figures == [FIGURES, {}]
