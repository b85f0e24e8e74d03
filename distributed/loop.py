"""The training loop: one function that learns a task, whatever process it runs in. The file to read first.

`train` is an iterator: between two of its steps its host records, shows, stops; there are no callbacks. What it
computes depends on the run and never on how many ranks there are (docs/design.md, section 5).
"""

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distributed import checkpoint, schedules
from distributed.data import planned
from distributed.data.loader import Loader
from distributed.data.order import Plan, seed_of, smallest_portion
from distributed.data.store import Store
from distributed.evaluation import Evaluator, objective
from distributed.model import Model
from distributed.run import Run
from distributed.schedules import Plateaus
from distributed.update import ONLY, Updater
from distributed.world import World
from tasks.errors import RunFailed, UserError
from tasks.task import Batch, Task

RESERVED = {"kind", "epoch", "step", "time", "lr", "samples_per_second"}  # columns of metrics.jsonl
ADVICE = "a smaller optimizer.lr or train.clip_norm=1 often helps"
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

    def to_json(self) -> dict[str, Any]:
        # A diverged objective or sum is a NaN or an infinity, which JSON has not: its repr is read back as it was.
        return {
            "step": self.step, "history": [repr(v) for v in self.plateaus.history], "best_step": self.best_step,
            "sums": {n: repr(v) for n, v in self.sums.items()}, "units": self.units,
            "stopped_early": self.stopped_early,
        }  # fmt: skip

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "State":
        return cls(
            told["step"], Plateaus([float(v) for v in told["history"]]), told["best_step"],
            {n: float(v) for n, v in told["sums"].items()}, told["units"], told["stopped_early"],
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
    state: State
    tally: "Tally"
    total: int  # optimizer steps of the whole training, unless it stops early

    @property
    def plan(self) -> Plan:
        return self.loader.plan

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
    model = Model.build(run, store.facts, world)
    _refuse_single_rows(model.learning(), plan, world.size, run.data.micro_batch_size)
    updater = Updater(model.wrapped, run.optimizers, run.precision, run.train.clip_norm, world)
    state = State()
    if resume:
        state = State.from_json(resume.state["loop"])
        model.restore(resume.model, str(resume.path))
        updater.restore(resume.optimizer, resume.state["update"])
    tally = Tally(state if world.rank == 0 else State(), world)
    total = min(run.train.epochs * plan.steps, run.train.steps or run.train.epochs * plan.steps)
    return Learning(run, store, world, loader, model, updater, state, tally, total)


def train(
    run: Run, store: Store, directory: Path, world: World, resume: checkpoint.Checkpoint | None
) -> Generator[Progress, None, None]:
    """Learns the run's task, and yields every `log.every` steps, after an evaluation, and after a checkpoint.

    Raises UserError as `begin` does, RunFailed for a loss that is not finite.
    """
    objective(run, store.facts)  # a misspelt one is refused before anything is learned
    learning = begin(run, store, world, resume)
    judge = Evaluator(run, store, "validation", world)
    model, state, plan = learning.model, learning.state, learning.plan

    while state.step < learning.total and not state.stopped_early:
        factor = learning.factor
        learn(learning)
        state.step += 1
        epoch, within = divmod(state.step, plan.steps)
        boundary = within == 0 or state.step == learning.total  # of an epoch, or of the training
        wishes: set[str] = set()

        if boundary or state.step % run.log.every == 0:
            yield Progress("train", epoch, state.step, learning.tally.take(run, factor), wishes=wishes)
        if boundary:
            model.share_buffers(world)
            metrics = judge(model.plain)
            _judged(run, store, state, metrics)
            yield Progress("validation", epoch, state.step, metrics, wishes=wishes)

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
    """Does optimizer step number `state.step`: every micro-batch of its global batch leaves its gradients, then the
    parameters move. The step is not counted.
    """
    run, world, loader, step = learning.run, learning.world, learning.loader, learning.state.step
    task = run.task
    epoch, k = divmod(step, loader.plan.steps)
    torch.manual_seed(seed_of(run.train.seed, step, TRANSFORM, world.rank))
    rows, batches = loader.micro_batches(epoch, k, run.data.micro_batch_size)
    units, whole = [float(count) for count in rows], float(len(loader.plan.batch(epoch, k)))
    if type(task).units is not Task.units:  # known only when all of them are there
        batches = list(batches)
        units, whole = _counted(task, batches, world)
    network = learning.model.learning()
    for index, (batch, part) in enumerate(zip(batches, units, strict=True)):
        torch.manual_seed(seed_of(run.train.seed, step, index, world.rank))
        update = learning.updater.accumulate(step, part * world.size / whole, last=index == len(rows) - 1)
        with update.sync(), run.precision.autocast(world.device):
            losses = task.step(network, batch, update)
        learning.tally.add(losses, part)
    learning.updater.apply(step, learning.factor)


def _counted(task: Task, batches: list[Batch], world: World) -> tuple[list[float], float]:
    """Returns the units of each micro-batch, and of the whole global batch over all ranks."""
    mine = [float(task.units(batch)) for batch in batches]
    whole = float(world.total(torch.tensor(sum(mine), dtype=world.sums, device=world.device)))
    return mine, max(whole, 1e-9)


class Tally:
    """Sums of the losses since the last progress, kept on the device: reading one would wait for it."""

    def __init__(self, state: State, world: World) -> None:
        self.world = world
        self.sums: dict[str, Tensor] = {
            n: torch.tensor(v, dtype=world.sums, device=world.device) for n, v in state.sums.items()
        }
        self.units = state.units

    def add(self, losses: dict[str, Tensor], units: float) -> None:
        for name, loss in losses.items():
            value = loss.detach().to(self.world.sums) * units if units else loss.new_zeros((), dtype=self.world.sums)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.units += units

    def over_ranks(self) -> tuple[dict[str, float], float]:
        """Returns the sums of all ranks, and their units; a rank may have met losses that others have not."""
        names = list(dict.fromkeys(name for mine in self.world.gather(list(self.sums)) for name in mine))
        mine = [float(self.sums.get(name, 0.0)) for name in names]
        *sums, units = self.world.total(
            torch.tensor([*mine, self.units], dtype=self.world.sums, device=self.world.device)
        ).tolist()
        return dict(zip(names, sums, strict=True)), units

    def take(self, run: Run, factor: float) -> dict[str, float]:
        """Returns mean losses and learning rates, and begins anew; raises RunFailed where a loss is not finite."""
        sums, units = self.over_ranks()
        self.sums, self.units = {}, 0.0
        means = {name: value / max(units, 1e-9) for name, value in sums.items()}
        odd = [name for name, value in means.items() if not math.isfinite(value)]
        if odd:
            raise RunFailed(f"the loss '{odd[0]}' is {means[odd[0]]}: {ADVICE}")
        _refuse_reserved("loss", means, RESERVED if len(means) == 1 else RESERVED | {"loss"})
        rates = {"lr" if n == ONLY else f"lr/{n}": o.lr * factor for n, o in run.optimizers.items()}
        return {"loss": sum(means.values()), **({} if len(means) == 1 else means), **rates}


def _save(learning: Learning, directory: Path) -> Path:
    """Publishes a checkpoint from rank 0; the other ranks wait until it stands.

    Raises RunFailed where losses or weights are not finite: the last good checkpoint stays the newest.
    """
    run, world, model, state = learning.run, learning.world, learning.model, learning.state
    model.share_buffers(world)
    state.sums, state.units = learning.tally.over_ranks()
    sound = all(map(math.isfinite, state.sums.values())) and learning.updater.is_finite()
    if any(world.agree(not sound)):
        raise RunFailed(f"losses or weights are not finite at step {state.step}: {ADVICE}")
    if world.rank == 0:
        optimizer, numbers = learning.updater.state()
        told = {"loop": state.to_json(), "update": numbers}
        checkpoint.save(
            directory, state.step, run.name, state.best_step, run.checkpoint.keep, model.tensors(), optimizer, told
        )
    world.agree(True)  # a barrier: no rank may report a checkpoint that is not there yet
    return checkpoint.folder_of(directory, state.step)


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


def _refuse_single_rows(model: nn.Module, plan: Plan, workers: int, micro_batch_size: int | None) -> None:
    """Batch normalisation of one row divides by nothing."""
    if smallest_portion(plan, workers, micro_batch_size) > 1:
        return
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
            raise UserError(
                f"batch normalisation in '{name}' needs at least 2 rows a worker and micro-batch, and would get 1",
                "take a larger data.batch_size, fewer resources.workers, or no data.micro_batch_size",
            )
