"""JSON of unknown origin: only what the standard allows (RFC 8259), and no more of it than is sensible."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from tasks.errors import UserError

MAX_BYTES = 2 << 30  # LVIS, the largest annotation file in use, has 1.1 GB
MAX_DEPTH = 32  # brackets within brackets; COCO has 5
MAX_DIGITS = 19  # of an integer: what 64 bits hold
# A string, closed or not: it always matches to its end, so that a file of quotes takes no quadratic time.
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # of UTF-16: characters above U+FFFF have two
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
BROKEN = "check the file; a broken or partial download is the usual cause"


def read(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Reads a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises UserError naming the file, and line and column where it can, for what is no JSON; for NaN and Infinity, a key
    that stands twice in an object, half a surrogate pair, integers of over 19 digits, nesting deeper than 32, and over
    `max_bytes` bytes.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file", "check the path")
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", "check the path and its permissions") from error
    if len(raw) > max_bytes:
        raise UserError(f"{path}: has over {max_bytes} bytes", "split it into smaller files")
    try:
        text = raw.decode(json.detect_encoding(raw))
        del raw  # annotations of COCO have half a gigabyte
        _refuse_depth(text.encode())
        found = json.loads(text, object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant)
        if HALF_PAIR.search(text):
            json.dumps(found, ensure_ascii=False).encode()  # a half without the other fits no file and no message
        return found
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}", BROKEN) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not {error.encoding}: {error.reason} at byte {error.start}", BROKEN) from None
    except ValueError as error:
        raise UserError(f"{path}: {error}", "mend the file, or write it anew with its program") from None


def _refuse_depth(raw: bytes) -> None:
    brackets = np.frombuffer(STRING.sub(b"", raw).translate(None, NO_BRACKETS), np.uint8)
    opening = (brackets == ord("[")) | (brackets == ord("{"))
    if brackets.size and np.cumsum(np.where(opening, 1, -1)).max() > MAX_DEPTH:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} brackets")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object, {str(found)[:80]}")
    return found


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"holds an integer of {len(digits)} digits, {digits[:10]}..., at most {MAX_DIGITS} are read")
    return int(digits)


def _constant(name: str) -> float:
    raise ValueError(f"holds {name}, which is no JSON number")
