"""Small networks: a multi-layer perceptron, a convolutional network, and the scaling layer before them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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
