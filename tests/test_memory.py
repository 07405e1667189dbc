"""What a process may take and what it held, in processes of their own."""

import subprocess
import sys

import pytest


def in_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much address space a process has")
def test_no_more_than_the_limit_can_be_taken():
    code = """
from keyed_xai.memory import limit_memory
limit_memory(2**28)
kept = bytearray(2**26)
try:
    bytearray(2**29)
except MemoryError:
    print("refused")
"""
    assert in_process(code) == "refused"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say it this way")
def test_peak_counts_what_was_held_and_let_go():
    code = """
from keyed_xai.memory import peak_memory
before = peak_memory()  # on Linux that of the process that started this one, where it is more
held = b"x" * (before + 2**26)
del held
print(peak_memory() - before)
"""
    assert 2**26 <= int(in_process(code)) < 2**28
