"""What a run leaves behind while it trains: metrics.jsonl, TensorBoard events, and metrics.parquet at the end."""

import contextlib
import importlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from distributed import durable

METRICS = "metrics.jsonl"
log = logging.getLogger("whipray")


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is recorded, and how often."""

    every: Annotated[int, Ge(1)] = 50  # optimizer steps between two rows of training figures
    tensorboard: bool = True  # write TensorBoard events beside metrics.jsonl


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity: such a figure is written as null."""
    return value if math.isfinite(value) else None


class Recorder:
    """Writes what the loop tells, one row a progress. Belongs to rank 0."""

    def __init__(self, directory: Path, settings: Log, resumed_at: int | None) -> None:
        """Rows after the step `resumed_at` are dropped: they will be written again."""
        self.path = directory / METRICS
        self._torn = False  # a row could not be written, or only half of it
        self._drop_after(resumed_at if resumed_at is not None else -1)
        self.board: _Board | None = None
        with self._losing_a_board():
            self.board = _Board(directory, resumed_at) if settings.tensorboard else None

    def _drop_after(self, step: int) -> None:
        if self.path.exists():
            kept = [row for row in read(self.path) if row["step"] <= step]
            durable.write(self.path, "".join(f"{durable.to_json(row)}\n" for row in kept))

    def add(
        self, kind: str, epoch: int, step: int, metrics: dict[str, float], speed: dict[str, float]
    ) -> dict[str, Any]:
        """Records one row and returns it; a row that cannot be written stops no training."""
        row = {"kind": kind, "epoch": epoch, "step": step, "time": round(time.time(), 3)}
        row |= {name: finite(value) for name, value in {**metrics, **speed}.items()}
        if kind != "checkpoint":
            self._append(durable.to_json(row))
        if self.board and metrics:
            with self._losing_a_board():
                self.board.scalars(f"{kind}/", step, {**metrics, **speed})
        return row

    def _append(self, line: str) -> None:
        try:
            durable.append(self.path, f"\n{line}" if self._torn else line)
            self._torn = False
        except OSError as error:
            self._torn = True
            log.warning("%s: a row was lost: %s", self.path, error.strerror)

    @contextlib.contextmanager
    def _losing_a_board(self) -> Iterator[None]:
        """TensorBoard events that cannot be written are given up, with a warning; the training goes on."""
        try:
            yield
        except OSError as error:
            self.board = None
            log.warning("TensorBoard events are lost from here on: %s", error.strerror or error)

    def close(self) -> None:
        """Writes out what is still held back; to be called however the run ends."""
        if self.board:
            with self._losing_a_board():
                self.board.close()

    def conclude(self, values: dict[str, Any], figures: dict[str, float], best_step: int) -> None:
        """Ends the record of a finished run: HParams for TensorBoard, and one Parquet table of all rows."""
        if self.board:
            with self._losing_a_board():
                self.board.hparams(values, figures, best_step)
        import pyarrow as pa
        from pyarrow import parquet

        rows = read(self.path)
        names = dict.fromkeys(name for row in rows for name in row)
        table = pa.table({name: [row.get(name) for row in rows] for name in names})
        sink = pa.BufferOutputStream()
        parquet.write_table(table, sink)
        durable.write(self.path.with_suffix(".parquet"), sink.getvalue().to_pybytes())


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl; lines that a crash or a full disk has torn are left out."""
    return rows_of(path.read_text("utf-8", errors="replace"))


def rows_of(text: str) -> list[dict[str, Any]]:
    """Returns the rows of some lines of a metrics.jsonl."""
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


class _Board:
    """TensorBoard events, written without torch or TensorFlow."""

    def __init__(self, directory: Path, resumed_at: int | None) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # Modules of generated classes, which no type checker sees.
        self.events: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self.summaries: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        self.writer = EventFileWriter(str(directory), max_queue_size=100, flush_secs=10)
        if resumed_at is not None:
            # TensorBoard forgets what an earlier process wrote after this step.
            log = self.events.SessionLog
            start = log(status=log.START)
            self.writer.add_event(self.events.Event(wall_time=time.time(), step=resumed_at + 1, session_log=start))

    def _add(self, step: int, summary: Any) -> None:
        self.writer.add_event(self.events.Event(wall_time=time.time(), step=step, summary=summary))

    def scalars(self, prefix: str, step: int, values: dict[str, float]) -> None:
        value = self.summaries.Summary.Value
        tagged = [value(tag=f"{prefix}{name}", simple_value=number) for name, number in values.items()]
        self._add(step, self.summaries.Summary(value=tagged))

    def hparams(self, values: dict[str, Any], figures: dict[str, float], best_step: int) -> None:
        """Settings and final figures, as TensorBoard's HParams table takes them."""
        from tensorboard.plugins.hparams import summary_v2

        plain = {n: v if isinstance(v, (bool, int, float, str)) else str(v) for n, v in values.items()}
        self._add(0, summary_v2.hparams_pb(plain))
        self.scalars("best/", best_step, figures)

    def close(self) -> None:
        self.writer.close()
