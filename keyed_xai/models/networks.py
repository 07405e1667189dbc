"""Small networks that come with the package: a residual network for small images, and an MLP for table rows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut, after He et al. 2016, figure 2."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        """Make the block; the shortcut is a 1x1 convolution where the shape changes."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        same = stride == 1 and channels_in == channels
        self.shortcut: nn.Module = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's feature maps."""
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(inner + self.shortcut(x))
        return out


class SmallResNet(nn.Module):
    """A stem of stride 2, residual blocks, global average pooling and a linear layer.

    Every block halves the resolution but the first and, of three or more, the last: weights alone settle the strides.
    """

    def __init__(self, in_channels: int = 1, classes: int = 10, widths: Sequence[int] = (32, 64, 64)) -> None:
        """Make the network.

        Args:
            in_channels: Channels of the image.
            classes: Number of logits.
            widths: Channels of each residual block.
        """
        super().__init__()
        strides = [1] + [2] * (len(widths) - 1)
        if len(widths) >= 3:
            strides[-1] = 1
        self.stem = nn.Conv2d(in_channels, widths[0], 3, stride=2, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(widths[0])
        self.stem_relu = nn.ReLU()
        widths_in = [widths[0], *widths[:-1]]
        self.blocks = nn.Sequential(*map(ResidualBlock, widths_in, widths, strides))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [n, classes]."""
        features = self.blocks(self.stem_relu(self.stem_bn(self.stem(x))))
        logits: Tensor = self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(features, 1), 1))
        return logits


class TableMLP(nn.Module):
    """Three linear layers with ReLU between them, for rows of a table.

    A row is an image of 1 x 1 x d pixels to the rest of the package; it has no feature map, only input gradients.
    """

    def __init__(self, features: int, classes: int = 2, widths: tuple[int, int] = (64, 32)) -> None:
        """Make the network.

        Args:
            features: Encoded columns of a row, d.
            classes: Number of logits.
            widths: Outputs of the first two layers.
        """
        super().__init__()
        self.columns = nn.Linear(features, widths[0])
        self.columns_relu = nn.ReLU()
        self.hidden = nn.Linear(widths[0], widths[1])
        self.hidden_relu = nn.ReLU()
        self.fc = nn.Linear(widths[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [n, classes] of rows [n, 1, 1, d]."""
        columns = self.columns_relu(self.columns(torch.flatten(x, 1)))
        logits: Tensor = self.fc(self.hidden_relu(self.hidden(columns)))
        return logits
