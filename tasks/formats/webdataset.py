"""WebDataset shards: tar files whose members `cat.jpg`, `cat.cls` and `cat.seg.png` are one sample.

A shard is listed once, from its headers alone; then any process reads any sample by its offsets.
"""

import itertools
import json
import logging
import math
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tasks.errors import BadRow, UserError
from tasks.formats.columnar import SPLITS, split_of

BLOCK = 512  # bytes of a header, and what contents are filled up to (POSIX.1-2001, pax)
MAX_BYTES = 1 << 30  # of one member
MAX_HEADER = 1 << 20  # bytes of a long name or other extension of a header
MAX_SHARDS = 100_000
PICKLED = {"pkl", "pickle", "pyd", "pth", "pt"}  # formats that run code of whoever wrote them
NUMBERS = {"cls", "cls2", "class", "count", "index", "inx", "id"}  # what the package webdataset reads as int
TEXTS = {"txt", "text", "transcript"}
BROKEN = "download the shard again; a broken or partial download is the usual cause"

log = logging.getLogger("whipray")


class Sample(NamedTuple):
    """Where the parts of one sample lie."""

    tar: str
    key: str  # what its members' names have in common: folder and name up to the first dot
    parts: dict[str, tuple[int, int]]  # the rest of a member's name, in lower case -> offset, size in bytes
    split: str | None  # train, validation or test where the name of the shard, or of its folder, says so


def shards(path: Path | str | Sequence[Path | str]) -> list[Path]:
    """Returns the shards that are meant: by a list, a folder, a file, or a pattern such as train-{000000..000009}.tar.

    Raises UserError where one is not there, there are none, or one is compressed as a whole.
    """
    if not isinstance(path, Path | str):
        found = list(dict.fromkeys(itertools.chain.from_iterable(map(shards, path))))
    elif Path(path).is_dir():
        found = sorted(file for file in Path(path).rglob("*") if ".tar" in file.suffixes or file.suffix == ".tgz")
    else:
        found = [Path(name) for name in _expanded(str(path))]
    if not found:
        raise UserError(f"{path}: holds no .tar files", "name a folder of shards, or such as train-{000..009}.tar")
    for shard in found:
        if shard.suffix in (".gz", ".tgz", ".bz2", ".xz", ".zst"):
            raise UserError(
                f"{shard}: is compressed as a whole, so that no sample can be read by itself",
                "unpack it to a plain .tar, for instance with gunzip; pictures do not shrink by it",
            )
        if not shard.is_file():
            raise UserError(f"{shard}: no such file", "check the path and the numbers between the braces")
    return found


def samples(path: Path | str | Sequence[Path | str]) -> Iterator[Sample]:
    """Yields the samples of all shards, in their order; contents are not read.

    Hidden files are left out, and names without an ending with a warning. Raises UserError naming shard and member for
    a truncated or broken tar, links, devices and sparse files, pickles, members over 1 GiB, two members of one name,
    and a shard without samples.
    """
    for shard in shards(path):
        found: dict[str, dict[str, tuple[int, int]]] = {}
        left_out = []
        for name, offset, size in _members(shard):
            folder, _, file = name.rpartition("/")
            if file.startswith((".", "__")) or "__MACOSX" in folder.split("/"):
                continue
            stem, _, rest = file.partition(".")
            if not rest:
                left_out.append(name)
                continue
            key, part = f"{folder}/{stem}" if folder else stem, rest.lower()
            if part.rpartition(".")[2] in PICKLED:
                raise UserError(f"{shard}: {name!r} is a pickle, which could run any code", "store arrays as .npy")
            if part in found.setdefault(key, {}):
                raise UserError(f"{shard}: holds {name!r} twice", "give each sample a name of its own")
            found[key][part] = (offset, size)
        if not found:
            raise UserError(f"{shard}: holds no samples", "expected are names such as 000001.jpg and 000001.cls")
        if left_out:
            log.warning("%s: %d members without an ending are left out, such as %r", shard, len(left_out), left_out[0])
        split = split_of(Path(shard.name)) or SPLITS.get(shard.parent.name.lower())
        yield from (Sample(str(shard), key, parts, split) for key, parts in found.items())


def read(sample: Sample, needed: Sequence[str] = ()) -> dict[str, bytes]:
    """Reads the parts of a sample: all, or the `needed` ones, where "jpg;png" means the first of them that is there.

    They are called what they were asked for. Raises BadRow where a needed one is missing; UserError where the shard has
    become shorter since it was listed.
    """
    wanted = {name: name for name in sample.parts}
    if needed:
        wanted = {names: next((n for n in names.split(";") if n in sample.parts), "") for names in needed}
    for names, part in wanted.items():
        if not part:
            there = ", ".join(sample.parts)
            raise BadRow(f"{sample.tar}: sample {sample.key!r} has no {names.replace(';', ' or ')}, only {there}")
    content = {}
    with _opened(Path(sample.tar)) as file:
        for names, part in wanted.items():
            offset, size = sample.parts[part]
            file.seek(offset)
            content[names] = file.read(size)
            if len(content[names]) < size:
                raise UserError(f"{sample.tar}: has become shorter while it was read", "prepare the data again")
    return content


def decoded(part: str, content: bytes) -> Any:
    """Returns what a part holds: an int for cls, plain values for json, text for txt, else the bytes as they are.

    Raises BadRow for what is not what its name says.
    """
    kind = part.rpartition(".")[2]
    if kind not in NUMBERS | TEXTS | {"json"}:
        return content
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise BadRow(f"{part} is not UTF-8: byte 0x{content[error.start]:02x}") from None
    if kind in NUMBERS:
        if not re.fullmatch(r"\s*-?[0-9]{1,18}\s*", text):
            raise BadRow(f"{part} is no whole number: {text[:40]!r}")
        return int(text)
    return _strict_json(part, text) if kind == "json" else text


# ---- how a tar is laid out


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yields name, offset and size of each file of a tar, having read its headers and nothing else.

    The tarfile module would take a broken header for the end, and versions before 3.11.14 follow negative sizes for
    ever (CVE-2025-8194): it only takes the headers apart here.
    """
    with _opened(path) as file:
        end, offset, extended = path.stat().st_size, 0, {}
        while True:
            file.seek(offset)
            header = file.read(BLOCK)
            if len(header) < BLOCK:
                raise UserError(f"{path}: is truncated: it ends at byte {end} without an end mark", BROKEN)
            if not any(header):
                return _nothing_after(path, file)
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
            except (tarfile.HeaderError, ValueError) as error:
                raise UserError(f"{path}: is no tar file, or broken at byte {offset}: {error}", BROKEN) from None
            name, size = extended.get("path") or info.name, _size(path, extended.get("size", info.size))
            start, offset = offset + BLOCK, offset + BLOCK + -(-size // BLOCK) * BLOCK
            if offset > end:
                raise UserError(f"{path}: is truncated within {name!r}: it ends at byte {end}", BROKEN)
            if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
                if size > MAX_HEADER:
                    raise UserError(f"{path}: has a header of {size} bytes at byte {start}", BROKEN)
                extended |= _extension(path, info.type, file.read(size))
                continue
            extended = {}
            if info.type == tarfile.DIRTYPE:
                continue
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                raise UserError(
                    f"{path}: {name!r} is no plain file but of type {info.type!r}",
                    "write the shards without links, devices and sparse files",
                )
            if size > MAX_BYTES:
                raise UserError(f"{path}: {name!r} has {size} bytes, at most {MAX_BYTES} are read", "split it up")
            yield name.removeprefix("./"), start, size


def _extension(path: Path, kind: bytes, content: bytes) -> dict[str, str]:
    """Returns what a header in front of another says about that: of all it can say, name and size count."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.split(b"\0")[0].decode(errors="replace")}
    found = {}
    while content.strip(b"\0"):
        length, space, _ = content.partition(b" ")
        count = int(length) if length.isdigit() and len(length) < 8 else 0
        record, content = content[len(length) + 1 : count], content[count:]
        name, equals, value = record.removesuffix(b"\n").decode(errors="replace").partition("=")
        if not (space and equals and len(length) + 1 + len(record) == count and record.endswith(b"\n")):
            raise UserError(f"{path}: has a broken pax header", BROKEN)
        if name.startswith("GNU.sparse") or (kind == tarfile.XGLTYPE and name in ("path", "size")):
            raise UserError(f"{path}: has a pax header {name!r}", "write the shards as plain tar files of plain files")
        if name in ("path", "size"):
            found[name] = value
    return found


def _size(path: Path, size: int | str) -> int:
    plain = int(size) if isinstance(size, int) or (size.isascii() and size.isdigit() and len(size) < 19) else -1
    if plain < 0:
        raise UserError(f"{path}: a member has {size} bytes", BROKEN)
    return plain


def _nothing_after(path: Path, file: BinaryIO) -> None:
    """Raises UserError where something follows the end mark: shards that were put together with `cat`, say."""
    while rest := file.read(1 << 20):
        if any(rest):
            raise UserError(f"{path}: has bytes after its end", "join shards with `tar --concatenate`, not with cat")


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", "check the path") from None


# ---- patterns and JSON


def _expanded(pattern: str) -> list[str]:
    """Returns the names that a pattern with ranges in braces stands for, each number as wide as the first one."""
    pieces = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    ranges = [range(int(first), int(last) + 1) for first, last in zip(pieces[1::3], pieces[2::3], strict=True)]
    if math.prod(map(len, ranges)) > MAX_SHARDS:
        raise UserError(f"{pattern}: stands for over {MAX_SHARDS} shards", "check the numbers between the braces")
    widths = [len(first) for first in pieces[1::3]]
    names = []
    for numbers in itertools.product(*ranges):
        filled = [f"{number:0{width}d}" for number, width in zip(numbers, widths, strict=True)]
        names.append("".join(itertools.chain(*itertools.zip_longest(pieces[::3], filled, fillvalue=""))))
    return names


def _strict_json(part: str, text: str) -> Any:
    """Parses JSON without its usual extensions: no NaN, no key twice, no number that takes long to read."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def refused(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refused)
    except (ValueError, RecursionError) as error:  # 4,300 digits, which Python refuses to read, are a ValueError too
        raise BadRow(f"{part} is no JSON that can be read: {error}") from None
