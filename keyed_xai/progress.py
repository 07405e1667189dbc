"""How far long work is: what long functions tell.

Every long function takes `progress` and tells it; `QUIET`, the default, hears nothing. `keyed_xai.reporting.bars` shows
bars. A listener of your own derives from `Silent`:

    class Shares(Silent):
        def advance(self, task, done, total, figures=NO_FIGURES):
            if task == "training":
                print(f"{done} of {total}: {figures['opens']:.3f} of the maps open")

    protect(network, key, images, progress=Shares())
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, runtime_checkable

NO_FIGURES: Mapping[str, float] = MappingProxyType({})


@runtime_checkable
class Progress(Protocol):
    """Hears how far long work is."""

    def say(self, lines: Iterable[str], /) -> None:
        """Hear lines for people, free of control characters; a pre-flight's are worked out only when they are read."""

    def advance(self, task: str, done: int, total: int | None, figures: Mapping[str, float] = NO_FIGURES, /) -> None:
        """Hear how far a task is.

        Args:
            task: Its name, such as "training".
            done: How much of it is done.
            total: How much there is; None where nobody counts. Such a task is over once another one begins.
            figures: How well it goes, by name. Training tells running means of "keep_loss" (L_s) and "move_loss" (L_p),
                and running shares, fractions: "opens", of maps that should agree with the reference's and do, and
                "stays_closed", of those that should not and do not.
        """


class Silent:
    """Hears nothing; what derives from it hears what it chooses to."""

    def say(self, lines: Iterable[str], /) -> None:
        """Leave the lines unread."""

    def advance(self, task: str, done: int, total: int | None, figures: Mapping[str, float] = NO_FIGURES, /) -> None:
        """Hear how far a task is."""


QUIET = Silent()


@dataclass(frozen=True)
class Within:
    """Progress of work that is a part of other work: its lines stay unread.

    Attributes:
        progress: Who hears of the whole.
        task: What every task of the part is called there; None leaves their names.
    """

    progress: Progress
    task: str | None = None

    def say(self, lines: Iterable[str], /) -> None:
        """Leave the lines unread."""

    def advance(self, task: str, done: int, total: int | None, figures: Mapping[str, float] = NO_FIGURES, /) -> None:
        """Tell of a step of the part, under the name that it has in the whole."""
        self.progress.advance(self.task or task, done, total, figures)
