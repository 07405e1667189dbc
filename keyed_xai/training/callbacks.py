"""What a caller wants to hear of a long run."""

from collections.abc import Callable
from dataclasses import dataclass

from keyed_xai.training.loop import StepFigures


@dataclass(frozen=True)
class Callbacks:
    """Functions that a run calls; each may be left out.

    Attributes:
        on_plan: Once, before training, with the lines of the pre-flight.
        on_step: After each training step.
        on_phase: At the start of "train", "measure" and "draw".
        on_wrong_key: With the number of wrong keys tried, and of all.
    """

    on_plan: Callable[[tuple[str, ...]], None] | None = None
    on_step: Callable[[StepFigures], None] | None = None
    on_phase: Callable[[str], None] | None = None
    on_wrong_key: Callable[[int, int], None] | None = None

    def notify(self, phase: str) -> None:
        """Say that a phase starts."""
        if self.on_phase is not None:
            self.on_phase(phase)
