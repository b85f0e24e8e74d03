"""Augmentation that mixes two rows, and their targets with them.

Who is mixed with whom, `partner` (B,), belongs to the plan of the global batch; by default it is the row before.
"""

import math

import torch
from torch import Tensor

from tasks.augment.windows import exact, paste
from tasks.task import Draw


def beta(draw: Draw, alpha: float) -> Tensor:
    """Returns (B,) float64 from Beta(alpha, alpha), exactly and without rejection, for any alpha > 0.

    For a > 1/2 Ulrich's formula gives Beta(a, a) from two uniform numbers (Devroye, Non-Uniform Random Variate
    Generation, 1986, IX.4.2); one with a = alpha + 1 is brought down to alpha: where G ~ Gamma(a + 1),
    G U^(1/a) ~ Gamma(a), and in G / (G + G') the sum of the two gammas cancels.
    """
    if not alpha > 0:
        raise ValueError(f"beta: alpha must be above 0, got {alpha}")
    u, v, first, second = (1 - exact(draw.uniform()) for _ in range(4))  # in (0, 1]: they have logarithms
    half = 0.5 * torch.sqrt(-torch.expm1(u.log() * (2 / (2 * alpha + 1)))) * torch.cos(2 * math.pi * v)
    odds = torch.log(0.5 + half) - torch.log(0.5 - half) + (first.log() - second.log()) / alpha
    return torch.sigmoid(odds)


def mix(values: Tensor, share: Tensor, partner: Tensor) -> Tensor:
    """Returns share x + (1 - share) x[partner] for floating `values` (B, ...) and `share` (B,)."""
    if not values.is_floating_point():
        raise ValueError(f"mix: expected floating values, got {values.dtype}: normalize, or encode one-hot, first")
    share = share.to(values.dtype).view(-1, *[1] * (values.ndim - 1))
    return (values * share).add_(values.index_select(0, partner).mul_(1 - share))


def mixup(
    images: Tensor, targets: Tensor, draw: Draw, alpha: float = 1.0, partner: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns pictures and targets (B, K), floating, each averaged with its partner's; its share is Beta(alpha, alpha).

    Zhang et al., 2018; unlike torchvision's MixUp each row has a weight of its own.
    """
    share, partner = beta(draw, alpha), _default(images, partner)
    return mix(images, share, partner), mix(targets, share, partner)


def paste_partner(
    images: Tensor, targets: Tensor, partner: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the pictures with their partner's rectangle pasted in, and targets (B, K) mixed by its area."""
    area = images.shape[-2] * images.shape[-1]
    share = 1 - exact(height * width) / area
    return paste(images, images.index_select(0, partner), top, left, height, width), mix(targets, share, partner)


def cutmix(
    images: Tensor, targets: Tensor, draw: Draw, alpha: float = 1.0, partner: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns pictures with a rectangle of their partner's and targets (B, K), floating, mixed by its area.

    Yun et al., 2019: the rectangle, before it is cut off at the edges, has a share of 1 - Beta(alpha, alpha) of the
    area and the picture's proportions. Unlike torchvision's CutMix each row has its own; the pictures may be uint8.
    """
    high, wide = images.shape[-2:]
    radius = 0.5 * torch.sqrt(1 - beta(draw, alpha))
    y, x = draw.integers(0, high), draw.integers(0, wide)
    down, across = (radius * high).long(), (radius * wide).long()
    top, left = (y - down).clamp(min=0), (x - across).clamp(min=0)
    height, width = (y + down).clamp(max=high) - top, (x + across).clamp(max=wide) - left
    return paste_partner(images, targets, _default(images, partner), top, left, height, width)


def _default(images: Tensor, partner: Tensor | None) -> Tensor:
    return torch.arange(len(images), device=images.device).roll(1) if partner is None else partner
