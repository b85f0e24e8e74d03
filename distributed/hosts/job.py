"""What every process of a run does, whoever started it: go on where the run stands, iterate the loop, conclude."""

import contextlib
import dataclasses
import functools
import logging
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from distributed import catalogue, checkpoint, config, durable, saved
from distributed.alive import MARK
from distributed.config import Given
from distributed.data import parts, remote
from distributed.data.broken import OnError
from distributed.data.derive import Wanted, derived
from distributed.data.store import Store
from distributed.evaluation import Evaluator, objective
from distributed.hosts import debugging
from distributed.hosts.watch import Watch
from distributed.loop import Progress, train
from distributed.model import Model
from distributed.processes import Mapper
from distributed.record import Recorder, check, finite
from distributed.run import Run, differences, resolve
from distributed.world import World
from tasks.errors import RunFailed, UserError

log = logging.getLogger("whipray")
Show = Callable[[dict[str, Any]], None]  # shows one row of metrics.jsonl to a person
LOCK = ".lock"
PACKAGES = ("torch", "torchvision", "ray", "pyarrow", "numpy", "whipray")


@dataclass(frozen=True)
class Job:
    """A run, and where it lies: all that another process needs to take part in it."""

    run: Run
    store: Path
    directory: Path
    on_error: OnError = "skip"  # what becomes of broken rows, where a worker prepares on its own node

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        rows = Store(self.store, dict(self.run.task.fields)).epoch_rows("train", self.run.data.most)
        return -(-rows // self.run.data.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training, unless it stops early."""
        total = self.run.train.epochs * self.steps_per_epoch
        return min(total, self.run.train.steps or total)

    def to_plain(self) -> dict[str, Any]:
        """Returns the job as plain data, so that a worker need not unpickle a user's classes."""
        given = {name: [given.value, given.origin] for name, given in self.run.givens().items()}
        return {
            "task": self.run.name, "given": given, "runs": str(self.run.runs),
            "store": str(self.store), "directory": str(self.directory), "on_error": self.on_error,
        }  # fmt: skip

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Job":
        given = {name: Given(value, origin) for name, (value, origin) in plain["given"].items()}
        run = resolve(plain["task"], given, Path(plain["runs"]))
        return cls(run, Path(plain["store"]), Path(plain["directory"]), plain["on_error"])


def prepare(
    run: Run, stores: Path, *, on_error: OnError = "skip", progress: parts.Progress | None = None,
    mapper: Mapper | None = None,
) -> Path:  # fmt: skip
    """Returns the store of a run's task, prepared now where it is not there yet; `stores` is a folder or a URI.

    Where the run wants its pictures decoded or reduced, it is the store made of that one.
    """
    check(run.log)
    shown = progress or (lambda stage, done, total: None)
    name = catalogue.folder_name(run.name)
    path = remote.prepare(run.task, name, run.data, stores, on_error=on_error, progress=shown, mapper=mapper)
    wanted = Wanted.of(run.data)
    if wanted is None:
        return path
    made = derived(path, wanted, workers=run.data.workers, progress=shown)
    remote.use(made, is_copy=remote.is_copy(path))  # it goes when its parent may go
    return made


def alone(run: Run) -> Run:
    """Returns the run so that one process prepares its data, as a worker of Ray's must.

    The other cores are other workers', and a process with the threads of Ray's libraries is not safe to fork.
    """
    return dataclasses.replace(run, data=dataclasses.replace(run.data, workers=1))


@contextlib.contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Holds a run directory while this process trains it; raises UserError where another one does.

    The lock goes with the process, however it ends.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be made: {error.strerror}", "give another folder by --runs") from None
    there = set(directory.iterdir())
    lock = FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=1)  # a look at the run's state holds it for a moment
    except Timeout:
        raise UserError(
            f"{directory}: another process is training this run", "wait for it, or give another --name"
        ) from None
    try:
        yield
    except UserError:
        _withdraw(directory, there)
        raise
    finally:
        lock.release()


def _withdraw(directory: Path, there: set[Path]) -> None:
    """Removes what a run has written before it was refused; one that has learned anything stays, as does all else."""
    if any(directory.glob("checkpoints/step-*")):
        return
    for path in set(directory.iterdir()) - there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not there:
        directory.rmdir()


def begin(job: Job) -> dict[str, Any] | None:
    """Writes what identifies the run; returns its summary where it is finished already.

    Raises UserError where the directory holds a run of other settings.
    """
    written = job.directory / saved.CONFIG
    if written.exists():
        before = {name: given.value for name, given in config.from_yaml(written).items()}
        changed = differences(job.run, before)
        if changed:
            raise UserError(f"{job.directory}: this run has other settings: " + "; ".join(changed),
                            "give the same settings to go on, or another --name")  # fmt: skip
        if saved.environment(job.directory).get("store", job.store.name) != job.store.name:
            raise UserError(f"{job.directory}: the raw data, or the code that reads them, changed since this run began",
                            "train on the new data under another --name")  # fmt: skip
        summary = saved.summary(job.directory)
        if summary and (summary["stopped_early"] or before.get("train.epochs", 0) >= job.run.train.epochs):
            return summary
        (job.directory / saved.SUMMARY).unlink(missing_ok=True)
    saved.clear_marks(job.directory)
    facts = Store(job.store, dict(job.run.task.fields)).facts
    saved.begin(job.directory, job.run, facts, {**environment(), "store": job.store.name})
    return None


def work(job: Job, world: World, show: Show = lambda row: None, stopped: Callable[[], bool] = lambda: False) -> None:
    """Trains the run to its end, or until `stopped()`; every rank calls it. A finished run has a summary.json.

    Whatever goes wrong is also written down in the run directory.
    """
    with saved.naming_failures(job.directory, world.rank), contextlib.closing(Attempt(job, world)) as attempt:
        show({"kind": "begin", "step": attempt.resume.step if attempt.resume else 0})
        with contextlib.closing(attempt.progresses()) as progresses:
            try:
                for progress, row in progresses:
                    if row:
                        show(row)
                    if stopped() or saved.is_asked_to_stop(job.directory):
                        progress.request("stop")
            except RunFailed as error:
                attempt.look_again(error)
                raise
        end = attempt.end()
        if end:
            judge(attempt, end)


class Attempt:
    """One process's part in a run, from where the run stands: what it records, and how fast it is."""

    def __init__(self, job: Job, world: World) -> None:
        """Raises UserError where checkpoints are there, but none is whole."""
        self.job, self.world = job, world
        remote.use(job.store)
        self.store = Store(job.store, dict(job.run.task.fields))
        self.resume, passed_over = checkpoint.newest(job.directory)
        if world.rank == 0:
            for reason in passed_over:
                log.warning("passed over: %s", reason)
                saved.note(job.directory, f"passed over: {reason}")
            if passed_over and self.resume is None:
                raise UserError(f"{job.directory}: no complete checkpoint is left", "begin anew under another --name")
            if self.resume and self.resume.task != job.run.name:
                raise UserError(f"{self.resume.path}: is of the task {self.resume.task}", "give another --name")
            checkpoint.repair(job.directory, self.resume)
            where = f"goes on from step {self.resume.step}" if self.resume else "begins"
            saved.note(job.directory, f"{where}, {world.size} worker{'s' * (world.size > 1)} on {world.device}")
        step = self.resume.step if self.resume else None
        _same_everywhere(world, step)
        MARK.step = step or 0
        self.held = saved.Held(job.directory) if world.rank == 0 else None
        self.recorder = Recorder(job.directory, job.run.log, step, job.run.values) if world.rank == 0 else None
        self.watch = Watch(job.run, self.store, world, self.recorder) if self.recorder else None
        self.clock = Clock(job.run.data.batch_size, step or 0)
        self.seconds, self.speed = 0.0, 0.0  # of this attempt, rows a second; known at its end
        self.steps_per_epoch = job.steps_per_epoch

    def progresses(self) -> Generator[tuple[Progress, dict[str, Any] | None]]:
        """Iterates the loop; with what it tells comes, on rank 0, the row that was recorded of it."""
        run, directory = self.job.run, self.job.directory
        loop = train(run, self.store, directory, self.world, self.resume)
        with contextlib.closing(debugging.watched(loop, run, directory, self.world)) as told:
            for one in told:
                MARK.step = one.step
                if self.held:
                    self.held.check()
                row = None
                if self.watch and one.kind != "alive":
                    row = self.watch.record(one, self.clock.speed(one.step))
                    self.watch.look(one)
                yield one, row
        self.seconds, self.speed = self.clock.overall()

    def look_again(self, error: RunFailed) -> None:
        """Adds to an error what a second look at its step shows."""
        seconds, _ = self.clock.overall()
        pace = seconds / max(MARK.step - self.clock.first, 1)
        if self.world.rank == 0:
            debugging.look_again(
                self.job.run, self.store.facts, self.job.store, self.job.directory, error, pace
            )  # fmt: skip

    def end(self) -> checkpoint.Checkpoint | None:
        """Returns the last checkpoint of a run that is at its end: all steps done, or stopped early."""
        newest, _ = checkpoint.newest(self.job.directory)
        return newest if newest and self._is_end(newest.step, newest.state) else None

    def is_last(self, saved: Progress) -> bool:
        """Returns whether a checkpoint that the loop has just told of is the run's last."""
        assert saved.checkpoint is not None, saved.kind
        try:
            return self._is_end(saved.step, checkpoint.state(saved.checkpoint))
        except FileNotFoundError:  # a newer one has taken its place already
            return False

    def _is_end(self, step: int, state: dict[str, Any]) -> bool:
        return step >= self.job.total_steps or state["loop"]["stopped_early"]

    def conclude(
        self, steps: int, best_step: int, figures: dict[str, dict[str, float]], parameters: int | None
    ) -> None:
        """Writes the summary that marks a run as finished; `figures` are those of its best checkpoint."""
        assert self.recorder is not None, "rank 0 concludes"
        run, epochs = self.job.run, -(-steps // self.steps_per_epoch)
        self.recorder.conclude({f"{s}/{n}": v for s, values in figures.items() for n, v in values.items()}, best_step)
        told = {
            "run": str(self.job.directory), "task": run.name, "epochs": epochs, "steps": steps,
            "best_step": best_step, "stopped_early": steps < self.job.total_steps,
            "objective": objective(run, self.store.facts)[0],
            "higher_is_better": objective(run, self.store.facts)[1],
            "metrics": {split: {n: finite(v) for n, v in values.items()} for split, values in figures.items()},
            "seconds": round(self.seconds, 3), "samples_per_second": round(self.speed, 1), "parameters": parameters,
            "workers": self.world.size, "device": str(self.world.device),
        }  # fmt: skip
        durable.write_json(self.job.directory / saved.SUMMARY, told)
        saved.note(self.job.directory, f"finished at step {steps}, best at step {best_step}")

    def close(self) -> None:
        if self.watch:
            self.watch.close()
        if self.recorder:
            self.recorder.close()
        if self.held:
            self.held.close()


def judge(attempt: Attempt, end: checkpoint.Checkpoint) -> dict[str, dict[str, float]]:
    """Returns the figures of the best checkpoint on validation and, this once, on test; rank 0 writes the summary."""
    job, store, world = attempt.job, attempt.store, attempt.world
    try:
        best = checkpoint.chosen(job.directory, "best")
    except UserError as error:
        log.warning("%s; the last checkpoint is judged in its place", error.message)
        best = end
    # As it was learned at the end: what was set free on the way counts among its parameters.
    model = Model.build(job.run, store.facts, World(device=world.device), (end.step - 1) // job.steps_per_epoch)
    model.restore(best.model, str(best.path))
    figures = {split: Evaluator(job.run, store, split, world)(model.plain) for split in ("validation", "test")}
    if world.rank == 0:
        attempt.conclude(
            end.step, best.step, figures, sum(p.numel() for p in model.plain.parameters() if p.requires_grad)
        )
    return figures


class Clock:
    """Wall time and speed of this process's part of a run."""

    def __init__(self, batch_size: int, step: int) -> None:
        self.batch_size, self.first, self.step = batch_size, step, step
        self.began = self.latest = time.monotonic()

    def speed(self, step: int) -> dict[str, float]:
        now = time.monotonic()
        rate = (step - self.step) * self.batch_size / max(now - self.latest, 1e-9)
        if step == self.step:
            return {}
        self.step, self.latest = step, now
        return {"samples_per_second": round(rate, 1)}

    def overall(self) -> tuple[float, float]:
        """Returns seconds, and rows a second, since this process began."""
        seconds = time.monotonic() - self.began
        return seconds, (self.step - self.first) * self.batch_size / max(seconds, 1e-9)


def _same_everywhere(world: World, step: int | None) -> None:
    steps = world.gather(step)
    if len(set(steps)) > 1:
        raise UserError(f"the ranks see different checkpoints: {steps}", "--runs must be a folder that all nodes share")


def environment() -> dict[str, Any]:
    """Returns where and with what this process runs, as environment.json keeps it."""
    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv, "python": platform.python_version(),
        "platform": platform.platform(), "host": platform.node(), "packages": packages,
        "devices": _devices(),
        "git": _git_state(),
    }  # fmt: skip


def _devices() -> list[str]:
    if not torch.cuda.is_initialized():  # asking would set up CUDA in a process that is about to fork
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


@functools.cache
def _git_state() -> dict[str, Any] | None:
    """The commit of the code that runs, and whether it was changed since; None outside a clone."""
    root = Path(__file__).parent.parent
    try:
        commit = subprocess.run(
            ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        state = subprocess.run(
            ["git", "-C", root, "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "changed": bool(state.stdout.strip())}
