"""Executes one optimizer step of a run again, in one process on the CPU, with its very rows and draws."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distributed import checkpoint, record, saved
from distributed.analysis.stepping import Part, Ranks, Seen
from distributed.data.store import Store
from distributed.evaluation import objective
from distributed.learning import Learning
from distributed.run import Run
from distributed.saved import Saved
from tasks.errors import RunFailed, UserError
from tasks.task import Batch

Tell = Callable[[int, int], None]  # steps done on the way, steps in all


@dataclass(frozen=True)
class Begun:
    """From where a replay starts, and what it takes."""

    step: int  # optimizer step that is to be seen, from 0: so many are done before it
    start: int  # steps that are done at the checkpoint; 0: the beginning
    ranks: Ranks
    notes: list[str]  # what a person should know about it

    @property
    def before(self) -> int:
        """Steps that are executed before the one that is to be seen."""
        return self.step - self.start


@dataclass(frozen=True)
class Replayed:
    """What one step was."""

    step: int
    epoch: int  # from 0, that it belongs to
    start: int
    ranks: int
    parts: list[Part]
    losses: dict[str, float]  # means over the step's units
    gradients: dict[str, float]
    not_finite: str
    failed: str  # why training would have ended here; empty: it went on
    rates: dict[str, float]
    recorded: dict[str, float | None]  # the run's row of metrics.jsonl for the steps up to this one; empty: none
    again: dict[str, float]  # the same figures as they are now
    learning: Learning  # as it stands after the step

    @property
    def difference(self) -> float | None:
        """The largest relative difference from what was recorded; None where nothing was."""
        both = [(self.again[name], value) for name, value in self.recorded.items() if name in self.again]
        apart = [
            abs(now - then) / max(abs(then), 1e-12) if then is not None and math.isfinite(now) else 0.0
            if then is None and not math.isfinite(now) else math.inf
            for now, then in both
        ]  # fmt: skip
        return max(apart) if apart else None


def begin(found: Saved, store_path: Path, step: int) -> Begun:
    """Returns the start of a replay: the newest whole checkpoint before the step, else the beginning of the run.

    Raises UserError for a step that the run has not, and where its data are no longer those that it learned from.
    """
    directory, run = found.directory, _plain(found.run)
    before = saved.environment(directory).get("store", store_path.name)
    if before != store_path.name:
        raise UserError(
            f"{directory}: the raw data, or the code that reads them, changed since this run began",
            "a step can be executed again with the same rows only",
        )
    store = Store(store_path, dict(run.task.fields))
    notes: list[str] = []
    size = int(run.resources.workers)
    if run.precision.sync_norm and size > 1:
        size = 1
        notes.append("precision.sync_norm: all rows are taken at once, as batch normalisation over the workers does")
    resume = None
    for at in _kept(directory, step):
        try:
            resume = checkpoint.chosen(directory, str(at))
            break
        except UserError as error:
            notes.append(f"passed over: {error.message}")
    ranks = Ranks.begin(run, store, size, resume)
    total = (saved.summary(directory) or {"steps": ranks.learning.total})["steps"]
    if not 0 <= step < total:
        raise UserError(
            f"--step {step}: the run has the steps 0 to {total - 1}",
            "steps count from 0; a row of metrics.jsonl counts those that are done: its last step is one less",
        )
    return Begun(step, resume.step if resume else 0, ranks, notes)


def _plain(run: Run) -> Run:
    """The run as it is looked at: on the CPU, nothing made ahead, nothing compiled."""
    return replace(run, data=replace(run.data, prefetch=0), precision=replace(run.precision, compile="no"))


def _kept(directory: Path, most: int) -> Iterator[int]:
    """Yields the steps of the checkpoints that are there, newest first."""
    steps = [path.name.removeprefix("step-") for path in (directory / "checkpoints").glob("step-*")]
    yield from sorted((int(step) for step in steps if step.isdigit() and int(step) <= most), reverse=True)


def replay(
    found: Saved, begun: Begun, *, rank: int | None = None, debugger: bool = False, tell: Tell = lambda done, all_: None
) -> Replayed:
    """Executes the steps up to `begun.step`, and looks at that one; with `rank` at the part of one rank alone.

    With `debugger`, breakpoint() is called before each micro-batch of that step. Raises UserError for a rank that the
    run has not.
    """
    ranks, learning, step = begun.ranks, begun.ranks.learning, begun.step
    if rank is not None and not 0 <= rank < ranks.size:
        ends = "there is rank 0 alone" if ranks.size == 1 else f"ranks are 0 to {ranks.size - 1}"
        raise UserError(f"--rank {rank}: the run has {ranks.size} worker{'s' * (ranks.size > 1)}", ends)
    rows = _rows(found.directory)
    figures: dict[str, float] = {}
    while learning.state.step < step:
        ranks.learn()
        learning.state.step += 1
        figures = _after(learning, rows)
        tell(learning.state.step - begun.start, begun.before)
    factor = learning.factor
    seen = ranks.learn(None if rank is None else [rank], _stop if debugger else None, look=True)
    learning.state.step += 1
    figures = {} if rank is not None else _after(learning, rows)
    recorded = rows.get(("train", step + 1), {}) if rank is None else {}
    return Replayed(
        step, step // learning.plan.steps, begun.start, ranks.size, seen.parts, _means(seen),
        seen.gradients, seen.not_finite, seen.failed,
        {name: one.lr * factor for name, one in learning.run.optimizers.items()},
        {name: value for name, value in recorded.items() if name in figures}, figures, learning,
    )  # fmt: skip


def _stop(model: Any, batch: Batch) -> None:
    """Stops in the debugger just before the task's step: `model` and `batch` are at hand, `r` and `s` lead into it."""
    breakpoint()


def _after(learning: Learning, rows: dict[tuple[str, int], dict[str, Any]]) -> dict[str, float]:
    """Does what the loop does between two steps, evaluations apart: what they found is on record."""
    run, state, plan = learning.run, learning.state, learning.plan
    boundary = state.step % plan.steps == 0 or state.step == learning.total
    figures: dict[str, float] = {}
    if boundary or state.step % run.log.every == 0:
        try:
            means = learning.tally.take()
            figures = {"loss": sum(means.values()), **(means if len(means) > 1 else {})}
        except RunFailed:  # not finite: to be looked at, no reason to end
            learning.tally.begin_anew()
            figures = {"loss": math.nan}
    if boundary and state.step < learning.total:
        name, higher_is_better = objective(run, learning.store.facts)
        row = rows.get(("validation", state.step))
        if row is None and run.schedule.name == "plateau":
            raise UserError(f"metrics.jsonl has no validation at step {state.step}, which schedule.name=plateau needs",
                            "take a later step, with a checkpoint nearer to it")  # fmt: skip
        value = math.nan if row is None or row.get(name) is None else row[name]
        state.plateaus.history.append(value if higher_is_better else -value)
    return figures


def _rows(directory: Path) -> dict[tuple[str, int], dict[str, Any]]:
    path = directory / record.METRICS
    return {(row["kind"], row["step"]): row for row in record.read(path)} if path.exists() else {}


def _means(seen: Seen) -> dict[str, float]:
    """Each loss of the step as a mean over its units."""
    total = sum(part.units for part in seen.parts)
    names = dict.fromkeys(name for part in seen.parts for name in part.losses)
    return {n: sum(part.losses.get(n, 0.0) * part.units for part in seen.parts) / max(total, 1e-9) for n in names}
