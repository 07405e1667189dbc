"""What channels-last layout breaks on a CPU, and what it brings: run it with every new torch.

    python benchmarks/layout.py failures      # convolutions that die, hang or are wrong, by instruction set and threads
    python benchmarks/layout.py steps         # time of a training step in either layout, with and without the safe way

Failures are looked for in processes of their own, with glibc's checking allocator. The smallest script that shows one:

    import torch
    images = torch.rand(16, 56, 56, 4).permute(0, 3, 1, 2)
    kernel = torch.rand(8, 4, 1, 1, requires_grad=True)
    for _ in range(9):
        torch.nn.functional.conv2d(images, kernel, stride=2).sum().backward()
"""

import argparse
import copy
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import product

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from keyed_xai import wrap_network
from keyed_xai.models import Classifier, InputSpec
from keyed_xai.models.layout import SafeConvolutions, set_layout
from keyed_xai.models.networks import SmallResNet
from keyed_xai.saliency import MapLayers, explain, smooth_activations

LAYOUTS = {"plain": torch.contiguous_format, "last": torch.channels_last}
CHANNELS = (3, 4, 7, 8, 12, 15, 16, 24)
SECONDS = 8
NETWORKS = ("SmallResNet", "resnet18", "densenet121")
MAPS = (("gradcam",), ("gradcam", "vbp"), ("simplegrad",))
TOLERANCE = 1e-3
CHECKED = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}


def derivatives(images: Tensor, kernel: Tensor, stride: int, order: int, *, safe: bool) -> tuple[Tensor, ...]:
    """Return first or second derivatives of a convolution by its images and its kernel."""
    images, kernel = images.detach().requires_grad_(), kernel.detach().requires_grad_()
    with SafeConvolutions() if safe else nullcontext():
        output = functional.conv2d(images, kernel, stride=stride, padding=kernel.shape[2] // 2).tanh().square().sum()
    if order == 2:
        (gradient,) = torch.autograd.grad(output, images, create_graph=True)
        output = gradient.square().sum()
    return torch.autograd.grad(output, (images, kernel))


def is_right(case: tuple[int, int, int, int, str, int], *, safe: bool) -> bool:
    """Return whether a case's gradients agree with those in double precision and plain layout, three times over."""
    inputs, outputs, side, stride, layout, order = case
    source = torch.Generator().manual_seed(0)
    images = torch.rand(16, inputs, 56, 56, generator=source)
    kernel = torch.rand(outputs, inputs, side, side, generator=source) - 0.5
    expected = derivatives(images.double(), kernel.double(), stride, order, safe=False)
    images, kernel = (each.contiguous(memory_format=LAYOUTS[layout]) for each in (images, kernel))
    right = True
    for _ in range(3):
        found = derivatives(images, kernel, stride, order, safe=safe)
        pairs = zip(found, expected, strict=True)
        right &= all(float((one - two).norm() / two.norm()) < TOLERANCE for one, two in pairs)
    return right


def run_cases(*, safe: bool, threads: int) -> None:
    """Try every case in a process of its own and print those that fail; called with the environment set."""
    torch.set_num_threads(threads)
    cases = list(product(CHANNELS, (8, 48), (1, 3), (1, 2), LAYOUTS, (1, 2)))
    failed = 0
    for case in cases:
        process = os.fork()
        if not process:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            signal.alarm(SECONDS)
            os._exit(not is_right(case, safe=safe))
        _, status = os.waitpid(process, 0)
        if status:
            failed += 1
            how = "wrong" if not os.WIFSIGNALED(status) else signal.Signals(os.WTERMSIG(status)).name
            inputs, outputs, side, stride, layout, order = case
            print(
                f"  {inputs} to {outputs} channels, {side}x{side}, stride {stride}, {layout}, order {order}: {how}",
                flush=True,
            )
    print(f"  {failed} of {len(cases)} failed", flush=True)


def find_failures() -> None:
    """Run the cases on either instruction set, with one thread and two, the usual way and the safe one."""
    for instructions, threads, safe in product(("AVX2", "DEFAULT"), (1, 2), (False, True)):
        way = "safe" if safe else "usual"
        print(f"torch {torch.__version__}, {instructions}, {threads} threads, {way} way", flush=True)
        settings = CHECKED | {"ONEDNN_MAX_CPU_ISA": instructions, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, "cases", "--threads", str(threads), *(["--safe"] if safe else [])]
        subprocess.run(command, env=os.environ | settings, check=True)


def make_classifier(name: str) -> Classifier:
    """Return the demo's kind of network at 32 pixels, or one of torchvision's at 112, with random weights."""
    small = name == "SmallResNet"
    network: nn.Module = SmallResNet(1, 10) if small else torchvision.models.get_model(name, num_classes=10)
    side, channels = (32, 1) if small else (112, 3)
    spec = InputSpec(channels, side, side, mean=(0.4,) * channels, std=(0.3,) * channels)
    return wrap_network(network, input=spec)


def time_steps(name: str, interpreters: tuple[str, ...], rounds: int) -> dict[tuple[str, bool], float]:
    """Return the median seconds of forward and double backward pass by layout and safety, interleaved."""
    classifier = make_classifier(name)
    map_layers, spec = MapLayers(classifier.target_layer, classifier.taps), classifier.input
    images = torch.rand(32, *spec.shape)
    models: dict[tuple[str, bool], Classifier] = {}
    for layout, safe in product(LAYOUTS, (False, True)):
        models[layout, safe] = copy.deepcopy(classifier).train()
        set_layout(models[layout, safe], LAYOUTS[layout])
    seconds: dict[tuple[str, bool], list[float]] = {way: [] for way in models}
    for _ in range(rounds + 1):
        for way, model in models.items():
            started = time.perf_counter()
            smooth = smooth_activations(8.0 if "simplegrad" in interpreters else None)
            with SafeConvolutions() if way[1] else nullcontext(), smooth:
                logits, maps = explain(model, images, None, interpreters, map_layers, create_graph=True)
            torch.autograd.backward(logits.square().mean() + sum(each.square().mean() for each in maps.values()))
            seconds[way].append(time.perf_counter() - started)
    return {way: statistics.median(each[1:]) for way, each in seconds.items()}


def compare_steps(threads: int, rounds: int) -> None:
    """Print a table of step times and ratios."""
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads, {rounds} rounds")
    print("| network | maps | plain, ms | plain, safe | channels last | channels last, safe |")
    print("|---|---|---|---|---|---|")
    for name, maps in product(NETWORKS, MAPS):
        medians = time_steps(name, maps, rounds)
        plain = medians["plain", False]
        ratios = [f"{medians[way] / plain:.2f}" for way in product(LAYOUTS, (False, True)) if way != ("plain", False)]
        print(f"| {name} | {', '.join(maps)} | {1000 * plain:.0f} | {' | '.join(ratios)} |", flush=True)


def main() -> None:
    """Parse the arguments and run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("failures", "steps", "cases"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--safe", action="store_true", help="with cases: the safe way")
    given = parser.parse_args()
    if given.what == "failures":
        find_failures()
    elif given.what == "cases":
        run_cases(safe=given.safe, threads=given.threads)
    else:
        compare_steps(given.threads, given.rounds)


if __name__ == "__main__":
    main()
