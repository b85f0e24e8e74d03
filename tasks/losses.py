"""Losses of classifiers: pure functions from scores and targets to one number a row, which nothing else shapes.

They are computed in float32, or in float64 where the scores are: in 16 bits a sum over classes loses what it is about.
"""

import torch
from torch import Tensor
from torch.nn import functional


def cross_entropy(
    scores: Tensor, target: Tensor, smoothing: float = 0.0, focal: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Returns (B,) float32 or float64: the cross entropy between targets and the softmax of `scores` (B, classes).

    `target` holds classes, (B,) int64, or shares of classes, (B, classes) floating.

    `smoothing` spreads that share of every target over all classes (Szegedy et al., 2016, section 7). `weights`
    (classes,) multiply the terms of their classes, and nothing is divided by their sum: a row's loss must not depend
    on the rows beside it. Both are as in torch.nn.functional.cross_entropy.

    `focal` multiplies a row's loss by (1 - p)^focal, where p is the share that the network gives to the row's class
    (Lin et al., 2017, section 3.2). For targets that are mixed or smoothed, 1 - p becomes half the sum over classes of
    |target - share|. That is the same for a hard target; it is 0 where the network is as sure as it is asked to be,
    and no surer; and for two classes it is the quality focal loss (Li et al., 2020, equation 4).
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    target = target.to(scores.dtype) if target.is_floating_point() else target
    weights = None if weights is None else weights.to(scores)
    plain = functional.cross_entropy(scores, target, weights, reduction="none", label_smoothing=smoothing)
    if not focal:
        return plain
    wanted = shares(target, scores.shape[-1]).to(scores.dtype) * (1 - smoothing) + smoothing / scores.shape[-1]
    # The least positive number instead of 0, whose power below 1 has an infinite slope: times 0 it would be NaN.
    off = (wanted - scores.softmax(-1)).abs().sum(-1).div(2).clamp(min=torch.finfo(scores.dtype).tiny)
    return plain * off**focal


def shares(target: Tensor, classes: int) -> Tensor:
    """Returns targets as shares of classes (B, classes), floating; those of (B,) int64 become ones and zeros."""
    if target.is_floating_point():
        return target
    # functional.one_hot looks at the largest class, for which it waits for the device.
    return torch.zeros(len(target), classes, device=target.device).scatter_(1, target[:, None], 1.0)
