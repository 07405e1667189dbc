"""The queue of a model: what is merged, split, retried, dropped and refused."""

import threading
import time

import numpy as np
import pytest

from keyed_xai.serving.batching import Batcher
from keyed_xai.serving.refusal import Refused


class Recorder:
    """Runs batches, one at a time once `gate` is open, and keeps what came."""

    def __init__(self):
        self.gate = threading.Event()
        self.started = threading.Semaphore(0)
        self.batches = []

    def __call__(self, images, target):
        self.started.release()
        assert self.gate.wait(10)
        self.batches.append((images[:, 0].tolist(), None if target is None else target.tolist()))
        if (images < 0).any():
            raise RuntimeError("negative")
        chosen = np.full(len(images), -1) if target is None else target
        return {"double": 2 * images, "target": chosen.astype(np.float32)}


@pytest.fixture
def make():
    """Returns a batcher and its recorder, whose thread is busy with one image, 99."""
    made = []

    def make(*, blocked=True, **options):
        recorder = Recorder()
        batcher = Batcher(recorder, name="m", **{"max_batch": 4, **options})
        made.append((batcher, recorder))
        if blocked:
            batcher.submit(numbers(99))
            assert recorder.started.acquire(timeout=10)
        return batcher, recorder

    yield make
    for batcher, recorder in made:
        recorder.gate.set()
        batcher.close()


def numbers(*values):
    return np.array(values, np.float32)[:, None]


def test_waiting_requests_share_a_batch_and_get_their_own_parts(make):
    batcher, recorder = make()
    answers = [batcher.submit(numbers(*values)) for values in ((1,), (2, 3), (4,), (5,))]
    assert batcher.waiting == 5
    recorder.gate.set()
    found = [answer.result(10)["double"].ravel().tolist() for answer in answers]
    assert found == [[2], [4, 6], [8], [10]]
    assert recorder.batches == [([99], None), ([1, 2, 3, 4], None), ([5], None)]
    assert batcher.waiting == 0


def test_order_is_kept_where_the_next_request_does_not_fit(make):
    batcher, recorder = make()
    answers = [batcher.submit(numbers(*values)) for values in ((1, 2, 3), (4, 5), (6,))]
    recorder.gate.set()
    [answer.result(10) for answer in answers]
    assert [values for values, _ in recorder.batches[1:]] == [[1, 2, 3], [4, 5, 6]]


def test_targets_merge_with_requests_that_have_none(make):
    batcher, recorder = make()
    answers = [
        batcher.submit(numbers(1)), batcher.submit(numbers(2, 3), np.array([7, -1])), batcher.submit(numbers(4))
    ]  # fmt: skip
    recorder.gate.set()
    assert [answer.result(10)["target"].tolist() for answer in answers] == [[-1], [7, -1], [-1]]
    assert recorder.batches[1] == ([1, 2, 3, 4], [-1, 7, -1, -1])


def test_failing_request_fails_alone(make, caplog):
    batcher, recorder = make()
    answers = [batcher.submit(numbers(value)) for value in (1, -2, 3)]
    recorder.gate.set()
    assert answers[0].result(10)["double"] == 2
    assert answers[2].result(10)["double"] == 6
    with pytest.raises(Refused) as refused:
        answers[1].result(10)
    assert refused.value.status == 500
    assert "negative" not in str(refused.value)
    assert "m failed: RuntimeError: negative" in caplog.text
    assert batcher.submit(numbers(5)).result(10)["double"] == 10


def test_cancelled_requests_do_not_run(make):
    batcher, recorder = make()
    answers = [batcher.submit(numbers(value)) for value in (1, 2, 3)]
    assert answers[1].cancel()
    recorder.gate.set()
    assert answers[2].result(10)["double"] == 6
    assert recorder.batches[1:] == [([1, 3], None)]
    only = batcher.submit(numbers(4))
    only.cancel()
    assert batcher.submit(numbers(5)).result(10)["double"] == 10


def test_lone_request_waits_for_others_only_with_a_delay(make):
    for delay, expected in ((0.0, [[1], [2]]), (60.0, [[1, 2]])):
        batcher, recorder = make(blocked=False, max_delay=delay, max_batch=2)
        recorder.gate.set()
        first = batcher.submit(numbers(1))
        if not delay:
            first.result(10)
        batcher.submit(numbers(2)).result(timeout=20)  # a full batch does not wait for the delay
        assert [values for values, _ in recorder.batches] == expected


def test_delay_ends(make):
    batcher, recorder = make(blocked=False, max_delay=0.05)
    recorder.gate.set()
    started = time.monotonic()
    batcher.submit(numbers(1)).result(timeout=20)
    assert time.monotonic() - started > 0.04


def test_flushing_ends_the_delay(make):
    batcher, recorder = make(blocked=False, max_delay=60.0)
    recorder.gate.set()
    answers = [batcher.submit(numbers(value)) for value in (1, 2)]
    with pytest.raises(TimeoutError):
        answers[0].result(0.05)
    batcher.flush()
    assert [float(answer.result(10)["double"][0, 0]) for answer in answers] == [2, 4]
    assert batcher.submit(numbers(3)).result(10)["double"] == 6


def test_closing_finishes_the_running_batch_and_refuses_the_rest(make):
    batcher, recorder = make(blocked=False)
    running = batcher.submit(numbers(1))
    assert recorder.started.acquire(timeout=10)
    waiting = batcher.submit(numbers(2))
    threading.Timer(0.05, recorder.gate.set).start()
    batcher.close()
    assert running.result(0)["double"] == 2
    with pytest.raises(Refused) as refused:
        waiting.result(0)
    assert refused.value.status == 503
    with pytest.raises(Refused, match="stopping"):
        batcher.submit(numbers(3))


def test_batches_are_reported(make):
    seen = []
    batcher, recorder = make(on_batch=lambda images, seconds: seen.append((images, seconds)))
    answers = [batcher.submit(numbers(1, 2)), batcher.submit(numbers(3))]
    recorder.gate.set()
    [answer.result(10) for answer in answers]
    assert [images for images, _ in seen] == [1, 3]
    assert all(0 <= seconds < 10 for _, seconds in seen)


def test_requests_larger_than_a_batch_are_refused(make):
    batcher, _ = make(blocked=False)
    for images in (numbers(*range(5)), numbers()[:0]):
        with pytest.raises(ValueError, match="Expected 1 to 4 images"):
            batcher.submit(images)
