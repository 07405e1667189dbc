"""Bars on a terminal and in notebooks, and a line every half minute elsewhere, of work that tells its progress."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

from rich import progress as rich_progress
from rich.console import Console

from keyed_xai.progress import NO_FIGURES

OPENED = {"opens": "opens", "stays_closed": "closed"}
"""The running figures of training that are shown, and what they are called when a model is protected."""
KEPT = {"opens": "kept", "stays_closed": "moved"}
"""The same when it is attacked."""
SECONDS_BETWEEN_LINES = 30.0
_BAR_WIDTH = 10  # leaves room at 80 columns for the longest phase, both times and the running figures


class ProgressLines(rich_progress.Progress):
    """Rich's tasks where nobody can see a bar move: every half minute, a line of the one at work.

    Args:
        console: Console that the lines go to.
        between: Seconds between two lines.
    """

    def __init__(self, console: Console, between: float = SECONDS_BETWEEN_LINES) -> None:
        """Begin to count the half minute."""
        super().__init__(console=console, disable=True)
        self._between, self._last = between, time.monotonic()

    def update(self, task_id: rich_progress.TaskID, **changes: Any) -> None:  # noqa: ANN401 - as in rich
        """Move a task, and print a line when it is time."""
        super().update(task_id, **changes)
        task = next(each for each in self.tasks if each.id == task_id)
        if time.monotonic() - self._last >= self._between:
            self._last = time.monotonic()
            self.console.print(_line(task), highlight=False, soft_wrap=True)


class Bars:
    """Shows a bar for every task, from when it is first heard of.

    Args:
        shown: Rich's progress, which draws them.
        say: Prints a line for people; the console of `shown` does if absent.
        words: Names of the figures that are shown, as shares, to what they are called.
        whole: The task that all others are parts of: of those, only the one at work keeps its bar.
    """

    def __init__(
        self,
        shown: rich_progress.Progress,
        *,
        say: Callable[[str], None] | None = None,
        words: Mapping[str, str] = OPENED,
        whole: str | None = None,
    ) -> None:
        """Begin without a bar."""
        self._shown, self._say, self._words, self._whole = shown, say or self._print, words, whole
        self._bars: dict[str, rich_progress.TaskID] = {}

    def say(self, lines: Iterable[str], /) -> None:
        """Print lines."""
        for line in lines:
            self._say(line)

    def advance(self, task: str, done: int, total: int | None, figures: Mapping[str, float] = NO_FIGURES, /) -> None:
        """Move a task's bar."""
        if task not in self._bars:
            self._end_others()
            self._bars[task] = self._shown.add_task(task, total=total, note="")
        note = ", ".join(f"{word} {figures[name]:.0%}" for name, word in self._words.items() if name in figures)
        self._shown.update(self._bars[task], completed=done, total=total, note=note)

    def _end_others(self) -> None:
        """Tick off what nobody counts, and drop the bars of parts."""
        for task in self._shown.tasks:
            if self._whole is not None and task.description != self._whole:
                self._shown.remove_task(self._bars.pop(task.description))
            elif task.total is None:
                self._shown.update(task.id, completed=1, total=1)

    def _print(self, line: str) -> None:
        self._shown.console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(
    *, say: Callable[[str], None] | None = None, words: Mapping[str, str] = OPENED, whole: str | None = None
) -> Iterator[Bars]:
    """Show progress on standard error until the block ends; the arguments are those of `Bars`."""
    console = Console(stderr=True)
    if not _can_draw(console):
        yield Bars(ProgressLines(console), say=say, words=words, whole=whole)
        return
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=_BAR_WIDTH),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(compact=True),
        rich_progress.TextColumn("{task.fields[note]}"),
    )
    with rich_progress.Progress(*columns, console=console) as shown:
        yield Bars(shown, say=say, words=words, whole=whole)


def _can_draw(console: Console) -> bool:
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


def _line(task: rich_progress.Task) -> str:
    done = f"{task.completed:,.0f}" + (f" of {task.total:,.0f}" if task.total else "")
    times = [f"{_clock(float(task.elapsed))} so far"] if task.elapsed else []
    times += [f"about {_clock(float(task.time_remaining))} left"] if task.time_remaining else []
    return ", ".join([f"{task.description}: {done}", *times, *filter(None, [task.fields.get("note")])])


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
