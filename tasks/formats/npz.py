"""NumPy's .npz: named arrays in a zip archive, read without pickles."""

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from tasks.errors import UserError
from tasks.formats.idx import BROKEN, MAX_DEFLATE

MAX_BYTES = 2**34  # of one array, unpacked
FAULTS = (  # what zipfile and numpy raise for broken files; SyntaxError and TokenError are of its parser of headers
    OSError, ValueError, EOFError, RuntimeError, SyntaxError, tokenize.TokenError, struct.error,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read(path: Path, names: Sequence[str], max_bytes: int = MAX_BYTES) -> list[np.ndarray]:
    """Reads the arrays of these names, in their order.

    Raises UserError naming the file for an absent array, one of over `max_bytes`, one of Python objects, and for a
    broken file. No more memory is taken than the file can fill.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            missing = [name for name in names if name not in found]
            if missing:
                raise UserError(
                    f"{path}: no array '{missing[0]}'; there are {', '.join(found)[:300]}", "this is another file"
                )
            return [_array(path, archive, name, max_bytes) for name in names]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "check task.source.path") from None
    except FAULTS as error:
        raise UserError(f"{path}: cannot be read: {error}", BROKEN) from error


def _array(path: Path, archive: zipfile.ZipFile, name: str, max_bytes: int) -> np.ndarray:
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > max_bytes:
        raise UserError(f"{path}: {info.filename} unpacks to over {max_bytes} bytes", "this is another file")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without measure
        raise UserError(
            f"{path}: {info.filename} is packed by method {info.compress_type}", "write it with numpy.savez"
        )
    with archive.open(info) as file:
        header = HEADERS.get(npy.read_magic(file))
        if header is None:
            raise UserError(f"{path}: {info.filename} is of an unknown version", "write it with numpy.savez")
        shape, _, dtype = header(file)
        promised = math.prod(shape) * dtype.itemsize  # of Python's integers, which do not overflow
        # numpy takes the memory before it reads
        whole = file.tell() + promised == info.file_size <= path.stat().st_size * MAX_DEFLATE
        if not whole and not dtype.hasobject:
            raise UserError(f"{path}: {info.filename} promises {promised} bytes, which it does not hold", BROKEN)
    with archive.open(info) as file:
        return npy.read_array(file, allow_pickle=False)
