"""`whipray verify`: the whole life of a task in miniature, with the ways to run it compared, in a folder of its own."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distributed import checkpoint, record, saved, weights
from distributed.analysis import verify as looks
from distributed.analysis.verify import Check, Checks, tried
from distributed.config import Given, Givens
from distributed.data.store import Store
from distributed.evaluation import Evaluator
from distributed.export.export import export
from distributed.hosts import job
from distributed.hosts.job import Job
from distributed.model import Model
from distributed.processes import die_with_parent, portable
from distributed.resources import Workers, cpu_count
from distributed.run import Run, resolve
from distributed.saved import Saved
from distributed.world import World, joined
from tasks.errors import UserError

SIZES = (2, 3)  # ranks that are compared with one
SEEDS = 3  # of trainings whose agreement is a statistical one
GRACE = 5.0  # seconds that the other ranks get to end by themselves after one has failed
# Small enough for seconds, uneven enough to show what goes wrong with uneven shares: 3 batches of 11, 11 and 10 rows.
SMALL = {
    "data.batch_size": 12, "data.limit": 32, "train.epochs": 2, "log.every": 1, "log.tensorboard": False,
    "log.images": 0,
    "checkpoint.every": 2, "resources.gpu": 0.0, "resources.workers": 1, "resources.host": "local", "data.prefetch": 0,
    "precision.compile": "no",  # each of the many processes would compile for itself
}  # fmt: skip
KEPT = ("data.batch_size", "data.limit")  # what a user may set otherwise
PARTS = 5  # rows of a micro-batch


def small(task: str, given: Givens, runs: Path) -> Run:
    """Returns the run that is rehearsed: as it was asked for, but small, on the CPU.

    Raises UserError for settings that do not resolve, and for initial weights that are not there.
    """
    asked = resolve(task, given, runs)  # in full, so that what is wrong is found
    if asked.train.init_from:
        weights.check(asked.train.init_from, asked.runs)
    fixed = {n: Given(v, "verify") for n, v in SMALL.items() if not (n in KEPT and n in given)}
    return resolve(task, {n: v for n, v in given.items() if n != "train.steps"} | fixed, runs)


def verify(run: Run, stores: Path) -> Iterator[Check]:
    """Yields one check after another. `run` is a small one; nothing of it is kept but the prepared data."""
    import torch._dynamo  # optimizers do: here once, instead of in every process for itself

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # processes are forked from this one: nothing parallel may have run in it
    try:
        with tempfile.TemporaryDirectory(prefix="whipray-verify-") as folder:
            yield from _verify(run, stores, Path(folder))
    finally:
        torch.set_num_threads(threads)


def _verify(run: Run, stores: Path, folder: Path) -> Iterator[Check]:
    given = sum(origin not in ("default", "recipe", "verify") for origin in run.origins.values())
    yield Check("the settings resolve", f"{len(run.values)} settings, {given} given", ok=True)
    began = time.monotonic()
    prepared: list[Path] = []

    def prepare() -> Checks:
        prepared.append(_on_ranks(1, lambda world: job.prepare(run, stores))[0])
        store = Store(prepared[0], dict(run.task.fields))
        rows = ", ".join(f"{len(store.rows(split)):,} {split}" for split in ("train", "validation", "test"))
        return [Check("the data are prepared", f"{rows} rows; {time.monotonic() - began:.1f} s", ok=True)]

    yield from tried("the data are prepared", prepare)
    if not prepared:
        return
    path = prepared[0]
    double = replace(run, precision=replace(run.precision, dtype="float64"))

    def look(function: Callable[[Run, Store], Checks], one: Run) -> Callable[[], Checks]:
        return lambda: _on_ranks(1, lambda world: function(one, Store(path, dict(one.task.fields))))[0]

    step = tried("a step", look(looks.one_step, run))
    yield from step
    if step[0].name == "a step":  # none can be done: all that follows would say the same
        return
    yield from tried("the order of the rows in a batch does not matter", look(looks.order_of_rows, double))
    yield from tried("a row is augmented the same in any batch", look(looks.keyed_draws, run))
    yield from tried("rows without targets are predicted", look(looks.predictions, run))
    life = _Life(run, path, folder)
    yield from tried("killed and gone on with", life.killed)
    yield from tried("the network can be exported", life.exported)
    ways = _Life(double, path, folder)
    yield from tried("micro-batches are the whole batch", ways.micro_batches)
    for size in SIZES:
        yield from tried(f"{size} ranks learn what one learns", lambda size=size: ways.ranks(size))
    yield from tried("an evaluation is the same on 1, 2 and 3 ranks", ways.evaluations)


class _Life:
    """Trainings of one run in several ways, each in a folder of its own, made once."""

    def __init__(self, run: Run, store: Path, folder: Path) -> None:
        self.run, self.store = run, store
        self.folder = Path(tempfile.mkdtemp(dir=folder))

    def _job(self, name: str, run: Run | None = None) -> Job:
        one = Job(run or self.run, self.store, self.folder / name)
        job.begin(one)
        return one

    def _trained(self, size: int, micro_batch_size: int | None = None, seed: int = 0) -> Job:
        """Returns a training that has been done to its end; `seed` is added to that of the run."""
        name = f"{size}-{micro_batch_size}-{seed}"
        run = replace(
            self.run,
            data=replace(self.run.data, micro_batch_size=micro_batch_size or self.run.data.micro_batch_size),
            train=replace(self.run.train, seed=self.run.train.seed + seed),
            resources=replace(self.run.resources, workers=Workers(size)),
        )
        one = Job(run, self.store, self.folder / name)
        if saved.summary(one.directory) is None:
            one = self._job(name, run)
            _on_ranks(size, lambda world: job.work(one, world))
        return one

    # ---- the checks

    def killed(self) -> Checks:
        """A training that is killed, and goes on from its checkpoint, ends like one that is not."""
        whole, part = self._trained(1), self._job("killed")

        def kill() -> bool:
            if any(part.directory.glob("checkpoints/step-*")):
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        how = _exit_code(lambda: job.work(part, World(), stopped=kill))
        if how != -signal.SIGKILL:
            return [Check("killed and gone on with", f"the training ended before it was killed ({how})", ok=False)]
        left, _ = checkpoint.newest(part.directory)
        _on_ranks(1, lambda world: job.work(part, world))
        ours, theirs = checkpoint.chosen(whole.directory, "last"), checkpoint.chosen(part.directory, "last")
        equal = {
            "weights": looks.same(ours.model, theirs.model), "optimizer": looks.same(ours.optimizer, theirs.optimizer),
            "record": _rows(whole) == _rows(part),
        }  # fmt: skip
        differ = ", ".join(what for what, same in equal.items() if not same)
        steps = f"kill -9 with a checkpoint of step {left.step if left else 0} of {ours.step}"
        return [Check("killed and gone on with, it ends the same to the bit",
                      f"{steps}: " + (f"other {differ}" if differ else "equal weights, optimizer and record"),
                      ok=not differ)]  # fmt: skip

    def exported(self) -> Checks:
        """What `whipray export` writes says what the network says."""
        name, one = "the network can be exported", self._trained(1)
        found = Saved(one.directory, self.run, Store(self.store, dict(self.run.task.fields)).facts)

        def write(world: World) -> Check:
            try:
                made = export(found, self.store, "torch", self.folder / "model.pt2")
            except UserError as error:  # not every network is a function of tensors: a detector takes lists of them
                return Check(name, f"it cannot: {error.message}; {error.hint}", ok=None)
            return Check(name, f"torch: differs by {made.difference:.1e} on {made.rows} rows", ok=True)

        return _on_ranks(1, write)

    def micro_batches(self) -> Checks:
        return [
            self._compared(
                f"micro-batches of {PARTS} rows are the whole batch", lambda seed: self._trained(1, PARTS, seed)
            )
        ]

    def ranks(self, size: int) -> Checks:
        return [self._compared(f"{size} ranks learn what one learns", lambda seed: self._trained(size, seed=seed))]

    def _compared(self, name: str, other: Callable[[int], Job]) -> Check:
        """Compares with one process: to rounding, or statistically where the task says why it cannot be exact."""
        one, another = self._trained(1), other(0)
        by = looks.apart(
            checkpoint.chosen(one.directory, "last").model, checkpoint.chosen(another.directory, "last").model
        )
        told = looks.exact(name, "weights", by, self.run)
        if told.ok is not None:
            return told
        pairs = [(self._loss(self._trained(1, seed=seed)), self._loss(other(seed))) for seed in range(SEEDS)]
        agree, words = looks.agreement(pairs)
        return Check(name, f"{words}; not exact: {self.run.task.invariance}", ok=agree)

    def _loss(self, one: Job) -> float:
        """The mean training loss of the last epoch."""
        losses = [row["loss"] for row in _rows(one) if row["kind"] == "train" and row["loss"] is not None]
        return statistics.fmean(losses[-one.steps_per_epoch :])

    def evaluations(self) -> Checks:
        """Every metric is the same on any number of ranks, of which some may have no rows."""
        weights = checkpoint.chosen(self._trained(1).directory, "last").model
        tiny = replace(self.run, data=replace(self.run.data, limit=2))
        checks = []
        for run, name in ((self.run, "an evaluation is the same on 1, 2 and 3 ranks"),
                          (tiny, "also where a rank has no rows")):  # fmt: skip

            def judge(world: World, run: Run = run) -> dict[str, float]:
                store = Store(self.store, dict(run.task.fields))
                model = Model.build(run, store.facts, World())
                model.restore(weights, "verify")
                return Evaluator(run, store, "validation", world)(model.plain)

            figures = {size: _on_ranks(size, judge) for size in (1, *SIZES)}
            [alone] = figures[1]
            odd = [n for n in alone for told in figures.values() for one in told if not looks.equal(alone[n], one[n])]
            words = f"they differ: {', '.join(dict.fromkeys(odd))}" if odd else ", ".join(alone) or "no figures"
            checks.append(Check(name, words, ok=not odd))
        return checks


def _rows(one: Job) -> list[dict[str, Any]]:
    """The record of a training, without what depends on the clock."""
    rows = record.read(one.directory / record.METRICS)
    return [{name: value for name, value in row.items() if not record.is_measured(name)} for row in rows]


# ---- processes


def _on_ranks(size: int, function: Callable[[World], Any]) -> list[Any]:
    """Calls a function in so many forked processes that share a world; returns what each rank returned.

    Raises what the first failing one raised.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="whipray-verify-") as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        ranks = [
            context.Process(target=_rank, args=(function, rank, size, folder, pipes[rank][1])) for rank in range(size)
        ]
        for process in ranks:
            process.start()
        try:
            return _answers(ranks, [receiving for receiving, _ in pipes])
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
            for receiving, sending in pipes:
                receiving.close()
                sending.close()


def _answers(ranks: list[Any], pipes: list[Any]) -> list[Any]:
    told: dict[int, Any] = {}
    deadline = float("inf")
    while len(told) < len(ranks) and time.monotonic() < deadline:
        waiting = [rank for rank in range(len(ranks)) if rank not in told]
        awaited = [pipes[rank] for rank in waiting] + [ranks[rank].sentinel for rank in waiting]
        multiprocessing.connection.wait(awaited, timeout=1.0)
        for rank in waiting:
            if pipes[rank].poll():
                told[rank] = pipes[rank].recv()
            elif not ranks[rank].is_alive():
                told[rank] = RuntimeError(f"rank {rank} ended with exit code {ranks[rank].exitcode}")
            if isinstance(told.get(rank), BaseException):
                deadline = min(deadline, time.monotonic() + GRACE)
    failures = [one for one in told.values() if isinstance(one, BaseException)]
    if failures:
        raise min(failures, key=saved.is_echo)
    return [told[rank] for rank in range(len(ranks))]


def _rank(function: Callable[[World], Any], rank: int, size: int, folder: str, tell: Any) -> None:
    die_with_parent()
    torch.set_num_threads(_threads(size))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks of one machine have nothing to say beyond it
    try:
        if size == 1:
            tell.send(function(World()))
            return
        with joined(rank, size, torch.device("cpu"), f"file://{folder}/meeting") as world:
            tell.send(function(world))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent must hear of it and raise it
        tell.send(portable(error))


def _threads(ranks: int) -> int:
    """Few: what is rehearsed is small, and threads that wait for one another cost more than they bring."""
    return max(1, cpu_count() // (2 * ranks))


def _exit_code(function: Callable[[], Any]) -> int | None:
    """Calls a function in a forked process; returns how that ended."""

    def target() -> None:
        die_with_parent()
        torch.set_num_threads(_threads(1))
        function()

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    try:
        process.join()
    except BaseException:  # an interrupt that reached this process alone
        process.kill()
        raise
    return process.exitcode
