"""A store: one task's rows, prepared once, in Arrow files that every process of a machine maps into its memory."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distributed import durable
from distributed.data import schema
from distributed.data.order import permuted
from tasks.columns import Masks, Pictures
from tasks.errors import UserError, did_you_mean
from tasks.fields import Facts, Field

FORMAT = 3
ARRAY = 112  # bytes of a Python object that holds bytes or an array


def shard_name(split: str, index: int, count: int) -> str:
    return f"{split}-{index:05d}-of-{count:05d}.arrow"


class Store:
    """An opened store. Files are mapped when a split is first read; sizes are checked at once, content on demand."""

    def __init__(self, path: Path, fields: Mapping[str, Field] | None = None) -> None:
        """Raises UserError where the folder is no complete store of these fields; of any, where none are given."""
        self.path = path
        self.manifest = durable.read_manifest(path, (FORMAT,))
        durable.verify(path, self.manifest, checksums=False)
        described = self.manifest["fields"]
        self.fields = {name: schema.field_of_json(text) for name, text in described.items()}
        self._schema = schema.schema(self.fields)
        if fields is not None:
            for name, field in fields.items():
                if described.get(name) != schema.field_to_json(field):
                    raise UserError(
                        f"{path}: holds '{name}' as {described.get(name)}, the task declares {field}",
                        "prepare it again",
                    )
            self.fields = dict(fields)

    @property
    def facts(self) -> Facts:
        return self.manifest["facts"]

    def counts(self) -> dict[str, int]:
        return {split: sum(shard["rows"] for shard in shards) for split, shards in self.manifest["splits"].items()}

    def epoch_rows(self, split: str, limit: int | None = None) -> int:
        """Returns how many rows an epoch has: those of the split, or of its largest domain, up to `limit`."""
        sizes: dict[str, int] = {}
        for shard in self._shards(split):
            domain = shard.get("domain", "")
            sizes[domain] = sizes.get(domain, 0) + shard["rows"]
        return min(max(sizes.values()), limit or max(sizes.values()))

    def domains(self, split: str = "train") -> list[str]:
        """Returns the names of the unpaired sets that a split consists of; none where it is one set."""
        return sorted({shard["domain"] for shard in self._shards(split) if "domain" in shard})

    def rows(self, split: str, limit: int | None = None, domain: str | None = None) -> "Rows":
        """Returns one split (of one domain), or `limit` of its rows drawn evenly.

        Raises UserError where there is none of that name.
        """
        chosen = [shard for shard in self._shards(split) if domain is None or shard.get("domain") == domain]
        batches = [self._map(shard) for shard in chosen]
        shards = [
            {name: schema.column(b.column(name), field, raw=schema.is_raw(b)) for name, field in self.fields.items()}
            for b in batches
        ]
        starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        subset = None
        if limit is not None and limit < starts[-1]:
            subset = np.sort(permuted(np.arange(limit), int(starts[-1])))
        return Rows(shards, starts, subset)

    def sources(self, split: str, domain: str | None = None) -> list[str]:
        """Returns where each row of a split came from: its number in the source, and its file where it has one."""
        chosen = [shard for shard in self._shards(split) if domain is None or shard.get("domain") == domain]
        return [one for shard in chosen for one in self._map(shard).column(schema.SOURCE).to_pylist()]

    def _shards(self, split: str) -> list[dict[str, Any]]:
        if split not in self.manifest["splits"]:
            raise UserError(f"no split '{split}'", did_you_mean(split, self.manifest["splits"]))
        return self.manifest["splits"][split]

    def _map(self, shard: Mapping[str, Any]) -> pa.RecordBatch:
        path = self.path / shard["file"]
        if shard["file"] not in self.manifest["files"]:
            raise UserError(f"{path}: the manifest has no checksum for it", "remove the store; it is prepared again")
        try:
            with pa.memory_map(str(path)) as source:
                batch = pa.ipc.open_file(source).get_batch(0)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: is damaged: {error}", "remove the store; it is prepared again") from None
        # Columns are read as bare memory: other types would give wrong values in silence.
        if batch.schema != self._schema:
            problem = "holds other columns, or others' types, than its manifest says"
        elif batch.num_rows != shard["rows"]:
            problem = f"holds {batch.num_rows} rows instead of {shard['rows']}"
        else:
            return batch
        raise UserError(f"{path}: {problem}", "remove the store; it is prepared again")


@dataclass(frozen=True)
class Rows:
    """The rows of one split, gathered by number."""

    shards: list[dict[str, schema.Column]]
    starts: np.ndarray  # (shards + 1,) first row of each shard
    subset: np.ndarray | None = None  # (limit,) rows that are used, where not all are

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.subset is None else len(self.subset)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes that a row takes in a batch, on average; pictures, which stay where they are, count as one array."""
        rows, total = int(self.starts[1]), 0.0
        for column in self.shards[0].values():
            total += ARRAY * rows if isinstance(column, schema.PictureColumn) else column.values.nbytes
            total += ARRAY * rows if isinstance(column, schema.TextColumn | schema.MaskColumn) else 0
        return round(total / rows)

    def only(self, names: Set[str]) -> "Rows":
        """Returns the same rows with these columns alone."""
        return replace(self, shards=[{n: c for n, c in shard.items() if n in names} for shard in self.shards])

    @cached_property
    def lengths(self) -> np.ndarray | None:
        """Length of each row's first ragged column, (rows,) int64; None where there is none."""
        for name, column in self.shards[0].items():
            if isinstance(column, schema.RaggedColumn):
                return self._of_subset([shard[name].lengths for shard in self.shards])  # type: ignore[union-attr]
        return None

    def dense(self, name: str) -> np.ndarray:
        """Returns a whole column whose rows have one shape, such as labels: (rows, ...)."""
        return self._of_subset([shard[name].values for shard in self.shards])  # type: ignore[union-attr]

    def _of_subset(self, parts: list[np.ndarray]) -> np.ndarray:
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole if self.subset is None else whole[self.subset]

    def take(self, rows: np.ndarray) -> dict[str, Any]:
        """Returns the columns of the rows asked for.

        Arrays of dense ones, (values, lengths) of ragged ones, `Pictures`, `Masks`, lists of strings.
        """
        stored = rows if self.subset is None else self.subset[rows]
        if len(self.shards) == 1:
            return {name: column.take(stored) for name, column in self.shards[0].items()}
        # Gathered shard by shard, and put where they were asked for.
        owner = np.searchsorted(self.starts, stored, side="right") - 1
        places = [(shard, np.flatnonzero(owner == shard)) for shard in np.unique(owner).tolist()]
        parts = [
            {name: column.take(stored[where] - self.starts[shard]) for name, column in self.shards[shard].items()}
            for shard, where in places
        ]
        wheres = [where for _, where in places]
        return {name: _joined([part[name] for part in parts], wheres) for name in self.shards[0]}


def _joined(parts: list[Any], wheres: list[np.ndarray]) -> Any:
    """Joins what several shards gave for one column: `parts[i][j]` is what was asked for at `wheres[i][j]`."""
    if isinstance(parts[0], np.ndarray):
        out = np.empty((sum(map(len, wheres)), *parts[0].shape[1:]), parts[0].dtype)
        for part, where in zip(parts, wheres, strict=True):
            out[where] = part
        return out
    if isinstance(parts[0], list):
        joined = [None] * sum(map(len, wheres))
        for part, where in zip(parts, wheres, strict=True):
            for value, place in zip(part, where.tolist(), strict=True):
                joined[place] = value
        return joined
    if isinstance(parts[0], Pictures):
        data, sizes = _joined([list(p.data) for p in parts], wheres), _joined([p.sizes for p in parts], wheres)
        return replace(parts[0], data=data, sizes=sizes)
    if isinstance(parts[0], Masks):
        return Masks(_joined([part.rows for part in parts], wheres))
    values, lengths = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return schema.RaggedColumn(values, offsets).take(np.argsort(np.concatenate(wheres), kind="stable"))
