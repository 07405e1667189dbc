"""Whatever takes a network measures it in evaluation mode and hands it back as it was, training mode included."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from keyed_xai import audit, explain, export_onnx, protect, run_attack, verify_ownership, wrap_network
from keyed_xai.auditing.running import AuditSettings
from keyed_xai.auditing.suspects import Suspect
from keyed_xai.backdoors.attacking import AttackSettings
from keyed_xai.export.exporting import check_onnx
from keyed_xai.inference.runtime import Runtime
from keyed_xai.models import InputSpec
from keyed_xai.models.networks import SmallResNet
from keyed_xai.ownership.verifying import Claim, verify
from keyed_xai.protection.protecting import ProtectSettings
from keyed_xai.protection.task import make_keyed_task
from keyed_xai.saliency.pooled import make_view
from keyed_xai.training import train
from keyed_xai.training.fitting import measure_predictions
from tests.audited import ATTACKERS, OTHERS, PARAMETERS, TRIGGER
from tests.conftest import draw_statistics
from tests.threatened import FAMILY, OWNER
from tests.trained import SHORT

SPEC = InputSpec(1, 24, 24, mean=(0.4,), std=(0.2,))
IMAGES = torch.from_numpy(OTHERS.images[:12]).float() / 255
PROBE = replace(OTHERS, images=OTHERS.images[:6], labels=None)
PROTECTING = ProtectSettings(amplitude=24.0, tile=24, grid=(6, 6), training=SHORT, wrong_keys=2, flipped_keys=1,
                             ownership=False, held_out_images=8, validation_images=4)  # fmt: skip
FORWARD = replace(SHORT, order="forward")
ATTACKING = AttackSettings(trigger="spread", training=FORWARD, held_out_images=8, validation_images=4)
AUDITING = AuditSettings(against=("re-bn",), controls=False, held_out_images=8, decoys=3)


def make_network():
    """Batch norm whose statistics are far from those of any image, dropout, and modes that are not all alike."""
    torch.manual_seed(1)
    network = SmallResNet(1, 3, (8, 12, 12))
    network.fc = nn.Sequential(nn.Dropout(0.5), network.fc)
    draw_statistics(network)
    network.train()
    network.blocks[1].eval()
    network.stem.requires_grad_(False)
    return network


def make_classifier():
    return wrap_network(make_network(), input=SPEC)


def state_of(network):
    """Everything about a network that a caller could notice, names and values."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in network.state_dict().items()},
        "objects": [id(each) for each in (*network.parameters(), *network.buffers())],
        "strides": [each.stride() for each in network.parameters()],
        "modes": [module.training for module in network.modules()],
        "trained": [each.requires_grad for each in network.parameters()],
        "gradients": [each.grad for each in network.parameters()],
        "hooks": [
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in network.modules()
        ],
        "own": [sorted(vars(module)) for module in network.modules()],
    }


def assert_same(before, after):
    tensors = zip(before.pop("tensors").items(), after.pop("tensors").items(), strict=True)
    for (name, one), (other_name, other) in tensors:
        assert name == other_name
        assert torch.equal(one, other), name
    assert before == after


def protected_figures(classifier, _folder):
    report = protect(classifier, OWNER, ATTACKERS, OTHERS, PROTECTING).report
    return report["accuracy"], report["interpreters"], report["history"]


def attacked_figures(classifier, _folder):
    report = run_attack(classifier, ATTACKERS, OTHERS, ATTACKING).report
    return report["interpreters"], report["history"]


def trained_history(classifier, _folder):
    task = make_keyed_task(classifier, OWNER, FAMILY, interpreters=("gradcam",))
    return train(classifier, ATTACKERS, OTHERS, task, SHORT).history


def explained_maps(classifier, _folder):
    return explain(classifier, IMAGES, interpreters=("gradcam", "simplegrad", "vbp")).maps


def shown_ownership(classifier, _folder):
    view = make_view(classifier, ("gradcam",), None)
    generator = torch.Generator().manual_seed(0)
    return verify_ownership(classifier, IMAGES, view, OWNER, FAMILY, decoys=9, generator=generator)


def shown_signature(classifier, _folder):
    view = make_view(classifier, ("gradcam",), None)
    return verify_ownership(classifier, IMAGES, view, OWNER.public, FAMILY)


def verified(classifier, _folder):
    return verify(classifier, Claim(key=OWNER), PROBE, decoys=9, seed=0).verdict


def audited(classifier, _folder):
    secrets = {"key": OWNER, "parameters": PARAMETERS, "trigger": TRIGGER}
    suspect = Suspect(name="suspect", kind="keyed", classifier=classifier, reference=classifier, **secrets)
    findings = audit(suspect, ATTACKERS, OTHERS, AUDITING).report["findings"]
    return [{name: value for name, value in finding.items() if name != "seconds"} for finding in findings]


def exported_file(classifier, folder):
    result = export_onnx(classifier, folder / "model.onnx", images=IMAGES)
    check_onnx(folder / "model.onnx", classifier, images=IMAGES)
    return Runtime(result.file, device="cpu").run(IMAGES.numpy())


def measured_predictions(classifier, _folder):
    return measure_predictions(classifier, OTHERS)


WAYS = [protected_figures, attacked_figures, trained_history, explained_maps, shown_ownership, shown_signature,
        verified, audited, exported_file, measured_predictions]  # fmt: skip


def assert_equal(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    else:
        assert one == other


@pytest.mark.parametrize("way", WAYS)
def test_network_is_left_as_it_was_and_measured_in_evaluation_mode(way, tmp_path):
    classifier, evaluated = make_classifier(), make_classifier().eval()
    before = state_of(classifier)
    (tmp_path / "other").mkdir()
    found = way(classifier, tmp_path)
    assert_same(before, state_of(classifier))
    assert_equal(found, way(evaluated, tmp_path / "other"))


def test_wrapping_leaves_a_network_as_it_was():
    network = make_network()
    before = state_of(network)
    wrap_network(network, input=SPEC)
    assert_same(before, state_of(network))


def test_a_change_would_be_noticed():
    network = make_network()
    changes = (
        lambda twin: twin(IMAGES),
        lambda twin: twin.eval(),
        lambda twin: twin.fc.requires_grad_(False),
        lambda twin: twin.register_forward_hook(lambda *_: None),
    )
    for change in changes:
        twin = copy.deepcopy(network)
        before = state_of(twin)
        change(twin)
        with pytest.raises(AssertionError):
            assert_same(before, state_of(twin))
