"""One trial of a sweep: a run of its own in the sweep's directory, trained in this process whoever asks for it.

What it tells, it has saved before: a trial that is stopped, killed or begun again goes on from where it last told.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distributed import record, saved
from distributed.config import Given, Givens
from distributed.evaluation import objective
from distributed.hosts import job
from distributed.hosts.job import Attempt, Job
from distributed.run import Run, resolve
from distributed.tuning.schedulers import Decision
from distributed.tuning.sweep import Outcome
from distributed.world import World
from search_spaces.dimensions import Value
from tasks.errors import RunFailed

# epoch, objective, figures, whether the training ends there -> does it go on?
Report = Callable[[int, float | None, dict[str, Any], bool], Decision]
NOT_FIGURES = ("kind", "epoch", "step", "time", "samples_per_second")
SWEEP = "sweep"  # origin of what is set for all trials because they are trials
# Thousands of trials keep what it takes to go on, and the best. What a trial tells, it has saved: it waits for that.
DEFAULTS = {"checkpoint.keep": Given(1, SWEEP), "checkpoint.background": Given(False, SWEEP)}


@dataclass(frozen=True)
class Setup:
    """What all trials of a sweep share."""

    task: str
    given: Givens  # what was given beside the search space
    origins: Mapping[str, str]  # where the search space names each of its settings
    runs: Path
    stores: Path
    directory: Path  # of the sweep
    summary: bool = False  # nothing is chosen among the trials, so that each may look at its test split

    def run(self, settings: Mapping[str, Value]) -> Run:
        """Returns the run of one point of the space; raises UserError naming the line of the space that is wrong."""
        drawn = {name: Given(value, f"search space {self.origins[name]}") for name, value in settings.items()}
        return resolve(self.task, {**DEFAULTS, **self.given, **drawn}, self.runs)

    def folder(self, trial: str) -> Path:
        return self.directory / "trials" / trial

    def to_plain(self) -> dict[str, Any]:
        """Returns the setup as plain data for another process."""
        paths = {name: str(getattr(self, name)) for name in ("runs", "stores", "directory")}
        given = {name: [one.value, one.origin] for name, one in self.given.items()}
        return {"task": self.task, "given": given, "origins": dict(self.origins), "summary": self.summary, **paths}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Setup":
        given = {name: Given(*one) for name, one in plain["given"].items()}
        runs, stores, directory = (Path(plain[name]) for name in ("runs", "stores", "directory"))
        return cls(plain["task"], given, plain["origins"], runs, stores, directory, plain["summary"])


@dataclass(frozen=True)
class Ended:
    """How a trial ended."""

    outcome: Outcome
    metrics: dict[str, Any]  # of validation at its best; empty: those that it reported
    seconds: float  # of this attempt
    error: str | None = None


def work(
    setup: Setup, trial: str, settings: Mapping[str, Value], world: World, report: Report,
    stopped: Callable[[], bool] = lambda: False,
) -> Ended | None:  # fmt: skip
    """Trains a trial from its newest checkpoint to its end, or until `report` says stop.

    Returns None where `stopped()` cut it off. Every rank calls it; rank 0 reports. A loss that is not finite and a full
    memory are a failed trial; raises UserError and whatever else goes wrong.
    """
    began = time.monotonic()
    run = setup.run(settings)
    one = Job(run, prepared(run, setup.stores), setup.folder(trial))
    with job.owned(one.directory) if world.rank == 0 else contextlib.nullcontext():
        if world.rank == 0:
            job.begin(one)
        world.agree(True)  # a barrier: nobody looks for checkpoints before the run has begun
        try:
            ended = _train(one, world, report, stopped, setup.summary)
        except (RunFailed, MemoryError, RuntimeError) as error:
            if not isinstance(error, RunFailed) and not _is_memory(error):
                raise
            if world.rank == 0:
                saved.write_failure(one.directory, world.rank, error)
            return Ended("failed", {}, time.monotonic() - began, f"{type(error).__name__}: {error}".splitlines()[0])
    return ended and Ended(ended[0], ended[1], time.monotonic() - began)


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _train(
    one: Job, world: World, report: Report, stopped: Callable[[], bool], summary: bool
) -> tuple[Outcome, dict[str, Any]] | None:
    with contextlib.closing(Attempt(one, world)) as attempt:
        name, _ = objective(one.run, attempt.store.facts)

        def tell(row: dict[str, Any], last: bool) -> bool:
            shown = {key: value for key, value in row.items() if key not in NOT_FIGURES}
            return report(-(-row["step"] // attempt.steps_per_epoch), shown[name], shown, last) == "stop"

        halt = False
        if attempt.resume and world.rank == 0:  # an earlier attempt has saved this, but perhaps could not tell any more
            ended = attempt.end() is not None
            rows = _judged(one)
            for row in rows:
                halt = tell(row, ended and row is rows[-1])
        if not world.agree(halt)[0]:
            halt = _iterate(attempt, tell, stopped)
        end = attempt.end()
        if end and summary:
            figures = job.judge(attempt, end)
            return "done", {**figures["validation"], "test": figures["test"]}
        if end:
            return "done", _conclude(attempt, end.step, end.state["loop"]["best_step"])
        return ("stopped", {}) if halt else None


def _iterate(attempt: Attempt, tell: Callable[[dict[str, Any], bool], bool], stopped: Callable[[], bool]) -> bool:
    """Iterates the loop; returns whether the trial was told to stop."""
    waiting: dict[int, dict[str, Any] | None] = {}  # step -> row of a validation whose checkpoint has not come yet
    with contextlib.closing(attempt.progresses()) as progresses:
        for progress, row in progresses:
            if progress.kind == "validation":
                waiting[progress.step] = row  # rows are with rank 0 only
            if progress.kind == "checkpoint" and progress.step in waiting:
                latest, last = waiting.pop(progress.step), attempt.is_last(progress)
                if attempt.world.agree(latest is not None and tell(latest, last))[0]:
                    return True
            elif stopped():
                progress.request("stop")
    return False


def _judged(one: Job) -> list[dict[str, Any]]:
    path = one.directory / record.METRICS
    return [row for row in record.read(path) if row["kind"] == "validation"] if path.exists() else []


def _conclude(attempt: Attempt, steps: int, best_step: int | None) -> dict[str, Any]:
    """Marks the trial as finished; returns its figures at its best. The test split is the winner's alone."""
    if attempt.world.rank != 0:
        return {}
    rows = _judged(attempt.job)
    best = next((row for row in rows if row["step"] == best_step), rows[-1])
    figures = {name: value for name, value in best.items() if name not in NOT_FIGURES}
    finite = {name: float("nan") if value is None else value for name, value in figures.items()}
    attempt.conclude(steps, best["step"], {"validation": finite}, None)
    return figures


_prepared: dict[tuple[Any, ...], Path] = {}


def prepared(run: Run, stores: Path) -> Path:
    """Returns the store of a trial; in one process it is looked for, and checked, once for all trials that share it."""
    data = run.data
    split = data.split, data.split_seed, data.validation, data.folds, data.fold
    key = (run.name, run.task.source, *split, data.pictures, data.short_side, stores)
    if key not in _prepared or not _prepared[key].exists():
        _prepared[key] = job.prepare(job.alone(run), stores)
    return _prepared[key]
