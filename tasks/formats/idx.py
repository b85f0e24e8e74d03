"""IDX, the format of MNIST: a header of 32-bit sizes, big-endian, and one array; plain or gzipped."""

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tasks.errors import UserError

# The third byte of a file -> what its numbers are (LeCun, "The MNIST database", section "file formats").
TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_DIMENSIONS = 8
MAX_DEFLATE = 1032  # bytes that one byte of deflate can unpack to at most (zlib's technical notes)
BROKEN = "download the file again; a broken or partial download is the usual cause"


def read(path: Path) -> np.ndarray:
    """Reads one array, in this machine's byte order, with the shape that the header says.

    Raises UserError naming the file for anything that is not exactly one whole array. No more is unpacked than the
    header promises, and no more is promised than a file of this size can hold.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not packed:
                return _array(path, file, size)
            with gzip.GzipFile(fileobj=file) as unpacked:
                return _array(path, unpacked, size * MAX_DEFLATE)  # type: ignore[arg-type]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "check the path in task.source.path") from None
    except EOFError:
        raise UserError(f"{path}: the gzip file is truncated", BROKEN) from None
    except (OSError, zlib.error) as error:  # a wrong checksum is an OSError without a strerror
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}", BROKEN) from error


def _array(path: Path, file: BinaryIO, limit: int) -> np.ndarray:
    """Reads header and array of a file that cannot hold more than `limit` bytes."""
    magic = file.read(4)
    if not magic:
        raise UserError(f"{path}: is empty", BROKEN)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        backwards = len(magic) == 4 and magic[2:] == b"\0\0" and magic[1] in TYPES
        reason = "its header is little-endian" if backwards else f"it begins with {magic!r}"
        raise UserError(
            f"{path}: is no IDX file: {reason}", "expected two zero bytes, a type and a number of dimensions"
        )
    if magic[2] not in TYPES:
        raise UserError(f"{path}: unknown IDX type 0x{magic[2]:02x}", f"known are {', '.join(map(hex, TYPES))}")
    dimensions = magic[3]
    if not 0 < dimensions <= MAX_DIMENSIONS:
        raise UserError(f"{path}: has {dimensions} dimensions", f"expected 1..{MAX_DIMENSIONS}")
    sizes = file.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise UserError(f"{path}: ends within its header", BROKEN)
    dtype = np.dtype(TYPES[magic[2]])
    shape = tuple(np.frombuffer(sizes, ">u4").tolist())
    promised = math.prod(shape) * dtype.itemsize  # of Python's integers, which do not overflow
    header = 4 + len(sizes)
    if header + promised > limit:
        backwards = np.frombuffer(sizes, "<u4").tolist()
        swapped = header + math.prod(backwards) * dtype.itemsize <= limit
        hint = (
            f"its sizes look little-endian ({' x '.join(map(str, backwards))}); IDX is big-endian"
            if swapped
            else BROKEN
        )
        raise UserError(f"{path}: is truncated: its header promises {promised} bytes, more than it can hold", hint)
    content = bytearray(promised)
    found, view = 0, memoryview(content)
    while found < promised and (count := file.readinto(view[found:])):  # type: ignore[attr-defined]
        found += count
    if found < promised:
        raise UserError(f"{path}: is truncated: its header promises {promised} bytes, {found} follow", BROKEN)
    if file.read(1):  # at the end of a gzip file this also compares the checksum
        raise UserError(f"{path}: has bytes after the {promised} that its header promises", BROKEN)
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)
