"""Progress as people see it: bars where they can move, and lines elsewhere."""

import io
import re

from rich.console import Console

from keyed_xai.reporting import bars
from keyed_xai.reporting.bars import KEPT, Bars, ProgressLines, progress_bar
from tests.heard import FIGURES


def lines_of(between, **options):
    """Bars off a terminal, and the file that their lines go to."""
    console = Console(file=io.StringIO(), width=80)
    return Bars(ProgressLines(console, between), **options), console.file


def on_terminal(monkeypatch, tell, **options):
    """Return the rows that a terminal of 80 columns was sent."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(bars, "Console", lambda **_: console)
    with progress_bar(**options) as shown:
        tell(shown)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    return [row.rstrip() for row in plain.replace("\r", "\n").splitlines()]


def test_line_says_how_far_how_long_and_how_well():
    shown, file = lines_of(0.0)
    for step in (1, 100, 200):
        shown.advance("training", step, 400, FIGURES)
    last = file.getvalue().splitlines()[-1]
    assert last.startswith("training: 200 of 400, 0:00:0")
    assert last.endswith("opens 98%, closed 100%")
    assert len(last) <= 80


def test_figures_are_called_as_asked_and_others_not_shown():
    shown, file = lines_of(0.0, words=KEPT)
    shown.advance("training", 1, 400, FIGURES)
    shown.advance("training", 2, 400, {"opens": 0.5, "speed": 3.0})
    first, second = file.getvalue().splitlines()
    assert first.endswith("kept 98%, moved 100%")
    assert second.endswith("kept 50%")


def test_lines_keep_their_distance():
    shown, file = lines_of(3600.0)
    for done in range(100):
        shown.advance("reading images", done, 100)
    assert file.getvalue() == ""


def test_task_without_a_count_is_ticked_off_when_the_next_begins():
    shown, file = lines_of(0.0)
    shown.advance("load", 0, None)
    shown.advance("latency", 0, None)
    assert [line.partition(",")[0] for line in file.getvalue().splitlines()] == [
        "load: 0",
        "load: 1 of 1",
        "latency: 0",
    ]


def test_bar_moves_on_a_terminal_within_80_columns(monkeypatch):
    def tell(shown):
        for step in range(1, 401):
            shown.advance("training", step, 400, FIGURES)
        shown.advance("wrong keys", 16, 1256)

    rows = on_terminal(monkeypatch, tell)
    training = [row for row in rows if "400/400" in row][-1]
    assert training.endswith("opens 98%, closed 100%")
    assert len(training) <= 80
    assert any("16/1256" in row for row in rows)
    assert sum(row.startswith(("training", "wrong keys")) for row in rows[-2:]) == 2


def test_of_the_parts_of_a_whole_only_the_one_at_work_keeps_its_bar(monkeypatch):
    def tell(shown):
        for number, part in enumerate(("pruning", "tuning")):
            shown.advance("audit", number, 2)
            shown.advance(part, 0, None)
            shown.advance(part, 3, 4)
        shown.advance("audit", 2, 2)

    rows = on_terminal(monkeypatch, tell, whole="audit")
    assert any(row.startswith("pruning") for row in rows)
    assert [row.split()[0] for row in rows[-2:]] == ["audit", "tuning"]
    assert "2/2" in rows[-2]
    assert "3/4" in rows[-1]


def test_lines_go_to_the_console_or_where_they_are_sent():
    sent = []
    shown, file = lines_of(3600.0)
    shown.say(["[bold] 1 of 2", "[/x]"])
    assert file.getvalue() == "[bold] 1 of 2\n[/x]\n"
    shown, file = lines_of(3600.0, say=sent.append)
    shown.say(iter(["one", "two"]))
    assert (sent, file.getvalue()) == (["one", "two"], "")


def test_nothing_is_written_where_it_is_soon_over(capfd):
    with progress_bar() as shown:
        shown.advance("explaining", 1, 2)
    assert capfd.readouterr() == ("", "")
