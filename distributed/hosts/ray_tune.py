"""Runs a sweep with Ray Tune: it places the trials and starts their processes; what is tried and stopped is ours.

`Ask` and `Tell` are the one Searcher and the one TrialScheduler that Tune sees, both thin over the same Sweep as every
other executor drives. A trial of one worker trains inside its actor, which the next trial reuses (docs/design.md,
section 7). Tune's own results go to a scratch folder and are thrown away: a sweep resumes from its journal.
"""

import gc
import os
import tempfile
import traceback
import uuid
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray.tune
import torch
from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from distributed.hosts import feasibility, ray_cluster, trial
from distributed.hosts.local import interruptible
from distributed.hosts.local_tune import Show
from distributed.hosts.trial import Setup
from distributed.run import Run
from distributed.tuning.schedulers import Decision
from distributed.tuning.sweep import Sweep
from distributed.world import World, pick_device
from tasks.errors import UserError

RETRIES = 2  # of a trial whose process died, each from the trial's own checkpoint
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours lets the trials end
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # our journal is what a sweep resumes from
    "TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "1000000",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def connect(run: Run, address: str | None) -> None:
    """Joins the cluster, or starts one of this machine's own; raises UserError where it can never hold a trial."""
    if run.resources.workers > 1:
        raise UserError(
            f"resources.workers={run.resources.workers}: a trial trains in one process",
            "resources.workers=1: the figures do not depend on the number of workers, and the trials share the machines",
        )
    ray_cluster.connect(address)
    feasibility.check(1, *_resources(run), ray_cluster.nodes(), ray_cluster.may_add())


def _resources(run: Run) -> tuple[float, float]:
    """Cores and devices of one trial."""
    gpu = run.resources.gpu
    if gpu is None:
        gpu = 1.0 if any(node.get("GPU") for node in ray_cluster.nodes()) else 0.0
    return run.resources.cpu or 1.0, gpu


class Driver:
    """What Tune's callbacks share: the sweep, who is shown, and why it must end."""

    def __init__(self, sweep: Sweep, setup: Setup, run: Run, show: Show, stopped: Callable[[], bool]) -> None:
        self.sweep, self.setup, self.show, self.stopped = sweep, setup, show, stopped
        self.limit = sweep.plan.trials.concurrent
        self.plain = {**setup.to_plain(), "cpu": run.resources.cpu or 1.0, "gpu": run.resources.gpu}
        self.running: dict[str, str] = {}  # Tune's name of a trial -> ours
        self.error: BaseException | None = None  # ends the sweep

    def ask(self, tune_id: str) -> dict[str, Any] | None:
        """Returns the next trial's configuration; None: none now."""
        one = self.sweep.ask()
        if one is None:
            return None
        self.running[tune_id] = one.id
        self.show(self.sweep.rows[one.id])
        return {"trial": one.id, "settings": one.settings, "setup": self.plain}

    def tell(self, tune_id: str, told: dict[str, Any]) -> Decision:
        """Takes in what a trial told; whatever goes wrong here ends the sweep, never Tune's own loop."""
        one = self.sweep.rows[self.running[tune_id]]
        if one.state != "running":  # begun again after its process had died with its last word said
            return "stop"
        if "refused" in told:
            self.error = UserError(*told["refused"])
        elif "crashed" in told:
            self.error = RuntimeError(f"trial {one.trial}: {told['crashed']}")
        elif "ended" in told:
            self.finish(one.trial, **told["ended"])
        else:
            decision = self.sweep.report(one.trial, told["epoch"], told["value"], told["metrics"])
            one.seconds = told["seconds"]
            self.show(one)
            if decision == "stop" and not told["last"]:
                self.finish(one.trial, "stopped", {}, told["seconds"])
            return decision if not told["last"] else "continue"
        return "continue"

    def finish(self, name: str, outcome: Any, metrics: dict[str, Any], seconds: float, error: str | None = None) -> None:
        self.sweep.finish(
            name, outcome, metrics, error=error, seconds=seconds, directory=self.setup.folder(name)
        )
        self.show(self.sweep.rows[name])

    def gone(self, tune_id: str, *, died: bool) -> None:
        """Tune has no more to do with a trial."""
        name = self.running.pop(tune_id, None)
        if died and name and self.sweep.rows[name].state == "running":
            self.finish(name, "failed", {}, 0.0, f"its process died {RETRIES + 1} times")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles whatever it holds, to resume as we do not
