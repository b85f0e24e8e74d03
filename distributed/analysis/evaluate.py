"""The figures of a run's checkpoint on one split of its data."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from distributed import checkpoint
from distributed.data.store import Store
from distributed.evaluation import Evaluator
from distributed.model import Model
from distributed.record import finite
from distributed.run import Run
from distributed.saved import Saved
from distributed.world import World, pick_device
from tasks.errors import UserError


@dataclass(frozen=True)
class Judged:
    """Figures, and what they were taken from."""

    metrics: dict[str, float | None]  # None where a figure is not finite
    step: int  # of the checkpoint
    rows: int
    seconds: float
    device: str


def evaluate(found: Saved, store_path: Path, split: str, which: str = "best") -> Judged:
    """Returns the figures of one split in this process.

    Raises UserError where the data are no longer those that the run learned from, or the checkpoint does not fit.
    """
    began = time.monotonic()
    run, store = found.run, Store(store_path, dict(found.run.task.fields))
    _refuse_other_data(found, store)
    world = World(device=device_of(run))
    chosen = checkpoint.chosen(found.directory, which)
    model = Model.build(run, found.facts, world)
    model.restore(chosen.model, str(chosen.path))
    judge = Evaluator(run, store, split, world)
    figures = {name: finite(value) for name, value in judge(model.plain).items()}
    return Judged(figures, chosen.step, judge.loader.rows, time.monotonic() - began, str(world.device))


def device_of(run: Run) -> torch.device:
    """Returns the first accelerator that the run may use, else the CPU."""
    return torch.device("cpu") if run.resources.gpu == 0 else pick_device(0)


def _refuse_other_data(found: Saved, store: Store) -> None:
    """With other facts a word or class may have another number: every figure would be wrong without a sign of it."""
    for name in sorted({*found.facts, *store.facts}):
        before, now = found.facts.get(name, {}), store.facts.get(name, {})
        if before != now:
            more = ""
            if "classes" in before and before["classes"] != now.get("classes"):
                more = f": {len(before['classes'])} classes then, {len(now.get('classes', []))} now"
            raise UserError(
                f"{found.directory}: what the run learned about '{name}' is not what the data say now{more}",
                f"the raw data have changed since; train again: whipray train {found.run.name}",
            )
