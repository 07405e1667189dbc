"""benchmarks/architectures.py: what becomes of a network is told rightly, whatever it does to the process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Networks that misbehave each in their way, and two real ones.
SCRIPT = """
import json, os, signal, sys, time
from keyed_xai_benchmarks import architectures as bench
from keyed_xai.errors import ModelError

def fail(): raise KeyError("x")
def refuse(): raise ModelError("say what to do")
def grow(): bytearray(b"x") * 2**32
deeds = {"fail": fail, "refuse": refuse, "grow": grow, "hang": lambda: time.sleep(60), "work": lambda: "",
         "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV)}

def steps(network, folder, say, **_):
    say("input", 64, "5 x 5")
    say("protect", "works", "")
    say("explain", *bench._try_step(deeds[network], trace=False))

real, bench.run_steps = bench.run_steps, steps
rows = [bench.try_network(name, bench.Limits(10, 2**31)) for name in deeds]
bench.run_steps = real
rows += [bench.try_network(name, bench.Limits(300, 8 * 2**30))
         for name in ("torchvision:squeezenet1_1", "timm:vit_tiny_patch16_224")]
print(json.dumps([row._asdict() for row in rows]))
print(bench.render(rows, {"torch": "2"}), file=sys.stderr)
"""


def test_outcomes_are_told_and_every_step_works_on_a_real_network():
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["network"]: row for row in json.loads(done.stdout.splitlines()[-1])}
    outcomes = {name: row["outcomes"]["explain"][0] for name, row in rows.items() if ":" not in name}
    assert outcomes == {
        "fail": "raw error", "refuse": "refused", "grow": "over the limit", "hang": "over the limit", "work": "works",
        "crash": "crash",
    }  # fmt: skip
    assert rows["fail"]["outcomes"]["explain"][1] == "KeyError: 'x'"
    assert rows["crash"]["outcomes"]["explain"][1] == "the process died of SIGSEGV"
    squeezenet = rows["torchvision:squeezenet1_1"]
    assert (squeezenet["input"], squeezenet["cells"]) == (96, "5 x 5")
    assert {step: outcome for step, (outcome, _) in squeezenet["outcomes"].items()} == dict.fromkeys(
        ("protect", "explain", "verify", "export"), "works"
    )
    refused = rows["timm:vit_tiny_patch16_224"]["outcomes"]["protect"]
    assert refused[0] == "refused"
    assert "no spatial feature map" in refused[1]
    assert "| protect | 7 | 1 | 0 | 0 | 0 |" in done.stderr
    assert "| crash | 64 | 5 x 5 | works | crash: the process died of SIGSEGV |" in done.stderr
    assert "Not run yet: torchvision:alexnet, " in done.stderr
    assert "torchvision:squeezenet1_1, " not in done.stderr.split("Not run yet: ")[1].splitlines()[0]


def test_every_network_has_a_name_that_its_package_knows():
    timm = pytest.importorskip("timm")
    from keyed_xai_benchmarks.architectures import TIMM, all_networks

    assert set(TIMM) <= set(timm.list_models())
    assert len(set(all_networks())) == len(all_networks())
