"""The training loop: one function that learns a task, whatever process it runs in. The file to read first.

`train` is an iterator: between two of its steps its host records, shows, stops; there are no callbacks. What it
computes depends on the run and never on how many ranks there are (docs/design.md, section 5).
"""

import contextlib
import logging
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from distributed import checkpoint, record
from distributed.alive import MARK
from distributed.data.order import seed_of
from distributed.data.store import Store
from distributed.divergence import failure
from distributed.evaluation import Evaluator, objective
from distributed.learning import Learning, State, begin
from distributed.run import Run
from distributed.saving import Saving
from distributed.tally import Told
from distributed.update import ONLY
from distributed.world import World
from tasks.errors import UserError
from tasks.task import Batch, Task

RESERVED = {"kind", "epoch", "step", "lr"} | record.MEASURED  # columns of metrics.jsonl
log = logging.getLogger("whipray")
TRANSFORM = 1 << 41  # the draws of transform, apart from those of every micro-batch


@dataclass
class Progress:
    """What the loop tells its host, the same on all ranks; the host answers with `request`."""

    kind: Literal["train", "validation", "checkpoint", "alive"]  # alive: nothing to tell, but it is time to ask
    epoch: int  # finished epochs, or the one under way
    step: int  # optimizer steps done
    metrics: dict[str, float]  # train: losses and lr of the steps since the last one; validation: the figures
    checkpoint: Path | None = None
    wishes: set[str] = field(default_factory=set)
    learning: Learning | None = None  # its parts on this rank, for a host that looks at them between two steps

    def request(self, wish: Literal["checkpoint", "stop"]) -> None:
        """Asks for a checkpoint now, or for a checkpoint and the end of the training."""
        self.wishes.add(wish)


def train(
    run: Run, store: Store, directory: Path, world: World, resume: checkpoint.Checkpoint | None
) -> Generator[Progress, None, None]:
    """Learns the run's task, and yields every `log.every` steps, after an evaluation, and after a checkpoint.

    Raises UserError as `begin` does, RunFailed for a loss that is not finite and for a checkpoint that cannot be
    written.
    """
    objective(run, store.facts)  # a misspelt one is refused before anything is learned
    learning = begin(run, store, world, resume)
    if learning.began_from and world.rank == 0:
        learning.began_from.write(directory)
    judge = Evaluator(run, store, "validation", world)
    state, plan, pace = learning.state, learning.plan, Pace(learning.state.step)

    with Saving(learning, directory) as saving:
        while state.step < learning.total and not state.stopped_early:
            factor = learning.factor
            learn(learning)
            state.step = MARK.step = state.step + 1
            epoch, within = divmod(state.step, plan.steps)
            boundary = within == 0 or state.step == learning.total  # of an epoch, or of the training
            telling = boundary or state.step % run.log.every == 0
            wishes: set[str] = set()

            if telling:
                metrics = _figures(learning, factor)
                yield Progress("train", epoch, state.step, metrics, wishes=wishes, learning=learning)
            if boundary:
                with learning.average.applied():
                    learning.model.share_buffers(world)  # those that are judged: of the average, where there is one
                    metrics = judge(learning.model.plain)
                _judged(run, store, state, metrics)
                yield Progress("validation", epoch, state.step, metrics, wishes=wishes, learning=learning)
            elif not telling and pace.is_due(state.step):
                yield Progress("alive", epoch, state.step, {}, wishes=wishes)

            # Only where the host could ask do the ranks need to agree on what it asked.
            stop = save = False
            if asked := telling or pace.is_due(state.step):
                ahead = pace.ahead(state.step)
                stop, save, ahead = world.most("stop" in wishes, "checkpoint" in wishes, ahead)
                pace.look(state.step, ahead)
            due = run.checkpoint.every is not None and state.step % run.checkpoint.every == 0
            if boundary or due or stop or save:
                saving.save()
            if asked or not run.checkpoint.background:
                for step in saving.settled(wait=bool(stop)):
                    yield _stands(learning, directory, step, wishes)
                    stop = world.agree("stop" in wishes)[0] or stop
            if stop:
                break
        saving.save()
        for step in saving.settled(wait=True):
            yield _stands(learning, directory, step, set())


def _stands(learning: Learning, directory: Path, step: int, wishes: set[str]) -> Progress:
    epoch = step // learning.plan.steps
    return Progress("checkpoint", epoch, step, {}, checkpoint.folder_of(directory, step), wishes)


class Pace:
    """When a host is asked though there is nothing to tell: every few seconds, at the same step on all ranks."""

    SECONDS = 2.0

    def __init__(self, step: int) -> None:
        self.step, self.since = step, time.monotonic()
        self.next = step + 1

    def is_due(self, step: int) -> bool:
        return step >= self.next

    def ahead(self, step: int) -> int:
        """Returns how many steps this rank is likely to do until it is time to ask again."""
        seconds = (time.monotonic() - self.since) / max(step - self.step, 1)
        return max(1, min(int(self.SECONDS / max(seconds, 1e-6)), 1 << 20))

    def look(self, step: int, ahead: int) -> None:
        self.step, self.since, self.next = step, time.monotonic(), step + ahead


def learn(learning: Learning) -> None:
    """Does optimizer step number `state.step`, which it does not count.

    Every micro-batch of its global batch leaves its gradients, then the parameters move.
    """
    run, world, loader, times = learning.run, learning.world, learning.loader, learning.times
    task, step = run.task, learning.state.step
    epoch, k = divmod(step, loader.plan.steps)
    if k == 0:
        learning.set_free(epoch)
    times.begin("data")
    world.seed(seed_of(run.train.seed, step, TRANSFORM, world.rank))
    rows, batches = loader.micro_batches(epoch, k, run.data.micro_batch_size)
    units, whole = [float(count) for count in rows], float(len(loader.plan.batch(epoch, k)))
    if type(task).units is not Task.units:  # known only when all of them are there
        batches = list(batches)
        units, whole = _counted(task, batches, world)
    network = learning.model.learning()
    buffers = learning.model.buffers() if run.train.max_skipped else []
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
        learning.model.put_back(buffers)
        _skip(learning, told)
    times.end()


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


def _figures(learning: Learning, factor: float) -> dict[str, float]:
    """Returns the mean losses since the last progress, and the learning rates."""
    means = learning.tally.take()
    _refuse_reserved("loss", means, RESERVED if len(means) == 1 else RESERVED | {"loss"})
    rates = {"lr" if n == ONLY else f"lr/{n}": o.lr * factor for n, o in learning.run.optimizers.items()}
    whole = sum(means.values()) if means else float("nan")  # all of the steps were left out
    return {"loss": whole, **({} if len(means) == 1 else means), **rates}


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
