"""Archives, .zip and .tar with its packed kinds: unpacked once into the user's cache, by rules of our own.

No archive is trusted: what is written lies inside the new folder, is a plain file with this user's usual rights, and
is counted while it is written. tarfile's own filter is not enough: Python 3.11 before .13 lets some links through.
"""

import bz2
import contextlib
import functools
import gzip
import hashlib
import lzma
import os
import posixpath
import re
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from filelock import FileLock

from tasks import cache
from tasks.errors import UserError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}  # how each kind of packed tar begins
MAX_ENTRIES = 2_000_000  # ImageNet has 1.4 million files
MAX_BYTES = 2**38  # unpacked; ImageNet has 0.6 of it
MAX_RATIO = 200  # unpacked bytes for each packed one, above FREE_BYTES: tables reach 50, a bomb thousands
FREE_BYTES = 2**26
MAX_NAME = 4096  # bytes of a path on Linux (PATH_MAX)
CHUNK = 2**20  # bytes read at once; no genuine header of a tar entry is as long
REFUSED = "if you trust this archive, unpack it yourself and name the folder"
BROKEN = "download the file again; a broken or partial download is the usual cause"
FAULTS = (  # what the readers raise for broken archives
    OSError, EOFError, ValueError, IndexError, OverflowError, RuntimeError, struct.error,
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip


class _Entry(NamedTuple):
    name: str
    kind: str  # file, folder, link, or the kind that is refused
    open: Callable[[], Any]  # a file's content, as a binary stream
    target: str = ""  # of a link, seen from the root


def unpacked(path: Path) -> Path:
    """Returns the folder that an archive is unpacked into, at the first call; a folder is returned as it is.

    Another process that asks meanwhile waits. A changed archive (path, size, time of change) gets a folder of its own.
    A link to a file of the archive becomes a copy of that file. Raises UserError naming archive and entry for a broken
    archive, for one that would write elsewhere than into its folder or make anything but plain files, for an encrypted
    one, for two entries of one name (in any case), and for more entries or bytes than a data set has.
    """
    with _faults(str(path)):
        if path.is_dir():
            return path
        if not path.exists():
            raise UserError(f"{path}: no such file or folder", "check the path in task.source.path")
        if not path.is_file() or not path.name.lower().endswith(SUFFIXES):
            raise UserError(f"{path}: is neither a folder nor an archive", f"archives end in {', '.join(SUFFIXES)}")
        identity = _identity(path)
        digest = hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]
        folder = cache.folder("unpacked") / f"{re.sub(r'[^A-Za-z0-9._-]', '_', path.name)[:64]}-{digest}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                _unpack(path, folder, identity)
    return folder


def _identity(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"


def _unpack(path: Path, folder: Path, identity: str) -> None:
    """Unpacks into a hidden folder beside `folder`, whose name it gets when it is whole."""
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left: we hold the lock
    try:
        partial.mkdir()
        with path.open("rb") as file:
            begin = file.read(6)  # what it is, whatever it is called
            file.seek(0)
            entries = _zip(path, file) if begin.startswith(b"PK") else _tar(path, file, begin)
            _write(path, entries, partial)
        if _identity(path) != identity:
            raise UserError(f"{path}: changed while it was unpacked", "try again when it is complete")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(path: Path, entries: Iterator[_Entry], folder: Path) -> None:
    room = min(MAX_BYTES, max(FREE_BYTES, MAX_RATIO * path.stat().st_size))
    names: dict[str, str] = {}  # where case does not count -> as spelt, a folder's with a stroke at the end
    links: list[tuple[str, str, str]] = []  # place for people, name, target
    for count, entry in enumerate(entries, 1):
        place = f"{path}, entry {entry.name!r}"
        if count > MAX_ENTRIES:
            raise UserError(f"{path}: has over {MAX_ENTRIES} entries", REFUSED)
        parts = _parts(place, entry.name)
        if "__MACOSX" in parts or parts[-1:] == [".DS_Store"]:
            continue
        if entry.kind not in ("file", "folder", "link"):
            raise UserError(f"{place}: is {entry.kind}", REFUSED)
        if not parts and entry.kind != "folder":
            raise UserError(f"{place}: is a {entry.kind} without a name", REFUSED)
        _claim(place, parts, entry.kind == "folder", names)
        with _faults(place):
            if entry.kind == "folder":
                folder.joinpath(*parts).mkdir(parents=True, exist_ok=True)
            elif entry.kind == "file":
                with entry.open() as content:
                    room = _copied(place, content, folder.joinpath(*parts), room)
            else:
                links.append((place, "/".join(parts), posixpath.normpath(entry.target)))
    # No link is ever made, so that none can lead out; one to a file that was just written becomes a copy of it.
    linked = {name for _, name, _ in links}
    for place, name, target in links:
        if names.get(_folded(target)) != target or target in linked:
            raise UserError(f"{place}: is a link to {target!r}, which is no file of the archive", REFUSED)
        with _faults(place), (folder / target).open("rb") as content:
            room = _copied(place, content, folder / name, room)
    if all(name.endswith("/") for name in names.values()):
        raise UserError(f"{path}: holds no files", BROKEN)


def _parts(place: str, name: str) -> list[str]:
    if len(name) > MAX_NAME:
        raise UserError(f"{place:.200}...: its name has over {MAX_NAME} characters", REFUSED)
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or re.match("[A-Za-z]:", name):
        raise UserError(f"{place}: its name could lead out of the folder", REFUSED)
    return parts


def _claim(place: str, parts: list[str], is_folder: bool, names: dict[str, str]) -> None:
    """Notes an entry and the folders above it; raises UserError where one of them is there under another guise."""
    for depth in range(1, len(parts) + 1):
        name = "/".join(parts[:depth])
        spelt = f"{name}/" if depth < len(parts) or is_folder else name
        before = names.get(_folded(name))
        if before is not None and (before != spelt or not spelt.endswith("/")):
            raise UserError(f"{place}: there is {before!r} already, which many file systems cannot tell apart", REFUSED)
        names[_folded(name)] = spelt


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _copied(place: str, content: IO[bytes], target: Path, room: int) -> int:
    """Writes a file, and returns how many bytes of the `room` are left."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        while chunk := content.read(CHUNK):
            room -= len(chunk)
            if room < 0:
                raise UserError(f"{place}: the archive unpacks to far more than one of its size should", REFUSED)
            file.write(chunk)
    return room


@contextlib.contextmanager
def _faults(place: str) -> Iterator[None]:
    """Turns what is raised for broken archives and full disks into a UserError that names the place."""
    try:
        yield
    except FAULTS as error:
        if isinstance(error, OSError) and error.errno:
            hint = f"look after the space in {cache.folder('unpacked')}, and the rights there and of the archive"
            raise UserError(f"{place}: cannot be unpacked: {error.strerror}", hint) from error
        raise UserError(f"{place}: cannot be unpacked: {error}", BROKEN) from error


def _zip(path: Path, file: IO[bytes]) -> Iterator[_Entry]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            name = info.orig_filename  # `filename` ends at a NUL
            kind = stat.S_IFMT(info.external_attr >> 16)
            opened = functools.partial(archive.open, info)
            if info.flag_bits & 0x1:
                raise UserError(f"{path}, entry {name!r}: is encrypted", "unpack it yourself and name the folder")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without measure
                raise UserError(f"{path}, entry {name!r}: is packed by method {info.compress_type}", REFUSED)
            if kind == stat.S_IFLNK:
                with _faults(f"{path}, entry {name!r}"), opened() as content:
                    target = content.read(MAX_NAME).decode()
                yield _Entry(name, "link", opened, posixpath.join(posixpath.dirname(name), target))
            elif kind in (0, stat.S_IFREG, stat.S_IFDIR):
                yield _Entry(name, "folder" if name.endswith("/") else "file", opened)
            else:
                yield _Entry(name, "a device, a pipe or a socket", opened)


def _tar(path: Path, file: IO[bytes], begin: bytes) -> Iterator[_Entry]:
    opener = next((opener for magic, opener in PACKED.items() if begin.startswith(magic)), contextlib.nullcontext)
    with opener(file) as stream:  # type: ignore[arg-type]
        metered = _Metered(stream)
        with tarfile.open(fileobj=metered, mode="r:") as archive:  # type: ignore[arg-type]
            while (member := archive.next()) is not None:
                archive.members = []  # it would keep them all
                if member.size < 0:  # Python before 3.11.14 goes round in circles (CVE-2025-8194)
                    raise UserError(f"{path}, entry {member.name!r}: has {member.size} bytes", BROKEN)
                opened = functools.partial(archive.extractfile, member)
                if member.isreg():
                    yield _Entry(member.name, "file", opened)
                elif member.isdir():
                    yield _Entry(member.name, "folder", opened)
                elif member.issym():
                    target = posixpath.join(posixpath.dirname(member.name), member.linkname)
                    yield _Entry(member.name, "link", opened, target)
                elif member.islnk():
                    yield _Entry(member.name, "link", opened, member.linkname)
                else:
                    yield _Entry(member.name, "a device, a pipe or of an unknown kind", opened)
            # tarfile takes any rubbish for the end. A whole archive ends in zeros, up to the end of the file: read on,
            # so that gzip compares its checksum.
            rest = metered.last + metered.read(CHUNK)
            if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0") or metered.read(1):
                raise UserError(f"{path}: does not end as a tar archive does", BROKEN)


class _Metered:
    """A stream that is read in small pieces only: a header may claim gigabytes, and be unpacked into memory."""

    def __init__(self, stream: Any) -> None:
        self.seek, self.tell, self._read = stream.seek, stream.tell, stream.read
        self.last = b""  # what was read last

    def read(self, size: int) -> bytes:
        if not 0 <= size <= CHUNK:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        self.last = self._read(size)
        return self.last
