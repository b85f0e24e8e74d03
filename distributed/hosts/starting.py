"""How a resolved run is begun on the host that its settings name: what the command and Python both do."""

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from distributed import saved, weights
from distributed.data import parts
from distributed.data.broken import OnError
from distributed.hosts import apart, job, local
from distributed.hosts.job import Job, Show
from distributed.run import Run


class Host(Protocol):
    """A module that trains runs."""

    def connect(self, run: Run, address: str | None) -> None: ...

    def train(self, one: Job, stores: Path, show: Show) -> bool: ...


@dataclass(frozen=True)
class Started:
    """A run that this process owns, with its data prepared."""

    job: Job
    stores: Path
    host: Host
    finished: bool  # it was at its end before: there is nothing to train

    def train(self, show: Show) -> bool:
        """Trains to the end; returns whether it was interrupted before. Raises whatever training raises."""
        return self.host.train(self.job, self.stores, show)


@contextlib.contextmanager
def started(
    run: Run, directory: Path, stores: Path, preparing: AbstractContextManager[parts.Progress], *,
    address: str | None = None, on_error: OnError = "skip", forks: bool = True,
) -> Iterator[Started]:  # fmt: skip
    """Prepares a run and begins it, or goes on with it, in its directory, which is this process's meanwhile.

    `forks`: this process may fork the ranks of several workers, because nothing parallel has run in it yet. Raises
    UserError for a request that this machine or cluster cannot hold, for data that cannot be prepared, and where the
    directory holds a run of other settings or is another process's.
    """
    host = _host(run, forks)
    host.connect(run, address)  # an impossible request is refused before anything is prepared
    if run.train.init_from and not (directory / saved.CONFIG).exists():
        weights.check(run.train.init_from, run.runs)
    with job.owned(directory):
        with preparing as progress:
            prepare = functools.partial(job.prepare, run, stores, on_error=on_error, progress=progress)
            store = local.elsewhere(prepare) if host is local and run.resources.workers > 1 else prepare()
        one = Job(run, store, directory, on_error)
        finished = job.begin(one) is not None
        yield Started(one, stores, host, finished)


def _host(run: Run, forks: bool) -> Host:
    if run.resources.on_ray:
        from distributed.hosts import ray_train

        return ray_train
    return local if forks or run.resources.workers == 1 else apart
