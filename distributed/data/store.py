"""A store: one task's rows, prepared once, in Arrow files that every process of a machine maps into its memory."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distributed import durable
from distributed.data import schema
from distributed.data.order import permuted
from tasks.errors import UserError, did_you_mean
from tasks.fields import Facts, Field

FORMAT = 2


def shard_name(split: str, index: int, count: int) -> str:
    return f"{split}-{index:05d}-of-{count:05d}.arrow"


class Store:
    """An opened store. Files are mapped when a split is first read; sizes are checked at once, content on demand."""

    def __init__(self, path: Path, fields: dict[str, Field]) -> None:
        """Raises UserError where the folder is no complete store of these fields."""
        self.path, self.fields = path, fields
        self.manifest = durable.read_manifest(path, (FORMAT,))
        durable.verify(path, self.manifest, checksums=False)
        for name, field in fields.items():
            stored = self.manifest["fields"].get(name)
            if stored != schema.field_to_json(field):
                raise UserError(f"{path}: holds '{name}' as {stored}, the task declares {field}", "prepare it again")

    @property
    def facts(self) -> Facts:
        return self.manifest["facts"]

    def counts(self) -> dict[str, int]:
        return {split: sum(shard["rows"] for shard in shards) for split, shards in self.manifest["splits"].items()}

    def rows(self, split: str, limit: int | None = None) -> "Rows":
        """Returns one split, or `limit` of its rows drawn evenly; raises UserError where there is none of that name."""
        if split not in self.manifest["splits"]:
            raise UserError(f"no split '{split}'", did_you_mean(split, self.manifest["splits"]))
        batches = [self._map(shard["file"]) for shard in self.manifest["splits"][split]]
        shards = [{n: schema.column(b.column(n), f) for n, f in self.fields.items()} for b in batches]
        starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        subset = None
        if limit is not None and limit < starts[-1]:
            subset = np.sort(permuted(np.arange(limit), int(starts[-1])))
        return Rows(shards, starts, subset)

    def _map(self, name: str) -> pa.RecordBatch:
        try:
            with pa.memory_map(str(self.path / name)) as source:
                return pa.ipc.open_file(source).get_batch(0)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self.path / name}: is damaged: {error}", "remove the store; it is prepared again"
            ) from None


@dataclass(frozen=True)
class Rows:
    """The rows of one split, gathered by number."""

    shards: list[dict[str, schema.Column]]
    starts: np.ndarray  # (shards + 1,) first row of each shard
    subset: np.ndarray | None = None  # (limit,) rows that are used, where not all are

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.subset is None else len(self.subset)

    @cached_property
    def lengths(self) -> np.ndarray | None:
        """Length of each row's first ragged column, (rows,) int64; None where all columns are dense."""
        for name, column in self.shards[0].items():
            if isinstance(column, schema.RaggedColumn):
                whole = np.concatenate([shard[name].lengths for shard in self.shards])  # type: ignore[union-attr]
                return whole if self.subset is None else whole[self.subset]
        return None

    def take(self, rows: np.ndarray) -> dict[str, Any]:
        """Returns columns of the rows asked for: arrays, (values, lengths) of ragged ones, lists of strings."""
        stored = rows if self.subset is None else self.subset[rows]
        if len(self.shards) == 1:
            return {name: column.take(stored) for name, column in self.shards[0].items()}
        # Gather shard by shard, then put the rows back into the order asked for.
        owner = np.searchsorted(self.starts, stored, side="right") - 1
        order = np.argsort(owner, kind="stable")
        parts = [
            {name: column.take(stored[owner == s] - self.starts[s]) for name, column in self.shards[s].items()}
            for s in np.unique(owner)
        ]
        back = np.argsort(order, kind="stable")
        return {name: _reordered([part[name] for part in parts], back) for name in self.shards[0]}


def _reordered(parts: list[Any], back: np.ndarray) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts).take(back, axis=0)
    if isinstance(parts[0], list):
        joined = [text for part in parts for text in part]
        return [joined[i] for i in back]
    values, lengths = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return schema.RaggedColumn(values, offsets).take(back)
