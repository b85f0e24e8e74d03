"""In which numbers a model computes: float32, float64, or float16 / bfloat16 where autocast thinks them safe."""

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats."""

    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"  # 16 bits: autocast, weights stay float32

    @property
    def stored(self) -> "torch.dtype":
        """The type of weights and inputs."""
        import torch

        return torch.float64 if self.dtype == "float64" else torch.float32

    def autocast(self, device: "torch.device") -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which forward passes run."""
        import torch

        if self.dtype in ("float32", "float64"):
            return contextlib.nullcontext()
        return torch.autocast(device.type, getattr(torch, self.dtype))

    def scaler(self, device: "torch.device") -> "torch.amp.GradScaler":
        """Returns the loss scaler that float16 needs (Micikevicius et al., 2018); for other types it does nothing."""
        import torch

        return torch.amp.GradScaler(device.type, enabled=self.dtype == "float16")

    def cast(self, value: Any) -> Any:
        """Returns the batch's floating tensors, wherever they stand, in the stored type."""
        import torch

        if isinstance(value, dict):
            return {name: self.cast(entry) for name, entry in value.items()}
        if isinstance(value, list):
            return [self.cast(entry) for entry in value]
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(self.stored)
        return value
