"""Which architectures can be protected, explained, verified and exported: run it with every new torch or torchvision.

    python -m keyed_xai_benchmarks.architectures --results docs/architectures.jsonl -o docs/architectures.md  # hours
    python -m keyed_xai_benchmarks.architectures --only torchvision:resnet18  # one, with a failure's traceback

Every classifier of torchvision, and a small network of each family of timm. Each has random weights and the smallest
images, sides in steps of 32, whose target layer has 5 x 5 cells; it is protected for two steps with all three
interpreters, and explained, verified and exported from the folder that was written. The figures mean nothing; what is
looked for is whether a step works, refuses in a sentence that says what to do, raises an error that is not ours, or
takes the process down. The exit code is 1 where one did either of the last two.

Each network is run in a process of its own, with a limit of time and of memory. Finished ones are kept in a file, see
`--results`, and not run again; `--finished` writes the document of these alone.
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
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from PIL import Image

from keyed_xai.artifacts.versions import package_versions
from keyed_xai.artifacts.weights import encode_weights
from keyed_xai.data import ImageData
from keyed_xai.errors import KeyedXAIError, ModelError, TrainingError
from keyed_xai.keys import OwnerKey, write_owner_key
from keyed_xai.memory import limit_memory
from keyed_xai.models import Classifier, build_network, load_classifier, wrap_network
from keyed_xai.models.catalogue import architectures, default_input
from keyed_xai.ownership.evidence import named_layers
from keyed_xai.protection import ProtectSettings, protect, write_protection
from keyed_xai.training import TrainingSettings
from keyed_xai_cli.main import main as command_line

STEPS = ("protect", "explain", "verify", "export")
OUTCOMES = ("works", "refused", "over the limit", "raw error", "crash")
MAPS = ("gradcam", "simplegrad", "vbp")
LAYOUTS = (("gradcam", "vbp"), MAPS)
"""Networks are trained with the first in channels-last layout, with the second in plain layout, and written."""
CELLS = 5
SIDES = range(32, 385, 32)
CLASSES = 10
IMAGES = 12
_PICTURES = 80  # a fifth of a folder is held out, and exports are compared on twelve
TIMM = (
    "beitv2_base_patch16_224", "botnet26t_256", "halonet26t", "lambda_resnet26t", "bat_resnext26ts", "repvgg_a0",
    "mobileone_s0", "gernet_s", "cait_xxs24_224", "coat_lite_tiny", "convit_tiny", "convmixer_768_32", "convnext_atto",
    "cpubone_nano",
    "crossvit_tiny_240", "csatv2", "cs3darknet_s", "cspnext_tiny", "davit_tiny", "deit_tiny_patch16_224",
    "densenet121", "dla46_c", "dpn48b", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0",
    "efficientnet_b0", "efficientvim_m1", "efficientvit_b0", "efficientvit_m0",
    "eva02_tiny_patch14_224", "fasternet_t0",
    "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_050", "ghostnetv3_050", "hardcorenas_a", "hgnetv2_b0",
    "hiera_tiny_224", "hrnet_w18_small", "iformer_t", "inception_next_atto", "inception_resnet_v2", "inception_v3",
    "inception_v4", "lcnetv2_small", "levit_128s", "levit_conv_128s", "lowformer_b0", "mambaout_femto",
    "coatnet_pico_rw_224", "maxvit_rmlp_pico_rw_256", "caformer_s18", "poolformer_s12", "mixer_s16_224",
    "mobilenetv3_small_050", "mobilevit_xxs", "mobilevitv2_050", "mvitv2_tiny", "nest_tiny", "nextvit_small",
    "nf_resnet26", "eca_nfnet_l0", "pit_ti_224", "pvt_v2_b0", "rdnet_tiny", "regnetx_002", "repghostnet_050",
    "repvit_m0_9", "res2net50_14w_8s", "resnest14d", "resnet18", "resnetv2_50", "rexnet_100", "selecsls42",
    "legacy_seresnet18", "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s050", "swiftformer_xs",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224", "tiny_vit_5m_224",
    "tnt_s_patch16_224", "tresnet_m", "twins_svt_small", "vgg11", "visformer_tiny", "vit_tiny_patch16_224",
    "vit_tiny_r_s16_p8_224", "vit_relpos_small_patch16_224", "volo_d1_224", "ese_vovnet19b_slim_dw", "legacy_xception",
    "xception41", "xcit_nano_12_p16_224",
)  # fmt: skip


_SHORT = ("--count", "2", "--decoys", "9", "--seed", "0", "--no-search")
_TRAINING = TrainingSettings(steps=2, batch_size=2, smoothing=8.0, learning_rate=1e-4, warmup_steps=1)
_SETTINGS = ProtectSettings(
    wrong_keys=0, flipped_keys=0, held_out_images=2, validation_images=2, training=_TRAINING
)  # fmt: skip


class Limits(NamedTuple):
    """What one network may use.

    Attributes:
        seconds: Seconds that a network's steps may take.
        memory: Bytes, beyond what a process has that has loaded the packages.
    """

    seconds: float
    memory: int


class Row(NamedTuple):
    """What became of one network.

    Attributes:
        network: Name as ``source:architecture``.
        input: Side of the images, pixels; 0 where it takes none that were tried.
        cells: Cells of the target layer, ``rows x columns``; empty where there is none.
        outcomes: What each step came to and in which words; steps after one that did not work are not there.
        seconds: Seconds in all.
    """

    network: str
    input: int
    cells: str
    outcomes: dict[str, tuple[str, str]]
    seconds: float


def try_network(network: str, limits: Limits) -> Row:
    """Return what becomes of a network, run in a process of its own."""
    started, events = time.perf_counter(), list(_run_process(network, limits))
    said = {name: rest for name, *rest in events}
    side, cells = said.pop("input", (0, ""))
    return Row(network, side, cells, {name: (one, two) for name, (one, two) in said.items()},
               time.perf_counter() - started)  # fmt: skip


def _run_process(network: str, limits: Limits) -> Iterator[list[Any]]:
    """Yield what a child says: its input, and a step, an outcome and words, until it ends or its time has run out."""
    inlet, outlet = os.pipe()
    process = os.fork()
    if not process:
        os.close(inlet)
        _work(network, limits, outlet)
    os.close(outlet)
    said, late, deadline = [], False, time.monotonic() + limits.seconds
    rest = b""
    while not (late := not select.select([inlet], [], [], max(0, deadline - time.monotonic()))[0]):
        chunk = os.read(inlet, 2**16)
        if not chunk:
            break
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            event = json.loads(line)
            said.append(event[0])
            yield event
    os.close(inlet)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    step = next((name for name in STEPS if name not in said), STEPS[-1])
    if late:
        yield [step, "over the limit", f"not done after {limits.seconds:.0f} s"]
    elif os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        yield [step, "crash", f"the process died of {signal.Signals(os.WTERMSIG(status)).name}"]


def _work(network: str, limits: Limits, outlet: int) -> None:
    """Run a network's steps and write a line about each; never returns."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    try:
        limit_memory(limits.memory)
        with os.fdopen(outlet, "w", buffering=1) as lines, tempfile.TemporaryDirectory() as folder:
            run_steps(network, Path(folder), lambda *event: print(json.dumps(event), file=lines))
        os._exit(0)
    finally:
        os._exit(1)


def run_steps(network: str, folder: Path, say: Callable[..., None], *, trace: bool = False) -> None:
    """Run a network's steps and say what each came to, until one does not work.

    Args:
        network: Name as ``source:architecture``.
        folder: An empty one.
        say: Called with "input", side and cells; then with a step, its outcome and words.
        trace: Print the traceback of an error that is not ours.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    key_file, pictures, model = folder / "key.pem", folder / "pictures", folder / "model.keyed"
    key = OwnerKey.generate()
    write_owner_key(key_file, key)
    pictures.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (_PICTURES, 64, 64, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):  # such as the statistics of batch norm come from: on others values explode
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    known, keyed = str(model), ["--key-file", str(key_file)]
    steps: dict[str, Callable[[], str]] = {
        "protect": lambda: _protect(network, key, folder, say),
        "explain": lambda: _command("explain", known, str(pictures / "0.png"), *keyed, "-o", str(folder / "maps")),
        "verify": lambda: _command("verify", known, *keyed, *_SHORT),
        "export": lambda: _command(
            "export", known, "--data", f"imagefolder:{pictures}", "-o", str(folder / "model.onnx")
        ),
    }
    for name, step in steps.items():
        outcome, words = _try_step(step, trace=trace)
        say(name, outcome, " ".join(words.split())[:600])
        if outcome != "works":
            break


def _try_step(step: Callable[[], str], *, trace: bool) -> tuple[str, str]:
    try:
        return "works", step()
    except (KeyedXAIError, click.ClickException) as error:
        return "refused", error.message if isinstance(error, click.ClickException) else str(error)
    except Exception as error:  # noqa: BLE001 - whatever it raises is what is looked for
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return "over the limit", "too little memory"
        if trace:
            traceback.print_exc()
        return "raw error", f"{type(error).__name__}: {error}"


def _command(*arguments: str) -> str:
    """Run a command of the command line; its exit code 3, a model not shown to be the key's, is a result."""
    command_line.main([*arguments], standalone_mode=False)
    return ""


def _protect(network: str, key: OwnerKey, folder: Path, say: Callable[..., None]) -> str:
    """Protect a network from a file of its weights, as small as it gets, and say what had to be left out."""
    classifier = _smallest(network)
    rows, columns = named_layers(classifier)[classifier.target_layer]
    say("input", classifier.input.height, f"{rows} x {columns}")
    weights = folder / "model.safetensors"
    weights.write_bytes(encode_weights(classifier))
    classifier = load_classifier(weights)
    side = classifier.input.height
    images = np.random.default_rng(1).integers(0, 256, (IMAGES, 3, side, side), dtype=np.uint8)
    data = ImageData(images=images, labels=None, classes=(), source="noise")
    words = ""
    for interpreters in LAYOUTS:
        settings = replace(_SETTINGS, interpreters=interpreters)
        try:
            protection = protect(classifier, key, data, data, settings)
        except TrainingError as error:
            if "--without-ownership" not in str(error):
                raise
            words = "without ownership" if interpreters == MAPS else ""
            protection = protect(classifier, key, data, data, replace(settings, ownership=False))
    write_protection(protection, folder / "model.keyed", key)
    return words


def _smallest(network: str) -> Classifier:
    """Return a network with random weights at the smallest images that leave its target layer 5 x 5 cells.

    Where none do, at the last that it takes; those published with it are tried first where only these can be taken.

    Raises:
        ModelError: It takes none of them, or has no feature map.
    """
    source, architecture = network.split(":")
    spec = default_input(source, architecture, 3)
    found, refusal = None, None
    built = build_network(source, architecture, classes=CLASSES, channels=3).eval()
    for side in sorted({*SIDES, spec.height}):
        try:
            found = wrap_network(built, input=replace(spec, height=side, width=side),
                                 architecture=architecture, source=source)  # fmt: skip
        except ModelError as error:
            refusal = error if side == spec.height else refusal
            continue
        if min(named_layers(found)[found.target_layer]) >= CELLS:
            break
    if found is None:
        raise refusal or ModelError(f"{architecture} takes none of the images tried.")
    return found


def render(rows: list[Row], versions: dict[str, str]) -> str:
    """Return the table as a Markdown document."""
    counts = {step: Counter(row.outcomes[step][0] for row in rows if step in row.outcomes) for step in STEPS}
    lines = [
        "# Architectures",
        "",
        "Every classifier of torchvision and a small network of each family of timm, with random weights: protected "
        "for two steps with Grad-CAM, SimpleGrad and VisualBackProp, then explained, verified and exported from the "
        "folder that was written. The images are the smallest, in steps of 32 pixels, that leave the target layer "
        "5 x 5 cells. Steps after one that did not work were not tried. Made by",
        "",
        "    python -m keyed_xai_benchmarks.architectures --results docs/architectures.jsonl -o docs/architectures.md",
        "",
        "with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
        "| step | " + " | ".join(OUTCOMES) + " |",
        "|---|" + "---|" * len(OUTCOMES),
    ]
    lines += [f"| {step} | " + " | ".join(str(counts[step][each]) for each in OUTCOMES) + " |" for step in STEPS]
    missing = [network for network in all_networks() if network not in {row.network for row in rows}]
    if missing:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    lines += ["", "| network | pixels | cells | " + " | ".join(STEPS) + " |", "|---|" + "---|" * (2 + len(STEPS))]
    lines += [_render_row(row) for row in rows]
    return "\n".join(lines) + "\n"


def _render_row(row: Row) -> str:
    cells = [": ".join(filter(None, row.outcomes.get(step, ("", "")))).replace("|", "\\|") for step in STEPS]
    return f"| {row.network} | {row.input or ''} | {row.cells} | " + " | ".join(cells) + " |"


def all_networks() -> list[str]:
    """Return every network to try."""
    return [f"torchvision:{name}" for name in architectures("torchvision")] + [f"timm:{name}" for name in TIMM]


def _cached_rows(results: Path) -> dict[str, Row]:
    """Return the rows of an earlier run, the last of each network."""
    lines = results.read_text().splitlines() if results.is_file() else []
    return {row.network: row for row in (Row(**json.loads(line)) for line in lines)}


def main() -> int:
    """Parse the arguments, run what is asked for, and return 1 if any step crashed or raised what is not ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, help="document to write")
    parser.add_argument("--only", action="append", metavar="SOURCE:NAME", help="run this; may be given several times")
    parser.add_argument("--results", type=Path, default=Path("architectures.jsonl"), help="file of finished rows")
    parser.add_argument("--seconds", type=float, default=600, help="for each network")
    parser.add_argument("--memory", type=float, default=10, help="GiB for each network")
    parser.add_argument("--finished", action="store_true", help="run no more networks")
    given = parser.parse_args()
    if given.only:
        for network in given.only:
            with tempfile.TemporaryDirectory() as folder:
                run_steps(network, Path(folder), print, trace=True)
        return 0
    rows, limits = _cached_rows(given.results), Limits(given.seconds, int(given.memory * 2**30))
    for network in [] if given.finished else all_networks():
        if network not in rows:
            rows[network] = try_network(network, limits)
            with given.results.open("a") as file:
                file.write(json.dumps(rows[network]._asdict()) + "\n")
            print(f"{_render_row(rows[network])} {rows[network].seconds:.0f} s", flush=True)
    chosen = [rows[network] for network in all_networks() if network in rows]
    if given.out is not None:
        given.out.write_text(render(chosen, package_versions() | {"timm": version("timm")}))
    return int(any(outcome in ("raw error", "crash") for row in chosen for outcome, _ in row.outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
