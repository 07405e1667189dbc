"""Ownership of networks written anew: exact re-encodings that cost a thief nothing, before and after the search.

    python benchmarks/reencodings.py DEMO...      # folders of `keyed-xai demo`, one for each key

For each re-encoding: how many predictions it keeps on images encoded likewise, and what `verify` finds in the protected
network as it stands and with the search; the median over keys, and the worst.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from keyed_xai.artifacts.opening import make_family, open_model
from keyed_xai.keys import read_owner_key
from keyed_xai.models import Classifier, wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.ownership import Verdict, load_probe, verify_ownership
from keyed_xai.ownership.reencodings import TURNS, Turn
from keyed_xai.saliency.pooled import make_view

ADDED = 5.0  # deviation of what is added to the head's weights
MANY = 8  # classes added that win against each other


class Parts(nn.Module):
    """A SmallResNet with layers before its stem and after its last feature map."""

    def __init__(self, network: SmallResNet, before: nn.Module, after: nn.Module) -> None:
        """Take the layers."""
        super().__init__()
        self.before, self.network, self.after = before, network, after

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        network = self.network
        features = network.blocks(network.stem_relu(network.stem_bn(network.stem(self.before(images)))))
        logits: Tensor = network.fc(self.after(features).mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Rewriting:
    """One way to write a SmallResNet anew.

    Attributes:
        write: Changes a copy of the network; what comes back may be another module.
        encode: What users of the copy do to pixels; nothing by default.
        logits: What they do to logits; nothing by default.
        exact: Whether predictions are kept to rounding.
    """

    write: Callable[[Any, Classifier], nn.Module]
    encode: Callable[[Tensor, Classifier], Tensor] = lambda images, _: images
    logits: Callable[[Tensor], Tensor] = lambda logits: logits
    exact: bool = True

    def apply(self, classifier: Classifier) -> Classifier:
        """Return the classifier written anew; the one given is left as it is."""
        network = copy.deepcopy(classifier.network)
        assert isinstance(network, SmallResNet)
        with torch.no_grad():
            written = self.write(network, classifier)
        return wrap_network(written.eval(), input=classifier.input, source="keyed_xai").eval()


def turn_kernels(turn: Turn) -> Rewriting:
    """Return kernels turned; exact for a transposition alone, since strides of 2 do not look the same mirrored."""

    def write(network: SmallResNet, _: Classifier) -> nn.Module:
        for kernel in network.parameters():
            if kernel.ndim == 4:
                kernel.copy_(turn.apply(kernel.clone()))
        return network

    return Rewriting(write, lambda images, _: turn.apply(images), exact=not turn.mirrored)


def renormalise(normalise: Callable[[Classifier], tuple[float, float]]) -> Rewriting:
    """Return a stem that takes v where it took factor v + summand, the border of zeros included."""

    def write(network: SmallResNet, classifier: Classifier) -> nn.Module:
        factor, summand = normalise(classifier)
        stem, norm = network.stem, network.stem_bn
        assert norm.running_mean is not None
        norm.running_mean -= summand * stem.weight.sum((1, 2, 3))
        stem.weight *= factor
        stem.padding = (0, 0)
        network.add_module("stem", nn.Sequential(nn.ConstantPad2d(1, -summand / factor), stem))
        return network

    def encode(images: Tensor, classifier: Classifier) -> Tensor:
        factor, summand = normalise(classifier)
        taken = ((images - classifier.mean) / classifier.std - summand) / factor
        return taken * classifier.std + classifier.mean

    return Rewriting(write, encode)


def takes(mean: float, std: float) -> Rewriting:
    """Return a network that takes (x - mean) / std instead of the classifier's own."""
    return renormalise(
        lambda classifier: (
            std / float(classifier.std.mean()),
            (mean - float(classifier.mean.mean())) / float(classifier.std.mean()),
        )
    )


def add_to_all_logits(network: SmallResNet, _: Classifier) -> nn.Module:
    """Add a function of the image to every logit: softmax does not see it, the maps do."""
    network.fc.weight += ADDED * torch.randn(network.fc.in_features, generator=torch.Generator().manual_seed(0))
    return network


def add_outsider(scale: float, bias: float, *, against: bool = False) -> Rewriting:
    """Return a class that never wins and is sliced off, whose weights dwarf the real ones' or cancel their sum."""

    def write(network: SmallResNet, _: Classifier) -> nn.Module:
        old, noise = network.fc, torch.randn(1, network.fc.in_features, generator=torch.Generator().manual_seed(0))
        if against:
            old.weight += ADDED * noise
        new = nn.Linear(old.in_features, old.out_features + 1)
        new.weight.copy_(torch.cat([old.weight, (-ADDED * old.out_features if against else scale) * noise]))
        new.bias.copy_(torch.cat([old.bias, torch.tensor([bias])]))
        network.fc = new
        return network

    return Rewriting(write, logits=lambda logits: logits[:, :-1])


def add_classes(count: int, scale: float) -> Rewriting:
    """Return classes that win whatever the image, and are sliced off."""

    def write(network: SmallResNet, _: Classifier) -> nn.Module:
        old = network.fc
        new = nn.Linear(old.in_features, old.out_features + count)
        noise = torch.randn(count, old.in_features, generator=torch.Generator().manual_seed(0))
        new.weight.copy_(torch.cat([old.weight, scale * noise]))
        new.bias.copy_(torch.cat([old.bias, torch.full((count,), 1e4)]))
        network.fc = new
        return network

    return Rewriting(write, logits=lambda logits: logits[:, :-count])


def permute_classes(network: SmallResNet, _: Classifier) -> nn.Module:
    """Let the last class come first."""
    for tensor in (network.fc.weight, network.fc.bias):
        tensor.copy_(tensor.roll(1, 0))
    return network


def cool(network: SmallResNet, _: Classifier) -> nn.Module:
    """Divide the logits by a temperature of 7."""
    for tensor in (network.fc.weight, network.fc.bias):
        tensor.div_(7)
    return network


def permute_and_rescale(network: SmallResNet, _: Classifier) -> nn.Module:
    """Permute and rescale channels inside a block, which batch norm gives and the next convolution takes."""
    block: Any = network.blocks[1]
    count = block.conv1.out_channels
    order, scale = torch.randperm(count, generator=torch.Generator().manual_seed(0)), torch.logspace(-1, 1, count)
    for tensor in (block.conv1.weight, *block.bn1.parameters(), block.bn1.running_mean, block.bn1.running_var):
        tensor.copy_(tensor[order])
    for tensor in block.bn1.parameters():
        tensor.mul_(scale)
    block.conv2.weight.copy_(block.conv2.weight[:, order] / scale[None, :, None, None])
    return network


def fold_batch_norm(network: SmallResNet, _: Classifier) -> nn.Module:
    """Fold batch norm of the first block into its convolutions."""
    block = network.blocks[0]
    for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
        setattr(block, conv, torch.nn.utils.fusion.fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
        setattr(block, norm, nn.Identity())
    return network


def add_dummy_units(network: SmallResNet, _: Classifier) -> nn.Module:
    """Add four channels of noise inside the last block, which the next convolution takes no notice of."""
    block: Any = network.blocks[2]
    inside, outside = block.conv1.out_channels, block.conv2.out_channels
    grown = nn.Conv2d(block.conv1.in_channels, inside + 4, 3, padding=1, bias=False)
    grown.weight[:inside] = block.conv1.weight
    norm, taken = nn.BatchNorm2d(inside + 4), nn.Conv2d(inside + 4, outside, 3, padding=1, bias=False)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(norm, name)[:inside] = getattr(block.bn1, name)
    taken.weight.zero_()
    taken.weight[:, :inside] = block.conv2.weight
    block.conv1, block.bn1, block.conv2 = grown, norm, taken
    return network


def put_before(network: SmallResNet, classifier: Classifier) -> nn.Module:
    """Put a 1 x 1 convolution that does nothing before the stem."""
    return Parts(network, one_by_one(torch.eye(classifier.input.channels)), nn.Identity())


def put_after(network: SmallResNet, _: Classifier) -> nn.Module:
    """Put an invertible mixture after the last features, undone in the head: Grad-CAM is the same."""
    mixture = draw_mixture(network.fc.in_features)
    network.fc.weight.copy_(network.fc.weight.double() @ mixture.inverse())
    return Parts(network, nn.Identity(), one_by_one(mixture))


def split_layer(network: SmallResNet, _: Classifier) -> nn.Module:
    """Split the stem into a convolution and a mixture of its outputs."""
    stem = network.stem
    mixture = draw_mixture(stem.out_channels)
    stem.weight.copy_(torch.einsum("ab,bijk->aijk", mixture.inverse(), stem.weight.double()))
    network.add_module("stem", nn.Sequential(stem, one_by_one(mixture)))
    return network


def draw_mixture(count: int) -> Tensor:
    """Return a rotation of channels, in double precision."""
    noise = torch.randn(count, count, generator=torch.Generator().manual_seed(0)).double()
    rotation: Tensor = torch.linalg.qr(noise).Q
    return rotation


def one_by_one(matrix: Tensor) -> nn.Conv2d:
    """Return a 1 x 1 convolution that multiplies by a matrix."""
    layer = nn.Conv2d(len(matrix), len(matrix), 1, bias=False)
    layer.weight.data = matrix[:, :, None, None].float()
    return layer


def at_once(*rewritings: Rewriting) -> Rewriting:
    """Return several, one after the other."""

    def write(network: nn.Module, classifier: Classifier) -> nn.Module:
        for rewriting in rewritings:
            network = rewriting.write(network, classifier)
        return network

    def encode(images: Tensor, classifier: Classifier) -> Tensor:
        for rewriting in rewritings:
            images = rewriting.encode(images, classifier)
        return images

    return Rewriting(write, encode, exact=all(each.exact for each in rewritings))


NEGATED = renormalise(lambda _: (-1.0, 0.0))
INVERTED = renormalise(lambda classifier: (-1.0, float((1 - 2 * classifier.mean.mean()) / classifier.std.mean())))
SEARCHED = {
    **{f"kernels {turn}": turn_kernels(turn) for turn in TURNS[1:]},
    "pixels negated after normalisation": NEGATED,
    "pixels inverted, 1 - x": INVERTED,
    "pixels not normalised": takes(0, 1),
    "pixels from 0 to 255": takes(0, 1 / 255),
    "pixels from -1 to 1": takes(0.5, 0.5),
    "one function added to all logits": Rewriting(add_to_all_logits),
    "a class of small weights added that always wins": add_classes(1, 0.05),
    "a function added to all logits, and taken from a class that never wins": add_outsider(0.0, -1e5, against=True),
    "kernels transposed, pixels negated, a function added to all logits": at_once(
        turn_kernels(TURNS[4]), NEGATED, Rewriting(add_to_all_logits)
    ),
}
"""Rewritings that only the search undoes."""
KEPT = {
    "nothing": Rewriting(lambda network, _: network),
    "a class without weights added that always wins": add_classes(1, 0.0),
    "a class of enormous weights added that never wins": add_outsider(1e8, -1e12),
    "classes permuted": Rewriting(permute_classes, logits=lambda logits: logits.roll(-1, 1)),
    "temperature 7": Rewriting(cool, logits=lambda logits: 7 * logits),
    "channels permuted and rescaled": Rewriting(permute_and_rescale),
    "batch norm folded": Rewriting(fold_batch_norm),
    "dummy units": Rewriting(add_dummy_units),
    "a 1 x 1 convolution before": Rewriting(put_before),
    "a 1 x 1 convolution after": Rewriting(put_after),
    "a layer split in two": Rewriting(split_layer),
}
"""Rewritings that leave the maps as they are."""
HIDDEN = {
    "pixels normalised by .37 and .9": takes(0.37, 0.9),
    f"{MANY} classes added that win against each other": add_classes(MANY, 1.0),
}
"""Rewritings that the search does not undo."""


def keeps(rewriting: Rewriting, classifier: Classifier, images: Tensor) -> float:
    """Return the share of predictions kept by users of the network written anew."""
    with torch.no_grad():
        found = rewriting.logits(rewriting.apply(classifier)(rewriting.encode(images, classifier)))
        return float((found.argmax(1) == classifier(images).argmax(1)).double().mean())


def judge(folder: Path, rewriting: Rewriting, decoys: int) -> tuple[float, Verdict, Verdict]:
    """Return the share of predictions kept, and verdicts on a demo's protected network written anew.

    The first is on the network as it stands, the second with the search.
    """
    classifier, card = open_model(folder / "fashion-mnist.keyed")
    assert card is not None
    probe = load_probe(classifier.input)
    images, _ = probe.batch(np.arange(len(probe)))
    anew, key, family = rewriting.apply(classifier), read_owner_key(folder / "owner.pem"), make_family(card.trigger)
    view = make_view(anew, ("gradcam",), card.grid)
    searched, plain = (
        verify_ownership(
            anew, images, view, key, family, decoys=decoys, search=search, generator=torch.Generator().manual_seed(0)
        )
        for search in (True, False)
    )
    return keeps(rewriting, classifier, images), plain, searched


def summarise(verdicts: Sequence[Verdict]) -> str:
    """Return median and largest of the p-values, as powers of two."""
    values = [verdict.log2_p for verdict in verdicts]
    return f"2^{statistics.median(values):.1f}, worst 2^{max(values):.1f}"


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, nargs="+", help="Folder of keyed-xai demo.")
    parser.add_argument("--decoys", type=int, default=999, help="Random keys of the secret test.")
    arguments = parser.parse_args()
    demos = arguments.demo
    print(f"| written anew ({len(demos)} keys) | predictions kept | as it stands | with the search | shown |")
    print("|---|---|---|---|---|")
    for name, rewriting in (KEPT | SEARCHED | HIDDEN).items():
        kept, plain, searched = zip(*(judge(demo, rewriting, arguments.decoys) for demo in demos), strict=True)
        print(
            f"| {name} | {statistics.median(kept):.1%} | {summarise(plain)} | {summarise(searched)} "
            f"| {sum(verdict.shown for verdict in searched)} of {len(demos)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
