"""Follows what a run records while another process trains it."""

import time
from pathlib import Path
from typing import Any

from distributed.record import METRICS, rows_of


class Rows:
    """The rows that are added to a run's metrics.jsonl from now on."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / METRICS
        self.began = time.time()
        self.identity, self.offset = 0, 0

    def new(self) -> list[dict[str, Any]]:
        """Returns the rows that came since the last call; a half-written one waits for the next."""
        if not self.path.exists():
            return []
        identity = self.path.stat().st_ino
        if identity != self.identity:  # a resumed run rewrites the file, without the rows that it will write again
            self.identity, self.offset = identity, 0
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [row for row in rows_of(whole.decode(errors="replace")) if row["time"] >= self.began]
