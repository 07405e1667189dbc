"""What it costs that PyTorch's threads spin while they wait: training steps with a core that is busy, and without.

    python -m keyed_xai_benchmarks.spinning

Each way to wait is timed in turn, in a process of its own, with two threads; medians are printed.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from keyed_xai_cli.main import SPIN_COUNT

WAYS = {
    "as OpenMP does by default": {},
    "asleep after a moment, as the command line does": {"GOMP_SPINCOUNT": SPIN_COUNT},
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
}
_ROUNDS = 5
_BUSY = "while True: pass"


def time_steps() -> float:
    """Return the seconds of ten passes over 500 packaged images, after a first one."""
    from keyed_xai.data import ImageSize, load_images
    from keyed_xai.demo import demo_classifier
    from keyed_xai.training.fitting import FittingSettings, fit_classifier

    data = load_images("builtin", ImageSize(1, 32, 32), split="held-out", limit=500)
    classifier = demo_classifier()
    fit_classifier(classifier, data, FittingSettings(epochs=1, batch_size=32))
    started = time.perf_counter()
    fit_classifier(classifier, data, FittingSettings(epochs=10, batch_size=32))
    return time.perf_counter() - started


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy inside the block."""
    other = subprocess.Popen([sys.executable, "-c", _BUSY])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def time_way(way: dict[str, str]) -> float:
    """Return what `time_steps` takes in a process that waits in a way."""
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "from keyed_xai_benchmarks.spinning import time_steps; print(time_steps())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**plain, "OMP_NUM_THREADS": "2", **way}, capture_output=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    """Time every way, idle and busy in turn, and print the medians."""
    idle: dict[str, list[float]] = {name: [] for name in WAYS}
    busy: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(_ROUNDS):
        for name, way in WAYS.items():
            idle[name].append(time_way(way))
            with busy_core():
                busy[name].append(time_way(way))
    print(f"{'threads wait':50} {'idle, s':>8} {'a core busy, s':>15}")
    for name in WAYS:
        print(f"{name:50} {statistics.median(idle[name]):8.1f} {statistics.median(busy[name]):15.1f}")


if __name__ == "__main__":
    main()
