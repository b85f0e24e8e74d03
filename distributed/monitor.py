"""What the machine does while it trains, once a second; and what the figures say about where a training is held up.

Costs a thread that wakes once a second. No torch at the top: the hint is told by a process that trains nothing.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import psutil

from distributed.resources import cpu_count

if TYPE_CHECKING:
    import torch

INTERVAL = 1.0  # seconds between two looks
MIB = 2**20
log = logging.getLogger("whipray")


class Monitor:
    """Looks at cores, memory and this process's device in a thread of its own, until it is closed."""

    def __init__(self, device: "torch.device", interval: float = INTERVAL) -> None:
        self.sources: dict[str, Callable[[], float]] = {**_of_process(), **_of_device(device)}
        self.interval = interval
        self.sums: dict[str, tuple[float, int]] = {}
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._look, name="monitor", daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.ended.wait(self.interval):
            for name, source in list(self.sources.items()):
                try:
                    value = float(source())
                except Exception as error:  # noqa: BLE001 - drivers raise classes of their own; a figure less is no failure
                    log.debug("%s cannot be had: %s", name, error)
                    del self.sources[name]
                    continue
                with self.lock:
                    total, count = self.sums.get(name, (0.0, 0))
                    self.sums[name] = total + value, count + 1

    def take(self) -> dict[str, float]:
        """Returns the mean of each figure since the last call; empty where nothing was looked at meanwhile."""
        with self.lock:
            sums, self.sums = self.sums, {}
        return {name: round(total / count, 1) for name, (total, count) in sums.items()}

    def close(self) -> None:
        self.ended.set()
        self.thread.join()


def _of_process() -> dict[str, Callable[[], float]]:
    process = psutil.Process()
    before = [time.monotonic(), sum(process.cpu_times()[:2])]

    def cores() -> float:
        now, used = time.monotonic(), sum(process.cpu_times()[:2])
        share = (used - before[1]) / max(now - before[0], 1e-9) / cpu_count()
        before[:] = now, used
        return 100 * share

    return {
        "cpu": cores,
        "memory_mib": lambda: process.memory_info().rss / MIB,
        "host_memory_mib": lambda: psutil.virtual_memory().used / MIB,
    }


def _of_device(device: "torch.device") -> dict[str, Callable[[], float]]:
    """NVML's figures, where nvidia-ml-py is installed, and torch's own peak; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    import torch

    return {
        "gpu": lambda: torch.cuda.utilization(device),
        "gpu_memory_mib": lambda: torch.cuda.device_memory_used(device) / MIB,
        "gpu_peak_mib": lambda: torch.cuda.max_memory_allocated(device) / MIB,
        "gpu_watt": lambda: torch.cuda.power_draw(device) / 1000,
        "gpu_celsius": lambda: torch.cuda.temperature(device),
    }


# ---- what holds a training up

ENOUGH = 20.0  # seconds of training before anything is said
MUCH = 0.2  # share of a step's time that is worth a word
IDLE = 50.0  # percent: a device that is busy less, though its data are there, waits for this program


class Course:
    """Where the time of a training went, from the rows of its metrics.jsonl."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """`values`: the run's settings by dotted name."""
        self.values = values
        self.step: int | None = None
        self.steps: dict[str, int] = {}
        self.sums: dict[str, float] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        since, self.step = self.step, row["step"]
        if row["kind"] != "train" or since is None:
            return
        for name, value in row.items():
            if value is not None and (name.startswith("time/") or name == "gpu"):
                self.sums[name] = self.sums.get(name, 0.0) + value * (row["step"] - since)
                self.steps[name] = self.steps.get(name, 0) + row["step"] - since

    def hint(self) -> str | None:
        """Returns what holds the training up and which setting helps; None where nothing does, or it is too early."""
        seconds = sum(total for name, total in self.sums.items() if name.startswith("time/")) / 1e3
        if seconds < ENOUGH:
            return None
        return hint({name: total / self.steps[name] for name, total in self.sums.items()}, self.values)


def hint(figures: Mapping[str, float], values: Mapping[str, Any]) -> str | None:
    """Returns one sentence on what holds a training up, and the settings that help; None where nothing does.

    `figures`: `time/<part>` in milliseconds a step, `gpu` in percent where it is known; `values`: the run's settings.
    """
    parts = {name: value for name, value in figures.items() if name.startswith("time/")}
    whole = sum(parts.values())
    if not whole:
        return None
    data, exchange = parts.get("time/data", 0.0) / whole, parts.get("time/communication", 0.0) / whole
    if data > MUCH and data >= exchange:
        return f"the training waits for data, {data:.0%} of its time: {_or(_for_data(values))}"
    if exchange > MUCH:
        return f"the workers wait for each other, {exchange:.0%} of the time: {_or(_for_exchange(values))}"
    if figures.get("gpu", 100.0) < IDLE:
        return f"the device is busy {figures['gpu']:.0f} % of the time, though data are there: {_or(_for_host(values))}"
    return None


def _for_data(values: Mapping[str, Any]) -> list[str]:
    helps = []
    if values.get("data.prefetch") == 0:
        helps.append("data.prefetch=2 makes batches ahead")
    if values.get("data.pictures") == "encoded":
        helps.append("data.pictures=decoded spares the decoding where rows are pictures")
    if values.get("data.resident") == "never":
        helps.append("data.resident=auto keeps small data on the device")
    return [*helps, "a cheaper transform, or more cores for each worker, help"]


def _for_exchange(values: Mapping[str, Any]) -> list[str]:
    helps = ["a larger data.batch_size means fewer exchanges", "fewer resources.workers may be as fast"]
    if values.get("parallel.compress") == "none":
        helps.insert(0, "parallel.compress=bfloat16 halves what is exchanged")
    return helps


def _for_host(values: Mapping[str, Any]) -> list[str]:
    helps = ["a larger data.batch_size gives it more to do at once"]
    if values.get("precision.compile") == "no":
        helps.append("precision.compile=reduce-overhead starts its work in fewer calls")
    return helps


def _or(helps: list[str]) -> str:
    return "; or ".join(helps)
