"""Max pools of every kind give their gradient to the same cells as PyTorch, ties included."""

import torch
from torch import nn

from keyed_xai.export.building import ExportSettings, build_model
from keyed_xai.saliency import MapLayers, explain
from tests.exported import outputs, seeded, wrap


class Pools(nn.Module):
    """Every kind of max pool, on the image itself, where ties are easily made."""

    def __init__(self):
        super().__init__()
        self.pools = nn.ModuleList(
            [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(3, 1, dilation=2)]
        )
        self.adaptive = nn.AdaptiveAvgPool2d(5)
        self.fc = nn.Linear(12, 3)

    def forward(self, x):
        pooled = [pool(x) for pool in self.pools]
        weighted = [self.adaptive(each).square().sum((2, 3)) for each in pooled]
        return self.fc(torch.cat(weighted, 1))


def test_pools_with_ties_agree_in_onnxruntime_itself():
    torch.manual_seed(0)
    classifier = wrap(Pools(), 17, require_map=False)
    model = build_model(classifier, ExportSettings(interpreters=("simplegrad",)))
    images = (torch.rand(4, 3, 17, 17, generator=seeded()) * 3).round() / 3
    _, found = outputs(model, images, [0, 1, 2, 1])
    _, maps = explain(classifier, images, torch.tensor([0, 1, 2, 1]), ["simplegrad"], MapLayers("", ()))
    torch.testing.assert_close(found, maps["simplegrad"], rtol=1e-4, atol=1e-5)
