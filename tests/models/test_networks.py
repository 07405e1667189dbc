"""SmallResNet: strides, shapes, a slow twin of its residual block. TableMLP: a slow twin."""

import pytest
import torch

from keyed_xai.models.networks import ResidualBlock, SmallResNet, TableMLP


@pytest.mark.parametrize(
    ("widths", "reduction"), [((4,), 2), ((4, 6), 4), ((4, 6, 6), 4), ((4, 6, 8, 8), 8), ((4, 6, 8, 8, 8), 16)]
)
def test_resolution_falls_as_documented(widths, reduction):
    network = SmallResNet(in_channels=2, classes=5, widths=widths).eval()
    images = torch.rand(3, 2, 32, 48)
    features = network.blocks(network.stem_relu(network.stem_bn(network.stem(images))))
    assert features.shape == (3, widths[-1], 32 // reduction, 48 // reduction)
    assert network(images).shape == (3, 5)


@pytest.mark.parametrize(("channels_in", "channels", "stride"), [(4, 4, 1), (4, 6, 1), (4, 6, 2), (4, 4, 2)])
def test_residual_block_matches_its_formula(channels_in, channels, stride):
    block = ResidualBlock(channels_in, channels, stride).eval()
    x = torch.randn(2, channels_in, 8, 8)
    inner = block.bn2(block.conv2(block.bn1(block.conv1(x)).clamp_min(0)))
    kept = stride == 1 and channels_in == channels
    shortcut = (
        x if kept else torch.einsum("oi,nihw->nohw", block.shortcut.weight[:, :, 0, 0], x[..., ::stride, ::stride])
    )
    torch.testing.assert_close(block(x), (inner + shortcut).clamp_min(0))


def test_gradients_reach_every_parameter():
    network = SmallResNet(1, 3, (4, 6, 6))
    network(torch.rand(4, 1, 16, 16)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_table_mlp_matches_its_formula():
    network = TableMLP(5, 3, (8, 4))
    rows = torch.randn(6, 1, 1, 5)
    value = rows[:, 0, 0]
    for layer in (network.columns, network.hidden):
        value = (value @ layer.weight.T + layer.bias).clamp_min(0)
    torch.testing.assert_close(network(rows), value @ network.fc.weight.T + network.fc.bias)
