"""A parsed row as bytes and back, before there are facts: plain values and arrays, whatever a task's row() gives."""

import json
from collections.abc import Mapping, Set
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from tasks.errors import UserError

HEAD = 8  # bytes that say how long the JSON is


def pack(row: Mapping[str, Any]) -> bytes:
    """Returns a row as bytes: JSON, with bytes and arrays beside it. No code is in it, as it would be in a pickle.

    Raises UserError for a value that is neither text, bytes, a number, an array, nor a list, set or dict of these.
    """
    blobs: list[bytes] = []
    head = json.dumps({name: _plain(value, name, blobs) for name, value in row.items()}).encode()
    return b"".join([len(head).to_bytes(HEAD, "little"), head, *blobs])


def unpack(data: bytes | memoryview, names: Set[str] | None = None) -> dict[str, Any]:
    """Returns a row as it was packed, or only some of its columns."""
    view = memoryview(data)
    end = HEAD + int.from_bytes(view[:HEAD], "little")
    told = json.loads(bytes(view[HEAD:end]))
    position = end

    def blob(size: int) -> memoryview:
        nonlocal position
        position += size
        return view[position - size : position]

    row = {}
    for name, value in told.items():  # in the order in which they were written: JSON keeps it
        if names is None or name in names:
            row[name] = _restored(value, blob)
        else:
            position += _size(value)
    return row


def _size(value: Any) -> int:
    """Bytes that stand beside the JSON for a value."""
    if isinstance(value, list):
        return sum(map(_size, value))
    if not isinstance(value, dict):
        return 0
    [(kind, told)] = value.items()
    if kind == "array":
        return told[2]
    if kind == "bytes":
        return told
    return _size(told) if kind in ("tuple", "set", "dict") else 0


def _plain(value: Any, column: str, blobs: list[bytes]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, (int, float)) and not isinstance(value, np.generic):
        return value
    if isinstance(value, (bytes, bytearray)):
        blobs.append(bytes(value))
        return {"bytes": len(value)}
    if isinstance(value, PurePath):
        return {"path": str(value)}
    if isinstance(value, list):
        return [_plain(part, column, blobs) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(part, column, blobs) for part in value]}
    if isinstance(value, Set):
        return {"set": [_plain(part, column, blobs) for part in value]}
    if isinstance(value, Mapping):
        return {"dict": [[_plain(key, column, blobs), _plain(part, column, blobs)] for key, part in value.items()]}
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        array = np.asarray(value)
        if array.dtype.kind in "biufcUSmM":
            blobs.append(array.tobytes())
            return {"array": [array.dtype.str, array.shape, array.nbytes]}
        return _plain(array.tolist(), column, blobs)
    raise UserError(
        f"column '{column}' holds a {type(value).__name__}, which cannot be kept",
        "let row() give text, numbers, arrays, or lists and dicts of these",
    )


def _restored(value: Any, blob: Any) -> Any:
    if isinstance(value, list):
        return [_restored(part, blob) for part in value]
    if not isinstance(value, dict):
        return value
    [(kind, told)] = value.items()
    if kind == "bytes":
        return bytes(blob(told))
    if kind == "array":
        dtype, shape, size = told
        array = np.frombuffer(blob(size), np.dtype(dtype)).reshape(shape).copy()  # theirs to change
        return array if array.shape else array[()]
    if kind == "path":
        return Path(told)
    if kind == "dict":
        return {_restored(key, blob): _restored(part, blob) for key, part in told}
    parts = [_restored(part, blob) for part in told]
    return tuple(parts) if kind == "tuple" else set(parts)
