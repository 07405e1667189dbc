"""Progress as people see it: bars where they can move, and lines elsewhere."""

import io
import re

import pytest
from rich.console import Console

from keyed_xai import progress
from keyed_xai.progress import ProgressLines, counter, phases, progress_bar, training_callbacks
from keyed_xai.training import StepFigures


def lines_of(between):
    console = Console(file=io.StringIO(), width=80)
    return ProgressLines(console, between), console.file


def figures(step, steps=400):
    return StepFigures(step=step, steps=steps, keep_loss=0.1, move_loss=0.2, opens=0.975, stays_closed=1.0)


def test_line_says_how_far_how_long_and_how_well():
    shown, file = lines_of(0.0)
    callbacks = training_callbacks(shown)
    for step in (1, 100, 200):
        callbacks.on_step(figures(step))
    last = file.getvalue().splitlines()[-1]
    assert last.startswith("training: 200 of 400, 0:00:0")
    assert last.endswith("opens 98%, closed 100%")
    assert len(last) <= 80


def test_lines_keep_their_distance():
    shown, file = lines_of(3600.0)
    advance = counter(shown, "reading images")
    for done in range(100):
        advance(done, 100)
    assert file.getvalue() == ""


def test_phase_without_a_count_is_told_by_its_name():
    shown, file = lines_of(0.0)
    begin = phases(shown)
    begin("load")
    begin("latency")
    assert [task.finished for task in shown.tasks] == [True, False]
    assert file.getvalue().startswith("load: 1 of 1")


def test_bar_moves_on_a_terminal_within_80_columns(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    with progress_bar() as shown:
        callbacks = training_callbacks(shown)
        for step in range(1, 401):
            callbacks.on_step(figures(step))
        callbacks.on_wrong_key(16, 1256)
    rows = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()).replace("\r", "\n").splitlines()
    training = [row for row in rows if "400/400" in row][-1]
    assert training.rstrip().endswith("opens 98%, closed 100%")
    assert len(training.rstrip()) <= 80
    assert any("16/1256" in row for row in rows)


@pytest.mark.parametrize("silent", [True, False])
def test_nothing_is_written_when_silent_or_soon_over(capfd, silent):
    with progress_bar(silent=silent) as shown:
        counter(shown, "explaining")(1, 2)
    assert capfd.readouterr() == ("", "")
