"""A split that lies on the device as a whole, where it fits: its batches are gathered there."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed.data.schema import DenseColumn, RaggedColumn
from distributed.data.store import Rows
from tasks.columns import Ragged

SHARE = 0.25  # of the device's free memory, that a split may take


class Resident:
    """The same as `Rows`, with tensors on a device; columns that are neither dense nor ragged stay where they are."""

    def __init__(self, rows: Rows, device: torch.device) -> None:
        self.rows, self.device = rows, device
        there = {n for n, c in rows.shards[0].items() if isinstance(c, DenseColumn | RaggedColumn)}
        everything = rows.only(there).take(np.arange(len(rows)))
        self.columns: dict[str, Tensor | Ragged] = {}
        for name, column in rows.shards[0].items():
            if isinstance(column, DenseColumn):
                self.columns[name] = torch.from_numpy(everything[name]).to(device)
            elif isinstance(column, RaggedColumn):
                values, lengths = (torch.from_numpy(part).to(device) for part in everything[name])
                self.columns[name] = Ragged(values, lengths)
        ragged = {name: column for name, column in self.columns.items() if isinstance(column, Ragged)}
        self.starts = {name: column.lengths.cumsum(0) - column.lengths for name, column in ragged.items()}

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def fits(rows: Rows, device: torch.device) -> bool:
        """Whether a split takes no more than a quarter of an accelerator's free memory. False for the CPU itself."""
        if device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(device)
        return rows.row_bytes * len(rows) <= SHARE * free

    def take(self, rows: np.ndarray) -> dict[str, Any]:
        """Returns the columns of the rows asked for: tensors on the device, `Ragged` of ragged ones, else as `Rows`."""
        places = torch.from_numpy(rows).to(self.device, non_blocking=True)
        rest = self.rows.only(set(self.rows.shards[0]) - set(self.columns))
        taken: dict[str, Any] = rest.take(rows) if rest.shards[0] else {}
        for name, column in self.columns.items():
            if isinstance(column, Tensor):
                taken[name] = column.index_select(0, places)
                continue
            lengths = column.lengths.index_select(0, places)
            ends = lengths.cumsum(0)
            shift = (self.starts[name].index_select(0, places) - ends + lengths).repeat_interleave(lengths)
            shift += torch.arange(len(shift), device=self.device)
            taken[name] = Ragged(column.values.index_select(0, shift), lengths)
        return {name: taken[name] for name in self.rows.shards[0]}
