"""Batch normalisation over the rows of all ranks, on any backend: torch's own refuses tensors of the CPU."""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncNorm(_BatchNorm):
    """(B, C, ...) -> the same shape; in training the statistics of the rows of all ranks, each row counted once.

    Gradients cross the ranks with them, so that several ranks learn what one would (Ioffe and Szegedy, 2015). Two sums
    a channel and a count are exchanged forwards, and as much backwards.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (B, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or distributed.get_world_size() == 1:
            return super().forward(input)
        x = input
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        # The mean's square is taken from the squares' mean: of features far from 0 float32 leaves nothing of it.
        wide = x.double()
        count = wide.new_full((1,), float(x.numel() / x.shape[1]))
        sums = _Sum.apply(torch.cat([wide.sum(axes), wide.square().sum(axes), count]))
        total, squares, rows = sums.split([x.shape[1], x.shape[1], 1])
        mean = total / rows
        variance = (squares / rows - mean.square()).clamp(min=0)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            self._track(mean.detach(), variance.detach() * rows / (rows - 1).clamp(min=1))
        out = (wide - mean.view(shape)) * (variance.view(shape) + self.eps).rsqrt()
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class _Sum(torch.autograd.Function):
    """A sum over all ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Sum.apply(*gradients)


def synchronised(module: nn.Module, device: torch.device) -> nn.Module:
    """Returns the module with every batch normalisation over all ranks; names, weights and buffers are the same ones.

    On CUDA by torch's SyncBatchNorm, elsewhere by `SyncNorm`.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        setattr(module, name, synchronised(child, device))
    if not isinstance(module, _BatchNorm):
        return module
    made = SyncNorm(
        module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
    )  # fmt: skip
    made._parameters, made._buffers = module._parameters, module._buffers
    return made.train(module.training)
