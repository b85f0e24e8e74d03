"""Trains a run on the workers of Ray Train: one process a worker, gradients averaged by DistributedDataParallel.

Ray starts the workers and watches them; what is trained, recorded and resumed is ours, from the run directory alone
(docs/design.md, section 7). A run is a row of attempts of a fixed number of workers, each a trainer of Ray's with a
fresh name, whose own results go to a scratch folder. The next one begins when a worker was lost, when a node is about
to leave, or, for a range of workers, when there is room for more: always from our newest checkpoint.
"""

import contextlib
import gc
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from ray.train.torch import TorchConfig

# The names that `ray.train` gives depend on an environment variable; these are version 2, which we are written for.
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from distributed import saved
from distributed.hosts import feasibility, hangs, ray_cluster, ray_worker, retries
from distributed.hosts.follow import Rows
from distributed.hosts.job import Job, Show
from distributed.hosts.local import interruptible
from distributed.hosts.ray_causes import cause
from distributed.hosts.ray_room import Room, leaving
from distributed.hosts.retries import Retries
from distributed.resources import cpu_count
from distributed.run import Run
from distributed.world import TIMEOUT
from tasks.errors import UserError

POLL = 0.3  # seconds between two looks at the run directory
LOOK = 3.0  # seconds between two looks at the cluster
SETTLE = 20.0  # seconds in which the places of an attempt that is over become free
RESTART = 20.0  # seconds that a resize costs; it must save more
log = logging.getLogger("whipray")
Move = Literal["leave", "grow"]  # why an attempt saves and ends, so that another one goes on


def connect(run: Run, address: str | None) -> None:
    """Joins the cluster, or starts one of this machine's own; raises UserError where it can never hold the run."""
    least = run.resources.workers.least
    if address is None and "RAY_ADDRESS" not in os.environ and not ray.is_initialized():
        # A Ray of our own will have what this machine has: no need to start it for a refusal.
        mine = {"CPU": float(cpu_count()), "GPU": float(torch.cuda.device_count())}
        feasibility.check(least, run.resources.cpu or 1.0, run.resources.gpu or 0.0, [mine])
    ray_cluster.connect(address)
    feasibility.check(least, *_per_worker(run), ray_cluster.nodes(), ray_cluster.may_add())


def _per_worker(run: Run) -> tuple[float, float]:
    """Cores and devices of one worker."""
    gpu = run.resources.gpu
    if gpu is None:
        gpu = 1.0 if any(node.get("GPU") for node in ray_cluster.nodes()) else 0.0
    return run.resources.cpu or 1.0, gpu


class Wishful(FixedScalingPolicy):
    """A fixed number of workers, and a wish for more that an autoscaler is told of."""

    def __init__(self, scaling_config: Any, wished: int) -> None:
        super().__init__(scaling_config)
        self.wished = wished

    def _get_num_workers_for_resource_request(self) -> int:
        return self.wished


class Trainer(TorchTrainer):
    """Ray's trainer without the helper processes that do nothing for us, a second of start each."""

    wished: int | None = None  # workers that an autoscaler should make room for

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if self.wished is not None:
            parts["scaling_policy"] = Wishful(self.scaling_config, self.wished)
        return super()._initialize_and_run_controller(**parts)

    def _create_default_callbacks(self) -> list[Any]:
        idle: tuple[type, ...] = (DatasetsCallback,)  # rows come from our stores
        if ray_cluster.connect().own:
            # It removes what a lost controller leaves on a cluster; a Ray of our own ends with us.
            idle += (PlacementGroupCleanerCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, idle)]


def train(one: Job, stores: Path, show: Show) -> bool:
    """Trains on the connected cluster; returns whether it was interrupted before its end.

    Raises UserError, RunFailed, or RuntimeError naming the rank that failed where it is of no use to go on.
    """
    # The state of Ray Train's controller is of no use to us: our own newest checkpoint decides where a run goes on.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    show({"kind": "begin", "step": 0})
    try:
        with interruptible() as stopped:
            with contextlib.closing(saved.Held(one.directory)) as held:
                _Attempts(one, stores, show, stopped, held).run()
            return stopped() and saved.summary(one.directory) is None
    finally:
        ray_worker.end(one.directory)


class _Attempts:
    """One run's attempts, from its newest checkpoint to its end."""

    def __init__(
        self, one: Job, stores: Path, show: Show, stopped: Callable[[], bool], held: saved.Held
    ) -> None:  # fmt: skip
        self.job, self.directory, self.stores, self.show, self.stopped = one, one.directory, stores, show, stopped
        self.held = held
        self.workers = one.run.resources.workers
        self.most = int(self.workers)
        self.room = Room(*_per_worker(one.run))
        self.retries = Retries(retries.limits(one.run.resources), retries.read(one.directory))
        self.rows = Rows(one.directory)
        self.learned = 0  # workers of an attempt that has recorded something
        self.speed: tuple[float, int] | None = None  # when this attempt recorded its first row, and of which step
        self.step = 0

    def run(self) -> None:
        wanted = self.workers.least
        while not self.stopped():
            size = self._await_room(wanted)
            if not size:
                return
            move, error = self._attempt(size)
            self.held.check()
            if move is None and (error is None or saved.is_asked_to_stop(self.directory)):
                if error:
                    raise error
                return  # it is at its end, or somebody has asked it to stop
            wanted = size
            if isinstance(error, UserError) and self.workers.least <= self.learned < size:
                # More workers than the task's batches are enough for: what has worked goes on.
                self._say(f"{size} workers are refused: {error.message}")
                self.most = wanted = self.learned
            elif error is not None and move is None:
                again = retries.decide(self.directory, self.retries, error)
                if again is None:
                    raise error
                self._say(again)
            elif move == "grow":
                wanted = self.most
            saved.clear_marks(self.directory)

    def _await_room(self, wanted: int) -> int:
        """Returns how many workers to begin with, once there is room for as many as there can be; 0: interrupted."""
        began, told = time.monotonic(), False
        while not self.stopped():
            there = min(self.room.free(), self.most)
            waited = time.monotonic() - began
            if there >= min(wanted, max(self.room.whole(), self.workers.least)):
                return there
            if waited > SETTLE and there >= self.workers.least:
                return there
            if waited > SETTLE and self.room.may_grow():
                return self.workers.least  # an autoscaler starts nodes for those that wait with Ray
            if waited > POLL * 10 and not told and there < self.workers.least:
                told = True
                self._say(f"waiting: the cluster has room for {there} of at least {self.workers.least} workers")
            time.sleep(POLL)
        return 0

    def _attempt(self, size: int) -> tuple[Move | None, BaseException | None]:
        """Trains with so many workers; returns why it is to go on elsewhere, if it is, and what went wrong."""
        attempt = uuid.uuid4().hex[:12]
        hangs.clear(self.directory)
        ray_worker.begin(self.directory, attempt)
        failed: list[BaseException] = []

        def fit() -> None:
            try:
                with tempfile.TemporaryDirectory(prefix="whipray-ray-") as scratch:
                    self._trainer(size, attempt, scratch).fit()
            except BaseException as error:  # noqa: BLE001 - judged below, in the thread that waits
                failed.append(error)

        move: Move | None = None
        looked, self.speed = time.monotonic(), None
        self.rows = Rows(self.directory)  # an attempt writes the rows of earlier ones anew
        thread = threading.Thread(target=fit, name="ray train", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL)
            self._show_rows(size)
            if self.stopped():
                saved.ask_to_stop(self.directory)
            elif move is None and time.monotonic() - looked > LOOK and not saved.is_asked_to_stop(self.directory):
                looked = time.monotonic()
                move = self._why_move(size, attempt)
                if move:
                    saved.ask_to_stop(self.directory)
        self._show_rows(size)
        done = saved.summary(self.directory) is not None
        error = cause(self.directory, failed[0]) if failed and not done else None
        failed.clear()
        gc.collect()  # Ray's controller, a process of 0.7 GB that may hold places, goes with the frames of its error
        return (None, None) if done else (move, error)

    def _trainer(self, size: int, attempt: str, scratch: str) -> Trainer:
        cpu, gpu = self.room.cpu, self.room.gpu
        trainer = Trainer(
            ray_worker.work,
            train_loop_config={**self.job.to_plain(), "stores": str(self.stores), "attempt": attempt},
            torch_config=TorchConfig(timeout_s=int(TIMEOUT.total_seconds())),
            scaling_config=ScalingConfig(
                num_workers=size, use_gpu=gpu > 0,
                resources_per_worker={"CPU": cpu, **({"GPU": gpu} if gpu else {})},
            ),
            run_config=RunConfig(
                name=f"whipray-{attempt}", storage_path=scratch,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
                logging_config=LoggingConfig(log_level="CRITICAL"),  # failure.json and log.txt say what went wrong
            ),
        )  # fmt: skip
        trainer.wished = self.most if self.room.may_grow() else None
        return trainer

    def _show_rows(self, size: int) -> None:
        for row in self.rows.new():
            self.show(row)
            self.step, self.learned = row["step"], size
            self.speed = self.speed or (time.monotonic(), self.step)

    def _why_move(self, size: int, attempt: str) -> Move | None:
        nodes = ray_worker.nodes(self.directory, attempt)
        if len(nodes) < size:
            return None  # not all of them have taken their places yet
        going = {node: seconds for node, seconds in leaving().items() if node in nodes}
        if going:
            soonest = min((seconds for seconds in going.values() if seconds is not None), default=None)
            when = "" if soonest is None else f" in {max(0, soonest):.0f} s"
            self._say(f"a node with workers of this run is leaving{when}: saving, then going on without it")
            return "leave"
        if size < self.most:
            there = min(size + self.room.free(), self.most)
            if there > size and self._left() * (1 - size / there) > RESTART:
                self._say(f"there is room for {there} workers: saving, then going on with them")
                return "grow"
        return None

    def _left(self) -> float:
        """Seconds that the rest of the training takes at the speed of this attempt; unknown is long."""
        if self.speed is None or self.step == self.speed[1]:
            return float("inf")
        began, first = self.speed
        return (self.job.total_steps - self.step) * (time.monotonic() - began) / (self.step - first)

    def _say(self, words: str) -> None:
        log.warning("%s", words)
        saved.note(self.directory, words)
