"""Short ways for tests to begin, train and read runs; all through what the hosts themselves use."""

from pathlib import Path
from typing import Any

from torch import Tensor

from distributed import checkpoint, config, record, saved
from distributed.hosts import job
from distributed.hosts.job import Job
from distributed.run import directory_of, resolve
from distributed.world import World


def begin(tmp_path: Path, stores: Path, task: str, *words: str, name: str = "run") -> Job:
    """Returns a run that is prepared and begun, but has not learned anything."""
    run = resolve(task, config.from_words([*words, "log.tensorboard=false"]), tmp_path / "runs")
    one = Job(run, job.prepare(run, stores), directory_of(tmp_path / "runs", run, name))
    job.begin(one)
    return one


def work(world: World, plain: dict[str, Any]) -> None:
    """Trains a job on one rank of a pool."""
    job.work(Job.from_plain(plain), world)


def train(tmp_path: Path, stores: Path, task: str, *words: str, name: str = "run") -> Job:
    one = begin(tmp_path, stores, task, *words, name=name)
    job.work(one, World())
    return one


def rows(one: Job) -> list[dict[str, Any]]:
    """Returns the recorded rows without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if not record.is_measured(k)}
        for row in record.read(one.directory / record.METRICS)
    ]


def parameters(one: Job, which: str = "last") -> dict[str, Tensor]:
    return checkpoint.chosen(one.directory, which).model


def summary(one: Job) -> dict[str, Any]:
    told = saved.summary(one.directory)
    assert told is not None, "the run is not finished"
    return told


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Returns the largest difference between two sets of named tensors, inf where names or shapes differ."""
    if a.keys() != b.keys() or any(a[n].shape != b[n].shape for n in a):
        return float("inf")
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a if a[n].numel())


def work_until(world: World, plain: dict[str, Any], step: int | None) -> None:
    """Trains a job on one rank of a pool, until a step where one is given: a checkpoint is saved there."""
    done = [0]

    def show(row: dict[str, Any]) -> None:
        done[0] = row["step"]

    job.work(Job.from_plain(plain), world, show, lambda: step is not None and done[0] >= step)
