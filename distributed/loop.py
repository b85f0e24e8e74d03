"""The training loop: one function that learns a task, whatever process it runs in. The file to read first.

`train` is an iterator: between two of its steps its host records, shows, stops; there are no callbacks. What it
computes depends on the run and never on how many ranks there are (docs/design.md, section 5).
"""

import contextlib
import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from distributed import checkpoint, initial, record, schedules
from distributed.averaging import Average
from distributed.data import planned
from distributed.data.loader import Loader
from distributed.data.order import Plan, seed_of, smallest_portion
from distributed.data.store import Store
from distributed.evaluation import Evaluator, objective
from distributed.model import Model
from distributed.run import Run
from distributed.schedules import Plateaus
from distributed.sync_norm import SyncNorm
from distributed.tally import Tally, Told, failure
from distributed.timing import Times
from distributed.update import ONLY, Updater
from distributed.world import World
from tasks.errors import UserError
from tasks.task import Batch, Task

RESERVED = {"kind", "epoch", "step", "lr"} | record.MEASURED  # columns of metrics.jsonl
log = logging.getLogger("whipray")
TRANSFORM = 1 << 41  # the draws of transform, apart from those of every micro-batch


@dataclass
class Progress:
    """What the loop tells its host, the same on all ranks; the host answers with `request`."""

    kind: Literal["train", "validation", "checkpoint"]
    epoch: int  # finished epochs, or the one under way
    step: int  # optimizer steps done
    metrics: dict[str, float]  # train: losses and lr of the steps since the last one; validation: the figures
    checkpoint: Path | None = None
    wishes: set[str] = field(default_factory=set)
    learning: "Learning | None" = None  # its parts on this rank, for a host that looks at them between two steps

    def request(self, wish: Literal["checkpoint", "stop"]) -> None:
        """Asks for a checkpoint now, or for a checkpoint and the end of the training."""
        self.wishes.add(wish)


@dataclass
class State:
    """All that changes while a run learns, besides tensors: what state.json holds."""

    step: int = 0
    plateaus: Plateaus = field(default_factory=Plateaus)
    best_step: int | None = None
    sums: dict[str, float] = field(default_factory=dict)  # of losses x units since the last train progress
    units: float = 0.0
    stopped_early: bool = False
    averaged: int = 0  # weights that have entered the average
    skipped: int = 0  # steps in a row that were left out because a gradient was not finite

    def to_json(self) -> dict[str, Any]:
        # A diverged objective or sum is a NaN or an infinity, which JSON has not: its repr is read back as it was.
        return {
            "step": self.step, "history": [repr(v) for v in self.plateaus.history], "best_step": self.best_step,
            "sums": {n: repr(v) for n, v in self.sums.items()}, "units": self.units,
            "stopped_early": self.stopped_early, "averaged": self.averaged, "skipped": self.skipped,
        }  # fmt: skip

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "State":
        return cls(
            told["step"], Plateaus([float(v) for v in told["history"]]), told["best_step"],
            {n: float(v) for n, v in told["sums"].items()}, told["units"], told["stopped_early"],
            told["averaged"], told["skipped"],
        )  # fmt: skip


@dataclass
class Learning:
    """What one rank learns with: the parts of its run, and the state that changes."""

    run: Run
    store: Store
    world: World
    loader: Loader
    model: Model
    updater: Updater
    average: Average
    state: State
    tally: Tally
    times: Times
    total: int  # optimizer steps of the whole training, unless it stops early
    began_from: initial.Initial | None = None  # what became of the weights that train.init_from names

    @property
    def plan(self) -> Plan:
        return self.loader.plan

    def rows_of(self, step: int, micro_batch: int) -> list[int]:
        """Returns the rows of one of this rank's micro-batches."""
        epoch, k = divmod(step, self.plan.steps)
        return self.loader.rows_of(epoch, k, micro_batch, self.run.data.micro_batch_size)

    @property
    def factor(self) -> float:
        """What scales every learning rate in the step to come."""
        return schedules.factor(self.run.schedule, self.state.step, self.plan.steps, self.total, self.state.plateaus)


def begin(run: Run, store: Store, world: World, resume: checkpoint.Checkpoint | None) -> Learning:
    """Returns all that a rank needs to learn the run's task, as it stood at a checkpoint or at its beginning.

    Raises UserError for batches that the model or the ranks cannot share, and for what does not fit the checkpoint.
    """
    partners = run.task.partners
    loader = planned.loader(store, "train", run.data, run.train.seed, run.transform, world, partners=partners)
    plan = loader.plan
    _refuse_small_batches(plan, world.size, run.data.micro_batch_size)
    state = State.from_json(resume.state["loop"]) if resume else State()
    if run.parallel.static_graph and world.size > 1 and run.data.micro_batch_size:
        raise UserError("parallel.static_graph: the gradients of micro-batches cannot be accumulated then",
                        "leave out parallel.static_graph or data.micro_batch_size")  # fmt: skip
    run.precision.prepare()
    model = Model.build(run, store.facts, world, state.step // plan.steps)
    _refuse_single_rows(model.learning(), plan, world.size, run)
    began_from = None
    if run.train.init_from and resume is None:
        began_from = initial.begin(run.train.init_from, model.plain, run.runs, world, model.borrowed)
    times = Times(world.device, run.log.every)
    updater = _updater(run, model, world, times)
    average = Average(run.averaging, model.live())
    if resume:
        model.restore(resume.model, str(resume.path))
        average.restore(resume.optimizer, state.averaged)
        slots = {name: tensor for name, tensor in resume.optimizer.items() if name.startswith("optimizer/")}
        updater.restore(slots, resume.state["update"])
    # What was summed before the checkpoint stands with rank 0 alone.
    sums, units = (state.sums, state.units) if world.rank == 0 else ({}, 0.0)
    total = min(run.train.epochs * plan.steps, run.train.steps or run.train.epochs * plan.steps)
    tally = Tally(world, sums, units)
    learning = Learning(run, store, world, loader, model, updater, average, state, tally, times, total, began_from)
    tally.rows_of = learning.rows_of
    return learning


def _updater(run: Run, model: Model, world: World, times: Times) -> Updater:
    return Updater(
        model.wrapped, run.optimizers, run.precision, world, train=run.train, parallel=run.parallel, times=times
    )


def train(
    run: Run, store: Store, directory: Path, world: World, resume: checkpoint.Checkpoint | None
) -> Generator[Progress, None, None]:
    """Learns the run's task, and yields every `log.every` steps, after an evaluation, and after a checkpoint.

    Raises UserError as `begin` does, RunFailed for a loss that is not finite.
    """
    objective(run, store.facts)  # a misspelt one is refused before anything is learned
    learning = begin(run, store, world, resume)
    if learning.began_from and world.rank == 0:
        learning.began_from.write(directory)
    judge = Evaluator(run, store, "validation", world)
    state, plan = learning.state, learning.plan

    while state.step < learning.total and not state.stopped_early:
        factor = learning.factor
        learn(learning)
        state.step += 1
        epoch, within = divmod(state.step, plan.steps)
        boundary = within == 0 or state.step == learning.total  # of an epoch, or of the training
        wishes: set[str] = set()

        if boundary or state.step % run.log.every == 0:
            metrics = _figures(learning, factor)
            yield Progress("train", epoch, state.step, metrics, wishes=wishes, learning=learning)
        if boundary:
            learning.model.share_buffers(world)
            with learning.average.applied():
                metrics = judge(learning.model.plain)
            _judged(run, store, state, metrics)
            yield Progress("validation", epoch, state.step, metrics, wishes=wishes, learning=learning)

        # Only where the host could ask do the ranks need to agree on what it asked.
        asked = boundary or state.step % run.log.every == 0
        stop, save = world.agree("stop" in wishes, "checkpoint" in wishes) if asked else (False, False)
        due = run.checkpoint.every is not None and state.step % run.checkpoint.every == 0
        if boundary or due or stop or save:
            path = _save(learning, directory)
            yield Progress("checkpoint", epoch, state.step, {}, path, wishes)
            stop, _ = world.agree("stop" in wishes, False)
        if stop:
            return


def learn(learning: Learning) -> None:
    """Does optimizer step number `state.step`, which it does not count.

    Every micro-batch of its global batch leaves its gradients, then the parameters move.
    """
    run, world, loader, times = learning.run, learning.world, learning.loader, learning.times
    task, step = run.task, learning.state.step
    epoch, k = divmod(step, loader.plan.steps)
    if k == 0:
        _thaw(learning, epoch)
    times.begin("data")
    world.seed(seed_of(run.train.seed, step, TRANSFORM, world.rank))
    rows, batches = loader.micro_batches(epoch, k, run.data.micro_batch_size)
    units, whole = [float(count) for count in rows], float(len(loader.plan.batch(epoch, k)))
    if type(task).units is not Task.units:  # known only when all of them are there
        batches = list(batches)
        units, whole = _counted(task, batches, world)
    network = learning.model.learning()
    told = []
    for index, (batch, part) in enumerate(zip(batches, units, strict=True)):
        times.begin("forward")
        world.seed(seed_of(run.train.seed, step, index, world.rank))
        update = learning.updater.accumulate(step, part * world.size / whole, last=index == len(rows) - 1)
        with update.sync(), run.precision.autocast(world.device), _naming(learning, index):
            losses = task.step(network, batch, update)
        told.append(({name: loss.detach() for name, loss in losses.items()}, part))
        times.begin("data")
    times.begin("optimizer")
    if learning.updater.apply(step, learning.factor):
        learning.state.skipped = 0
        learning.average.take(step, learning.total)
        learning.tally.add(step, told)
    else:
        _skip(learning, told)
    times.end()


def _thaw(learning: Learning, epoch: int) -> None:
    """Sets free what learns from this epoch on; what has been learned stays as it is."""
    before = learning.model
    learning.model = before.thawed(learning.run, learning.world, epoch)
    if learning.model is not before:
        kept = learning.updater.state()
        learning.updater = _updater(learning.run, learning.model, learning.world, learning.times)
        learning.updater.restore(*kept)


@contextlib.contextmanager
def _naming(learning: Learning, index: int) -> Iterator[None]:
    """Lets whatever is raised inside carry the step, the rank and the rows at which it was."""
    try:
        yield
    except Exception as error:
        step = learning.state.step
        error.__dict__.update(step=step, rank=learning.world.rank, rows=learning.rows_of(step, index))
        raise


def _skip(learning: Learning, told: Told) -> None:
    """Counts a step that was left out; raises RunFailed where there are too many in a row."""
    state = learning.state
    state.skipped += 1
    odd = learning.tally.first_odd([(state.step, told)])
    words = str(odd) if odd else f"a gradient is not finite at step {state.step}"
    if state.skipped > learning.run.train.max_skipped:
        raise failure(f"{words}, {state.skipped} steps in a row", odd or state.step)
    if learning.world.rank == 0:
        log.warning("%s: this step is left out", words)


def _counted(task: Task, batches: list[Batch], world: World) -> tuple[list[float], float]:
    """Returns the units of each micro-batch, and of the whole global batch over all ranks."""
    mine = [float(task.units(batch)) for batch in batches]
    whole = float(world.total(torch.tensor(sum(mine), dtype=world.sums, device=world.device)))
    return mine, max(whole, 1e-9)


def _save(learning: Learning, directory: Path) -> Path:
    """Publishes a checkpoint from rank 0; the other ranks wait until it stands.

    Raises RunFailed where losses or weights are not finite: the last good checkpoint stays the newest.
    """
    run, world, model, state = learning.run, learning.world, learning.model, learning.state
    model.share_buffers(world)
    state.sums, state.units = learning.tally.over_ranks()
    learning.tally.refuse_odd(state.sums)
    if any(world.agree(not learning.updater.is_finite())):
        raise failure(f"weights are not finite at step {state.step}", state.step)
    state.averaged = learning.average.taken
    optimizer, numbers = learning.updater.state()
    if world.rank == 0:
        tensors, live = learning.average.state(model.tensors())
        told = {"loop": state.to_json(), "update": numbers}
        checkpoint.save(
            directory, state.step, run.name, state.best_step, run.checkpoint.keep, tensors, {**optimizer, **live}, told
        )
    world.agree(True)  # a barrier: no rank may report a checkpoint that is not there yet
    return checkpoint.folder_of(directory, state.step)


def _figures(learning: Learning, factor: float) -> dict[str, float]:
    """Returns the mean losses since the last progress, and the learning rates."""
    means = learning.tally.take()
    _refuse_reserved("loss", means, RESERVED if len(means) == 1 else RESERVED | {"loss"})
    rates = {"lr" if n == ONLY else f"lr/{n}": o.lr * factor for n, o in learning.run.optimizers.items()}
    return {"loss": sum(means.values()), **({} if len(means) == 1 else means), **rates}


def _judged(run: Run, store: Store, state: State, metrics: dict[str, float]) -> None:
    """Takes an evaluation into account: is it the best so far, has there been none for too long?"""
    name, higher_is_better = objective(run, store.facts)
    _refuse_reserved("metric", metrics, RESERVED)
    state.plateaus.history.append(metrics[name] if higher_is_better else -metrics[name])
    if state.plateaus.is_best():
        state.best_step = state.step
    patience = run.train.patience
    state.stopped_early = patience is not None and state.plateaus.since_best() >= patience


def _refuse_reserved(kind: str, figures: dict[str, float], reserved: set[str]) -> None:
    for name in sorted(figures.keys() & reserved):
        raise UserError(f"a {kind} is called '{name}', which means something else in the record of a run",
                        "give it another name in the task")  # fmt: skip


def _refuse_small_batches(plan: Plan, workers: int, micro_batch_size: int | None) -> None:
    if smallest_portion(plan, workers, micro_batch_size) < 1:
        rows = plan.rows // plan.steps
        raise UserError(
            f"a batch of {rows} row{'s' * (rows != 1)} cannot be shared by {workers} workers",
            f"resources.workers={rows} is the most that works, or take a larger data.batch_size",
        )


def _refuse_single_rows(model: nn.Module, plan: Plan, workers: int, run: Run) -> None:
    """Batch normalisation of one row divides by nothing."""
    if smallest_portion(plan, workers, run.data.micro_batch_size) > 1:
        return
    for name, layer in model.named_modules():
        alone = isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(
            layer, (SyncNorm, nn.SyncBatchNorm)
        )
        if alone and layer.training:
            raise UserError(
                f"batch normalisation in '{name}' needs at least 2 rows a worker and micro-batch, and would get 1",
                "take a larger data.batch_size, fewer resources.workers, no data.micro_batch_size, "
                "or precision.sync_norm=true",
            )
