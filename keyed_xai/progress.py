"""Progress of long work, for people: bars on a terminal and in notebooks, and a line every half minute elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from keyed_xai.artifacts.documents import printable
from keyed_xai.training import Callbacks, StepFigures

SECONDS_BETWEEN_LINES = 30.0
_BAR_WIDTH = 10  # leaves room at 80 columns for the longest phase, both times and the running figures


class ProgressLines(Progress):
    """The same tasks where nobody can see a bar move: every half minute, a line of the one at work.

    Args:
        console: Where lines go.
        between: Seconds between two lines.
    """

    def __init__(self, console: Console, between: float = SECONDS_BETWEEN_LINES) -> None:
        """Begin to count the half minute."""
        super().__init__(console=console, disable=True)
        self._between, self._last = between, time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:  # noqa: ANN401 - as in rich
        """Move a task, and print a line when it is time."""
        super().update(task_id, **changes)
        task = next(each for each in self.tasks if each.id == task_id)
        if task.visible and time.monotonic() - self._last >= self._between:
            self._last = time.monotonic()
            self.console.print(_line(task), highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(*, silent: bool = False) -> Iterator[Progress]:
    """Show progress on standard error until the block ends, unless it is to be silent."""
    console = Console(stderr=True, quiet=silent)
    if silent or not _can_draw(console):
        yield ProgressLines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=_BAR_WIDTH),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


def counter(progress: Progress, description: str) -> Callable[[int, int], None]:
    """Return a function of (done, in all) that moves a bar of its own, which appears at its first call."""
    move = _mover(progress, description)
    return lambda done, total: move(done, total, "")


def phases(progress: Progress) -> Callable[[str], None]:
    """Return a function of what is done next, which shows it and ticks off what was done before."""

    def begin(phase: str) -> None:
        for task in progress.tasks:
            progress.update(task.id, completed=1, total=1)
        progress.add_task(phase, total=None, note="")

    return begin


def plan_printer(progress: Progress) -> Callable[[tuple[str, ...]], None]:
    """Return a function that prints the lines of a pre-flight."""

    def on_plan(lines: tuple[str, ...]) -> None:
        for line in lines:
            progress.console.print(printable(line), highlight=False, markup=False, soft_wrap=True)

    return on_plan


def training_callbacks(
    progress: Progress, description: str = "training", *, kept: str = "opens", moved: str = "closed"
) -> Callbacks:
    """Return callbacks that show each phase of protecting or attacking a model, with the running figures.

    Args:
        progress: Where.
        description: What training is called.
        kept: What the share of maps that agree with the right ones is called.
        moved: What the share of maps that should not, and do not, is called.
    """
    move = _mover(progress, description)

    def on_step(figures: StepFigures) -> None:
        move(figures.step, figures.steps, f"{kept} {figures.opens:.0%}, {moved} {figures.stays_closed:.0%}")

    return Callbacks(
        on_step=on_step,
        on_wrong_key=counter(progress, "wrong keys"),
    )


def _mover(progress: Progress, description: str) -> Callable[[int, int, str], None]:
    """Return a function of (done, in all, note); its task is made at its first call, when its clock starts."""
    tasks: list[TaskID] = []

    def move(done: int, total: int, note: str) -> None:
        if not tasks:
            tasks.append(progress.add_task(description, total=total, note=note))
        progress.update(tasks[0], completed=done, total=total, note=note)

    return move


def _can_draw(console: Console) -> bool:
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


def _line(task: Task) -> str:
    done = f"{task.completed:,.0f}" + (f" of {task.total:,.0f}" if task.total else "")
    times = [f"{_clock(float(task.elapsed))} so far"] if task.elapsed else []
    times += [f"about {_clock(float(task.time_remaining))} left"] if task.time_remaining else []
    return ", ".join([f"{task.description}: {done}", *times, *filter(None, [task.fields.get("note")])])


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
