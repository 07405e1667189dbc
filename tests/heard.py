"""Listeners to progress, for tests of what long functions tell."""

from keyed_xai.progress import NO_FIGURES, Silent


class Heard(Silent):
    """Remembers all that it is told."""

    def __init__(self):
        self.lines, self.steps, self.figures = [], [], []

    def say(self, lines, /):
        self.lines += lines

    def advance(self, task, done, total, figures=NO_FIGURES, /):
        self.steps.append((task, done, total))
        self.figures.append(dict(figures))

    def counts(self, task):
        """How far a task was, each time that it was told: pairs of what was done and of all."""
        return [(done, total) for name, done, total in self.steps if name == task]


class StopAt(Silent):
    """Raises an error once so much of a task is done."""

    def __init__(self, done, error, task="training"):
        self.done, self.error, self.task = done, error, task

    def advance(self, task, done, total, figures=NO_FIGURES, /):
        if task.startswith(self.task) and done == self.done:
            raise self.error


FIGURES = {"keep_loss": 0.1, "move_loss": 0.2, "opens": 0.975, "stays_closed": 1.0}
