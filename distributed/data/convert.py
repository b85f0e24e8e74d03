"""From raw rows to a store: read, split, learn the facts, encode, write, publish; once for each fingerprint."""

import ast
import contextlib
import dataclasses
import hashlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from filelock import FileLock

from distributed import durable
from distributed.data import schema, split
from distributed.data.settings import Data
from distributed.data.store import FORMAT, Store, shard_name
from tasks.errors import BadRow, UserError
from tasks.fields import Facts, check_parsed, check_row
from tasks.task import Example, Task

log = logging.getLogger("whipray")

SHARD_BYTES = 256 << 20
CONTENT_BYTES = 64 << 20  # sources up to here are fingerprinted by content, larger ones by names, sizes and times
TRAINING = ("transform", "build", "loss", "step", "units", "predict", "metrics", "measure", "inputs")
Progress = Callable[[str, int, int], None]  # stage, rows done, rows in all (0: not known)


@dataclass(frozen=True)
class Skipped:
    """One raw row that was set aside."""

    where: str
    reason: str


# ---- the fingerprint: everything that decides what a store holds


def fingerprint(task: Task, data: Data) -> str:
    """Returns 32 hex digits over raw source, reader, split rule and `task.source.*`; raises UserError without it."""
    described = {
        "format": FORMAT,
        "fields": {name: schema.field_to_json(field) for name, field in task.fields.items()},
        "version": task.version,
        "code": _reading_code(type(task)),
        "source": {k: v for k, v in asdict(task.source).items() if not _is_path(task, k)},
        "split": [data.split, data.split_seed, data.validation, data.folds, data.fold],
        "files": [_file_identity(path) for path in guarded(task).files()],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _is_path(task: Task, name: str) -> bool:
    """Paths are identified by what they hold, so that a moved source is not prepared again."""
    from distributed.config import settings_of

    return "path" in getattr(settings_of(type(task.source), "source")[f"source.{name}"].type, "__metadata__", ())


def _reading_code(cls: type) -> list[str]:
    """The code that may take part in reading, so that an edited reader makes its stores stale.

    That is all of a task's modules but what only training looks at: networks, and the methods named in TRAINING.
    """
    found = []
    for module in dict.fromkeys(base.__module__ for base in cls.__mro__ if base not in (Task, object)):
        try:
            tree = ast.parse(inspect.getsource(sys.modules[module]))
        except (OSError, TypeError, KeyError):
            continue
        kept = [node for node in tree.body if not (isinstance(node, ast.ClassDef) and "forward" in _methods(node))]
        for node in kept:
            if isinstance(node, ast.ClassDef):
                node.body = [part for part in node.body if getattr(part, "name", "") not in TRAINING]
        found.append(ast.dump(ast.Module(kept, [])))
    return found


def _methods(node: ast.ClassDef) -> set[str]:
    return {part.name for part in node.body if isinstance(part, ast.FunctionDef)}


def _file_identity(root: Path) -> list[Any]:
    files = sorted(_walk(root)) if root.is_dir() else [root]
    try:
        stats = [(path, path.stat()) for path in files]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file or folder", "check task.source.path") from None
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}", "check task.source.path") from None
    if sum(stat.st_size for _, stat in stats) <= CONTENT_BYTES:
        return [[str(p.relative_to(root)), durable.checksum(p), s.st_size] for p, s in stats if p.is_file()]
    return [[str(p.relative_to(root)), s.st_size, s.st_mtime_ns] for p, s in stats]


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent) / name for name in files if not name.startswith("."))


def guarded(task: Task) -> Task:
    """Returns the task as its readers may see it: `task.source.*`, and no other setting."""
    settings = {field.name for field in dataclasses.fields(task)} - {"source"}

    def look(self: Task, name: str) -> Any:
        if name in settings:
            raise UserError(
                f"{type(task).__name__} reads 'task.{name}' while preparing data; there only task.source.* may be read",
                "move the setting into the task's Source, or use it in transform() or build()",
            )
        return object.__getattribute__(self, name)

    copy = object.__new__(type(type(task).__name__, (type(task),), {"__getattribute__": look}))
    copy.__dict__.update(task.__dict__)
    return copy


# ---- preparing


def locate(task: Task, task_name: str, data: Data, stores: Path) -> Path:
    """Returns where the store of this task and split lies, or will lie."""
    return stores / task_name / fingerprint(task, data)[:16]


def prepare(
    task: Task, task_name: str, data: Data, stores: Path, *, on_error: Literal["skip", "stop"] = "skip",
    progress: Progress = lambda stage, done, total: None,
) -> Path:  # fmt: skip
    """Returns the path of the task's store, made now where it is not there yet.

    A store that is there is checked against its checksums. Two preparations of one store wait for one another.
    Raises UserError for sources that cannot be read, more broken rows than `data.max_bad`, and empty splits.
    """
    split.check(data)
    path = locate(task, task_name, data, stores)
    if path.exists():
        return _checked(path, task, data, on_error)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made: {error.strerror}", "give another folder by --stores") from None
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            return _checked(path, task, data, on_error)
        _convert(guarded(task), data, path, on_error, progress)
    return path


def _checked(path: Path, task: Task, data: Data, on_error: str) -> Path:
    """Returns the path of a store that is whole, and that leaves out no more than is allowed now."""
    try:
        manifest = Store(path, dict(task.fields)).manifest
        durable.verify(path, manifest)
    except UserError as error:
        raise UserError(error.message, f"remove {path} and it is prepared again from the raw data") from None
    skipped = [Skipped(**one) for one in manifest["skipped"]["first"]]
    for one in skipped:
        _set_aside([], one, on_error)
    rows = sum(shard["rows"] for shards in manifest["splits"].values() for shard in shards)
    _refuse_if_too_many(skipped, manifest["skipped"]["rows"], rows + manifest["skipped"]["rows"], data.max_bad)
    return path


def _convert(task: Task, data: Data, path: Path, on_error: str, progress: Progress) -> None:
    rows, splits, report = _read(task, data, on_error, progress)
    skipped: list[Skipped] = report.pop("skipped")
    counts = {name: splits.count(name) for name in split.SPLITS}
    _refuse_if_empty(counts, data)
    facts = _facts(task, [row for (_, row), name in zip(rows, splits, strict=True) if name == "train"])
    written: dict[str, list[dict[str, Any]]] = {}
    with durable.publish(path, manifest := {"format": FORMAT, "facts": facts, "splits": written}) as folder:
        for name in split.SPLITS:
            mine = [row for row, of in zip(rows, splits, strict=True) if of == name]
            encoded = _encoded(task, facts, mine, on_error, skipped)
            written[name] = list(_write(folder, name, encoded, task))
            counts[name] = sum(shard["rows"] for shard in written[name])
        total = sum(counts.values()) + len(skipped)
        _refuse_if_too_many(skipped, len(skipped), total, data.max_bad)
        _refuse_if_empty(counts, data)
        progress("written", sum(counts.values()), sum(counts.values()))
        manifest |= {
            "fields": {name: schema.field_to_json(field) for name, field in task.fields.items()},
            "skipped": {"rows": len(skipped), "first": [asdict(one) for one in skipped[:100]]},
            **report,
        }
        manifest["facts"] = facts
        _warn(skipped, total, report)
        _seal(folder, manifest)


def _seal(folder: durable.Folder, manifest: dict[str, Any]) -> None:
    """Arrow trusts its input: what is sealed is read back and validated once, in full."""
    for shards in manifest["splits"].values():
        for shard in shards:
            with pa.memory_map(str(folder.path / shard["file"])) as source:
                pa.ipc.open_file(source).get_batch(0).validate(full=True)


def _facts(task: Task, rows: list[dict[str, Any]]) -> Facts:
    with _blamed(task, "facts"):
        facts = _plain(task.facts(iter(rows)))
        durable.to_json(facts)
    return facts


@contextlib.contextmanager
def _blamed(task: Task, method: str, where: str = "") -> Iterator[None]:
    """Lets an error that no task should raise say in which of its methods it arose, and at which row."""
    try:
        yield
    except (BadRow, UserError):
        raise
    except Exception as error:
        error.add_note(f"in {type(task).__name__}.{method}" + (f" of {where}" if where else ""))
        raise


Rows = list[tuple[int, dict[str, Any]]]  # each with its number in the source, from 1


def _read(task: Task, data: Data, on_error: str, progress: Progress) -> tuple[Rows, list[str], dict[str, Any]]:
    """Reads all raw rows but the broken ones, and assigns their splits."""
    rows: Rows = []
    given: list[str | None] = []
    contents: list[bytes] = []
    identities: list[bytes] = []
    skipped: list[Skipped] = []
    fields = task.fields
    targets = {name for name, field in fields.items() if field.target}
    whole = type(task).encode is Task.encode
    for number, example in enumerate(task.examples(task.source), start=1):
        reference, its_split, group = example if isinstance(example, Example) else Example(example)
        try:
            with _blamed(task, "row", _where(number, reference)):
                row = task.row(reference)
                check_parsed(row, fields, whole=whole)
        except BadRow as error:
            _set_aside(skipped, Skipped(_where(number, reference), str(error)), on_error)
            continue
        own = split.digest({name: value for name, value in row.items() if name not in targets})
        rows.append((number, row))
        given.append(its_split)
        identities.append(own)
        contents.append(own if group is None else split.digest({"group": group}))
        if number % 1000 == 0:
            progress("read", number, 0)
    _refuse_if_too_many(skipped, len(skipped), len(skipped) + len(rows), data.max_bad)
    if not rows:
        raise UserError(f"{task.source.path or type(task).__name__}: holds no rows", "check task.source.path")
    progress("read", len(rows), len(rows))
    splits = split.assign(data, given, contents)
    train = {i for i, name in zip(identities, splits, strict=True) if name == "train"}
    across = sum(name == "test" and i in train for i, name in zip(identities, splits, strict=True))
    return (
        rows,
        splits,
        {"skipped": skipped, "duplicates": {"test_in_train": across, "rows": len(rows) - len(set(identities))}},
    )


def _encoded(task: Task, facts: Facts, rows: Rows, on_error: str, skipped: list[Skipped]) -> Iterator[dict[str, Any]]:
    fields = task.fields
    for number, row in rows:
        try:
            with _blamed(task, "encode", f"row {number}"):
                encoded = check_row(task.encode(dict(row), facts), fields, facts)
        except BadRow as error:
            _set_aside(skipped, Skipped(f"row {number}", str(error)), on_error)
        else:
            yield encoded


def _write(folder: durable.Folder, name: str, rows: Iterable[dict[str, Any]], task: Task) -> Iterator[dict[str, Any]]:
    """Writes a split's shards, one record batch each, and yields their entries of the manifest."""
    pending: list[dict[str, Any]] = []
    files: list[tuple[Path, int]] = []
    size = 0

    def flush() -> None:
        nonlocal size
        part = folder.path / f"{name}-{len(files)}.part"
        batch = schema.batch_of(pending, task.fields)
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        files.append((part, len(pending)))
        pending.clear()
        size = 0

    for row in rows:
        pending.append(row)
        size += sum(
            value.nbytes if isinstance(value, (np.ndarray, np.generic)) else len(value) for value in row.values()
        )
        if size >= SHARD_BYTES:
            flush()
    if pending:
        flush()
    for index, (part, count) in enumerate(files):
        final = shard_name(name, index, len(files))
        part.rename(folder.path / final)
        folder.add_written(final)
        yield {"file": final, "rows": count}


# ---- what is said of broken rows


def _where(number: int, reference: Any) -> str:
    return f"row {number} ({reference})" if isinstance(reference, (str, int, Path)) else f"row {number}"


def _set_aside(skipped: list[Skipped], one: Skipped, on_error: str) -> None:
    if on_error == "stop":
        raise UserError(f"{one.where}: {one.reason}", "mend the row, or set broken rows aside: --on-error skip")
    skipped.append(one)


def _refuse_if_too_many(skipped: list[Skipped], count: int, total: int, most: float) -> None:
    if skipped and count > most * total:
        raise UserError(
            f"{count} of {total} rows are broken; the first: {skipped[0].where}: {skipped[0].reason}",
            f"mend them, or allow more than {most:.0%}: data.max_bad=0.5",
        )


def _refuse_if_empty(counts: dict[str, int], data: Data) -> None:
    for name in ("train", "validation", "test"):
        if not counts[name]:
            raise UserError(
                f"no row falls into the {name} split ({', '.join(f'{k} {v}' for k, v in counts.items())})",
                "there are too few rows for these shares: give another data.split_seed or data.split",
            )


def _warn(skipped: list[Skipped], total: int, report: dict[str, Any]) -> None:
    if skipped:
        log.warning(
            "%d of %d rows set aside; the first: %s: %s", len(skipped), total, skipped[0].where, skipped[0].reason
        )
    across = report["duplicates"]["test_in_train"]
    if across:
        log.warning("%d rows of the source's test split are also in its train split: test figures flatter", across)


def _plain(value: Any) -> Any:
    """Facts as JSON holds them, so that they are the same before and after they are stored."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value.tolist() if isinstance(value, np.ndarray) else value
