"""Where figures go beside metrics.jsonl: TensorBoard, MLflow, Weights & Biases, or what a package adds.

A package adds its own by an entry point of the group `whipray.writers`: a name, and `module:Class` of a class that is
called as `Class(directory, resumed_at)` and does what `Writer` says.
"""

import contextlib
import importlib
import importlib.util
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tasks.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import numpy as np

# name -> (where, package that it needs, how to get it)
OURS = {
    "tensorboard": ("distributed.writers.tensorboard:TensorBoard", "tensorboard", "pip install tensorboard"),
    "mlflow": ("distributed.writers.mlflow:MLflow", "mlflow", "pip install -e '.[mlflow]'"),
    "wandb": ("distributed.writers.wandb:WeightsAndBiases", "wandb", "pip install -e '.[wandb]'"),
}
MOST_WAITING = 1000  # calls that a slow writer may lag behind
PATIENCE = 30.0  # seconds that a writer gets to finish when the run ends
log = logging.getLogger("whipray")


class Writer(Protocol):
    """Writes what a run tells, in one thread, in order. Constructed as `Class(directory, resumed_at)`.

    `directory` is the run's; `resumed_at` is the step at which the run goes on, None where it begins: what was written
    of later steps will be written again. One that knows how may also have `graph(definition)`: bytes of a GraphDef.
    """

    def settings(self, values: Mapping[str, Any]) -> None:
        """Every setting of the run by its dotted name, once at the beginning."""
        ...

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None: ...

    def images(self, tag: str, step: int, pictures: "list[np.ndarray]") -> None:
        """Pictures (height, width, 3) uint8."""
        ...

    def text(self, tag: str, step: int, markdown: str) -> None: ...

    def histogram(self, tag: str, step: int, counts: "np.ndarray", edges: "np.ndarray") -> None:
        """Counts (N,) float64 of the bins between edges (N + 1,) float64."""
        ...

    def close(self) -> None:
        """Writes out what is still held back."""
        ...


def listed() -> dict[str, str]:
    """Returns every writer by name, and where it is: `module:Class`."""
    return {point.name: point.value for point in entry_points(group="whipray.writers")} | {
        name: where for name, (where, _, _) in OURS.items()
    }


def check(names: Iterable[str]) -> None:
    """Raises UserError for writers that are not there, or whose package is not installed; imports none of ours."""
    known = listed()
    for name in names:
        if name not in known:
            raise UserError(f"log.writers={name}: there is no such writer", did_you_mean(name, known))
        package = OURS[name][1] if name in OURS else known[name].partition(":")[0].partition(".")[0]
        if importlib.util.find_spec(package) is None:
            hint = OURS[name][2] if name in OURS else f"install the package that brings {known[name]}"
            raise UserError(f"log.writers={name}: the package '{package}' is not installed", hint)


def opened(name: str, directory: Path, resumed_at: int | None) -> Writer:
    """Returns the writer of that name for a run; raises whatever its package raises."""
    module, _, cls = listed()[name].partition(":")
    return getattr(importlib.import_module(module), cls)(directory, resumed_at)


class Behind:
    """A writer in a thread of its own: importing, connecting and writing hold up no training, and end none."""

    def __init__(self, name: str, make: Callable[[], Writer]) -> None:
        self.name, self.lost = name, False
        self.calls: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(MOST_WAITING)
        self.thread = threading.Thread(target=self._write, args=(make,), name=f"writer {name}", daemon=True)
        self.thread.start()

    def do(self, method: str, *arguments: Any) -> None:
        """Has the writer do something later; what it cannot do is left out with a warning."""
        if self.lost:
            return
        try:
            self.calls.put_nowait((method, arguments))
        except queue.Full:
            self._give_up(f"it is {MOST_WAITING} rows behind")

    def _write(self, make: Callable[[], Writer]) -> None:
        try:
            writer = make()
            while call := self.calls.get():
                if not self.lost:
                    getattr(writer, call[0])(*call[1])
            writer.close()
        except Exception as error:  # noqa: BLE001 - code of others, a full disk, a server that went away: not the run's end
            words = str(error).strip().splitlines()
            self._give_up(f"{type(error).__name__}: {words[0] if words else ''}")

    def _give_up(self, why: str) -> None:
        if not self.lost:
            self.lost = True
            log.warning("%s gets nothing from here on: %s; metrics.jsonl has it all", self.name, why)

    def close(self) -> None:
        """Waits until all is written, for half a minute at most."""
        with contextlib.suppress(queue.Full):  # the thread is stuck, as the next lines will find
            self.calls.put(None, timeout=PATIENCE)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            self._give_up(f"it has not written all within {PATIENCE:g} s")
