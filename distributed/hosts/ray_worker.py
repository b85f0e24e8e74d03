"""What one worker of Ray Train does; it runs in a thread that is not the main one, in a folder of Ray's.

Driver and workers meet in the run directory: `.ray/attempt` names the attempt that is under way, and each worker of it
leaves word of its node there. A worker of another attempt, whose driver was killed or which a network has cut off, ends
itself before two of them could write one run.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import get_device

from distributed import durable, saved
from distributed.hosts import hangs, job
from distributed.hosts.job import Job
from distributed.world import World

FOLDER, ATTEMPT = ".ray", "attempt"
FENCE = 1.0  # seconds between two looks at which attempt is under way
REPLACED = 75  # exit code of a worker whose attempt is over


def work(plain: dict[str, Any]) -> None:
    """Takes part in a run as one of its ranks; `plain` is a job's plain data, with `stores` and `attempt`."""
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), get_device())
    one = Job.from_plain(plain)
    with _held(one.directory, plain["attempt"], world.rank):
        if not one.store.exists():  # the folder of stores is this node's own
            with saved.naming_failures(one.directory, world.rank):
                store = job.prepare(job.alone(one.run), Path(plain["stores"]), on_error=one.on_error)
            one = replace(one, store=store)
        with hangs.pulse(one.directory, world, one.run.resources.hang):
            job.work(one, world)


@contextlib.contextmanager
def _held(directory: Path, attempt: str, rank: int) -> Iterator[None]:
    """Leaves word of where this rank is, and ends its process when another attempt is under way."""
    place = {"attempt": attempt, "node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()}
    durable.write_json(directory / FOLDER / f"rank-{rank:05d}.json", place)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(FENCE):
            if under_way(directory) not in (attempt, None):
                saved.note(directory, f"rank {rank} of an earlier attempt ends: another one is under way")
                os._exit(REPLACED)

    threading.Thread(target=watch, name="fence", daemon=True).start()
    try:
        yield
    finally:
        over.set()


# ---- the driver's side


def begin(directory: Path, attempt: str) -> None:
    """Declares an attempt the one that is under way; workers of any other end within seconds."""
    end(directory)
    (directory / FOLDER).mkdir()
    durable.write(directory / FOLDER / ATTEMPT, attempt)


def end(directory: Path) -> None:
    shutil.rmtree(directory / FOLDER, ignore_errors=True)


def under_way(directory: Path) -> str | None:
    """Returns the name of the attempt that is under way; None where that cannot be read."""
    try:
        return (directory / FOLDER / ATTEMPT).read_text()
    except OSError:
        return None


def nodes(directory: Path, attempt: str) -> list[str]:
    """Returns the nodes of the workers of an attempt that have begun, one entry a worker."""
    found = []
    for path in (directory / FOLDER).glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            place = json.loads(path.read_bytes())
            if place["attempt"] == attempt:
                found.append(place["node"])
    return found
