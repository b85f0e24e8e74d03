"""From raw rows to a store: read, split, learn the facts, encode, write, publish; once for each fingerprint.

Rows are read (`parts.py`) and encoded by as many processes as there are, and written (`shards.py`) by this one. However
many they are, the shards are the same to the bit.
"""

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from distributed import durable
from distributed.data import packed, schema, split
from distributed.data.broken import OnError, Skipped, blamed, refuse_if_too_many, set_aside
from distributed.data.fingerprint import fingerprint, guarded
from distributed.data.parts import Listed, Progress, TrainRows, Work, batches_of, pieces_of, read, sent
from distributed.data.settings import Data
from distributed.data.shards import Shards, batches_as_file, on_disk, publishing, seal
from distributed.data.store import FORMAT, Store
from distributed.processes import Mapper, Processes
from distributed.resources import cpu_count
from tasks.errors import BadRow, UserError
from tasks.fields import Facts, check_row
from tasks.task import Task

log = logging.getLogger("whipray")

IN_PROCESSES = 8  # portions of work that one process does by itself: starting others would cost as much


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
            _convert(Work(task, data, on_error, scratch, mapper or on_this_machine(data.workers), progress), path)
        except Exception:
            shutil.rmtree(scratch, ignore_errors=True)  # a kill leaves it, and the next preparation goes on there
            raise
        shutil.rmtree(scratch, ignore_errors=True)
        _clear_abandoned(path.parent)
    return path


def on_this_machine(workers: int | None) -> Mapper:
    """Returns a mapper over so many processes, by default one a core; a little work is then done without any."""
    return Processes(workers or cpu_count(), IN_PROCESSES if workers is None else 1)


def _clear_abandoned(folder: Path) -> None:
    """Removes what killed preparations of other fingerprints have left: nobody may ever go on with them."""
    for scratch in folder.glob(".*.work"):
        with contextlib.suppress(Timeout), FileLock(folder / f"{scratch.name[1:-5]}.lock", timeout=0):
            shutil.rmtree(scratch, ignore_errors=True)


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
        set_aside([], one, on_error)
    rows = sum(shard["rows"] for shards in manifest["splits"].values() for shard in shards)
    refuse_if_too_many(skipped, manifest["skipped"]["rows"], rows + manifest["skipped"]["rows"], data.max_bad)
    return path


def _convert(work: Work, path: Path) -> None:
    parts, listed = read(work)
    skipped = listed.skipped
    refuse_if_too_many(skipped, len(skipped), len(skipped) + len(listed), work.data.max_bad)
    if not len(listed):
        raise UserError(f"{work.task.source.path or type(work.task).__name__}: holds no rows", "check task.source.path")
    splits = split.assign(work.data, listed.given, split.joined(listed.units, listed.identities))
    _refuse_odd_domains(listed.domains, splits)
    counts = dict(zip(split.SPLITS, np.bincount(splits, minlength=3).tolist(), strict=True))
    _refuse_if_empty(counts, listed)
    with blamed(guarded(work.task), "facts"):
        facts = _plain(guarded(work.task).facts(TrainRows(parts, splits)))
        durable.to_json(facts)
    duplicates = listed.duplicates(splits)
    shards: dict[str, list[dict[str, Any]]] = {}
    with publishing(path, manifest := {"format": FORMAT, "facts": facts, "splits": shards}) as folder:
        writer = Shards(folder, schema.schema(work.task.fields))
        done, pieces = 0, list(pieces_of(parts, splits))
        items = ((sent(part, work.mapper), batch, codes) for part, batch, codes in pieces)
        encoded = work.mapper.over(encode_chunk, (work.task, facts, work.on_error), items)
        for (_, _, codes), one in zip(pieces, encoded, strict=True):
            skipped += writer.take(one)
            done += len(codes)
            work.progress("encode", done, len(listed))
        shards |= writer.finish()
        counts = {name: sum(shard["rows"] for shard in shards.get(name, [])) for name in split.SPLITS}
        total = sum(counts.values()) + len(skipped)
        refuse_if_too_many(skipped, len(skipped), total, work.data.max_bad)
        _refuse_if_empty(counts, listed)
        work.progress("written", sum(counts.values()), sum(counts.values()))
        manifest |= {
            "fields": {name: schema.field_to_json(field) for name, field in work.task.fields.items()},
            "skipped": {"rows": len(skipped), "first": [asdict(one) for one in skipped[:100]]},
            "duplicates": duplicates,
        }
        _warn(skipped, total, duplicates, listed)
        seal(folder, shards)


def encode_chunk(task: Task, facts: Facts, on_error: OnError, piece: tuple[Path | bytes, int, np.ndarray]) -> bytes:
    """Encodes a batch of a part's rows; returns an Arrow file with one batch for each split and domain of theirs.

    The piece is the part, or where it lies, the batch's place in it, and the splits of its rows.
    """
    part, splits = batches_of(piece[0])[piece[1]], piece[2]
    encoder = guarded(task)
    skipped: list[Skipped] = []
    groups: dict[tuple[str, str], list[tuple[dict[str, Any], str]]] = {}
    sources, domains = part.column("source").to_pylist(), part.column("domain").to_pylist()
    for row, code, source, domain in zip(part.column("row"), splits.tolist(), sources, domains, strict=True):
        try:
            with blamed(encoder, "encode", source):
                encoded = check_row(encoder.encode(packed.unpack(row.as_buffer()), facts), task.fields, facts)
        except BadRow as error:
            set_aside(skipped, Skipped(source, str(error)), on_error)
        else:
            groups.setdefault((split.SPLITS[code], domain or ""), []).append((encoded, source))
    batches = [
        schema.batch_of([row for row, _ in rows], task.fields, [source for _, source in rows])
        for rows in groups.values()
    ]
    told = {"skipped": [asdict(one) for one in skipped], "groups": list(groups)}
    return batches_as_file(schema.schema(task.fields), batches, told)


def _refuse_if_empty(counts: Mapping[str, int], listed: Listed) -> None:
    for name in split.SPLITS:
        if not counts[name]:
            there = ", ".join(f"{k} {v}" for k, v in counts.items())
            few = "there are too few rows for these shares: give another data.split_seed or data.split"
            own = f"the source names its splits, and none of them is {name}: data.split=8:1:1 splits all rows anew"
            raise UserError(f"no row falls into the {name} split ({there})", own if any(listed.given) else few)


def _refuse_odd_domains(domains: list[str | None], splits: np.ndarray) -> None:
    """Each row has a domain or none has, each domain has rows in each split, and its name can be one of a file."""
    names = sorted({name for name in domains if name is not None})
    if not names:
        return
    if None in domains:
        raise UserError(f"row {domains.index(None) + 1} has no domain, others have: {', '.join(names)[:200]}",
                        "name one for every row, or for none")  # fmt: skip
    there = set(zip(domains, splits.tolist(), strict=True))
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name) or name in ("row", "partner"):
            raise UserError(
                f"a domain is called {name!r}", "use letters, digits, _ and -; 'row' and 'partner' are taken"
            )
        for place, part in enumerate(split.SPLITS):
            if (name, place) not in there:
                raise UserError(f"no row of the domain '{name}' falls into the {part} split",
                                "there are too few rows: give another data.split_seed or data.split")  # fmt: skip


def _warn(skipped: list[Skipped], total: int, duplicates: dict[str, int], listed: Listed) -> None:
    if skipped:
        log.warning(
            "%d of %d rows set aside; the first: %s: %s", len(skipped), total, skipped[0].where, skipped[0].reason
        )
    across = duplicates["test_in_train"]
    if across and any(listed.given):
        log.warning("%d rows of the source's test split are also in its train split: test figures flatter", across)


def _plain(value: Any) -> Any:
    """Facts as JSON holds them, so that they are the same before and after they are stored."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value.tolist() if isinstance(value, np.ndarray) else value
