"""The one write path of everything that must survive a crash: written beside, synced, renamed, folder synced.

Every file operation goes through `OPERATIONS`, so that a test can fail, tear or kill at the N-th of them.
"""

import contextlib
import glob
import io
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.errors import UserError

CHUNK = 1 << 20


class Foreign(UserError):
    """A published folder that is not damaged, but not ours to use or to replace: somebody else's work is in it."""


class Operations:
    """What is done to the file system: write, sync, rename."""

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)


OPERATIONS = Operations()


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        OPERATIONS.sync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it that are missing, their names durable."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def remove(path: Path) -> None:
    """Removes a file or a published folder: at once under its name, so that a kill leaves no half of it to be found."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    OPERATIONS.rename(path, aside)
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def _write_synced(path: Path, *pieces: bytes | memoryview) -> None:
    # A sync that failed is never tried again: the kernel may have dropped the pages, and would call it a success.
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            for piece in pieces:
                OPERATIONS.write(descriptor, piece)
            OPERATIONS.sync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        error.filename = error.filename or str(path)  # the kernel does not say which file it was
        raise


class Sink(io.FileIO):
    """A new file for libraries that write by themselves: what they write goes through `OPERATIONS` as well."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")

    def write(self, data: Any) -> int:
        OPERATIONS.write(self.fileno(), data)
        return memoryview(data).nbytes


def write(path: Path, data: bytes | str) -> None:
    """Replaces a file as a whole: after a crash it holds the old bytes or the new ones."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        _write_synced(temporary, data.encode() if isinstance(data, str) else data)
        OPERATIONS.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file as a whole; a NaN raises, it is no JSON."""
    write(path, to_json(value, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)


def append(path: Path, line: str, *, sync: bool = False) -> None:
    """Adds one line: a crash leaves it whole, torn at the end of the file, or absent; with `sync` it is on the disk.

    Raises OSError where it could not be written whole; a part of it may then stand at the end of the file.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        OPERATIONS.write(descriptor, f"{line}\n".encode())
        if sync:
            OPERATIONS.sync(descriptor)
    finally:
        os.close(descriptor)


class Folder:
    """A folder in the making: files are added, and a manifest of their sizes and checksums is written last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, dict[str, Any]] = {}

    def add(self, name: str, *pieces: bytes | memoryview) -> None:
        """Writes a file of these pieces, one behind the other."""
        _write_synced(self.path / name, *pieces)
        crc32 = 0
        for piece in pieces:
            crc32 = zlib.crc32(piece, crc32)
        self.files[name] = {"bytes": sum(memoryview(piece).nbytes for piece in pieces), "crc32": f"{crc32:08x}"}

    def add_written(self, name: str) -> None:
        """Takes in a file that another writer has put there."""
        path = self.path / name
        descriptor = os.open(path, os.O_RDONLY)
        try:
            OPERATIONS.sync(descriptor)
        finally:
            os.close(descriptor)
        self.files[name] = {"bytes": path.stat().st_size, "crc32": checksum(path)}


@contextlib.contextmanager
def publish(target: Path, manifest: dict[str, Any]) -> Iterator[Folder]:
    """Makes a whole folder appear at once under `target`, with `manifest` plus "files" as its manifest.json.

    What was half-made goes away with the exception; what a kill leaves is a hidden `.NAME.*.part` folder, which the
    next publication of that name removes. A folder that stands at `target` already is replaced.
    """
    make_folder(target.parent)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    temporary.mkdir()
    try:
        folder = Folder(temporary)
        yield folder
        whole = {**manifest, "files": folder.files}
        text = to_json({**whole, "digest": digest_of(whole)}, indent=1)
        _write_synced(temporary / "manifest.json", text.encode())
        sync_folder(temporary)
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
        if target.exists():  # a rename cannot replace a folder
            OPERATIONS.rename(target, aside)
        try:
            OPERATIONS.rename(temporary, target)
        except BaseException:
            if aside.exists():
                aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(target.parent)


def digest_of(manifest: dict[str, Any]) -> str:
    """Returns a checksum of what a manifest says, however it is laid out."""
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"


def checksum(path: Path) -> str:
    """Returns a file's CRC-32 as eight hex digits."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def read_manifest(folder: Path, formats: tuple[int, ...]) -> dict[str, Any]:
    """Returns a published folder's manifest; raises UserError where it is missing or broken.

    Raises Foreign where it is of another format.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        files, version, digest = manifest["files"], manifest["format"], manifest.pop("digest")
        sizes = {name: (entry["bytes"], entry["crc32"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise UserError(f"{folder}: has no manifest.json", "it is incomplete, or no folder of whipray") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}", "it is no folder of whipray, or not yours"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is broken: {error!r}", "it was changed or damaged after it was written") from None
    if digest != digest_of(manifest):
        raise UserError(f"{path}: was changed after it was written", "make it anew; such files are not to be edited")
    if version not in formats:
        raise Foreign(f"{path}: is of format {version}, this whipray reads {formats[-1]}",
                      "use the whipray that wrote it, or make it anew")  # fmt: skip
    for name in sizes:
        if name != Path(name).name or name.startswith("."):
            raise UserError(f"{path}: names a file outside its folder: {name!r}", "it was tampered with")
    return manifest


def verify(folder: Path, manifest: dict[str, Any], *, checksums: bool = True) -> None:
    """Compares a published folder's files with its manifest; raises UserError naming the first that differs.

    A file that the manifest does not name raises Foreign; hidden ones, such as a desktop's, are not looked at.
    """
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.exists():
            raise UserError(f"{path}: is missing", "it was deleted after it was written")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise UserError(f"{path}: has {size} bytes instead of {entry['bytes']}", "it was cut off or changed")
        try:
            same = not checksums or checksum(path) == entry["crc32"]
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}", "look after the disk, or its rights") from None
        if not same:
            raise UserError(f"{path}: its checksum differs", "its content was damaged after it was written")
    for path in sorted(folder.iterdir()):
        if not (path.name in manifest["files"] or path.name == "manifest.json" or path.name.startswith(".")):
            raise Foreign(f"{path}: is not named in the manifest", "it was put there after the others were written")
