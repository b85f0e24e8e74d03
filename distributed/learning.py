"""What a rank learns with: the parts of a run, begun from its settings or from a checkpoint."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from distributed import checkpoint, initial, schedules
from distributed.averaging import Average
from distributed.data import planned
from distributed.data.loader import Loader
from distributed.data.order import Plan, smallest_portion
from distributed.data.store import Store
from distributed.model import Model
from distributed.run import Run
from distributed.schedules import Plateaus
from distributed.sync_norm import SyncNorm
from distributed.tally import Tally
from distributed.timing import Times
from distributed.update import Updater
from distributed.world import World
from tasks.errors import UserError


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
            told.get("averaged", 0), told.get("skipped", 0),
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

    def set_free(self, epoch: int) -> None:
        """Lets that learn which does from this epoch on; what has been learned stays as it is."""
        before = self.model
        self.model = before.thawed(self.run, self.world, epoch)
        if self.model is not before:
            kept = self.updater.state()
            self.updater = _updater(self.run, self.model, self.world, self.times)
            self.updater.restore(*kept)

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
    _refuse_parallel(run, world)
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
        model.wrapped, run.optimizers, run.precision, world, train=run.train, parallel=run.parallel, times=times,
        frozen=model.frozen,
    )  # fmt: skip


def _refuse_parallel(run: Run, world: World) -> None:
    if run.parallel.static_graph and world.size > 1 and run.data.micro_batch_size:
        raise UserError("parallel.static_graph: the gradients of micro-batches cannot be accumulated then",
                        "leave out parallel.static_graph or data.micro_batch_size")  # fmt: skip
    if run.parallel.static_graph and world.size > 1 and len(run.optimizers) > 1:
        # The loss of one entry passes through the others, and torch takes that for their own first backward: their
        # gradients would stay those of each rank, without a word.
        raise UserError(f"parallel.static_graph: the losses of {', '.join(run.optimizers)} are learned one by one",
                        "leave out parallel.static_graph")  # fmt: skip
    if run.parallel.shard_optimizer and world.size > 1 and run.train.unfreeze:
        raise UserError("parallel.shard_optimizer: what learns must not change, as train.unfreeze says",
                        "leave out one of the two")  # fmt: skip


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
