"""In which numbers a model computes, how they lie in memory, and what it trades for speed, memory or repeatability."""

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats, layout in memory, compilation."""

    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"  # 16 bits: autocast, weights stay float32
    tf32: Literal["no", "convolutions", "all"] = "convolutions"  # where a GPU takes float32 in 19 bits
    channels_last: bool = False  # pictures lie pixel by pixel in memory, as convolutions of GPUs like them
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no"  # mode of torch.compile
    recompute: tuple[str, ...] = ()  # parts whose activations are made again in backward, to save memory: layer1,layer2
    sync_norm: bool = False  # batch normalisation over the rows of all workers
    deterministic: bool = False  # only operations that give the same bits twice, or an error; slower

    @property
    def stored(self) -> "torch.dtype":
        """The type of weights and inputs."""
        import torch

        return torch.float64 if self.dtype == "float64" else torch.float32

    def prepare(self) -> None:
        """Sets what torch keeps for the whole process; another run in this process sets its own."""
        import torch

        torch.set_float32_matmul_precision("high" if self.tf32 == "all" else "highest")
        torch.backends.cudnn.allow_tf32 = self.tf32 != "no"  # of convolutions; that is torch's own default too
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
        if self.deterministic or torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(self.deterministic)

    def autocast(self, device: "torch.device") -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which forward passes run."""
        import torch

        if self.dtype in ("float32", "float64"):
            return contextlib.nullcontext()
        return torch.autocast(device.type, getattr(torch, self.dtype))

    def plain(self, device: "torch.device") -> contextlib.AbstractContextManager[Any]:
        """Returns the context inside of that of `autocast` in which nothing is cast, as a backward wants it."""
        import torch

        if self.dtype in ("float32", "float64"):
            return contextlib.nullcontext()
        return torch.autocast(device.type, enabled=False)

    def scaler(self, device: "torch.device") -> "torch.amp.GradScaler":
        """Returns the loss scaler that float16 needs (Micikevicius et al., 2018); for other types it does nothing."""
        import torch

        return torch.amp.GradScaler(device.type, enabled=self.dtype == "float16")

    def cast(self, value: Any) -> Any:
        """Returns the batch's floating tensors, wherever they stand, in the stored type and layout."""
        import torch

        if isinstance(value, dict):
            return {name: self.cast(entry) for name, entry in value.items()}
        if isinstance(value, list):
            return [self.cast(entry) for entry in value]
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            if self.channels_last and value.ndim == 4:
                return value.to(self.stored, memory_format=torch.channels_last)
            return value.to(self.stored)
        return value
