"""Requests that come at the same time run as one batch.

One thread for each model takes what waits, oldest first, whenever it is free. Under load batches grow by themselves; a
lone request waits for nobody unless `max_delay` says so. Requests stay whole: one has at most `max_batch` images.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from threading import Condition, Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyed_xai.inference.images import PREDICTED
from keyed_xai.serving.refusal import Refused, busy

Arrays = dict[str, NDArray[np.float32]]
"""Outputs by name, [n, ...]."""
Run = Callable[[NDArray[Any], NDArray[np.int64] | None], Mapping[str, NDArray[np.float32]]]
"""What runs images [n, c, h, w] and their targets int64 [n] or None, such as `Runtime.run`."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Job:
    images: NDArray[Any]
    target: NDArray[np.int64] | None
    answer: Future[Arrays] = field(default_factory=Future)
    arrival: float = field(default_factory=time.monotonic)


class Batcher:
    """The queue of one model, and the thread that works it off. Close it, or the thread keeps the process alive."""

    def __init__(
        self,
        run: Run,
        *,
        name: str,
        max_batch: int,
        max_delay: float = 0.0,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> None:
        """Start the thread.

        Args:
            run: Runs a batch; an exception is an answer too.
            name: Name of the model, for the log.
            max_batch: Images at once, at most.
            max_delay: How long the oldest request waits for others, seconds.
            on_batch: Called with the images of each batch that ran and the seconds it took, in the thread.
        """
        self._run, self._name, self._max_batch, self._max_delay = run, name, max_batch, max_delay
        self._on_batch = on_batch
        self._jobs: deque[_Job] = deque()
        self._waiting = 0
        self._closed = False
        self._changed = Condition()
        self._thread = Thread(target=self._work, name=f"keyed-xai {name}")
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return self._waiting

    def submit(self, images: NDArray[Any], target: NDArray[np.int64] | None = None) -> Future[Arrays]:
        """Queue images [n, c, h, w] with their targets [n]; cancel the future to drop them before they run.

        Returns:
            Their outputs; or a `Refused`, where the model failed on these images, or the queue was closed before their
            turn.

        Raises:
            ValueError: These are no images, or more than a batch holds.
            Refused: The queue is closed.
        """
        if not 1 <= len(images) <= self._max_batch:
            raise ValueError(f"Expected 1 to {self._max_batch} images, got {len(images)}")
        job = _Job(images=images, target=target)
        with self._changed:
            if self._closed:
                raise busy("The server is stopping.")
            self._jobs.append(job)
            self._waiting += len(images)
            self._changed.notify()
        return job.answer

    def flush(self) -> None:
        """Let no request wait for others from now on: none will come."""
        with self._changed:
            self._max_delay = 0.0
            self._changed.notify_all()

    def close(self) -> None:
        """Refuse what waits, and return once the batch that is running is done."""
        with self._changed:
            self._closed = True
            jobs = list(self._jobs)
            self._jobs.clear()
            self._waiting = 0
            self._changed.notify_all()
        for job in jobs:
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(busy("The server stopped before the request's turn."))
        self._thread.join()

    def _work(self) -> None:
        while (jobs := self._take()) is not None:
            if jobs:
                self._answer(jobs)

    def _take(self) -> list[_Job] | None:
        """Return the oldest requests that fit in one batch, without those that were cancelled; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if self._jobs and self._max_delay:
                left = self._jobs[0].arrival + self._max_delay - time.monotonic()
                self._changed.wait_for(self._is_due, max(0.0, left))
            if self._closed:
                return None
            taken: list[_Job] = []
            room = self._max_batch
            while self._jobs and len(self._jobs[0].images) <= room:
                job = self._jobs.popleft()
                self._waiting -= len(job.images)
                if job.answer.set_running_or_notify_cancel():
                    taken.append(job)
                    room -= len(job.images)
            return taken

    def _is_due(self) -> bool:
        """Return whether a batch should run before its delay is over."""
        return self._closed or not self._max_delay or self._waiting >= self._max_batch

    def _answer(self, jobs: Sequence[_Job]) -> None:
        """Run requests as one batch; where that fails each on its own, so that none fails for its neighbours."""
        try:
            answers = self._run_together(jobs)
        except Exception as error:  # noqa: BLE001 - whatever a model raises is this request's, not the thread's
            if len(jobs) == 1:
                _log.error("%s failed: %s: %s", self._name, type(error).__name__, error)
                jobs[0].answer.set_exception(Refused(500, "The model failed on this request; see the server's log."))
                return
            for job in jobs:
                self._answer([job])
            return
        for job, answer in zip(jobs, answers, strict=True):
            job.answer.set_result(answer)

    def _run_together(self, jobs: Sequence[_Job]) -> list[Arrays]:
        started = time.monotonic()
        images = jobs[0].images if len(jobs) == 1 else np.concatenate([job.images for job in jobs])
        found = self._run(images, _join_targets(jobs))
        if self._on_batch is not None:
            self._on_batch(len(images), time.monotonic() - started)
        edges = accumulate((len(job.images) for job in jobs), initial=0)
        return [{name: values[start:stop] for name, values in found.items()} for start, stop in pairwise(edges)]


def _join_targets(jobs: Sequence[_Job]) -> NDArray[np.int64] | None:
    """Return the targets of all images, the predicted class for those without; None where none has one."""
    if all(job.target is None for job in jobs):
        return None
    return np.concatenate(
        [np.full(len(job.images), PREDICTED, np.int64) if job.target is None else job.target for job in jobs]
    )
