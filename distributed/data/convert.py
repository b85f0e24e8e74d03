"""From raw rows to a store: read, split, learn the facts, encode, write, publish; once for each fingerprint.

Rows are read in chunks of a fixed size by as many processes as there are, and set down beside the store to be, so that
what a kill interrupts goes on. Whatever the number of processes, the shards are the same to the bit.
"""

import contextlib
import itertools
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from distributed import durable
from distributed.data import packed, schema, split
from distributed.data.fingerprint import fingerprint, guarded
from distributed.data.settings import Data
from distributed.data.store import FORMAT, Store, shard_name
from distributed.processes import Mapper, in_processes
from distributed.resources import cpu_count
from tasks.errors import BadRow, UserError
from tasks.fields import Facts, check_parsed, check_row
from tasks.task import Example, Task

log = logging.getLogger("whipray")

SHARD_BYTES = 256 << 20
CHUNK = 256  # rows that are read and encoded together
Progress = Callable[[str, int, int], None]  # stage, rows done, rows in all (0: not known)
OnError = Literal["skip", "stop"]


@dataclass(frozen=True)
class Skipped:
    """One raw row that was set aside."""

    where: str
    reason: str


def locate(task: Task, task_name: str, data: Data, stores: Path) -> Path:
    """Returns where the store of this task and split lies, or will lie."""
    return stores / task_name / fingerprint(task, data)[:16]


def prepare(
    task: Task, task_name: str, data: Data, stores: Path, *, on_error: OnError = "skip",
    progress: Progress = lambda stage, done, total: None, mapper: Mapper | None = None,
) -> Path:  # fmt: skip
    """Returns the path of the task's store, made now where it is not there yet.

    A store that is there is checked against its checksums. Two preparations of one store wait for one another.
    `mapper` is who does the work: by default `data.workers` processes of this machine. Raises UserError for sources
    that cannot be read, more broken rows than `data.max_bad`, and empty splits.
    """
    split.check(data)
    path = locate(task, task_name, data, stores)
    scratch = path.with_name(f".{path.name}.work")
    if path.exists() and not scratch.exists():
        return _checked(path, task, data, on_error)
    with exclusively(path):
        if path.exists():
            shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed when it had just published
            return _checked(path, task, data, on_error)
        with on_disk(path):
            scratch.mkdir(exist_ok=True)
        try:
            work = _Work(task, data, on_error, scratch, mapper or in_processes(data.workers or cpu_count()), progress)
            _convert(work, path)
        except Exception:
            shutil.rmtree(scratch, ignore_errors=True)  # a kill leaves it, and the next preparation goes on there
            raise
        shutil.rmtree(scratch, ignore_errors=True)
    return path


@contextlib.contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Lets one process at a time make what is to lie at `path`; says so where it must wait for another."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made: {error.strerror}", "give another folder by --stores") from None
    lock = FileLock(path.with_suffix(".lock"))
    with on_disk(path):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("another process prepares these data; waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


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


@contextlib.contextmanager
def publishing(path: Path, manifest: dict[str, Any]) -> Iterator[durable.Folder]:
    """Publishes a folder as `durable.publish` does; what the disk refuses is told to people."""
    with contextlib.ExitStack() as stack:
        with on_disk(path):
            folder = stack.enter_context(durable.publish(path, manifest))
        yield folder
        with on_disk(path):
            stack.close()


def _checked(path: Path, task: Task, data: Data, on_error: OnError) -> Path:
    """Returns the path of a store that is whole, and that leaves out no more than is allowed now."""
    try:
        store = Store(path, dict(task.fields))
        manifest = store.manifest
        durable.verify(path, manifest)
        for name in manifest["splits"]:
            store.rows(name)
    except UserError as error:
        raise UserError(error.message, f"remove {path} and it is prepared again from the raw data") from None
    skipped = [Skipped(**one) for one in manifest["skipped"]["first"]]
    for one in skipped:
        _set_aside([], one, on_error)
    rows = sum(shard["rows"] for shards in manifest["splits"].values() for shard in shards)
    _refuse_if_too_many(skipped, manifest["skipped"]["rows"], rows + manifest["skipped"]["rows"], data.max_bad)
    return path


@dataclass(frozen=True)
class _Work:
    """What one preparation is about, and where and by whom it is done."""

    task: Task
    data: Data
    on_error: OnError
    scratch: Path
    mapper: Mapper
    progress: Progress


def _convert(work: _Work, path: Path) -> None:
    parts, listed = _read(work)
    skipped = listed.skipped
    _refuse_if_too_many(skipped, len(skipped), len(skipped) + len(listed), work.data.max_bad)
    if not len(listed):
        raise UserError(f"{work.task.source.path or type(work.task).__name__}: holds no rows", "check task.source.path")
    splits = split.assign(work.data, listed.given, listed.units)
    counts = dict(zip(split.SPLITS, np.bincount(splits, minlength=3).tolist(), strict=True))
    _refuse_if_empty(counts)
    with _blamed(guarded(work.task), "facts"):
        facts = _plain(guarded(work.task).facts(_TrainRows(parts, splits)))
        durable.to_json(facts)
    duplicates = listed.duplicates(splits)
    shards: dict[str, list[dict[str, Any]]] = {}
    with publishing(path, manifest := {"format": FORMAT, "facts": facts, "splits": shards}) as folder:
        writer = Shards(folder, schema.schema(work.task.fields))
        done, pairs = 0, _with_splits(parts, splits)
        for encoded in work.mapper(encode_chunk, (work.task, facts, work.on_error), pairs):
            skipped += writer.take(encoded)
            done = min(done + CHUNK, len(listed))
            work.progress("encode", done, len(listed))
        shards |= writer.finish()
        counts = {name: sum(shard["rows"] for shard in shards.get(name, [])) for name in split.SPLITS}
        total = sum(counts.values()) + len(skipped)
        _refuse_if_too_many(skipped, len(skipped), total, work.data.max_bad)
        _refuse_if_empty(counts)
        work.progress("written", sum(counts.values()), sum(counts.values()))
        manifest |= {
            "fields": {name: schema.field_to_json(field) for name, field in work.task.fields.items()},
            "skipped": {"rows": len(skipped), "first": [asdict(one) for one in skipped[:100]]},
            "duplicates": duplicates,
        }
        _warn(skipped, total, duplicates)
        seal(folder, shards)


def seal(folder: durable.Folder, splits: dict[str, list[dict[str, Any]]]) -> None:
    """Arrow trusts its input: what is sealed is read back and validated once, in full."""
    for shard in itertools.chain.from_iterable(splits.values()):
        with pa.memory_map(str(folder.path / shard["file"])) as source:
            pa.ipc.open_file(source).get_batch(0).validate(full=True)


# ---- reading: raw rows -> parsed rows, in parts of CHUNK rows


_PART = pa.schema([
    ("row", pa.large_binary()), ("source", pa.large_string()), ("split", pa.string()), ("domain", pa.string()),
    ("unit", pa.float64()), ("again", pa.float64()), ("identity", pa.binary(16)),
])  # fmt: skip


def read_chunk(task: Task, data: Data, on_error: OnError, chunk: tuple[int, list[Any]]) -> bytes:
    """Reads rows, and returns them packed, as an Arrow file; the chunk is the number of its first row, and examples."""
    reader, fields = guarded(task), task.fields
    targets = {name for name, field in fields.items() if field.target}
    whole = type(task).encode is Task.encode
    skipped: list[Skipped] = []
    rows = []
    for number, example in enumerate(chunk[1], start=chunk[0]):
        one = example if isinstance(example, Example) else Example(example)
        where = _where(number, one.reference)
        try:
            with _blamed(reader, "row", where):
                row = reader.row(one.reference)
                checked = check_parsed(row, fields, whole=whole)
        except BadRow as error:
            _set_aside(skipped, Skipped(where, str(error)), on_error)
            continue
        identity = split.digest({name: value for name, value in row.items() if name not in targets})
        unit, again = split.units(
            identity if one.group is None else split.digest({"group": one.group}), data.split_seed
        )
        rows.append((packed.pack(checked), where, one.split, one.domain, unit, again, identity))
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in _PART]
    batch = pa.record_batch(columns, schema=_PART)
    return batches_as_file(_PART, [batch], {"skipped": [asdict(one) for one in skipped]})


@dataclass(frozen=True)
class _Listed:
    """What is known of all rows together, but their content."""

    given: list[str | None]  # the source's word for each row's split
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


def _read(work: _Work) -> tuple[list[Path], _Listed]:
    """Reads all raw rows, those that an earlier preparation has read left out; returns the parts, and the listing."""
    examples = iter(guarded(work.task).examples(work.task.source))
    there = {int(path.name.split("-")[0]): path for path in work.scratch.glob("*-*.part") if _is_whole(path)}
    missing: list[int] = []
    parts: list[Path] = []

    def chunks() -> Iterator[tuple[int, list[Any]]]:
        for index in itertools.count():
            with _blamed(work.task, "examples"):
                chunk = list(itertools.islice(examples, CHUNK))
            if not chunk:
                return
            parts.append(there.get(index, Path()))
            if index not in there:
                missing.append(index)
                yield index * CHUNK + 1, chunk

    read = work.mapper(read_chunk, (work.task, work.data, work.on_error), chunks())
    for done, data in enumerate(read):
        index = missing[done]
        parts[index] = work.scratch / f"{index:08d}-{zlib.crc32(data):08x}.part"
        with on_disk(work.scratch):
            _set_down(parts[index], data)
        work.progress("read", (index + 1) * CHUNK, 0)
    given, units, identities, skipped = [], [], [], []
    for part in parts:
        table = _open(part)
        skipped += [Skipped(**one) for one in json.loads(table.schema.metadata[b"skipped"])]
        given += table.column("split").to_pylist()
        units.append(np.stack([table.column(name).to_numpy() for name in ("unit", "again")], axis=1))
        identities.append(np.frombuffer(b"".join(table.column("identity").to_pylist()), "V16"))
    listed = _Listed(
        given, np.concatenate([np.empty((0, 2)), *units]), np.concatenate([np.empty(0, "V16"), *identities]), skipped
    )
    work.progress("read", len(listed), len(listed))
    for one in skipped:
        _set_aside([], one, work.on_error)
    return parts, listed


def _is_whole(part: Path) -> bool:
    """A part carries its checksum in its name: it is scratch, and not worth a sync."""
    return durable.checksum(part) == part.stem.split("-")[1]


def _set_down(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".writing")
    with durable.Sink(temporary) as file:
        file.write(data)
    durable.OPERATIONS.rename(temporary, path)


def _open(part: Path) -> pa.RecordBatch:
    with pa.memory_map(str(part)) as source:
        return pa.ipc.open_file(source).get_batch(0)


class _TrainRows:
    """The parsed training rows, one by one, as often as they are asked for: never all at once in memory."""

    def __init__(self, parts: list[Path], splits: np.ndarray) -> None:
        self.parts, self.splits = parts, splits

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start = 0
        for part in self.parts:
            rows = _open(part).column("row")
            for position in np.flatnonzero(self.splits[start : start + len(rows)] == split.TRAIN).tolist():
                yield packed.unpack(rows[position].as_buffer())
            start += len(rows)


def _with_splits(parts: list[Path], splits: np.ndarray) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yields the bytes of every part with the splits of its rows."""
    start = 0
    for part in parts:
        data = part.read_bytes()
        rows = pa.ipc.open_file(data).get_batch(0).num_rows
        yield data, splits[start : start + rows]
        start += rows


# ---- encoding and writing


def encode_chunk(task: Task, facts: Facts, on_error: OnError, pair: tuple[bytes, np.ndarray]) -> bytes:
    """Encodes a part's rows; returns an Arrow file with one batch for each split and domain that they fall into."""
    part, splits = pa.ipc.open_file(pair[0]).get_batch(0), pair[1]
    encoder = guarded(task)
    skipped: list[Skipped] = []
    groups: dict[tuple[str, str], list[tuple[dict[str, Any], str]]] = {}
    sources, domains = part.column("source").to_pylist(), part.column("domain").to_pylist()
    for row, code, source, domain in zip(part.column("row"), splits.tolist(), sources, domains, strict=True):
        try:
            with _blamed(encoder, "encode", source):
                encoded = check_row(encoder.encode(packed.unpack(row.as_buffer()), facts), task.fields, facts)
        except BadRow as error:
            _set_aside(skipped, Skipped(source, str(error)), on_error)
        else:
            groups.setdefault((split.SPLITS[code], domain or ""), []).append((encoded, source))
    batches = [
        schema.batch_of([row for row, _ in rows], task.fields, [source for _, source in rows])
        for rows in groups.values()
    ]
    told = {"skipped": [asdict(one) for one in skipped], "groups": list(groups)}
    return batches_as_file(schema.schema(task.fields), batches, told)


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


# ---- what is said of broken rows


@contextlib.contextmanager
def _blamed(task: Task, method: str, where: str = "") -> Iterator[None]:
    """Lets an error that no task should raise say in which of its methods it arose, and at which row."""
    place = f"in {type(task).__name__}.{method}" + (f" of {where}" if where else "")
    try:
        yield
    except (BadRow, UserError):
        raise
    except SystemExit as error:  # it would end the command in silence, as if all were well
        raise UserError(
            f"{place}: sys.exit({error.code!r}) was called", "raise BadRow for a row to set aside"
        ) from error
    except Exception as error:
        error.add_note(place)
        raise


def _where(number: int, reference: Any) -> str:
    return f"row {number} ({reference})" if isinstance(reference, (str, int, Path)) else f"row {number}"


def _set_aside(skipped: list[Skipped], one: Skipped, on_error: OnError) -> None:
    if on_error == "stop":
        raise UserError(f"{one.where}: {one.reason}", "mend the row, or set broken rows aside: --on-error skip")
    skipped.append(one)


def _refuse_if_too_many(skipped: list[Skipped], count: int, total: int, most: float) -> None:
    if skipped and count > most * total:
        raise UserError(
            f"{count} of {total} rows are broken; the first: {skipped[0].where}: {skipped[0].reason}",
            f"mend them, or allow more than {most:.0%}: data.max_bad=0.5",
        )


def _refuse_if_empty(counts: Mapping[str, int]) -> None:
    for name in split.SPLITS:
        if not counts[name]:
            raise UserError(
                f"no row falls into the {name} split ({', '.join(f'{k} {v}' for k, v in counts.items())})",
                "there are too few rows for these shares: give another data.split_seed or data.split",
            )


def _warn(skipped: list[Skipped], total: int, duplicates: dict[str, int]) -> None:
    if skipped:
        log.warning(
            "%d of %d rows set aside; the first: %s: %s", len(skipped), total, skipped[0].where, skipped[0].reason
        )
    across = duplicates["test_in_train"]
    if across:
        log.warning("%d rows of the source's test split are also in its train split: test figures flatter", across)


def _plain(value: Any) -> Any:
    """Facts as JSON holds them, so that they are the same before and after they are stored."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value.tolist() if isinstance(value, np.ndarray) else value
