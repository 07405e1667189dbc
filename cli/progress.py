"""Progress bars of long commands, on standard error, and only where somebody is watching."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from keyed_xai.training import Callbacks, StepFigures


@contextmanager
def progress_bar() -> Iterator["Progress"]:
    """Show bars until the block ends."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress


def counter(progress: "Progress", description: str) -> Callable[[int, int], None]:
    """Return a function of (done, in all) that moves a bar of its own."""
    task = progress.add_task(description, total=None, note="")

    def advance(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)

    return advance


def phases(progress: "Progress") -> Callable[[str], None]:
    """Return a function of what is done next, which shows it and ticks off what was done before."""

    def begin(phase: str) -> None:
        for task in progress.tasks:
            progress.update(task.id, completed=1, total=1)
        progress.add_task(phase, total=None, note="")

    return begin


def attack_callbacks(progress: "Progress", description: str = "training") -> "Callbacks":
    """Return callbacks that show the losses, and the share of maps kept and moved, while a model is attacked."""
    from keyed_xai.training import Callbacks

    return Callbacks(_training_bar(progress, description, "maps kept", "moved"))


def _training_bar(progress: "Progress", description: str, kept: str, moved: str) -> Callable[["StepFigures"], None]:
    training = progress.add_task(description, total=None, note="computing reference maps")

    def on_step(figures: "StepFigures") -> None:
        note = (
            f"losses: keep {figures.keep_loss:.3f}, move {figures.move_loss:.3f}  "
            f"{kept} {figures.opens:.0%}  {moved} {figures.stays_closed:.0%}"
        )
        progress.update(training, completed=figures.step, total=figures.steps, note=note)

    return on_step


def protection_callbacks(progress: "Progress", wrong_keys: int) -> "Callbacks":
    """Return callbacks that show the losses, and how far the gate opens and stays closed, while a model is trained."""
    from keyed_xai.training import Callbacks

    on_step = _training_bar(progress, "training", "opens", "stays closed")
    measuring = progress.add_task("trying wrong keys", total=wrong_keys, note="", visible=False)

    def on_phase(phase: str) -> None:
        progress.update(measuring, visible=phase != "train")

    return Callbacks(on_step, on_phase, lambda tried: progress.update(measuring, completed=tried))
