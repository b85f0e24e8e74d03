"""From a split's rows to the micro-batches of one worker, on its device and transformed as the task says."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from distributed.data.order import Plan, portions, spread
from distributed.data.store import Rows
from distributed.precision import Precision
from distributed.world import World
from tasks.task import Batch, Draw, Ragged, Task


class Loader:
    """Gathers whole batches column by column; nothing here is done row by row."""

    def __init__(self, task: Task, rows: Rows, plan: Plan, precision: Precision, world: World) -> None:
        self.task, self.rows, self.plan, self.precision, self.world = task, rows, plan, precision, world

    def micro_batches(self, epoch: int, k: int, micro_batch_size: int | None) -> tuple[list[int], Iterator[Batch]]:
        """Returns how many rows this rank's micro-batches of global batch `k` have, and the batches, one by one."""
        parts = portions(self.plan.batch(epoch, k), self.world.rank, self.world.size, micro_batch_size)
        return [len(part) for part in parts], (self._batch(part, epoch, training=True) for part in parts)

    def once(self, batch_size: int) -> Iterator[Batch]:
        """Yields this rank's contiguous share of the split, each row once, for evaluation."""
        start, end = spread(len(self.rows), self.world.size, self.world.rank)
        for first in range(start, end, batch_size):
            yield self._batch(np.arange(first, min(first + batch_size, end)), 0, training=False)

    def _batch(self, rows: np.ndarray, epoch: int, *, training: bool) -> Batch:
        return self.batch_of(self.rows.take(rows), rows, epoch, training=training)

    def batch_of(self, columns: dict[str, Any], rows: np.ndarray, epoch: int = 0, *, training: bool) -> Batch:
        device = self.world.device
        batch: Batch = {name: to_tensor(value, device) for name, value in columns.items()}
        batch["row"] = torch.from_numpy(rows).to(device)
        draw = Draw(self.plan.seed, epoch, rows, device)
        return self.precision.cast(self.task.transform(batch, draw, training))


def to_tensor(value: Any, device: torch.device) -> Any:
    """An array as a tensor, (values, lengths) as Ragged, a list of strings as it is."""
    if isinstance(value, tuple):
        return Ragged(torch.from_numpy(value[0]).to(device), torch.from_numpy(value[1]).to(device))
    return torch.from_numpy(value).to(device) if isinstance(value, np.ndarray) else value
