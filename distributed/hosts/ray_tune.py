"""Runs a sweep with Ray Tune: it places the trials and starts their processes; what is tried and stopped is ours.

`Ask` and `Tell` are the one Searcher and the one TrialScheduler that Tune sees, both thin over the same Sweep as every
other executor drives. A trial of one worker trains inside its actor, which the next trial reuses (docs/design.md,
section 7). Tune's own results go to a scratch folder and are thrown away: a sweep resumes from its journal.
"""

import gc
import json
import logging
import os
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray.tune
import torch
from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from distributed.hosts import feasibility, ray_cluster, trial
from distributed.hosts.local import interruptible
from distributed.hosts.local_tune import Show
from distributed.hosts.trial import Setup
from distributed.run import Run
from distributed.tuning.schedulers import Decision
from distributed.tuning.sweep import Outcome, Sweep
from distributed.world import World, pick_device
from tasks.errors import UserError

RETRIES = 2  # of a trial whose process died, each from the trial's own checkpoint
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a trial records what it does itself
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours ends the sweep
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # our journal is what a sweep resumes from
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # two pages for each process that dies
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the old output is silent when it is told so
}
log = logging.getLogger("whipray")


def connect(run: Run, address: str | None) -> None:
    """Joins the cluster, or starts one of this machine's own; raises UserError where it can never hold a trial."""
    if run.resources.workers > 1:
        raise UserError(
            f"resources.workers={run.resources.workers}: a trial trains in one process",
            "resources.workers=1: figures do not depend on the number of workers, and trials run side by side",
        )
    os.environ.update(ENVIRONMENT)  # before Ray starts: its workers inherit it
    ray_cluster.connect(address)
    feasibility.check(1, *_resources(run), ray_cluster.nodes(), ray_cluster.may_add())


def _resources(run: Run) -> tuple[float, float]:
    """Cores and devices of one trial."""
    gpu = run.resources.gpu
    if gpu is None:
        gpu = 1.0 if any(node.get("GPU") for node in ray_cluster.nodes()) else 0.0
    return run.resources.cpu or 1.0, gpu


def tune(sweep: Sweep, setup: Setup, run: Run, show: Show) -> bool:
    """Trains the sweep's trials on the connected cluster; returns whether it was interrupted before their end.

    Raises UserError, or RuntimeError with the traceback of a trial: the sweep goes on when that is mended.
    """
    cpu, gpu = _resources(run)
    nodes = ray_cluster.nodes()
    slots = feasibility.most(cpu, gpu, nodes, ray_cluster.may_add())
    slots = min(slots, sweep.plan.trials.concurrent or slots)
    name = f"whipray-{uuid.uuid4().hex[:12]}"  # trainables of one name would overwrite one another in the cluster
    shared = setup.directory if len(nodes) > 1 else None  # what several nodes write to, all must see
    with tempfile.TemporaryDirectory(prefix=".ray-", dir=shared) as scratch, interruptible() as stopped:
        driver = Driver(sweep, setup, show, slots, cpu, gpu, stopped)
        Tuner(
            ray.tune.with_resources(_named(name), {"cpu": cpu, **({"gpu": gpu} if gpu else {})}),
            tune_config=TuneConfig(search_alg=Ask(driver), scheduler=Tell(driver), num_samples=-1, reuse_actors=True),
            run_config=RunConfig(
                name=name, storage_path=scratch, stop=End(driver), verbose=0,
                failure_config=FailureConfig(max_failures=RETRIES),
            ),
        ).fit()  # fmt: skip
        if driver.error is not None:
            raise driver.error
        return stopped()


class Driver:
    """What Tune's callbacks share: the sweep, who is shown, and why it must end."""

    def __init__(
        self,
        sweep: Sweep,
        setup: Setup,
        show: Show,
        slots: int,
        cpu: float,
        gpu: float,
        stopped: Callable[[], bool],
    ) -> None:
        self.sweep, self.setup, self.show, self.slots, self.stopped = sweep, setup, show, slots, stopped
        self.shared = {"setup": setup.to_plain(), "threads": max(1, int(cpu)), "gpu": gpu}
        self.running: dict[str, str] = {}  # Tune's name of a trial -> ours
        self.error: BaseException | None = None  # ends the sweep

    @property
    def ending(self) -> bool:
        return self.error is not None or self.stopped()

    def ask(self, tune_id: str) -> dict[str, Any] | str | None:
        """Returns the next trial's configuration, None where there is no room, or Searcher.FINISHED."""
        if self.ending:
            return Searcher.FINISHED
        if len(self.running) >= self.slots:  # asked ahead of time, a searcher would know less
            return None
        one = self.sweep.ask()
        if one is None:
            return Searcher.FINISHED
        self.running[tune_id] = one.id
        self.show(self.sweep.rows[one.id])
        return {"trial": one.id, "settings": json.dumps(one.settings), **self.shared}

    def tell(self, tune_id: str, told: dict[str, Any]) -> Decision:
        """Takes in what a trial told, and says whether it goes on."""
        row = self.sweep.rows[self.running[tune_id]]
        if row.state != "running" or self.ending:  # Tune repeats the last word
            return "stop"
        if "refused" in told:
            self.error = UserError(*told["refused"])
        elif "crashed" in told:
            self.error = RuntimeError(f"trial {row.trial}: {told['crashed']}")
        elif "ended" in told:
            self.finish(row.trial, **told["ended"])
        else:
            decision = self.sweep.report(row.trial, told["epoch"], told["value"], told["metrics"])
            self.show(row)
            if decision == "stop" and not told["last"]:
                self.finish(row.trial, "stopped", {}, told["seconds"])
                return "stop"
        return "continue"

    def finish(
        self, name: str, outcome: Outcome, metrics: dict[str, Any], seconds: float, error: str | None = None
    ) -> None:
        self.sweep.finish(name, outcome, metrics, error=error, seconds=seconds, directory=self.setup.folder(name))
        self.show(self.sweep.rows[name])

    def died(self, tune_id: str) -> None:
        """The process of a trial is gone; Tune begins it again, unless that has been enough."""
        log.warning("trial %s: its process died", self.running[tune_id])

    def gone(self, tune_id: str, *, failed: bool) -> None:
        """Tune has no more to do with a trial."""
        name = self.running.pop(tune_id)
        if failed and self.sweep.rows[name].state == "running":
            self.finish(name, "failed", {}, 0.0, f"its process died {RETRIES + 1} times")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles whatever it holds, in order to resume as we do not


class Ask(Searcher):
    """What Tune asks for trials."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver

    def suggest(self, trial_id: str) -> Any:
        return self.driver.ask(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.driver.gone(trial_id, failed=error)

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class Tell(FIFOScheduler):
    """What Tune tells of trials, and asks whether they go on."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        go_on = self.driver.tell(trial.trial_id, json.loads(result["told"])) == "continue"
        return TrialScheduler.CONTINUE if go_on else TrialScheduler.STOP

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.driver.died(trial.trial_id)


class End(Stopper):
    """Ends all trials at once when the sweep is interrupted or fails."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.driver.ending


def _named(name: str) -> Callable[[dict[str, Any]], None]:
    def trainable(config: dict[str, Any]) -> None:
        _trial(config)

    trainable.__name__ = name
    return trainable


def _trial(config: dict[str, Any]) -> None:
    """What a trial's actor does, in a thread that is not its main one; another trial may have been there before."""
    began = time.monotonic()
    torch.set_num_threads(config["threads"])
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    setup = Setup.from_plain(config["setup"])
    device = pick_device(0) if config["gpu"] else torch.device("cpu")

    def tell(**told: Any) -> None:
        # Tune would flatten and rewrite what is no text. Where it stops a trial, this raises SystemExit.
        ray.tune.report({"told": json.dumps(told)})

    def report(epoch: int, value: float | None, metrics: dict[str, Any], last: bool) -> Decision:
        tell(epoch=epoch, value=value, metrics=metrics, last=last, seconds=time.monotonic() - began)
        return "continue"

    try:
        ended = trial.work(setup, config["trial"], json.loads(config["settings"]), World(device=device), report)
    except UserError as error:
        tell(refused=[error.message, error.hint])
    except Exception:  # noqa: BLE001 - whatever it is, the driver raises it
        tell(crashed=traceback.format_exc())
    else:
        assert ended is not None, "nobody else stops it"
        tell(ended=asdict(ended))
