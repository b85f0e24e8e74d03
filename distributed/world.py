"""Who we are among the processes of a run, and all that they tell each other.

Only sync_norm.py and the sharded optimizer, within the network and the step, use torch.distributed elsewhere.
"""

import contextlib
import datetime
import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from distributed.parallel import Parallel

CPU = torch.device("cpu")
TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """Rank, size and device; every method is a collective unless it says otherwise, and free where size is 1."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    def wrap(self, module: nn.Module, parallel: Parallel = Parallel()) -> nn.Module:
        """Returns the module with its gradients averaged over the ranks during backward."""
        if self.size == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        kind = DistributedDataParallel if "torch._dynamo" in sys.modules else _Unwatched
        wrapped = kind(
            module, device_ids=None if self.device.type == "cpu" else [self.device], forward_sync_buffers=False,
            bucket_cap_mb=parallel.bucket_mib, gradient_as_bucket_view=parallel.bucket_views,
            static_graph=parallel.static_graph, find_unused_parameters=parallel.find_unused,
        )  # fmt: skip
        if parallel.compress != "none":
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

            hooks = {"bfloat16": default_hooks.bf16_compress_hook, "float16": default_hooks.fp16_compress_hook}
            wrapped.register_comm_hook(None, hooks[parallel.compress])
        return wrapped

    def seed(self, value: int) -> None:
        """Seeds the generators of the CPU and of this rank's device. No collective.

        As torch.manual_seed does, which asks all kinds of devices, and keeps a stack of calls for those that are not
        there: half a millisecond each time.
        """
        torch.default_generator.manual_seed(value)
        if self.device.type == "cuda":
            torch.cuda.init()
            torch.cuda.default_generators[self.device.index or 0].manual_seed(value)
        elif self.device.type == "mps":
            torch.mps.manual_seed(value)

    @property
    def sums(self) -> torch.dtype:
        """The type in which figures are summed: float64, where the device has it."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    @contextlib.contextmanager
    def no_sync(self, *modules: nn.Module) -> Iterator[None]:
        """Keeps gradients to this rank, as all micro-batches but the last want it. No collective."""
        with contextlib.ExitStack() as stack:
            for module in modules:
                if isinstance(module, DistributedDataParallel):
                    stack.enter_context(module.no_sync())
            yield

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the sum over the ranks."""
        if self.size > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def most(self, *numbers: int) -> tuple[int, ...]:
        """Returns for each number the largest of all ranks."""
        if self.size == 1:
            return numbers
        votes = torch.tensor(numbers, dtype=torch.int32, device=self.device)
        distributed.all_reduce(votes, distributed.ReduceOp.MAX)
        return tuple(votes.tolist())

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        """Returns for each wish whether any rank has it."""
        return tuple(bool(vote) for vote in self.most(*wishes))

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrites the tensors with those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)


class _Unwatched(DistributedDataParallel):
    """Averages gradients without importing torch._dynamo, which takes a second in every rank.

    All that the class asks it for is how torch.compile is set; to be used where nothing is compiled.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        default = SimpleNamespace(get_optimize_ddp_mode=lambda: "ddp_optimizer")
        torch._dynamo = SimpleNamespace(utils=default)  # type: ignore[bad-assignment]
        try:
            super().__init__(*args, **settings)
        finally:
            del torch._dynamo  # from here on torch imports the real one for whoever needs it

    _inside_ddp_forward = contextlib.contextmanager(inspect.unwrap(DistributedDataParallel._inside_ddp_forward))


def plain(module: nn.Module) -> nn.Module:
    """Returns the module as the task built it, without the wrapper."""
    if isinstance(module, DistributedDataParallel):
        return module.module
    if isinstance(module, nn.ModuleDict):
        return nn.ModuleDict({name: plain(entry) for name, entry in module.items()})
    return module


@contextlib.contextmanager
def joined(rank: int, size: int, device: torch.device, init_method: str) -> Iterator[World]:
    """Joins the process group of a run, gloo on CPUs and NCCL on GPUs, and leaves it at the end."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, init_method=init_method, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield World(rank, size, device)
    finally:
        distributed.destroy_process_group()


def pick_device(local_rank: int) -> torch.device:
    """Returns the accelerator of this local rank, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
