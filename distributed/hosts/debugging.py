"""What helps to look into a training while it goes on: anomalies of autograd, a profile, what filled the memory."""

import contextlib
import logging
import os
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from distributed import durable
from distributed.analysis import replay
from distributed.analysis.machine import memory
from distributed.hosts.retries import classify
from distributed.loop import Progress
from distributed.run import Run
from distributed.saved import Saved
from distributed.world import World
from tasks.errors import RunFailed
from tasks.task import Facts

log = logging.getLogger("whipray")
PROFILE, TABLE, MEMORY, SNAPSHOT = "profile", "table.txt", "memory.txt", "memory.pickle"
PATIENCE = 20.0  # seconds that a second look at a failed step may take: the other ranks wait for rank 0 to end
ROWS = 20  # operators of the table


def watched(
    progresses: Generator[Progress, None, None], run: Run, directory: Path, world: World
) -> Generator[Progress, None, None]:
    """Yields what the loop tells. What is switched on for the loop is off again between two of its steps."""
    profile = Profile(directory / PROFILE, world.device) if run.train.profile and world.rank == 0 else None
    with contextlib.closing(progresses):
        try:
            while True:
                with _anomalies(run), _memory(run, directory, world):
                    progress = next(progresses, None)
                if progress is None:
                    return
                if profile:
                    profile.see(progress)
                yield progress
        finally:
            if profile:
                profile.close()


@contextlib.contextmanager
def _anomalies(run: Run) -> Iterator[None]:
    if not run.train.detect_anomaly:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")
        with torch.autograd.set_detect_anomaly(True):
            yield


def look_again(run: Run, facts: Facts, store: Path, directory: Path, error: RunFailed, pace: float) -> None:
    """Adds to an error of numbers that are not finite the first tensor that was not: executes the step again.

    `pace` is the seconds that a step took; where it would take longer than `PATIENCE`, whipray replay is left to the
    user, as it is where anything is in the way.
    """
    step = getattr(error, "step", None)
    if step is None:
        return
    found = Saved(directory, run, facts)
    try:
        begun = replay.begin(found, store, step)
        if (begun.before + 1) * begun.ranks.size * pace > PATIENCE:
            return
        odd = replay.replay(found, begun).not_finite
    except Exception as other:  # noqa: BLE001 - what ended the run is told, whatever becomes of the second look
        log.debug("the step could not be executed again: %s", other)
        return
    if odd:
        error.add_note(f"the first that is not finite in step {step}: {odd}")


class Profile:
    """Traces the steps between the first two rows of training figures; those before are the warm-up."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.began = 0  # steps done when the trace began
        self.under_way: Any = None
        self.done = False

    def see(self, progress: Progress) -> None:
        """Begins or ends the trace, where the loop has just told of training figures."""
        if progress.kind != "train" or self.done:
            return
        if self.under_way:
            self._finish(progress.step)
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it tells every start and stop, and that there is no GPU
        from torch import profiler

        activities = [profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(profiler.ProfilerActivity.CUDA)
        self.began = progress.step
        self.under_way = profiler.profile(activities=activities)
        self.under_way.start()

    def _finish(self, step: int) -> None:
        profile, self.under_way, self.done = self.under_way, None, True
        profile.stop()
        self.folder.mkdir(exist_ok=True)
        trace = self.folder / f"steps-{self.began}-{step}.json"
        profile.export_chrome_trace(str(trace))
        sort = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=sort, row_limit=ROWS, max_name_column_width=40)
        durable.write(self.folder / TABLE, f"steps {self.began} to {step}; the trace is {trace}\n{table}\n")

    def close(self) -> None:
        """Ends what is under way; a training that is too short for a profile is warned of."""
        if self.under_way:
            self.under_way.stop()
            self.under_way = None
        if not self.done:
            log.warning("too few steps for a profile: it needs two rows of training figures; take a smaller log.every")
            self.done = True


@contextlib.contextmanager
def _memory(run: Run, directory: Path, world: World) -> Iterator[None]:
    """Where memory runs out, writes down what took it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's are of the latter
        if classify(None, error) == "memory":
            with contextlib.suppress(OSError):  # of a full disk, say: the cause itself is what must be told
                durable.write(directory / MEMORY, _summary(run, world, error))
                error.add_note(f"{directory / MEMORY} says what took it; precision.recompute=LAYER saves some too")
            if world.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(directory / SNAPSHOT))
        raise


def _summary(run: Run, world: World, error: BaseException) -> str:
    import psutil

    free, total = memory()
    own = psutil.Process().memory_info().rss
    settings = ("data.batch_size", "data.micro_batch_size", "precision.dtype", "precision.recompute", "data.resident")
    lines = [
        f"rank {world.rank} of {world.size} on {world.device}: {error}", "",
        *(f"{name}={run.values[name]}" for name in settings if name in run.values), "",
        f"host: this process {own / 1e9:.2f} GB, free {free / 1e9:.2f} of {total / 1e9:.2f} GB",
    ]  # fmt: skip
    if world.device.type == "cuda":
        lines += ["", torch.cuda.memory_summary(world.device), f"{SNAPSHOT}: open it at https://pytorch.org/memory_viz"]
    return "\n".join(lines) + "\n"
