"""Small networks: a multi-layer perceptron, two convolutional networks, and the scaling layer before them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tasks.networks.depth import StochasticDepth, linear_shares


class Standardise(nn.Module):
    """Subtracts the mean and divides by the standard deviation, a channel or feature (dimension 1) each.

    Inside the network, so that an exported model takes raw inputs.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, ...) -> (B, C, ...)
        shape = (1, -1, *[1] * (x.dim() - 2))
        return (x - self.mean.view(shape)) / self.std.view(shape)


class Unstandardise(nn.Module):
    """Multiplies by the standard deviation and adds the mean: the last layer where the target has a unit."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x: Tensor) -> Tensor:  # any shape, kept
        return x * self.std + self.mean


def mlp(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """(B, ...) with `inputs` numbers a row -> (B, outputs); ReLU between the layers."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def cnn(shape: tuple[int, int, int], width: int, classes: int) -> nn.Sequential:
    """(B, channels, height, width) -> (B, classes).

    Two stages of 5x5 convolution (`width`, then twice as many channels), batch normalisation, ReLU and 2x2 max
    pooling, then one linear layer.
    """
    channels, rows, columns = shape
    layers: list[nn.Module] = []
    for out in (width, 2 * width):
        layers += [nn.Conv2d(channels, out, 5, padding=2, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
        channels, rows, columns = out, rows // 2, columns // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * rows * columns, classes))


def residual(
    shape: tuple[int, int, int], width: int, blocks: int, classes: int, stochastic_depth: float = 0.0
) -> nn.Sequential:
    """(B, channels, height, width) -> (B, classes), of any height and width from 2 on.

    A small network of residual blocks (He et al., 2016): a 3x3 convolution, `blocks` blocks of `width` channels, a 3x3
    convolution of stride 2, `blocks` blocks of twice as many channels, the mean over all places, one linear layer;
    batch normalisation and ReLU after each convolution. `stochastic_depth` is the share of the rows that skip the
    last block; those before it are skipped linearly less. It has, for w = `width`,

        (90 blocks + 18) w^2 + (9 channels + 12 blocks + 6 + 2 classes) w + classes

    parameters: 204,650 for one channel, width 32, 2 blocks and 10 classes.
    """
    skipped = iter(linear_shares(stochastic_depth, 2 * blocks))
    layers: list[nn.Module] = []
    channels = shape[0]
    for out, stride in ((width, 1), (2 * width, 2)):
        layers += [_normalised(channels, out, stride), nn.ReLU()]
        layers += [_Residual(out, next(skipped)) for _ in range(blocks)]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class _Residual(nn.Module):
    """Two convolutions whose result is added to what came in."""

    def __init__(self, width: int, skipped: float) -> None:
        super().__init__()
        self.branch = nn.Sequential(_normalised(width, width), nn.ReLU(), _normalised(width, width))
        self.depth = StochasticDepth(skipped)

    def forward(self, x: Tensor) -> Tensor:  # (B, width, height, width of the picture), kept
        return (x + self.depth(self.branch(x))).relu()


def _normalised(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out))
