"""Spoilt inputs for every reader, to see what it makes of them: run it when a reader changes.

    python -m keyed_xai_benchmarks.fuzz --count 100000                # all readers
    python -m keyed_xai_benchmarks.fuzz --reader onnx --count 1000
    python -m keyed_xai_benchmarks.fuzz --reader onnx --case 4711     # one case again, with its traceback

Of each case the outcome is "accepted", "typed" (an error of keyed-xai, which says what to do), or "other" (any other
exception, or the death of the process). On top it may be "slow" (more than a second) or "large" (more than 1 GiB of
memory beyond what the process had). Cases are numbered and always the same for the same seed.

Readers run in processes of their own, a few thousand cases in each, so that one that crashes or hangs is counted and
the others go on.
"""

import argparse
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any

from keyed_xai.errors import KeyedXAIError
from keyed_xai.memory import limit_memory, peak_memory
from keyed_xai_benchmarks.readers import Reader, make_readers

SLOW_SECONDS = 1.0
LARGE_BYTES = 2**30
MOST_BYTES = 6 * 2**30  # beyond what the process had: what wants more gets a MemoryError instead of the machine's all
RUNS_BEFORE_SLOW = 3
HANG_SECONDS = 60
CASES_IN_A_PROCESS = 2000
OUTCOMES = ("accepted", "typed", "other", "slow", "large")


@dataclass
class Tally:
    """What became of a reader's cases.

    Attributes:
        cases: Number of cases.
        counts: Number of cases by outcome.
        faults: Number, outcome and words of each case that is other, slow or large.
        seconds: Spent on all.
        slowest: Seconds of the slowest case.
    """

    cases: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, str, str]] = field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0

    def add(self, case: int, outcome: str, words: str = "", seconds: float = 0.0, grown: int = 0) -> None:
        """Count a case."""
        self.cases += 1
        self.slowest = max(self.slowest, seconds)
        found = [outcome] + ["slow"] * (seconds > SLOW_SECONDS) + ["large"] * (grown > LARGE_BYTES)
        for each in found:
            self.counts[each] += 1
            if each not in ("accepted", "typed"):
                self.faults.append((case, each, f"{words} ({seconds:.2f} s, {grown / 2**20:.0f} MiB)"))


def fuzz(name: str, reader: Reader, count: int, *, seed: int = 0, first: int = 0) -> Tally:
    """Return what becomes of `count` cases of a reader, run in other processes."""
    tally, started = Tally(), time.perf_counter()
    while tally.cases < count:
        start = first + tally.cases
        for entry in _run_process(name, reader, range(start, min(start + CASES_IN_A_PROCESS, first + count)), seed):
            tally.add(*_again_if_slow(name, reader, seed, entry))
    tally.seconds = time.perf_counter() - started
    return tally


def _again_if_slow(name: str, reader: Reader, seed: int, entry: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a case's entry; where it was slow, that of the quickest of more runs, alone: the machine may be busy."""
    for _ in range(RUNS_BEFORE_SLOW):
        if entry[3] <= SLOW_SECONDS:
            break
        entry = min(entry, next(_run_process(name, reader, range(entry[0], entry[0] + 1), seed)), key=itemgetter(3))
    return entry


def _run_process(name: str, reader: Reader, cases: range, seed: int) -> Iterator[tuple[Any, ...]]:
    """Yield case, outcome, words, seconds and growth of cases run in a process of their own, until it ends."""
    inlet, outlet = os.pipe()
    process = os.fork()
    if not process:
        os.close(inlet)
        _work(name, reader, cases, seed, outlet)
    os.close(outlet)
    case, hung = cases.start, False
    with os.fdopen(inlet) as lines:
        while True:
            if not select.select([lines], [], [], HANG_SECONDS)[0]:
                hung = True
                break
            line = lines.readline()
            if not line:
                break
            entry = json.loads(line)
            case = entry[0] + 1
            yield tuple(entry)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"{name}: case {case} cannot be made; look at it with --case {case}")
    if hung:
        yield case, "other", "it hangs", float(HANG_SECONDS), 0
    elif case < cases.stop and os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        yield case, "other", f"the process died of {signal.Signals(os.WTERMSIG(status)).name}", 0.0, 0


def _work(name: str, reader: Reader, cases: range, seed: int, outlet: int) -> None:
    """Run cases and write a line about each; never returns."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what decoders print
    warnings.simplefilter("ignore")
    limit_memory(MOST_BYTES)
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    try:
        with os.fdopen(outlet, "w", buffering=1) as lines, tempfile.TemporaryDirectory(dir=fast) as folder:
            before = peak_memory()
            for case in cases:
                entry = _try_case(reader, _source(name, seed, case), Path(folder))
                grown = peak_memory() - before
                lines.write(json.dumps([case, *entry, grown]) + "\n")
                if grown > LARGE_BYTES:  # the peak never falls: the next process measures from its own
                    break
        os._exit(0)
    finally:
        os._exit(1)


def _try_case(reader: Reader, random: Random, folder: Path) -> tuple[str, str, float]:
    made = reader.make(random)
    outcome, words, started = "accepted", "", time.perf_counter()
    try:
        reader.read(made, folder)
    except KeyedXAIError:
        outcome = "typed"
    except BaseException as error:  # noqa: BLE001 - whatever it raises is what is looked for
        outcome, words = "other", f"{type(error).__name__}: {error}"[:300]
    return outcome, words, time.perf_counter() - started


def _source(name: str, seed: int, case: int) -> Random:
    return Random(f"{seed}/{name}/{case}")


def describe(name: str, tally: Tally) -> str:
    """Return a row of the table."""
    figures = " | ".join(str(tally.counts[outcome]) for outcome in OUTCOMES)
    return f"| {name} | {tally.cases} | {figures} | {tally.slowest:.2f} | {tally.seconds:.0f} |"


def show_case(name: str, reader: Reader, case: int, seed: int) -> None:
    """Run one case here and print what it does."""
    made = reader.make(_source(name, seed, case))
    print(repr(made)[:2000])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            reader.read(made, Path(folder))
        except Exception:  # noqa: BLE001 - it is what is looked at
            traceback.print_exc()
    print(f"{time.perf_counter() - started:.2f} s, {peak_memory() / 2**20:.0f} MiB at most")


def main() -> int:
    """Parse the arguments, run what is asked for, and return 1 if anything is other, slow or large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="cases for each reader")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--reader", action="append", help="one reader only; may be given several times")
    parser.add_argument("--case", type=int, help="show one case of the reader")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        readers = make_readers(Path(folder))
        names = given.reader or list(readers)
        if unknown := [name for name in names if name not in readers]:
            parser.error(f"no reader {', '.join(unknown)}; there are {', '.join(readers)}.")
        if given.case is not None:
            show_case(names[0], readers[names[0]], given.case, given.seed)
            return 0
        print(f"| reader | cases | {' | '.join(OUTCOMES)} | slowest, s | seconds |", flush=True)
        print("|---|" + "---|" * (len(OUTCOMES) + 3))
        failed = False
        for name in names:
            tally = fuzz(name, readers[name], given.count, seed=given.seed, first=given.first)
            print(describe(name, tally), flush=True)
            for case, outcome, words in tally.faults:
                print(f"  {name} {case}: {outcome}: {words}", flush=True)
            failed |= bool(tally.faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
