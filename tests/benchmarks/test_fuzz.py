"""benchmarks/fuzz.py: every reader stands a short run of spoilt inputs, and what must be counted is."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
READERS = [
    "pem", "licence", "card", "bundle", "safetensors", "pt", "checkpoint", "onnx", "metadata", "images", "requests",
]  # fmt: skip
# Readers that misbehave each in their way at case 3; one that is only slow is run again before it counts.
MISBEHAVING = """
import json, os, signal, sys, time
from keyed_xai_benchmarks import fuzz
from keyed_xai_benchmarks.readers import Reader
from keyed_xai.errors import DataError

fuzz.HANG_SECONDS, fuzz.LARGE_BYTES, fuzz.SLOW_SECONDS = 2, 2**26, 0.5

def fail(): raise KeyError("x")
def refuse(): raise DataError("x")
def grow(): bytearray(b"x") * 2**27
deeds = {"fail": fail, "refuse": refuse, "grow": grow, "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
         "linger": lambda: time.sleep(0.7), "hang": lambda: time.sleep(9), "none": lambda: None}
for name, deed in deeds.items():
    reader = Reader(lambda random: random.randbytes(2), lambda case, folder: deed() if case == third else None)
    third = reader.make(fuzz._source(name, 5, 3))
    tally = fuzz.fuzz(name, reader, 6, seed=5)
    print(json.dumps([name, tally.cases, dict(tally.counts), [case for case, _, _ in tally.faults]]))
"""


def run(*command):
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}
    result = subprocess.run([sys.executable, *command], check=False, **options)
    return result.returncode, result.stdout, result.stderr


def test_no_reader_fails_on_spoilt_inputs():
    code, output, errors = run("-m", "keyed_xai_benchmarks.fuzz", "--count", "60")
    assert code == 0, output + errors
    rows = [re.split(r" ?\| ?", line)[1:-1] for line in output.splitlines()[2:]]
    assert [row[0] for row in rows] == READERS
    for row in rows:
        cases, accepted, typed, *faults = map(int, row[1:7])
        assert (cases, faults) == (60, [0, 0, 0])
        assert accepted + typed == 60
        assert typed > 0


def test_faults_are_counted_and_the_other_cases_go_on():
    code, output, errors = run("-c", MISBEHAVING)
    assert code == 0, errors
    found = {name: rest for name, *rest in map(json.loads, output.splitlines())}
    assert found == {
        "fail": [6, {"accepted": 5, "other": 1}, [3]],
        "refuse": [6, {"accepted": 5, "typed": 1}, []],
        "grow": [6, {"accepted": 6, "large": 1}, [3]],
        "crash": [6, {"accepted": 5, "other": 1}, [3]],
        "linger": [6, {"accepted": 6, "slow": 1}, [3]],
        "hang": [6, {"accepted": 5, "other": 1, "slow": 1}, [3, 3]],
        "none": [6, {"accepted": 6}, []],
    }


def test_one_case_is_shown_again():
    code, output, errors = run("-m", "keyed_xai_benchmarks.fuzz", "--reader", "card", "--case", "1")
    assert code == 0, errors
    assert "MiB at most" in output
