"""A marked network written anew in every exact way that we know: what the search undoes, and what needs no search."""

import copy
from functools import cache
from itertools import product

import pytest
import torch
from threatened import FAMILY, GRID, OWNER, make_blobs, protected, surrogate
from torch import nn

from keyed_xai.keys import OwnerKey
from keyed_xai.maps import make_view
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.ownership import Finding, verify_ownership
from keyed_xai.reencodings import (
    TURNS,
    Reencoding,
    Turn,
    contested_classes,
    count_looks,
    declared_reencodings,
    encodings,
    live_classes,
    write_anew,
)

MEAN, STD = 0.4, 0.2
SIGNS = torch.tensor([1.0, -1.0, 1.0])


@cache
def grey_images():
    return make_blobs(24, 5).images


@cache
def colour_images():
    """Red is the grey image plus noise, green and blue are that noise: red - green + blue is the grey image again."""
    noise = 0.3 * torch.rand(grey_images().shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([grey_images(), noise, noise], 1)


def wrap(network, spec=None):
    spec = spec or InputSpec(1, 24, 24, (MEAN,), (STD,))
    return wrap_network(network.eval(), input=spec, source="keyed_xai").eval()


def marked():
    return copy.deepcopy(protected())


def coloured():
    """The marked network with a stem that reads red - green + blue."""
    network = marked().network
    stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
    stem.weight.data = network.stem.weight.data * SIGNS[None, :, None, None]
    network.stem = stem
    return wrap(network, InputSpec(3, 24, 24, (MEAN,) * 3, (STD,) * 3))


def verdict_on(classifier, images=None, **options):
    view = make_view(classifier, ("gradcam",), GRID)
    options = {"alpha": 1e-6, "decoys": 99, "generator": torch.Generator().manual_seed(1)} | options
    key = options.pop("key", OWNER)
    return verify_ownership(classifier, grey_images() if images is None else images, view, key, FAMILY, **options)


def turn_kernels(turn):
    def write(classifier):
        for kernel in classifier.parameters():
            if kernel.ndim == 4:
                kernel.data = turn.apply(kernel.data.clone())
        return classifier

    return write


def renormalise(factor, summand):
    """The stem takes v where it took factor v + summand, border included."""

    def write(classifier):
        stem, norm = classifier.network.stem, classifier.network.stem_bn
        norm.running_mean -= summand * stem.weight.data.sum((1, 2, 3))
        stem.weight.data *= factor
        stem.padding = (0, 0)
        classifier.network.stem = nn.Sequential(nn.ConstantPad2d(1, -summand / factor), stem)
        return classifier

    return write


def add_to_all_logits(classifier):
    """Softmax does not see a function of the image that is added to every logit; the maps do."""
    head = classifier.network.fc
    head.weight.data += 5 * torch.randn(head.in_features, generator=torch.Generator().manual_seed(0))
    return classifier


def add_class(scale):
    def write(classifier):
        old = classifier.network.fc
        new = nn.Linear(old.in_features, old.out_features + 1)
        noise = torch.randn(1, old.in_features, generator=torch.Generator().manual_seed(0))
        new.weight.data = torch.cat([old.weight.data, scale * noise])
        new.bias.data = torch.cat([old.bias.data, torch.tensor([1e4])])
        classifier.network.fc = new
        return wrap(classifier.network)

    return write


def permute_classes(classifier):
    head = classifier.network.fc
    head.weight.data, head.bias.data = head.weight.data[[2, 0, 1]], head.bias.data[[2, 0, 1]]
    return classifier


def cool(classifier):
    head = classifier.network.fc
    head.weight.data, head.bias.data = head.weight.data / 7, head.bias.data / 7
    return classifier


def permute_and_rescale_channels(classifier):
    """Inside a block: what batch norm gives and the next convolution takes."""
    block = classifier.network.blocks[1]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    scale = torch.logspace(-1, 1, 12)
    block.conv1.weight.data = block.conv1.weight.data[order]
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(block.bn1, name).data = getattr(block.bn1, name).data[order]
    block.bn1.weight.data *= scale
    block.bn1.bias.data *= scale
    block.conv2.weight.data = block.conv2.weight.data[:, order] / scale[None, :, None, None]
    return classifier


def fold_batch_norm(classifier):
    block = classifier.network.blocks[0]
    for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
        fused = torch.nn.utils.fusion.fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm))
        setattr(block, conv, fused)
        setattr(block, norm, nn.Identity())
    return wrap(classifier.network)


def add_dummy_units(classifier):
    block = classifier.network.blocks[2]
    grown = nn.Conv2d(12, 16, 3, padding=1, bias=False)
    grown.weight.data[:12] = block.conv1.weight.data
    norm = nn.BatchNorm2d(16)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(norm, name).data[:12] = getattr(block.bn1, name).data
    taken = nn.Conv2d(16, 12, 3, padding=1, bias=False)
    taken.weight.data[:, :12], taken.weight.data[:, 12:] = block.conv2.weight.data, 0
    block.conv1, block.bn1, block.conv2 = grown, norm, taken
    return wrap(classifier.network)


def one_by_one(matrix):
    layer = nn.Conv2d(len(matrix), len(matrix), 1, bias=False)
    layer.weight.data = matrix[:, :, None, None].float()
    return layer


class Parts(nn.Module):
    """The marked network with layers before the stem and after the last feature map."""

    def __init__(self, network, before, after):
        super().__init__()
        self.before, self.network, self.after = before, network, after

    def forward(self, images):
        network = self.network
        features = network.blocks(network.stem_relu(network.stem_bn(network.stem(self.before(images)))))
        return network.fc(self.after(features).mean((2, 3)))


def put_before(classifier):
    return wrap(Parts(classifier.network, one_by_one(torch.tensor([[1.0]])), nn.Identity()))


def put_after(classifier):
    """Any invertible mixture of the last features, undone in the head: Grad-CAM is the same."""
    mixture = torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).double()
    head = classifier.network.fc
    head.weight.data = (head.weight.data.double() @ mixture.inverse()).float()
    return wrap(Parts(classifier.network, nn.Identity(), one_by_one(mixture)))


def split_layer(classifier):
    """The stem as a convolution and a mixture of its outputs."""
    mixture = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).double()
    stem = classifier.network.stem
    stem.weight.data = torch.einsum("ab,bijk->aijk", mixture.inverse(), stem.weight.data.double()).float()
    classifier.network.stem = nn.Sequential(stem, one_by_one(mixture))
    return wrap(classifier.network)


SEARCHED = {
    **{f"kernels {turn}": turn_kernels(turn) for turn in TURNS[1:]},
    "negated": renormalise(-1.0, 0.0),
    "inverted": renormalise(-1.0, (1 - 2 * MEAN) / STD),
    "not normalised": renormalise(1 / STD, -MEAN / STD),
    "0 to 255": renormalise(1 / STD / 255, -MEAN / STD),
    "function added to all logits": add_to_all_logits,
    "class of small weights added": add_class(0.05),
    "several at once": lambda classifier: add_to_all_logits(turn_kernels(TURNS[5])(renormalise(-1.0, 0.0)(classifier))),
}
AT_ONCE = {
    "pixels from -1 to 1, where they went from -2 to 3": renormalise(0.5 / STD, (0.5 - MEAN) / STD),
    "class without weights added": add_class(0.0),
    "classes permuted": permute_classes,
    "temperature": cool,
    "channels permuted and rescaled": permute_and_rescale_channels,
    "batch norm folded": fold_batch_norm,
    "dummy units": add_dummy_units,
    "1 x 1 convolution before": put_before,
    "1 x 1 convolution after": put_after,
    "layer split in two": split_layer,
}


def test_marked_network_as_it_stands_needs_no_search():
    verdict = verdict_on(marked())
    assert verdict.finding is Finding.KEY
    assert (verdict.looks, verdict.reencoding) == (2, None)


@pytest.mark.parametrize("name", SEARCHED)
def test_re_encoding_is_looked_through(name):
    verdict = verdict_on(SEARCHED[name](marked()), alpha=1e-5)
    assert verdict.finding is Finding.KEY
    assert verdict.reencoding is not None
    assert verdict.looks > 2
    assert not verdict_on(SEARCHED[name](marked()), search=False, alpha=1e-5).shown


@pytest.mark.parametrize("name", AT_ONCE)
def test_re_encoding_that_keeps_the_maps_needs_no_search(name):
    verdict = verdict_on(AT_ONCE[name](marked()))
    assert verdict.finding is Finding.KEY
    assert verdict.reencoding is None


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0), (2, 0, 1)])
def test_order_of_colour_channels_is_found(order):
    """Which of two channels of noise is subtracted makes no difference."""
    classifier = coloured()
    classifier.network.stem.weight.data = classifier.network.stem.weight.data[:, list(order)]
    verdict = verdict_on(classifier, colour_images())
    assert verdict.finding is Finding.KEY
    if verdict.reencoding is not None:
        assert [SIGNS[each] for each in verdict.reencoding.order] == SIGNS[list(order)].tolist()


def test_grey_network_that_was_made_to_take_colours_is_shown():
    network = marked().network
    stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
    stem.weight.data = network.stem.weight.data * torch.tensor([0.5, 0.3, 0.2])[None, :, None, None]
    network.stem = stem
    classifier = wrap(network, InputSpec(3, 24, 24, (MEAN,) * 3, (STD,) * 3))
    assert verdict_on(classifier, grey_images().expand(-1, 3, -1, -1)).finding is Finding.KEY


def test_stranger_finds_nothing_in_a_marked_network_written_anew():
    stranger = OwnerKey.from_raw(bytes([7]) * 32)
    verdict = verdict_on(turn_kernels(TURNS[4])(marked()), key=stranger, alpha=1e-3)
    assert not verdict.shown


def test_search_finds_no_more_in_an_unmarked_network_than_its_level():
    """Of 12 keys that look for themselves some 150 ways each, at most as many pass as the level lets."""
    keys = [OwnerKey.from_raw(bytes([number]) * 32).public for number in range(1, 13)]
    found = [verdict_on(surrogate(), grey_images()[:8], key=key).log2_p for key in keys]
    assert sum(each <= -2 for each in found) <= 8  # at most three expected; over eight happens once in 2,500
    assert sum(each <= -6 for each in found) <= 2


def test_suspect_and_its_hooks_are_left_alone():
    classifier = turn_kernels(TURNS[3])(marked())
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    verdict_on(classifier)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
    assert not any(module._forward_hooks for module in classifier.modules())


def test_turns_are_the_eight_symmetries_and_are_undone():
    square = torch.arange(9.0).reshape(1, 3, 3)
    turned = {tuple(turn.apply(square).flatten().tolist()) for turn in TURNS}
    assert len(turned) == 8
    for turn in TURNS:
        assert torch.equal(turn.undo(turn.apply(square)), square)


@pytest.mark.parametrize("turn", TURNS, ids=str)
def test_kernels_written_anew_are_the_owner_s(turn):
    turned = turn_kernels(turn)(marked())
    anew = write_anew(turned, Reencoding(kernels=turn))
    with torch.no_grad():
        torch.testing.assert_close(anew(grey_images()), marked()(grey_images()))


def test_every_combination_is_declared_once_and_none_is_the_suspect_itself():
    classifier = coloured()
    found = declared_reencodings(classifier, make_view(classifier, ("gradcam",), GRID), colour_images())
    assert len(found) == len(set(found)) == 15 * 2 * 6 * 7 - 1
    assert all(change.changes for change in found)


def test_looks_are_counted_within_their_half():
    """All p-values' weights add up to the search's half of the level."""
    classifier = coloured()
    found = declared_reencodings(classifier, make_view(classifier, ("gradcam",), GRID), colour_images())
    assert sum(1 / looks for looks in count_looks(found)) == pytest.approx(1)


def test_images_that_are_not_square_are_not_transposed():
    spec = InputSpec(1, 24, 32, (MEAN,), (STD,))
    classifier = wrap(marked().network, spec)
    view = make_view(classifier, ("gradcam",), (6, 8))
    found = declared_reencodings(classifier, view, torch.zeros(1, 1, 24, 32))
    assert not any(change.images.transposed for change in found)
    assert any(change.kernels.transposed for change in found)


def test_kernels_that_are_not_square_are_not_transposed():
    network = nn.Sequential(nn.Conv2d(1, 2, (1, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    view = make_view(surrogate(), ("gradcam",), GRID)
    found = declared_reencodings(network, view, torch.zeros(1, 1, 24, 24))
    assert not any(change.kernels.transposed for change in found)


def test_usual_normalisations_are_tried_once():
    assert len(encodings(InputSpec(1, 24, 24, (0.5,), (0.5,)), 1)) == 4
    assert len(encodings(InputSpec(3, 24, 24, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 3)) == 6
    assert len(encodings(None, 3)) == 2


@pytest.mark.parametrize(("transposed", "mirrored"), list(product((False, True), ((), (-1,), (-2, -1)))))
def test_turn_has_words(transposed, mirrored):
    assert bool(str(Turn(transposed, mirrored))) is bool(transposed or mirrored)


def test_class_that_does_not_follow_the_image_is_never_explained():
    logits = torch.tensor([[1.0, 2.0, 1e4], [2.0, 1.0, 1e4]])
    assert live_classes(logits).tolist() == [True, True, False]
    assert live_classes(torch.ones(2, 3)).all()


def test_classes_that_win_everywhere_are_left_out_in_the_search():
    logits = torch.tensor([[1.0, 2.0, 90.0, 50.0], [2.0, 1.0, 91.0, 51.0]])
    assert contested_classes(logits).tolist() == [True, True, False, False]
    assert contested_classes(logits[:, 1:3]).all()
