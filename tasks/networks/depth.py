"""Stochastic depth: residual branches that a share of the rows skips while a network learns."""

import torch
from torch import Tensor, nn


class StochasticDepth(nn.Module):
    """Sets a residual branch to zero for a share of the rows, drawn anew in every step (Huang et al., 2016).

    The other rows are scaled up in training, as torchvision does it, so that nothing is left to do in evaluation. The
    draws are those of torch's own generator, one a row in the order of the batch: inside a network nobody knows which
    row is which, so another number of workers is equal in distribution only. A task says that in its `invariance`.
    """

    def __init__(self, share: float) -> None:
        """`share` of the rows, 0 to below 1, skips the branch."""
        super().__init__()
        self.share = share

    def forward(self, branch: Tensor) -> Tensor:  # (B, ...) -> (B, ...)
        if not self.training or not self.share:
            return branch
        kept = torch.empty(len(branch), *[1] * (branch.ndim - 1), dtype=branch.dtype, device=branch.device)
        return branch * kept.bernoulli_(1 - self.share).div_(1 - self.share)

    def extra_repr(self) -> str:
        return f"share={self.share:g}"


def linear_shares(last: float, blocks: int) -> list[float]:
    """Returns the shares of a network's blocks, from the first: they grow in equal steps up to `last`.

    The linear decay rule of Huang et al., 2016, section 3: early blocks make what all later ones use.
    """
    return [last * number / blocks for number in range(1, blocks + 1)]
