"""The sweep's journal: one JSON object a line, only ever added to, each line on the disk before the sweep goes on.

A crash leaves the last line whole, torn or absent; whoever opens the journal again drops a torn one. The open file
is locked, so that two processes never drive one sweep. Numbers that JSON does not have are {"float": "nan"}.
"""

import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any

from distributed import durable
from tasks.errors import UserError

Record = dict[str, Any]


class Journal:
    """An open journal; `create` begins one, `open` goes on with one."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"another process is running the sweep in {path.parent}", "wait for it, or stop it"
            ) from None

    @classmethod
    def create(cls, path: Path, header: Record) -> "Journal":
        """Begins a journal with its first line; raises UserError where there is one already."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            raise UserError(f"there is a sweep already: {path}", "go on with it, or choose another --name") from None
        journal = cls(path, descriptor)
        journal.append(header)
        durable.sync_folder(path.parent)
        return journal

    @classmethod
    def open(cls, path: Path) -> tuple["Journal", list[Record]]:
        """Returns the journal, ready to be added to, and its records; a torn last line is cut off the file."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
        except OSError as error:
            raise UserError(
                f"cannot open the journal {path}: {error.strerror}", "is this the folder of a sweep?"
            ) from None
        journal = cls(path, descriptor)
        try:
            content = path.read_bytes()
            records, whole = parse(content, path)
            if whole < len(content):
                os.ftruncate(descriptor, whole)
                durable.OPERATIONS.sync(descriptor)
        except BaseException:
            journal.close()
            raise
        return journal, records

    def append(self, record: Record) -> None:
        """Adds one line and returns when it is on the disk; what could not be written whole is taken back."""
        size = os.fstat(self._descriptor).st_size
        try:
            durable.append(self.path, json.dumps(encode(record), allow_nan=False, separators=(",", ":")), sync=True)
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise

    def close(self) -> None:
        """Gives the journal free for others; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read(path: Path) -> list[Record]:
    """Returns the records of a journal that somebody else may be writing."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the journal {path}: {error.strerror}", "is this the folder of a sweep?") from None
    return parse(content, path)[0]


def parse(content: bytes, path: Path) -> tuple[list[Record], int]:
    """Returns the records, and how many bytes they fill: less than there are where the last line is torn."""
    records: list[Record] = []
    whole = 0
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        last = number == len(lines) or not any(lines[number:])
        record: Any = None
        try:
            record = json.loads(line, object_hook=decode, parse_constant=refuse)
            torn = number == len(lines) or not isinstance(record, dict)
        except (ValueError, TypeError, RecursionError):  # UnicodeDecodeError is a ValueError
            torn = True
        if torn and last:
            return records, whole
        if torn:
            raise UserError(
                f"{path}:{number}: the journal is damaged", "restore it, or begin a sweep of another --name"
            )
        records.append(record)
        whole += len(line) + 1
    return records, whole


def encode(value: Any) -> Any:
    """Returns the value with numbers that JSON does not have written as {"float": text}."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def decode(value: dict[str, Any]) -> Any:
    return float(value["float"]) if value.keys() == {"float"} else value


def refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")
