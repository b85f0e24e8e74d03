"""Raw rows, read and set down in parts beside the store to be, so that what a kill interrupts goes on."""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Set
from dataclasses import asdict, dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distributed import durable
from distributed.data import packed, split
from distributed.data.broken import OnError, Skipped, blamed, placed, refuse_if_too_many, set_aside, where_of
from distributed.data.fingerprint import guarded
from distributed.data.settings import Data
from distributed.data.shards import on_disk
from distributed.processes import Mapper
from tasks.errors import BadRow
from tasks.fields import Picture, check_parsed
from tasks.task import Example, Task

CHUNK = 256  # rows that are read together
BATCH_BYTES = 16 << 20  # of packed rows that are held, and encoded, together
HOPELESS, HOPELESS_ROWS = 10, 5_000  # so many times max_bad, after so many rows: no need to read all of them
Progress = Callable[[str, int, int], None]  # stage, rows done, rows in all (0: not known)


PART = pa.schema([
    ("row", pa.large_binary()), ("source", pa.large_string()), ("split", pa.string()), ("domain", pa.string()),
    ("unit", pa.float64()), ("again", pa.float64()), ("identity", pa.binary(16)),
])  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What one preparation is about, and where and by whom it is done."""

    task: Task
    data: Data
    on_error: OnError
    scratch: Path
    mapper: Mapper
    progress: Progress


@dataclass(frozen=True)
class Listed:
    """What is known of all rows together, but their content."""

    given: list[str | None]  # the source's word for each row's split
    domains: list[str | None]
    units: np.ndarray  # (rows, 2) float64
    identities: np.ndarray  # (rows,) V16
    skipped: list[Skipped]

    def __len__(self) -> int:
        return len(self.given)

    def duplicates(self, splits: np.ndarray) -> dict[str, int]:
        distinct, which = np.unique(self.identities, return_inverse=True)
        in_train = np.zeros(len(distinct), bool)
        in_train[which[splits == split.TRAIN]] = True
        across = int(in_train[which[splits == split.TEST]].sum())
        return {"test_in_train": across, "rows": len(self) - len(distinct)}


def read(work: Work) -> tuple[list[Path], Listed]:
    """Reads all raw rows, those that an earlier preparation has read left out; returns the parts, and the listing."""
    examples = iter(guarded(work.task).examples(work.task.source))
    there = {path.name.rpartition("-")[0]: path for path in work.scratch.glob("*-*.part") if _is_whole(path)}
    missing: list[tuple[int, str]] = []
    parts: list[Path] = []

    def chunks() -> Iterator[tuple[str, int, list[Any]]]:
        for index in itertools.count():
            with blamed(work.task, "examples"):
                chunk = list(itertools.islice(examples, CHUNK))
                if not chunk:
                    return
                # What is listed in another order this time is another part.
                listed = hashlib.blake2b(bytes(ForkingPickler.dumps(chunk)), digest_size=8).hexdigest()
            name = f"{index:08d}-{listed}"
            parts.append(there.get(name, Path()))
            if name not in there:
                missing.append((index, name))
                yield name, index * CHUNK + 1, chunk

    scratch = work.scratch if work.mapper.same_disk else None
    fixed = work.task, work.data, work.on_error, scratch
    rows, broken, first = 0, 0, []
    for done, told in enumerate(work.mapper.over(read_chunk, fixed, chunks())):
        index, name = missing[done]
        with on_disk(work.scratch):
            parts[index] = work.scratch / told.decode() if scratch else _set_down(work.scratch / name, told)
        sizes = [batch.num_rows for batch in batches_of(parts[index])]
        rows, broken = rows + sum(sizes[:-1]), broken + sizes[-1]
        first = first or _skipped_of(parts[index])
        if rows + broken > HOPELESS_ROWS and broken > HOPELESS * work.data.max_bad * (rows + broken):
            refuse_if_too_many(first, broken, rows + broken, work.data.max_bad)
        work.progress("read", (index + 1) * CHUNK, 0)
    given, domains, units, identities, skipped = [], [], [], [], []
    for part in parts:
        skipped += _skipped_of(part)
        for batch in batches_of(part)[:-1]:
            given += batch.column("split").to_pylist()
            domains += batch.column("domain").to_pylist()
            units.append(np.stack([batch.column(name).to_numpy() for name in ("unit", "again")], axis=1))
            identities.append(np.frombuffer(b"".join(batch.column("identity").to_pylist()), "V16"))
    everything = np.concatenate([np.empty((0, 2)), *units]), np.concatenate([np.empty(0, "V16"), *identities])
    listed = Listed(given, domains, *everything, skipped)
    work.progress("read", len(listed), len(listed))
    for one in skipped:
        set_aside([], one, work.on_error)
    return parts, listed


def read_chunk(task: Task, data: Data, on_error: OnError, scratch: Path | None, chunk: tuple[str, int, list]) -> bytes:
    """Reads rows and packs them into an Arrow file, a part; the chunk is its name, its first row's number, examples.

    Returns the name of the part in the scratch folder, or the part itself where there is no folder that both see.
    """
    name, first, examples = chunk
    skipped: list[Skipped] = []
    batches = map(_batch, _read_rows(task, data, on_error, first, examples, skipped))
    if scratch is None:
        memory = pa.BufferOutputStream()
        _write(memory, batches, skipped, Path())
        return memory.getvalue().to_pybytes()
    written = scratch / f"{name}.writing"
    with on_disk(scratch):
        sink = durable.Sink(written)
    with contextlib.closing(sink):
        _write(sink, batches, skipped, scratch)
    with on_disk(scratch):
        return _named(written).name.encode()


def _write(sink: Any, batches: Iterator[pa.RecordBatch], skipped: list[Skipped], place: Path) -> None:
    """Writes a part; only what goes wrong in writing is the disk's fault, and not a reader's."""
    with on_disk(place):
        writer = pa.ipc.new_file(sink, PART)
    for batch in batches:
        with on_disk(place):
            writer.write_batch(batch)
    # What was set aside comes last, as a batch of its own: only now is it known.
    told = [(json.dumps(asdict(one)).encode(), None, None, None, 0.0, 0.0, bytes(16)) for one in skipped]
    with on_disk(place):
        writer.write_batch(_batch(told))
        writer.close()


def _batch(rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in PART]
    return pa.record_batch(columns, schema=PART)


def _read_rows(
    task: Task, data: Data, on_error: OnError, first: int, examples: list[Any], skipped: list[Skipped]
) -> Iterator[list[tuple[Any, ...]]]:
    """Yields rows of PART, as many at a time as have some BATCH_BYTES together."""
    reader, fields = guarded(task), task.fields
    targets = {name for name, field in fields.items() if field.target}
    whole = type(task).encode is Task.encode
    rows, size = [], 0
    for number, example in enumerate(examples, start=first):
        one = example if isinstance(example, Example) else Example(example)
        where = where_of(number, one.reference)
        try:
            with blamed(reader, "row", where):
                row = reader.row(one.reference)
                checked = check_parsed(row, fields, whole=whole)
        except BadRow as error:
            set_aside(skipped, Skipped(where, str(error)), on_error)
            continue
        # A picture is what it shows, wherever its file lies.
        content = {
            n: checked[n] if isinstance(fields.get(n), Picture) else v for n, v in row.items() if n not in targets
        }
        with placed(where):
            identity = split.digest(content)
            group = identity if one.group is None else split.digest({"group": one.group})
            content = packed.pack(checked)
        unit, again = split.units(group, data.split_seed)
        rows.append((content, where, one.split, one.domain, unit, again, identity))
        size += len(content)
        if size >= BATCH_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _named(written: Path) -> Path:
    """Gives a part its final name, which carries its checksum: it is scratch, and not worth a sync."""
    final = written.with_name(f"{written.stem}-{durable.checksum(written)}.part")
    durable.OPERATIONS.rename(written, final)
    return final


def _set_down(path: Path, data: bytes) -> Path:
    written = path.with_suffix(".writing")
    with durable.Sink(written) as file:
        file.write(data)
    return _named(written)


def _is_whole(part: Path) -> bool:
    return durable.checksum(part) == part.stem.rpartition("-")[2]


def batches_of(part: Path | bytes) -> list[pa.RecordBatch]:
    """The batches of a part; the last one tells of the rows that were set aside."""
    if isinstance(part, bytes):
        file = pa.ipc.open_file(part)
        return [file.get_batch(index) for index in range(file.num_record_batches)]
    with pa.memory_map(str(part)) as source:
        file = pa.ipc.open_file(source)
        return [file.get_batch(index) for index in range(file.num_record_batches)]


def _skipped_of(part: Path) -> list[Skipped]:
    return [Skipped(**json.loads(told.as_py())) for told in batches_of(part)[-1].column("row")]


class TrainRows:
    """The parsed training rows, one by one, as often as they are asked for: never all at once in memory."""

    def __init__(self, parts: list[Path], splits: np.ndarray, names: Set[str] | None = None) -> None:
        self.parts, self.splits, self.names = parts, splits, names

    def only(self, names: Set[str]) -> "TrainRows":
        """Returns the same rows with these columns alone: the bytes of the others are not touched."""
        return TrainRows(self.parts, self.splits, names)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for part, index, codes in pieces_of(self.parts, self.splits):
            rows = batches_of(part)[index].column("row")
            for position in np.flatnonzero(codes == split.TRAIN).tolist():
                yield packed.unpack(rows[position].as_buffer(), self.names)


def pieces_of(parts: list[Path], splits: np.ndarray) -> Iterator[tuple[Path, int, np.ndarray]]:
    """Yields every batch of rows: its part, its place there, and the splits of its rows."""
    start = 0
    for part in parts:
        for index, batch in enumerate(batches_of(part)[:-1]):
            yield part, index, splits[start : start + batch.num_rows]
            start += batch.num_rows


def sent(part: Path, mapper: Mapper) -> Path | bytes:
    return part if mapper.same_disk else part.read_bytes()
