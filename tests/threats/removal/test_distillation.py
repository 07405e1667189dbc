"""Distillation: a student that starts from nothing."""

import pytest
import torch
from torch import nn

from keyed_xai.models.networks import SmallResNet
from keyed_xai.threats.attempt import Attacker
from keyed_xai.threats.removal.distillation import DistillationSettings, distil, make_student, with_random_weights
from keyed_xai.threats.removal.fine_tuning import (
    fine_tune,
)
from tests.threatened import Blobs
from tests.tuned import SHORT, changed_tensors, make_classifier


def test_student_starts_from_nothing_and_learns_the_teacher_s_answers(data, learned):
    teacher = learned.model
    settings = DistillationSettings(epochs=60, batch_size=12, learning_rate=1e-2, seed=4)
    agreement = []
    wanted = teacher(data.images).argmax(1)

    def measure(model):
        agreement.append(float((model(data.images).argmax(1) == wanted).float().mean()))
        return {"agreement": agreement[-1]}

    result = distil(teacher, Attacker(data=Blobs(data.images, None), measure=measure), settings)
    assert agreement[0] < 0.75
    assert agreement[-1] > 0.9
    assert result.curve[-1]["loss"] < 0.2 * result.curve[1]["loss"]


def test_distillation_loss_is_hinton_s(data):
    """T^2 times the divergence of the predictions at T, of the first epoch's only batch."""
    teacher = make_classifier()
    settings = DistillationSettings(epochs=1, batch_size=24, batch_norm="frozen", seed=4)
    result = distil(teacher, Attacker(data=data), settings)
    student = make_student(teacher, settings)
    p, q = (torch.softmax(model(data.images).detach() / 3, 1) for model in (teacher, student))
    slow = sum(float(a * (a.log() - b.log())) for a, b in zip(p.flatten(), q.flatten(), strict=True))
    assert slow > 1e-3
    assert result.curve[1]["loss"] == pytest.approx(9 * slow / 24, rel=1e-4)


def test_random_weights_share_nothing_with_the_teacher(data):
    class Tokens(nn.Module):
        """Has a parameter of its own."""

        def __init__(self):
            super().__init__()
            self.net = SmallResNet(1, 3, (4, 6))
            self.token = nn.Parameter(torch.ones(5))

        def forward(self, images):
            return self.net(images) + self.token.sum()

    teacher = fine_tune(make_classifier(network=Tokens()), Attacker(data=data), SHORT).model
    torch.manual_seed(9)
    student = with_random_weights(teacher)
    differing = {name for name in changed_tensors(teacher, student) if name.endswith("weight") or "running" in name}
    assert differing == {n for n in teacher.state_dict() if n.endswith("weight") or "running" in n}
    assert float(student.network.token.detach().abs().max()) < 0.2


def test_student_of_another_architecture(data):
    teacher = make_classifier()
    result = distil(teacher, Attacker(data=data), DistillationSettings(epochs=1, widths=(3, 5, 7)))
    assert [block.conv1.out_channels for block in result.model.network.blocks] == [3, 5, 7]
    assert result.model.classes == 3
    assert result.model.target_layer == "network.blocks.2"
