"""What went wrong in an attempt on Ray: what the first failing rank wrote down, or what Ray has noticed."""

from collections.abc import Mapping
from pathlib import Path

import ray
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import TrainingFailedError

from distributed import saved
from distributed.hosts import hangs
from distributed.hosts.retries import Lost
from tasks.errors import RunFailed, UserError


def cause(directory: Path, error: BaseException) -> BaseException:
    """Returns the error that an attempt ended with, for people; where a process is gone, failure.json is written."""
    if not isinstance(error, (TrainingFailedError, ray.exceptions.RayError)):
        return error
    told = saved.failure(directory)
    if told is None or told["echo"]:  # the rank that is the cause was killed, and its node perhaps too
        lost = _lost(directory, getattr(error, "worker_failures", {}))
        if lost:
            saved.write_failure(directory, lost.__dict__["rank"], lost)
            return lost
    if told is None:
        failures = getattr(error, "worker_failures", {})
        words = "; ".join(f"rank {rank}: {str(failure).strip().splitlines()[0]}" for rank, failure in failures.items())
        return Lost(words or " ".join(str(error).split())[:500])
    if told["kind"] == "UserError":
        return UserError(told["message"], told["hint"])
    if told["kind"] in ("RunFailed", "Hung"):
        return RunFailed(told["message"])
    failed = RuntimeError(f"rank {told['rank']} on {told['host']}: {told['kind']}: {told['message']}")
    failed.__dict__.update(place=told["place"], remote_traceback=told["traceback"])
    failed.add_note(f"{directory / saved.FAILURE} holds the whole traceback")
    return failed


def _lost(directory: Path, failures: Mapping[int, BaseException]) -> Lost | None:
    """Returns the first rank whose process or node is gone, as Ray tells it."""
    for rank, failure in sorted(failures.items()):
        if not isinstance(failure, WorkerHealthCheckFailedError):
            continue
        words = str(failure)
        how = "went with its node" if "node has died" in words else "was killed, or ended itself"
        shown = hangs.read(directory, rank)
        error = Lost(f"rank {rank} {how}")
        error.__dict__.update(rank=rank, step=shown.step if shown else 0, remote_traceback=words)
        return error
    return None
