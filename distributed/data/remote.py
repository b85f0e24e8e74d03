"""Stores and raw data at a URI of pyarrow.fs: fetched once a machine, checked while they come, evicted by size.

A fetched copy lies in the user's cache under a name that its content decides. Beside it lie NAME.lock, held by whoever
fetches it, and NAME.used: locked by every process that uses the copy, and as old as its last use.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from distributed import config, durable
from distributed.config import as_uri, is_uri
from distributed.data import convert
from distributed.data.settings import Data
from distributed.data.store import FORMAT
from tasks import cache
from tasks.errors import UserError
from tasks.task import Task

log = logging.getLogger("whipray")
T = TypeVar("T")
R = TypeVar("R")
Listing = list[tuple[str, int, int]]  # name below the root, bytes, nanoseconds when it was written

LIMIT = "WHIPRAY_CACHE_BYTES"
MANIFEST = "manifest.json"
BLOCK = 8 << 20  # bytes of one request: S3 answers each in some 50 ms, whatever its size
STREAMS = 8  # files on their way at once
ATTEMPTS, WAIT = 3, 1.0  # seconds before the second attempt; twice as many before the third
OBJECTS = ("s3", "gcs", "abfs")  # an object appears whole when it is closed, and there are no folders to make

NO_BUCKET, CHECK_BUCKET = "there is no such bucket", "check its name; whipray makes no buckets"
DENIED = "ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE|TOKEN_EXPIRED|status 40[13]|[Cc]redentials"


# ---- where things are


def join(uri: str, *parts: str) -> str:
    """Returns the URI of something below another one; its query stays at the end."""
    head, mark, query = uri.partition("?")
    return "/".join([head.rstrip("/"), *filter(None, parts)]) + mark + query


def exists(uri: str) -> bool:
    """Returns whether a whole store lies at a URI; raises UserError where not even its bucket does."""
    filesystem, path = _opened(uri)
    if _tried(uri, lambda: filesystem.get_file_info(f"{path}/{MANIFEST}")).is_file:
        return True
    _require_bucket(uri, filesystem, path)
    return False


def locate(task: Task, task_name: str, data: Data, stores: Path) -> Path:
    """Returns where the store of this task and split lies, or will lie, on this machine.

    `stores` is a folder or a URI; what is at the URI is fetched.
    """
    task = with_local_sources(task)
    if not is_uri(stores):
        return convert.locate(task, task_name, data, stores)
    path = convert.locate(task, task_name, data, cache.folder("stores"))
    uri = join(as_uri(stores), task_name, path.name)
    if not path.exists() and exists(uri):
        fetch(uri, path)
    return path


def prepare(task: Task, task_name: str, data: Data, stores: Path, **how: Any) -> Path:
    """Returns the path of the task's store on this machine, made now where it is nowhere yet.

    Where `stores` is a URI, a store that is there is fetched, and one that is made here is put there. `how` goes to
    `convert.prepare`, which checks what was there. Copies are evicted beyond WHIPRAY_CACHE_BYTES.
    """
    most_bytes = _limit()
    task = with_local_sources(task)
    path = locate(task, task_name, data, stores)
    with _on_disk(path):
        use(path, is_copy=is_uri(stores))
    convert.prepare(task, task_name, data, cache.folder("stores") if is_uri(stores) else stores, **how)
    if is_uri(stores):
        push(path, join(as_uri(stores), task_name, path.name))
    if most_bytes is not None:
        evict(cache.folder(""), most_bytes, {path})
    return path


def with_local_sources(task: Task) -> Task:
    """Returns the task with every path of `task.source` that is a URI fetched, and replaced by that of the copy."""
    local = {}
    for name, setting in config.settings_of(type(task.source), "source").items():
        value = getattr(task.source, name := name.removeprefix("source."), None)
        if "path" in getattr(setting.type, "__metadata__", ()) and value and is_uri(value):
            local[name] = str(source(value, cache.folder("sources")))
    return dataclasses.replace(task, source=dataclasses.replace(task.source, **local)) if local else task


# ---- stores


def push(store: Path, uri: str) -> None:
    """Puts a published store at a URI, its manifest last: that is the commit. A store that is there is left alone.

    Files are named by their content too, so that two pushes at once cannot mix. Raises UserError.
    """
    if exists(uri):
        return
    manifest = durable.read_manifest(store, (FORMAT,))
    filesystem, path = _opened(uri)
    if filesystem.type_name not in OBJECTS:
        _tried(uri, lambda: filesystem.create_dir(path, recursive=True))

    def put(item: tuple[str, dict[str, Any]]) -> None:
        name, entry = item
        if _put(uri, filesystem, f"{path}/{_remote_name(name, entry)}", store / name) != entry:
            raise UserError(f"{store / name}: its checksum differs", f"remove {store}; it is prepared again")

    _each(put, manifest["files"].items())
    _put(uri, filesystem, f"{path}/{MANIFEST}", store / MANIFEST)


def fetch(uri: str, path: Path) -> Path:
    """Returns `path`, where the store of a URI now lies: fetched once, whoever asks at the same time, and held.

    Every file is compared with the manifest while it comes. Raises UserError naming what is missing, damaged, out of
    reach or of another version; then, and after a kill, nothing is there.
    """
    with _on_disk(path):
        use(path, is_copy=True)
        with convert.exclusively(path):
            if not path.exists():
                with durable.publish(path, manifest := {}) as folder:
                    _fetch(uri, folder, manifest)
    return path


def _fetch(uri: str, folder: durable.Folder, manifest: dict[str, Any]) -> None:
    filesystem, path = _opened(uri)
    _get(join(uri, MANIFEST), filesystem, f"{path}/{MANIFEST}", folder.path / MANIFEST)
    try:
        manifest |= durable.read_manifest(folder.path, (FORMAT,))
    except UserError as error:
        raise UserError(
            error.message.replace(str(folder.path / MANIFEST), join(uri, MANIFEST)),
            f"remove {uri}; it is prepared again from the raw data",
        ) from None
    files = manifest.pop("files")
    log.info("fetching %s: %d files, %d bytes", uri, len(files), sum(entry["bytes"] for entry in files.values()))

    def get(item: tuple[str, dict[str, Any]]) -> None:
        name, entry = item
        there, mend = join(uri, _remote_name(name, entry)), f"remove {uri}; it is prepared again from the raw data"
        try:
            came = _get(there, filesystem, f"{path}/{_remote_name(name, entry)}", folder.path / name)
        except _Missing:
            raise UserError(f"{there}: is missing", mend) from None
        if came["bytes"] != entry["bytes"]:
            raise UserError(f"{there}: has {came['bytes']} bytes instead of {entry['bytes']}", mend)
        if came != entry:
            raise UserError(f"{there}: its checksum differs", mend)
        folder.files[name] = entry

    _each(get, files.items())


def _remote_name(name: str, entry: dict[str, Any]) -> str:
    return f"{name}.{entry['crc32']}"


# ---- raw data


def source(uri: str, folder: Path) -> Path:
    """Returns the local copy, below `folder`, of the raw file or folder at a URI; fetched once, and held.

    A copy is of one state of the source: the names, sizes and times of its files. Raises UserError for what is not
    there or out of reach, for names that would lie elsewhere, and where the source changes meanwhile.
    """
    filesystem, root = _opened(uri)
    listed = _listing(uri, filesystem, root)
    path = folder / hashlib.sha256(json.dumps([uri, listed]).encode()).hexdigest()[:16]
    local = path / "files" / PurePosixPath(root).name
    with _on_disk(path):
        use(path, is_copy=True)
        with convert.exclusively(path):
            if not _is_whole(local, listed):
                with durable.publish(path, {"uri": uri}) as copy:
                    _fetch_files(uri, listed, copy, local.relative_to(path))
    return local


def _is_whole(local: Path, listed: Listing) -> bool:
    try:
        return all((local / name).stat().st_size == size for name, size, _ in listed)
    except OSError:
        return False


def _fetch_files(uri: str, listed: Listing, copy: durable.Folder, below: Path) -> None:
    filesystem, root = _opened(uri)

    def get(one: tuple[str, int, int]) -> None:
        name, size, modified = one
        came = _get(join(uri, name), filesystem, f"{root}/{name}".rstrip("/"), copy.path / below / name)
        if came["bytes"] != size:
            raise UserError(f"{join(uri, name)}: changed while it was fetched", "start again when it is at rest")
        # The fingerprint of a large source looks at times: they must be the same on every machine.
        os.utime(copy.path / below / name, ns=(modified, modified))
        copy.files[str(below / name)] = came

    folders = {(below / name).parent for name, _, _ in listed}
    for one in folders:
        (copy.path / one).mkdir(parents=True, exist_ok=True)
    _each(get, listed)
    for one in folders.union(*(folder.parents for folder in folders)):
        durable.sync_folder(copy.path / one)
    if _listing(uri, filesystem, root) != listed:
        raise UserError(f"{uri}: changed while it was fetched", "start again when it is at rest")


def _listing(uri: str, filesystem: fs.FileSystem, root: str) -> Listing:
    """Returns the files of a source, in order; that of a single one is empty."""
    info = _tried(uri, lambda: filesystem.get_file_info(root))
    if info.type == fs.FileType.NotFound:
        _require_bucket(uri, filesystem, root)
        raise UserError(f"{uri}: is not there", "check the URI")
    if info.is_file:
        return [("", info.size, info.mtime_ns or 0)]
    found = _tried(uri, lambda: filesystem.get_file_info(fs.FileSelector(root, recursive=True)))
    files = sorted((one.path[len(root) + 1 :], one.size, one.mtime_ns or 0) for one in found if one.is_file)
    for name, _, _ in files:
        if {"", ".", ".."} & set(name.split("/")) or "\0" in name:
            raise UserError(f"{uri}: {name!r} is no name for a local file", "rename it, or leave it out")
    if not files:
        raise UserError(f"{uri}: holds no files", "check the URI")
    names = {name for name, _, _ in files}
    for name in names:
        for parent in PurePosixPath(name).parents:
            if str(parent) in names:
                raise UserError(f"{uri}: '{parent}' is a file and a folder as well", "rename one of the two")
    return files


# ---- copies in use, and those that may go

_held: dict[Path, int] = {}  # descriptors that go with the process, and with those that are forked from it


def use(path: Path, *, is_copy: bool = False) -> None:
    """Holds a copy until this process ends, so that no eviction takes it.

    What nobody has called a copy yet, as `is_copy` does, is never evicted, and need not be held.
    """
    mark = path.with_suffix(".used")
    if is_copy:
        path.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    if not mark.exists():
        return
    if path not in _held:
        descriptor = os.open(mark, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for an eviction that is under way
        _held[path] = descriptor
    os.utime(mark)


def is_copy(path: Path) -> bool:
    """Returns whether a store is a copy of one at a URI, which may be evicted."""
    return path.with_suffix(".used").exists()


def evict(folder: Path, most_bytes: int, keep: Set[Path] = frozenset()) -> list[Path]:
    """Removes copies below a folder, the longest unused first, until they take no more than `most_bytes`.

    Those that a process uses stay, and those to keep. Returns what was removed.
    """
    copies = [(mark.stat().st_mtime_ns, path, _size(path)) for mark, path in _copies(folder)]
    total, removed = sum(size for _, _, size in copies), []
    for _, path, size in sorted(copies):
        if total <= most_bytes:
            break
        if path not in keep and _remove(path):
            removed.append(path)
            total -= size
    return removed


def _copies(folder: Path) -> Iterator[tuple[Path, Path]]:
    for parent, folders, files in os.walk(folder):
        for name in [name for name in folders if f"{name}.used" in files]:
            folders.remove(name)
            yield Path(parent, f"{name}.used"), Path(parent, name)
        folders[:] = [name for name in folders if not name.startswith(".")]


def _size(path: Path) -> int:
    return sum(Path(parent, name).lstat().st_size for parent, _, files in os.walk(path) for name in files)


def _remove(path: Path) -> bool:
    descriptor = os.open(path.with_suffix(".used"), os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
        path.rename(aside)  # at once: nobody sees a half of it
        shutil.rmtree(aside)
    except (BlockingIOError, FileNotFoundError):  # in use, or evicted by another process
        return False
    finally:
        os.close(descriptor)
    return True


def _limit() -> int | None:
    text = os.environ.get(LIMIT)
    if not text:
        return None
    if not re.fullmatch(r"\d+(\.\d+)?(e\d{1,2})?", text):
        raise UserError(f"{LIMIT}={text}: expected a number of bytes", f"such as {LIMIT}=50e9, or leave it unset")
    return int(float(text))


# ---- bytes on their way


class _Missing(UserError):
    """What was asked for is not there."""


def _opened(uri: str) -> tuple[fs.FileSystem, str]:
    """Returns the file system of a URI, and the path within it."""
    config.refuse_credentials(uri)
    filesystem, path = _tried(uri, lambda: fs.FileSystem.from_uri(uri))
    if not path.strip("/"):
        raise UserError(f"{uri}: names no bucket or folder", "such as s3://bucket/folder")
    return filesystem, path.rstrip("/")


def _require_bucket(uri: str, filesystem: fs.FileSystem, path: str) -> None:
    bucket = path.split("/")[0]
    if filesystem.type_name in OBJECTS:
        info = _tried(uri, lambda: filesystem.get_file_info(bucket))
        if info.type == fs.FileType.NotFound:
            raise UserError(f"{uri}: {NO_BUCKET}", CHECK_BUCKET)


def _get(uri: str, filesystem: fs.FileSystem, path: str, target: Path) -> dict[str, Any]:
    """Copies a remote file to the disk, synced; returns its size and CRC-32 as a manifest has them."""
    with _tried(uri, lambda: filesystem.open_input_file(path)) as file:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            size = crc = 0
            while block := _tried(uri, functools.partial(file.read_at, BLOCK, size)):
                durable.OPERATIONS.write(descriptor, block)
                size, crc = size + len(block), zlib.crc32(block, crc)
            durable.OPERATIONS.sync(descriptor)
        finally:
            os.close(descriptor)
    return {"bytes": size, "crc32": f"{crc:08x}"}


def _put(uri: str, filesystem: fs.FileSystem, path: str, file: Path) -> dict[str, Any]:
    """Copies a file to a remote place, where it appears whole; returns its size and CRC-32."""
    folder, _, name = path.rpartition("/")
    beside = path if filesystem.type_name in OBJECTS else f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.part"

    def copy() -> dict[str, Any]:
        size = crc = 0
        with file.open("rb") as local, filesystem.open_output_stream(beside, compression=None) as stream:
            while block := local.read(BLOCK):
                stream.write(block)
                size, crc = size + len(block), zlib.crc32(block, crc)
        if beside != path:
            filesystem.move(beside, path)
        return {"bytes": size, "crc32": f"{crc:08x}"}

    return _tried(uri, copy)


def _each(do: Callable[[T], None], items: Iterable[T]) -> None:
    """Does it to several items at once; the first error ends it."""
    pool = ThreadPoolExecutor(STREAMS)
    try:
        for done in [pool.submit(do, item) for item in items]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _tried(uri: str, call: Callable[[], R]) -> R:
    """Calls what reaches a remote place, again where the moment may be to blame; raises UserError in the end."""
    for attempt in itertools.count(1):
        try:
            return call()
        except pa.ArrowException as error:
            raise UserError(
                f"{uri}: {_first_line(error)}", "such as s3://bucket/folder or gs://bucket/folder"
            ) from None
        except OSError as error:
            refusal = _refusal(uri, error)
            if refusal or attempt == ATTEMPTS:
                raise refusal or UserError(
                    f"{uri}: cannot be reached: {_first_line(error)}", "check the network, and the URI"
                ) from None
            log.warning("%s: attempt %d of %d failed: %s", uri, attempt, ATTEMPTS, _first_line(error))
            time.sleep(WAIT * 2 ** (attempt - 1))
    raise AssertionError


def _refusal(uri: str, error: OSError) -> UserError | None:
    """Returns what an error means where another attempt would end in the same; None where it need not."""
    words = str(error)
    if re.search("NO_SUCH_BUCKET|[Bb]ucket.* not found", words):
        return UserError(f"{uri}: {NO_BUCKET}", CHECK_BUCKET)
    if isinstance(error, FileNotFoundError) or "NO_SUCH_KEY" in words:
        return _Missing(f"{uri}: is not there", "check the URI")
    if isinstance(error, PermissionError) or re.search(DENIED, words):
        return UserError(f"{uri}: access is denied", f"{config.GIVE_CREDENTIALS}, and check what they allow")
    if "Unable to load lib" in words:
        return UserError(f"{uri}: {_first_line(error)}", "HDFS needs Java and Hadoop here: JAVA_HOME, HADOOP_HOME")
    if error.errno is not None and not isinstance(error, (ConnectionError, TimeoutError)):  # a file system's word
        return UserError(f"{uri}: {error.strerror}", "check the URI, and the disk behind it")
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    """Tells what this machine's disk refuses; what a remote place refuses is told before it comes here."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}",
            f"make room, bound the cache by {LIMIT}, or move it by XDG_CACHE_HOME",
        ) from None
