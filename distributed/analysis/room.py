"""How many rows of a batch fit into the memory at once: the size of a micro-batch, found by trying.

Each size learns a few steps by the very loop that trains, in a process that may run out of memory without harm.
"""

import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distributed.analysis.evaluate import device_of
from distributed.analysis.machine import memory
from distributed.data.store import Store
from distributed.learning import Learning, begin
from distributed.loop import learn
from distributed.processes import die_with_parent, flush, portable
from distributed.run import Run
from distributed.world import World
from tasks.errors import RunFailed, UserError
from tasks.task import Task


@dataclass(frozen=True)
class Probe:
    """What became of a few steps with micro-batches of one size."""

    rows: int
    fits: bool
    memory: int | None = None  # bytes at the peak, over what was taken before
    speed: float | None = None  # rows a second
    why: str = ""  # it does not fit, or cannot be trained


@dataclass(frozen=True)
class Room:
    """Which micro-batches fit into the memory, and how quick they are."""

    probes: list[Probe]
    share: int  # most rows that a worker may get of a global batch
    budget: int  # bytes

    @property
    def fitting(self) -> list[Probe]:
        return [probe for probe in self.probes if probe.fits]

    @property
    def largest(self) -> int:
        return max(probe.rows for probe in self.fitting)

    @property
    def quickest(self) -> int:
        return max(self.fitting, key=lambda probe: probe.speed or 0.0).rows

    @property
    def would_fit(self) -> int | None:
        """Rows that would fill the budget, if memory goes on to grow as between the two largest.

        None where the rows are too few of the memory to tell.
        """
        *_, smaller, larger = [None, None, *sorted(self.fitting, key=lambda probe: probe.rows)]
        if smaller is None or larger is None or not larger.memory or not smaller.memory:
            return None
        grown = larger.memory - smaller.memory
        if grown < 0.1 * larger.memory:
            return None
        return int(larger.rows + (self.budget - larger.memory) / grown * (larger.rows - smaller.rows))


def micro_batch(
    run: Run, store_path: Path, *, budget: int | None = None, show: Callable[[Probe], None] = lambda probe: None
) -> Room:
    """Tries powers of two up to a worker's share of a global batch, then halves the gap to the first that is too large.

    The micro-batches of a batch are alike in size, so that of 100 rows 60 at once mean 50: sizes that mean the same as
    a smaller one are left out.

    Each is tried in a process of its own, which may run out of memory without harm: on a device by its own bounds, on
    the CPU by `budget` bytes; none: 90 % of what is free. Raises UserError where no size can be trained.
    """
    rows = Store(store_path, dict(run.task.fields)).epoch_rows("train", run.data.limit)
    share = min(-(-run.data.batch_size // run.resources.workers), rows)
    budget = budget or int(0.9 * memory()[0])
    probes: list[Probe] = []
    refusals: list[UserError] = []

    def fits(size: int) -> bool:
        try:
            told = _apart(lambda: _probe(run, store_path, size, share, budget), size)
        except UserError as error:  # such as normalisation of a single row, of which another size leaves none
            refusals.append(error)
            told = Probe(size, fits=False, why=error.message)
        probes.append(told)
        show(told)
        return told.fits

    fitting, too_large = 0, share + 1
    for size in dict.fromkeys([*(even(size, share) for size in _powers(share)), share]):
        before = len(refusals)
        if fits(size):
            fitting = size
        elif len(refusals) == before:
            too_large = size
            break
    if not fitting and refusals:
        raise refusals[-1]
    if not fitting:
        raise UserError(f"not even micro-batches of {too_large} rows fit: {probes[-1].why}",
                        "a smaller network or smaller rows; free some memory")  # fmt: skip
    while too_large - fitting > max(1, fitting // 32):
        middle = (fitting + too_large) // 2
        size = even(middle, share)
        if size <= fitting or fits(size):
            fitting = middle
        else:
            too_large = size
    return Room(sorted(probes, key=lambda probe: probe.rows), share, _budget_of(run, budget))


def even(size: int, share: int) -> int:
    """Returns the rows of the largest micro-batch of a share, where none may have more than `size`."""
    return -(-share // -(-share // size))


def _powers(below: int) -> Iterator[int]:
    size = 1
    while size < below:
        yield size
        size *= 2


def _probe(run: Run, store_path: Path, rows: int, share: int, budget: int) -> Probe:
    """Learns a few steps in this process, which is thrown away."""
    if run.resources.cpu:
        torch.set_num_threads(max(1, round(run.resources.cpu)))
    world = World(device=device_of(run))
    store = Store(store_path, dict(run.task.fields))
    peak = _peak(world.device, budget)
    data = dataclasses.replace(run.data, batch_size=share, micro_batch_size=rows)
    try:
        learning = begin(dataclasses.replace(run, data=data), store, world, None)  # refuses what cannot be
        del learning
        # Two micro-batches, since the second meets gradients of the first; all, where all lie in memory together.
        batch = min(share, 2 * rows) if type(run.task).units is Task.units else share
        limit = store.epoch_rows("train", run.data.limit) // batch * batch  # so that no batch is smaller
        data = dataclasses.replace(data, batch_size=batch, limit=limit)
        learning = begin(dataclasses.replace(run, data=data), store, world, None)
        speed = _speed(learning)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        return Probe(rows, fits=False, why="out of memory")
    return Probe(rows, fits=True, memory=peak(), speed=speed)


def _speed(learning: Learning) -> float:
    """Rows a second, of steps after the first two."""
    began, counted, step = 0.0, 0, 0
    while step < 3 or (time.perf_counter() - began < 0.3 and step < 50):
        if step == 2:
            began, counted = time.perf_counter(), 0
        counted += len(learning.plan.batch(*divmod(learning.state.step, learning.plan.steps)))
        learn(learning)
        learning.state.step += 1
        learning.tally.take()  # waits for the device
        step += 1
    return counted / max(time.perf_counter() - began, 1e-9)


def _is_out_of_memory(error: BaseException) -> bool:
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "bad_alloc", "could not create a memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in signs)


def _budget_of(run: Run, budget: int) -> int:
    if run.resources.gpu == 0 or not torch.cuda.device_count():
        return budget
    return _apart(lambda: torch.cuda.mem_get_info(device_of(run))[0], 0)


def _peak(device: torch.device, budget: int) -> Callable[[], int | None]:
    """Bounds what this process may take from here on, where that is the CPU's; the result tells what it took."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_reserved(device)
    if sys.platform != "linux":
        return lambda: None
    import resource

    now = _status()
    # Of what is asked for, not of what is touched: it fails before the machine begins to swap.
    most = now["VmData"] + budget
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return lambda: max(0, _status()["VmHWM"] - now["VmRSS"])


def _status() -> dict[str, int]:
    """Bytes of this process's memory, by the names of proc(5)."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def _apart(call: Callable[[], Any], rows: int) -> Any:
    """Calls in a forked process; a Probe that does not fit where it was killed, as one is that takes too much."""
    if torch.cuda.is_initialized():  # a forked process could not use it
        torch.cuda.empty_cache()
        return call()
    receiving, sending = multiprocessing.Pipe(duplex=False)
    flush()
    process = multiprocessing.get_context("fork").Process(target=_tell, args=(call, sending), name="probe")
    process.start()
    sending.close()
    try:
        told = receiving.recv()
    except EOFError:
        told = None
    except BaseException:  # an interrupt that reached this process alone
        process.kill()
        raise
    finally:
        process.join()
    if isinstance(told, BaseException):
        raise told
    if told is not None:
        return told
    code = process.exitcode or 0
    if -code in (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS):
        return Probe(rows, fits=False, why=f"killed by {signal.Signals(-code).name}")
    raise RunFailed(f"the process that tried {rows} rows ended with exit code {code}")


def _tell(call: Callable[[], Any], sending: Any) -> None:
    die_with_parent()
    try:
        sending.send(call())
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        sending.send(portable(error))
    flush()
    os._exit(0)  # threads of the loader or of a library need not be waited for
