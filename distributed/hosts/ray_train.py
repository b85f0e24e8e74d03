"""Trains a run on the workers of Ray Train: one process a worker, gradients averaged by DistributedDataParallel.

Ray starts the workers and watches them; what is trained, recorded and resumed is ours, from the run directory alone
(docs/design.md, section 7). Ray's own results go to a scratch folder under a fresh name, and are thrown away.
"""

import logging
import os
import tempfile
import threading
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, get_device

# The names that `ray.train` gives depend on an environment variable; these are version 2, which we are written for.
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from distributed import saved
from distributed.hosts import feasibility, job, ray_cluster
from distributed.hosts.follow import Rows
from distributed.hosts.job import Job, Show
from distributed.hosts.local import interruptible
from distributed.resources import cpu_count
from distributed.run import Run
from distributed.world import TIMEOUT, World
from tasks.errors import RunFailed, UserError

POLL = 0.3  # seconds between two looks at the run directory
log = logging.getLogger("whipray")


def connect(run: Run, address: str | None) -> None:
    """Joins the cluster, or starts one of this machine's own; raises UserError where it can never hold the run."""
    if address is None and "RAY_ADDRESS" not in os.environ and not ray.is_initialized():
        # A Ray of our own will have what this machine has: no need to start it for a refusal.
        mine = {"CPU": float(cpu_count()), "GPU": float(torch.cuda.device_count())}
        feasibility.check(run.resources.workers, run.resources.cpu or 1.0, run.resources.gpu or 0.0, [mine])
    ray_cluster.connect(address)
    feasibility.check(run.resources.workers, *_per_worker(run), ray_cluster.nodes(), ray_cluster.may_add())


def _per_worker(run: Run) -> tuple[float, float]:
    """Cores and devices of one worker."""
    gpu = run.resources.gpu
    if gpu is None:
        gpu = 1.0 if any(node.get("GPU") for node in ray_cluster.nodes()) else 0.0
    return run.resources.cpu or 1.0, gpu


class Trainer(TorchTrainer):
    """Ray's trainer without the helper processes that do nothing for us, a second of start each."""

    def _create_default_callbacks(self) -> list[Any]:
        idle: tuple[type, ...] = (DatasetsCallback,)  # rows come from our stores
        if ray_cluster.connect().own:
            # It removes what a lost controller leaves on a cluster; a Ray of our own ends with us.
            idle += (PlacementGroupCleanerCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, idle)]


def train(one: Job, stores: Path, show: Show) -> bool:
    """Trains on the connected cluster; returns whether it was interrupted before its end.

    Raises UserError, or RuntimeError naming the rank that failed.
    """
    run = one.run
    cpu, gpu = _per_worker(run)
    # The state of Ray Train's controller is of no use to us: our own newest checkpoint decides where a run goes on.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="whipray-ray-") as scratch:
        trainer = Trainer(
            _worker,
            train_loop_config={**one.to_plain(), "stores": str(stores)},
            torch_config=TorchConfig(timeout_s=int(TIMEOUT.total_seconds())),
            scaling_config=ScalingConfig(
                num_workers=run.resources.workers, use_gpu=gpu > 0,
                resources_per_worker={"CPU": cpu, **({"GPU": gpu} if gpu else {})},
            ),
            run_config=RunConfig(
                name=f"whipray-{uuid.uuid4().hex[:12]}", storage_path=scratch,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )  # fmt: skip
        return _fit(trainer, one, show)


def _fit(trainer: Trainer, one: Job, show: Show) -> bool:
    """Runs the trainer beside this thread, which shows what the workers record and passes on a wish to stop."""
    failed: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that waits
            failed.append(error)

    rows = Rows(one.directory)
    thread = threading.Thread(target=fit, name="ray train", daemon=True)
    with interruptible() as stopped:
        thread.start()
        show({"kind": "begin", "step": 0})
        while thread.is_alive():
            thread.join(POLL)
            for row in rows.new():
                show(row)
            if stopped():
                saved.ask_to_stop(one.directory)
        if failed:
            _raise(one.directory, failed[0])
        return stopped() and saved.summary(one.directory) is None


def _raise(directory: Path, error: BaseException) -> None:
    """Raises what the first failing rank wrote down, or what Ray knows where none could."""
    if not isinstance(error, (TrainingFailedError, ray.exceptions.RayError)):
        raise error
    told = saved.failure(directory)
    if told and told["kind"] == "UserError":
        raise UserError(told["message"], told["hint"]) from error
    if told and told["kind"] == "RunFailed":
        raise RunFailed(told["message"]) from error
    if told:
        failed = RuntimeError(f"rank {told['rank']} on {told['host']}: {told['kind']}: {told['message']}")
        failed.__dict__.update(place=told["place"], remote_traceback=told["traceback"])
        failed.add_note(f"{directory / saved.FAILURE} holds the whole traceback")
        raise failed from error
    failures = getattr(error, "worker_failures", {})
    words = "; ".join(f"rank {rank}: {str(failure).strip().splitlines()[0]}" for rank, failure in failures.items())
    raise RuntimeError(words or str(error)) from error


def _worker(plain: dict[str, Any]) -> None:
    """What one Ray Train worker does; it runs in a thread that is not the main one, in a folder of Ray's."""
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), get_device())
    one = Job.from_plain(plain)
    if not one.store.exists():  # the folder of stores is this node's own
        one = replace(one, store=job.prepare(job.alone(one.run), Path(plain["stores"]), on_error=one.on_error))
    job.work(one, world)
