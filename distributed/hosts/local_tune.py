"""Runs a sweep in this process, one trial after another, without Ray: pdb works inside a trial."""

from collections.abc import Callable
from typing import Any

import torch

from distributed.hosts import trial
from distributed.hosts.local import interruptible
from distributed.hosts.trial import Setup
from distributed.run import Run
from distributed.tuning.schedulers import Decision
from distributed.tuning.sweep import Row, Sweep, Trial
from distributed.world import World, pick_device
from tasks.errors import UserError

Show = Callable[[Row], None]  # hears of every trial that begins, tells or ends


def check(run: Run) -> None:
    """Raises UserError for what this host cannot do."""
    if run.resources.workers > 1:
        raise UserError(
            f"resources.workers={run.resources.workers}: without Ray a sweep trains in this one process",
            "resources.workers=1, or leave out --no-ray: a figure does not depend on the number of workers",
        )


def tune(sweep: Sweep, setup: Setup, run: Run, show: Show) -> bool:
    """Trains the sweep's trials; returns whether it was interrupted before their end.

    Raises UserError, and whatever else a trial raises: the sweep goes on with the same trial when that is mended.
    """
    world = World(device=torch.device("cpu") if run.resources.gpu == 0 else pick_device(0))
    with interruptible() as stopped:
        while not stopped() and (one := sweep.ask()):
            if not _try(sweep, setup, one, world, show, stopped):
                break
        return stopped()


def _try(sweep: Sweep, setup: Setup, one: Trial, world: World, show: Show, stopped: Callable[[], bool]) -> bool:
    """Trains one trial; returns whether it came to an end."""

    def report(epoch: int, value: float | None, metrics: dict[str, Any], last: bool) -> Decision:
        decision = sweep.report(one.id, epoch, value, metrics)
        show(sweep.rows[one.id])
        return decision

    show(sweep.rows[one.id])
    ended = trial.work(setup, one.id, one.settings, world, report, stopped)
    if ended is None:
        return False
    sweep.finish(
        one.id, ended.outcome, ended.metrics, error=ended.error, seconds=ended.seconds, directory=setup.folder(one.id)
    )
    show(sweep.rows[one.id])
    return True
