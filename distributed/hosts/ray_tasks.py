"""Conversion over a cluster: chunks of rows are read and encoded as Ray tasks, in the order of the source."""

import functools
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from distributed.config import Given
from distributed.hosts import ray_cluster
from distributed.processes import Mapper, portable
from distributed.run import Run, resolve
from tasks.task import Task


@dataclass(frozen=True)
class OverCluster:
    """A mapper over the cores of the cluster that this process has joined.

    The raw data must lie where all nodes see them. What the tasks return comes back through Ray's object store, so that
    stores need not lie on a shared disk.
    """

    run: Run
    same_disk: bool = False

    def over(self, function: Callable[..., bytes], fixed: tuple, items: Iterable[Any]) -> Iterator[bytes]:
        assert isinstance(fixed[0], Task), "the task is resolved anew on each node: its class may be a file's"
        plain = json.dumps({name: [given.value, given.origin] for name, given in self.run.givens().items()})
        rest = ray.put(fixed[1:])
        rows, waiting = iter(items), deque[Any]()
        ahead = 2 * max(1, int(sum(node.get("CPU", 0) for node in ray_cluster.nodes())))
        call = ray.remote(num_cpus=1, max_retries=3)(_call)
        while True:
            for item in itertools.islice(rows, ahead - len(waiting)):
                waiting.append(call.remote(self.run.name, plain, function, rest, item))
            if not waiting:
                return
            told = ray.get(waiting.popleft())
            if isinstance(told, BaseException):
                raise told
            yield told


def mapper(run: Run, address: str | None) -> Mapper:
    """Joins a cluster, and returns a mapper over its cores."""
    ray_cluster.connect(address)
    return OverCluster(run)


def _call(name: str, plain: str, function: Callable[..., bytes], rest: tuple, item: Any) -> bytes | BaseException:
    try:
        return function(_task(name, plain), *rest, item)
    except Exception as error:  # noqa: BLE001 - whoever asked raises it
        return portable(error)


@functools.lru_cache(maxsize=2)
def _task(name: str, plain: str) -> Task:
    given = {setting: Given(value, origin) for setting, (value, origin) in json.loads(plain).items()}
    return resolve(name, given, Path()).task
