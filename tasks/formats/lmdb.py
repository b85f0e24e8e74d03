"""LMDB sets of pictures and labels, as CRNN and the deep-text-recognition benchmark write them: `num-samples`,
`image-000000001`, `label-000000001` and so on.

LMDB maps the file into memory and trusts it: a broken one crashes the process that reads it. So another process
looks at every entry first. Nothing is written or locked.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.errors import BadRow, UserError

HUGE = 1 << 30  # bytes of a file that must not be mostly holes
BROKEN = "copy or download it again; a broken or partial copy is the usual cause"
MB_A_SECOND = 5  # at least so much is checked, or the check is given up


def references(path: Path) -> Iterator[tuple[str, int]]:
    """Yields a reference (path, number) for each sample; `path` is the folder that holds data.mdb, or such a file.

    Every entry is checked, in a process of its own. Raises UserError where it is no LMDB of this layout, is truncated
    or broken or mostly holes, or holds pickled values, which could run any code.
    """
    size = _size(path)
    _package()
    try:
        # -P: a folder that a user stands in must not bring modules of its own.
        checked = subprocess.run(
            [sys.executable, "-P", "-c", "from tasks.formats import lmdb; lmdb.report()", str(path)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])},
            capture_output=True, text=True, check=False, timeout=30 + size / (MB_A_SECOND << 20),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(f"{path}: checking it does not come to an end", BROKEN) from None
    if checked.returncode < 0:
        raise UserError(f"{path}: is corrupt: reading it crashes (signal {-checked.returncode})", BROKEN)
    if checked.returncode:
        raise RuntimeError(f"checking {path} failed:\n{checked.stderr}")
    found = json.loads(checked.stdout)
    if "fault" in found:
        raise UserError(f"{path}: {found['fault']}", found["hint"])
    return ((str(path), number) for number in range(1, found["samples"] + 1))


def read(reference: tuple[str, int]) -> tuple[bytes, str]:
    """Reads one sample, which `references` has listed: the bytes of a picture file, and its label.

    Raises BadRow where one of them is missing or empty, or the label is not UTF-8.
    """
    path, number = reference
    try:
        with _environment(path).begin() as transaction:
            picture = transaction.get(b"image-%09d" % number)
            label = transaction.get(b"label-%09d" % number)
    except _package().Error as error:
        raise UserError(f"{path}, sample {number}: cannot be read: {error}", BROKEN) from error
    for name, value in (("image", picture), ("label", label)):
        if not value:
            raise BadRow(f"{path}: {name}-{number:09d} is {'missing' if value is None else 'empty'}")
    try:
        return picture, label.decode()
    except UnicodeDecodeError:
        raise BadRow(f"{path}: label-{number:09d} is not UTF-8: {label[:20]!r}") from None


def report() -> None:
    """Prints what `references` must know of the LMDB that the command line names: the work of the other process."""
    try:
        found: dict[str, Any] = {"samples": _samples(Path(sys.argv[1]))}
    except UserError as error:
        found = {"fault": error.message, "hint": error.hint}
    sys.stdout.write(json.dumps(found))


def _samples(path: Path) -> int:
    """Returns the number of samples after a look at the first and last byte of every value."""
    try:
        environment = _opened(path)
        pages, page = environment.info()["last_pgno"] + 1, environment.stat()["psize"]
        if pages * page > _size(path):  # before any page is touched: beyond the file's end that is fatal
            raise UserError(f"is truncated: {pages} pages of {page} bytes, the file has {_size(path)}", BROKEN)
        with environment.begin(buffers=True) as transaction:
            entries = environment.stat()["entries"]
            for visited, (key, value) in enumerate(transaction.cursor(), 1):
                if visited > min(entries, _size(path)):  # pages that lead back to themselves
                    raise UserError(f"is corrupt: it says that it has {entries} entries, and has more", BROKEN)
                # 0x80 opens a pickle of protocol 2 and later, and neither UTF-8 nor a picture; a full stop ends it.
                if len(value) and (value[0], value[-1]) == (0x80, ord(".")):
                    raise UserError(
                        f"holds pickled values, which could run any code: {bytes(key)[:40]!r}",
                        "write pictures as JPEG or PNG and labels as UTF-8",
                    )
            said = bytes(transaction.get(b"num-samples", b""))
    except _package().Error as error:
        raise UserError(f"is no LMDB that can be read: {error}", BROKEN) from error
    if not said:
        raise UserError("has no entry 'num-samples'", "expected are num-samples, image-000000001, label-000000001 ...")
    samples = int(said) if said.isdigit() and len(said) < 19 else 0
    if not 0 < samples <= entries:
        raise UserError(f"num-samples is {said[:40]!r}, of {entries} entries", "it must be the number of pictures")
    return samples


def _size(path: Path) -> int:
    """Returns the bytes of the data file; raises UserError where it is none or consists of holes."""
    data = path / "data.mdb" if path.is_dir() else path
    if not data.is_file():
        locked = (path / "lock.mdb").exists()
        hint = (
            "its lock.mdb alone holds nothing: copy data.mdb too" if locked else "name the folder that holds data.mdb"
        )
        raise UserError(f"{data}: no such file", hint)
    found = data.stat()
    if found.st_size > HUGE and found.st_blocks * 512 * 16 < found.st_size:
        raise UserError(
            f"{data}: of its {found.st_size} bytes only {found.st_blocks * 512} are there, the rest are holes",
            "copy it without them: mdb_copy -c OLD NEW",
        )
    return found.st_size


@functools.lru_cache(maxsize=8)
def _environment(path: str) -> Any:
    """Opened once a process, as LMDB demands. A forked process may go on with it: without locks nothing is shared."""
    return _opened(Path(path))


def _opened(path: Path) -> Any:
    return _package().open(
        str(path), subdir=path.is_dir(), map_size=_size(path), readonly=True, lock=False, create=False,
        readahead=False, meminit=False,
    )  # fmt: skip


def _package() -> Any:
    try:
        import lmdb
    except ImportError:
        raise UserError(
            "an LMDB is read by the package lmdb, which is not installed", "pip install -e '.[lmdb]'"
        ) from None
    return lmdb
