"""The shards of a store: encoded rows gathered until one is full, written, sealed, published as a whole."""

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from distributed import durable
from distributed.data import split
from distributed.data.broken import Skipped
from distributed.data.store import shard_name
from tasks.errors import UserError

SHARD_BYTES = 256 << 20


class Shards:
    """Gathers encoded rows until a shard is full, for every split and domain by itself."""

    def __init__(self, folder: durable.Folder, of: pa.Schema) -> None:
        self.folder, self.schema = folder, of
        self.pending: dict[tuple[str, str], list[pa.RecordBatch]] = {}
        self.sizes: dict[tuple[str, str], int] = {}  # bytes pending
        self.written: dict[tuple[str, str], list[tuple[Path, int]]] = {}

    def take(self, encoded: bytes) -> list[Skipped]:
        """Takes in what `encode_chunk` returns; gives back the rows that it set aside."""
        with pa.ipc.open_file(encoded) as file:
            told = {name.decode(): json.loads(value) for name, value in file.schema.metadata.items()}
            for index, group in enumerate(map(tuple, told["groups"])):
                batch = file.get_batch(index)
                self.pending.setdefault(group, []).append(batch)
                self.sizes[group] = self.sizes.get(group, 0) + batch.nbytes
                if self.sizes[group] >= SHARD_BYTES:
                    self._flush(group)
        return [Skipped(**one) for one in told["skipped"]]

    def _flush(self, group: tuple[str, str]) -> None:
        files = self.written.setdefault(group, [])
        part = self.folder.path / f"{'@'.join(group)}-{len(files)}.part"
        table = (
            pa.Table.from_batches(self.pending.pop(group))
            .replace_schema_metadata(self.schema.metadata)
            .combine_chunks()
        )
        self.sizes[group] = 0
        with on_disk(self.folder.path), durable.Sink(part) as sink, pa.ipc.new_file(sink, self.schema) as writer:
            writer.write_batch(table.to_batches()[0])
        files.append((part, table.num_rows))

    def finish(self) -> dict[str, list[dict[str, Any]]]:
        """Returns the manifest's entries of all shards, by split."""
        for group in list(self.pending):
            self._flush(group)
        entries: dict[str, list[dict[str, Any]]] = {}
        order = {name: place for place, name in enumerate(split.SPLITS)}
        groups = sorted(self.written, key=lambda group: (order.get(group[0], len(order)), group))
        for name, domain in groups:
            files = self.written[name, domain]
            for index, (part, rows) in enumerate(files):
                final = shard_name(f"{name}@{domain}" if domain else name, index, len(files))
                with on_disk(self.folder.path):
                    durable.OPERATIONS.rename(part, self.folder.path / final)
                    self.folder.add_written(final)
                entries.setdefault(name, []).append(
                    {"file": final, "rows": rows, **({"domain": domain} if domain else {})}
                )
        return entries


def batches_as_file(of: pa.Schema, batches: Iterable[pa.RecordBatch], told: Mapping[str, Any]) -> bytes:
    """Returns an Arrow file in memory; what is `told` of the batches stands in its schema's metadata."""
    sink = pa.BufferOutputStream()
    metadata = {name: json.dumps(value) for name, value in told.items()}
    with pa.ipc.new_file(sink, of.with_metadata(metadata)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def seal(folder: durable.Folder, splits: dict[str, list[dict[str, Any]]]) -> None:
    """Arrow trusts its input: what is sealed is read back and validated once, in full."""
    for shard in itertools.chain.from_iterable(splits.values()):
        with pa.memory_map(str(folder.path / shard["file"])) as source:
            pa.ipc.open_file(source).get_batch(0).validate(full=True)


@contextlib.contextmanager
def publishing(path: Path, manifest: dict[str, Any]) -> Iterator[durable.Folder]:
    """Publishes a folder as `durable.publish` does; what the disk refuses is told to people."""
    with contextlib.ExitStack() as stack:
        with on_disk(path):
            folder = stack.enter_context(durable.publish(path, manifest))
        yield folder
        with on_disk(path):
            stack.close()


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Tells people what the disk refuses, where a store is written that is to lie at `path`."""
    try:
        yield
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)  # pyarrow's own words are longer, and say no more
        raise UserError(
            f"{path}: cannot be written: {why}", "make room there or look after the disk, or give another folder"
        ) from None
