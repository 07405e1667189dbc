"""Verdicts of both tests together: what is shown, what never is, and what a model cannot learn from being asked."""

from math import comb

import numpy as np
import pytest
import torch
from torch import nn

from keyed_xai import metrics
from keyed_xai.decoys import signature_decoy
from keyed_xai.errors import ModelError
from keyed_xai.ownership import tests as ownership
from keyed_xai.ownership.verdict import Finding, verify_ownership
from keyed_xai.saliency.pooled import make_view
from keyed_xai.threats.removal.rescaling import RescalingSettings, rescale_channels
from keyed_xai.triggers import derive_trigger
from tests.claimed import FAMILY, generator, owner_key
from tests.threatened import FAMILY as LOUD
from tests.threatened import GRID, OWNER, make_blobs, reference


class Marked(nn.Module):
    """A model whose Grad-CAM map is always the same."""

    def __init__(self, pattern):
        super().__init__()
        self.pattern, self.map = pattern, nn.Identity()

    def forward(self, images):
        maps = self.map(self.pattern.expand(len(images), 1, -1, -1) + 1e-3 * images.mean((1, 2, 3), keepdim=True))
        return torch.stack([maps.mean((1, 2, 3)), torch.zeros(len(images))], 1)


def test_untrained_model_shows_nothing(key, network, images, view):
    for alpha in (1e-6, 1e-3):
        verdict = verify_ownership(network, images, view, key, FAMILY, alpha=alpha, decoys=19, generator=generator())
        assert not verdict.shown
        assert verdict.alpha == alpha


def test_untrained_model_shows_nothing_however_many_keys_claim_it(network, images, view):
    shown = [
        verify_ownership(network, images, view, owner_key(n).public, FAMILY, search=False).shown for n in range(50)
    ]
    assert not any(shown)


def test_public_key_alone_reads_the_signature(key, flat_images, pooled_view):
    model = Marked(signature_decoy(key.public, "gradcam", (8, 8)))
    verdict = verify_ownership(model, flat_images, pooled_view, key.public, FAMILY)
    assert verdict.shown
    assert verdict.opening is None
    assert verdict.signature.combined.overlap == 32
    assert verdict.signature.combined.log2_p == pytest.approx(-60.67, abs=0.01)


def test_another_key_reads_no_signature(key, flat_images, pooled_view):
    model = Marked(signature_decoy(key.public, "gradcam", (8, 8)))
    verdict = verify_ownership(model, flat_images, pooled_view, owner_key(1), FAMILY, decoys=19, generator=generator())
    assert not verdict.shown
    assert verdict.signature.combined.p_value > 0.01


def test_opening_alone_can_show(key, flat_images, pooled_view, make_lock):
    """A lock without a signature, at a level that 99 decoys can reach."""
    trigger = derive_trigger(key, FAMILY)
    model = make_lock(trigger, torch.eye(8))
    verdict = verify_ownership(
        model, flat_images, pooled_view, key, FAMILY, alpha=0.02, decoys=99, generator=generator()
    )
    assert verdict.opening.reached == 0
    assert verdict.opening.p_value == 0.01
    assert verdict.opening.statistic > 0.3
    assert verdict.opening.largest_decoy < 0.01
    assert verdict.signature.combined.p_value > 0.02
    assert verdict.shown


@pytest.mark.parametrize("search", [False, True])
def test_public_test_alone_is_shown_at_its_own_p_value(key, flat_images, pooled_view, search):
    """Doubled where a search would follow."""
    model = Marked(signature_decoy(key.public, "gradcam", (8, 8)))
    p_value = (1 + search) / comb(64, 32)
    for factor, finding in ((1.001, Finding.PUBLIC_PATTERN), (0.999, Finding.NOTHING)):
        verdict = verify_ownership(
            model, flat_images, pooled_view, key.public, FAMILY, alpha=factor * p_value, search=search
        )
        assert verdict.finding is finding


def test_public_pattern_whose_secret_trigger_does_nothing_is_not_shown(key, flat_images, pooled_view):
    """A model that shows the victim's pattern as a constant frames him: that was shown, and is not."""
    model = Marked(signature_decoy(key.public, "gradcam", (8, 8)))
    verdict = verify_ownership(model, flat_images, pooled_view, key, FAMILY, alpha=1e-6, generator=generator())
    assert verdict.signature.combined.overlap == 32
    assert verdict.finding is Finding.PATTERN_ONLY
    assert not verdict.shown


class Counting(nn.Module):
    """Knows nothing but the order of queries: it moves its maps at the n-th, and shows the pattern it was given."""

    def __init__(self, pattern, query):
        super().__init__()
        self.pattern, self.query, self.asked = pattern, query, 0
        self.map = nn.Identity()

    def forward(self, images):
        self.asked += 1
        maps = self.pattern.flip(0) if self.asked == self.query else self.pattern
        maps = self.map(maps.expand(len(images), 1, -1, -1) + 1e-3 * images.mean((1, 2, 3), keepdim=True))
        return torch.stack([maps.mean((1, 2, 3)), torch.zeros(len(images))], 1)


def test_owner_s_trigger_cannot_be_told_by_its_place(key, flat_images, pooled_view):
    """Moving the first changed query took p to the least; with its place drawn it does in one of 100."""
    pattern = signature_decoy(key.public, "gradcam", (8, 8))
    found = []
    for seed in range(40):
        model = Counting(pattern, 3)  # one query reads the pattern, one the plain maps
        verdict = verify_ownership(
            model, flat_images, pooled_view, key, FAMILY, decoys=99, may_count=True, generator=generator(seed),
            search=False,
        )  # fmt: skip
        found.append(verdict.opening.p_value)
    assert sum(p == 0.01 for p in found) <= 4  # .4 expected; more than four happens once in 20,000
    model = Counting(pattern, 3)
    fixed = verify_ownership(model, flat_images, pooled_view, key, FAMILY, decoys=99, search=False)
    assert fixed.opening.p_value == 0.01


class Listening(nn.Module):
    """Shows most of a pattern, and to transposed images all of it, which a search finds; keeps what it is asked."""

    def __init__(self, pattern):
        super().__init__()
        self.map = nn.Identity()
        self.whole, self.most, self.heard = pattern.T, pattern.flatten().clone(), []
        wrong = [int(self.most.argmax()), int(self.most.argmin())]
        self.most[wrong] = self.most[wrong[::-1]]
        self.most = self.most.view(8, 8)

    def forward(self, images):
        self.heard.append(images.detach().clone())
        first = self.heard[0][: len(images)]
        near, far = ((each - first).abs().max() for each in (images, images.transpose(2, 3)))
        shown = self.most if near <= far else self.whole
        maps = self.map(shown.expand(len(images), 1, -1, -1) + 1e-3 * images.mean((1, 2, 3), keepdim=True))
        return torch.stack([maps.mean((1, 2, 3)), torch.zeros(len(images))], 1)


@pytest.mark.parametrize(("may_count", "times"), [(True, 1), (False, 2)])
def test_one_who_may_count_is_asked_the_secret_once(key, flat_images, pooled_view, may_count, times):
    """A trigger that comes twice, among decoys that do not, is the owner's: moving the maps for it was shown as his."""
    model = Listening(signature_decoy(key.public, "gradcam", (8, 8)))
    options = {"may_count": may_count, "decoys": 99, "alpha": 2.0**-50, "generator": generator()}
    verdict = verify_ownership(model, flat_images, pooled_view, key, FAMILY, **options)
    assert not verdict.shown
    owner = derive_trigger(key, FAMILY).apply(flat_images)
    heard = [each for each in model.heard if len(each) == len(owner)]
    ways = [sum(torch.allclose(each, way, atol=1e-6) for each in heard) for way in (owner, owner.transpose(2, 3))]
    assert min(sum(ways), 2) == times


@pytest.mark.parametrize("decoys", [1, 50])
def test_too_few_random_keys_to_matter_ask_nobody_who_may_count(key, flat_images, pooled_view, decoys, monkeypatch):
    """The trigger would be given away for nothing; and the public pattern alone is not the key's then."""
    monkeypatch.setattr(ownership, "measure_opening", None)
    model = Marked(signature_decoy(key.public, "gradcam", (8, 8)))
    verdict = verify_ownership(model, flat_images, pooled_view, key, FAMILY, may_count=True, decoys=decoys)
    assert (verdict.finding, verdict.opening) == (Finding.PATTERN_ONLY, None)


def test_verdict_follows_its_generator(key, network, images, view):
    verdicts = [
        verify_ownership(network, images, view, key, FAMILY, decoys=5, search=False, generator=generator(seed))
        for seed in (1, 1, 2)
    ]
    assert verdicts[0] == verdicts[1]
    assert verdicts[0].opening.largest_decoy != verdicts[2].opening.largest_decoy


def test_verifying_leaves_the_model(key, network, images, view):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    verify_ownership(network, images, view, key, FAMILY, decoys=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("options", [{"decoys": 0}, {"alpha": 0.0}, {"alpha": 1.0}, {"alpha": float("nan")}])
def test_impossible_settings_are_refused(key, network, images, view, options):
    with pytest.raises(ValueError, match="Expected images, at least 1 decoy and 0 < alpha < 1"):
        verify_ownership(network, images, view, key, FAMILY, **options)


def test_no_images_are_refused(key, network, view):
    with pytest.raises(ValueError, match="Expected images"):
        verify_ownership(network, torch.zeros(0, 1, 16, 16), view, key, FAMILY)


def test_model_without_the_layer_is_refused(key, images, view):
    with pytest.raises(ModelError, match="blocks"):
        verify_ownership(nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), images, view, key, FAMILY)


def test_model_without_finite_maps_is_no_evidence(key, network, images, view):
    with torch.no_grad():
        network.blocks[2].conv1.weight.fill_(float("nan"))
    verdict = verify_ownership(network, images, view, key, FAMILY, alpha=0.2, decoys=19)
    assert not verdict.shown
    assert verdict.opening.p_value == 1


def show_pattern(monkeypatch, model, images):
    """Let the owner's patterns be what the model's maps show already: perfect evidence, without training."""
    view = make_view(model, ("gradcam", "vbp"), GRID)
    _, maps = view.pooled_in_chunks(model, images)
    patterns = {}
    for name, each in maps.items():
        average = metrics.normalise_maps(each.double()).mean(0).flatten().numpy()
        patterns[name] = np.isin(np.arange(36), np.argsort(-average, kind="stable")[:18]).reshape(GRID)
    monkeypatch.setattr(ownership, "signature_cells", lambda _, name, __: patterns[name])


@pytest.fixture
def shown_images(monkeypatch):
    images = make_blobs(16, 3).images
    show_pattern(monkeypatch, reference(), images)
    return images


def claimed(model, images, *interpreters, key=OWNER):
    view = make_view(model, interpreters, GRID)
    return verify_ownership(model, images, view, key, LOUD, alpha=1e-6, decoys=99, search=False, generator=generator())


def test_rescaling_takes_visualbackprop_s_evidence_and_leaves_grad_cam_s_and_the_predictions(shown_images):
    rescaled = rescale_channels(reference(), RescalingSettings()).model
    with torch.no_grad():
        torch.testing.assert_close(rescaled(shown_images), reference()(shown_images), atol=1e-4, rtol=1e-4)
    before, after = (
        claimed(model, shown_images, "gradcam", "vbp", key=OWNER.public) for model in (reference(), rescaled)
    )
    assert before.signature.interpreters["vbp"].p_value < 1e-9
    assert after.signature.interpreters["vbp"].p_value > 1e-3
    assert before.signature.interpreters["gradcam"] == after.signature.interpreters["gradcam"]
    assert before.shown
    assert after.shown


def test_joint_claim_is_judged_by_the_interpreters_that_count(shown_images):
    joint, alone = (claimed(reference(), shown_images, *names) for names in (("gradcam", "vbp"), ("gradcam",)))
    assert joint.signature.combined == alone.signature.combined
    assert joint.opening == alone.opening
    assert set(joint.signature.interpreters) == {"gradcam", "vbp"}
    assert not joint.refused


def test_claim_on_visualbackprop_alone_is_refused_however_strong(shown_images):
    verdict = claimed(reference(), shown_images, "vbp")
    assert verdict.signature.combined.p_value < 1e-9
    assert verdict.opening is not None
    assert verdict.refused
    assert not verdict.shown
