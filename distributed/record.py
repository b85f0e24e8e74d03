"""What a run leaves behind while it trains: metrics.jsonl, what the writers make of it, metrics.parquet at the end."""

import contextlib
import functools
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from distributed import durable, writers
from tasks.errors import UserError

if TYPE_CHECKING:
    import numpy as np

METRICS = "metrics.jsonl"
log = logging.getLogger("whipray")


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is recorded, and how often."""

    every: Annotated[int, Ge(1)] = 50  # optimizer steps between two rows of training figures
    tensorboard: bool = True  # write TensorBoard events beside metrics.jsonl
    writers: tuple[str, ...] = ()  # what else is told: mlflow, wandb, or what a package brings
    machine: bool = True  # look once a second at cores, memory and device
    images: Annotated[int, Ge(0)] = 8  # first rows of validation shown with their predictions after each; 0: none
    histograms: bool = False  # of weights and gradients, after each validation
    graph: bool = False  # the network's operations, for TensorBoard's Graphs
    flops: bool = False  # count the operations of a step, which costs one, and estimate how well the device is used
    peak_tflops: Annotated[float, Gt(0)] | None = None  # what one device can do; none: known of NVIDIA's common ones

    @property
    def told(self) -> tuple[str, ...]:
        """The names of all writers."""
        return ("tensorboard",) * self.tensorboard + tuple(dict.fromkeys(self.writers))


# Columns that depend on the machine and the moment, and not on what is learned; so do those that begin with "time/".
MEASURED = frozenset({
    "time", "samples_per_second", "cpu", "memory_mib", "host_memory_mib", "gpu", "gpu_memory_mib", "gpu_peak_mib",
    "gpu_watt", "gpu_celsius", "tflops", "mfu",
})  # fmt: skip


def is_measured(column: str) -> bool:
    return column in MEASURED or column.startswith("time/")


def check(settings: Log) -> None:
    """Raises UserError for what cannot be recorded: a writer that is not there, or something that nobody would get."""
    if "tensorboard" in settings.writers:
        raise UserError("log.writers=tensorboard: TensorBoard has a setting of its own, log.tensorboard",
                        "leave it out of log.writers")  # fmt: skip
    writers.check(settings.writers)
    if settings.graph and not settings.tensorboard:
        raise UserError("log.graph=true: only TensorBoard shows graphs", "log.tensorboard=true")
    if settings.histograms and not settings.told:
        raise UserError("log.histograms=true: there is nobody to be told of them",
                        "log.tensorboard=true, or log.writers=mlflow")  # fmt: skip
    if settings.peak_tflops and not settings.flops:
        raise UserError("log.peak_tflops is not used: operations are not counted", "log.flops=true")


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity: such a figure is written as null."""
    return value if math.isfinite(value) else None


class Recorder:
    """Writes what the loop tells, one row a progress. Belongs to rank 0."""

    def __init__(
        self, directory: Path, settings: Log, resumed_at: int | None, values: Mapping[str, Any] | None = None
    ) -> None:
        """Rows after the step `resumed_at` are dropped: they will be written again. `values`: the run's settings."""
        self.path = directory / METRICS
        self._torn = False  # a row could not be written, or only half of it
        self._drop_after(resumed_at if resumed_at is not None else -1)
        self.writers = [
            writers.Behind(name, functools.partial(writers.opened, name, directory, resumed_at))
            for name in settings.told
        ]
        self._values = dict(values or {})  # told with the first figures: a writer's import would delay the first step

    def _drop_after(self, step: int) -> None:
        if self.path.exists():
            kept = [row for row in read(self.path) if row["step"] <= step]
            durable.write(self.path, "".join(f"{durable.to_json(row)}\n" for row in kept))

    def add(
        self, kind: str, epoch: int, step: int, metrics: dict[str, float], measured: dict[str, float]
    ) -> dict[str, Any]:
        """Records one row and returns it; one that cannot be written stops no training.

        `metrics` are what was learned, `measured` how fast and on what.
        """
        row = {"kind": kind, "epoch": epoch, "step": step, "time": round(time.time(), 3)}
        row |= {name: finite(value) for name, value in {**metrics, **measured}.items()}
        if kind != "checkpoint":
            self._append(durable.to_json(row))
        if metrics:
            if self._values:
                self._tell("settings", self._values)
                self._values = {}
            self._tell("scalars", kind, step, {**metrics, **measured})
        return row

    def images(self, tag: str, step: int, pictures: "list[np.ndarray]") -> None:
        """Shows pictures (height, width, 3) uint8."""
        self._tell("images", tag, step, pictures)

    def text(self, tag: str, step: int, markdown: str) -> None:
        self._tell("text", tag, step, markdown)

    def histogram(self, tag: str, step: int, counts: "np.ndarray", edges: "np.ndarray") -> None:
        """Shows counts (N,) of the bins between edges (N + 1,)."""
        self._tell("histogram", tag, step, counts, edges)

    def graph(self, definition: bytes) -> None:
        """Shows a GraphDef, which TensorBoard alone can do."""
        for writer in self.writers:
            if writer.name == "tensorboard":
                writer.do("graph", definition)

    def _tell(self, method: str, *arguments: Any) -> None:
        for writer in self.writers:
            writer.do(method, *arguments)

    def _append(self, line: str) -> None:
        try:
            durable.append(self.path, f"\n{line}" if self._torn else line)
            self._torn = False
        except OSError as error:
            self._torn = True
            log.warning("%s: a row was lost: %s", self.path, error.strerror)

    def close(self) -> None:
        """Writes out what is still held back; to be called however the run ends."""
        for writer in self.writers:
            writer.close()

    def conclude(self, figures: dict[str, float], best_step: int) -> None:
        """Ends the record of a finished run: figures of its best checkpoint, and one Parquet table of all rows."""
        self._tell("scalars", "best", best_step, figures)
        import pyarrow as pa
        from pyarrow import parquet

        rows = read(self.path) if self.path.exists() else []  # somebody may have taken it away
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
