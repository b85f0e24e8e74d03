"""Trains a run on this machine without Ray: in this process, or in several that are forked from it.

Where one of several is killed or hangs, all of them are ended, and fresh ones go on from the newest checkpoint.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from distributed import saved
from distributed.hosts import hangs, job, retries
from distributed.hosts.follow import Rows
from distributed.hosts.hangs import Watch
from distributed.hosts.job import Job, Show
from distributed.hosts.retries import Lost
from distributed.processes import die_with_parent, flush, portable
from distributed.resources import cpu_count
from distributed.run import Run
from distributed.world import World, joined, pick_device
from tasks.errors import UserError

GRACE = 30.0  # seconds that the other ranks get to end by themselves after one has failed
POLL = 0.3  # seconds between two looks at what the ranks record


def connect(run: Run, address: str | None) -> None:
    """Raises UserError where this machine lacks the devices that the run asks for."""
    if address is not None:
        raise UserError("--address names a Ray cluster, but this run is to be trained without Ray",
                        "leave it out, or train on Ray: resources.host=ray")  # fmt: skip
    devices = 0 if run.resources.gpu == 0 else torch.cuda.device_count()
    if devices and run.resources.workers.least > devices:
        raise UserError(f"resources.workers={run.resources.workers}: this machine has {devices} devices, one a worker",
                        f"resources.workers={devices}, or resources.gpu=0 to train on the CPU")  # fmt: skip
    check_device(run)


def check_device(run: Run) -> None:
    """Raises UserError where this machine has none of the devices that the run asks for."""
    if run.resources.gpu and not (torch.cuda.device_count() or torch.backends.mps.is_available()):
        raise UserError(f"resources.gpu={run.resources.gpu:g}: this machine has no device", "resources.gpu=0")


def train(one: Job, stores: Path, show: Show = lambda row: None) -> bool:
    """Trains in as many processes as `processes` says; returns whether it was interrupted before its end.

    Raises UserError and whatever training raises, of whichever process it was: what one of several raises only after
    what `retries` allows.
    """
    with interruptible() as stopped:
        if processes(one.run) == 1:
            hangs.clear(one.directory)  # several processes may have trained it before, and have been killed
            if one.run.resources.cpu:
                torch.set_num_threads(max(1, round(one.run.resources.cpu)))
            with retries.hinting():
                job.work(one, World(device=_device(one, 0)), show, stopped)
        else:
            retries.persist(one.directory, one.run.resources, lambda: _forked(one, show, stopped), stopped)
        return stopped() and saved.summary(one.directory) is None


def processes(run: Run) -> int:
    """Returns how many processes train: of a range, as many as this machine has devices, or cores, for."""
    workers = run.resources.workers
    room = cpu_count() if run.resources.gpu == 0 else torch.cuda.device_count() or cpu_count()
    return min(workers, max(workers.least, room))


def _device(one: Job, local_rank: int) -> torch.device:
    return torch.device("cpu") if one.run.resources.gpu == 0 else pick_device(local_rank)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Lets the first SIGINT or SIGTERM ask for a checkpoint and the end; a second one ends at once."""
    asked, mine = threading.Event(), os.getpid()

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        if os.getpid() != mine:
            return  # a rank that was forked from here: Ctrl-C reaches all of them, and once is enough
        # Where nobody reads any more, or the signal came in the midst of a line: the wish is what counts.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            sys.stderr.write("stopping after a checkpoint; once more to stop at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # signals belong to the main thread; whoever runs it stops us
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forked(one: Job, show: Show, stopped: Callable[[], bool]) -> None:
    """One attempt in forked processes; none of them is left when it ends, however it does."""
    # Forked, not spawned: the children share what is imported. Safe because nothing parallel ran in the parent yet.
    context = multiprocessing.get_context("fork")
    size = processes(one.run)
    rows = Rows(one.directory)
    hangs.clear(one.directory)
    hang = one.run.resources.hang
    watching = Watch(one.directory, size, hang) if hang else None
    with tempfile.TemporaryDirectory(prefix="whipray-") as folder:
        meeting = f"file://{folder}/meeting"
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        ranks = [
            context.Process(target=_rank, args=(one, rank, meeting, pipes[rank][1], stopped), name=f"rank {rank}")
            for rank in range(size)
        ]
        flush()
        for process in ranks:
            process.start()
        show({"kind": "begin", "step": 0})

        def look(whole: bool) -> None:
            for row in rows.new():
                show(row)
            if stopped():  # a signal to this process alone
                saved.ask_to_stop(one.directory)
            hung = watching.look() if watching and whole else None
            if hung:
                saved.write_failure(one.directory, hung.rank, hung)
                raise hung

        try:
            _await(ranks, [receiving for receiving, _ in pipes], look, one.directory)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()  # SIGKILL ends one that is stopped, too
                process.join()
            hangs.clear(one.directory)


def _rank(one: Job, rank: int, meeting: str, tell: Any, stopped: Callable[[], bool]) -> None:
    """One forked process, from joining to leaving; what it raises is told to the parent."""
    die_with_parent()
    # Words go past the bar of the parent: the thread that draws it is not here, and may have held its lock.
    sys.stdout, sys.stderr = (getattr(stream, "rich_proxied_file", stream) for stream in (sys.stdout, sys.stderr))
    size = processes(one.run)
    torch.set_num_threads(max(1, round(one.run.resources.cpu or cpu_count() // size)))
    if sys.platform == "linux":
        # Ranks of one machine have nothing to say beyond it.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        with (
            joined(rank, size, _device(one, rank), meeting) as world,
            hangs.pulse(one.directory, world, one.run.resources.hang, judging=False),
        ):
            job.work(one, world, stopped=stopped)
        tell.send(DONE)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent must hear of it and raise it
        tell.send(portable(error))
        sys.exit(1)


def _await(ranks: list[Any], pipes: list[Any], look: Callable[[bool], Any], directory: Path) -> None:
    """Waits for all ranks, and has a look meanwhile, which is told whether all of them are still there.

    Raises what the first failing one raised, after its partners had a while to end.
    """
    failures: dict[int, BaseException] = {}
    deadline = None
    waiting = dict(enumerate(ranks))
    while waiting and (deadline is None or time.monotonic() < deadline):
        # A rank may be unable to end before its words are taken: its pipe and its end are awaited together.
        awaited = [pipes[rank] for rank in waiting] + [process.sentinel for process in waiting.values()]
        multiprocessing.connection.wait(awaited, timeout=POLL)
        look(len(waiting) == len(ranks))
        for rank, process in list(waiting.items()):
            if not pipes[rank].poll() and process.is_alive():
                continue
            told = _received(pipes[rank])
            if told is None:
                told = _lost(rank, process, _end_of(process), directory)
            elif isinstance(told, SystemExit):
                told = _lost(rank, process, f"ended itself with exit code {told.code}", directory)
            del waiting[rank]
            if isinstance(told, BaseException):
                failures[rank] = told
                deadline = deadline or time.monotonic() + GRACE
                # A partner that waits for the failed rank will not end: a user error is known at once.
                if isinstance(told, UserError):
                    raise told
    for rank, failure in sorted(failures.items(), key=lambda one: saved.is_echo(one[1])):
        saved.write_failure(directory, rank, failure)  # a killed rank could not do it itself
        raise failure


DONE = "done"


def _received(pipe: Any) -> Any:
    """Returns what a rank has said, None where it went without a word."""
    try:
        return pipe.recv() if pipe.poll() else None
    except EOFError:
        return None


def _lost(rank: int, process: Any, how: str, directory: Path) -> Lost:
    """The error that a rank could not tell itself."""
    shown = hangs.read(directory, rank)
    step = f" at step {shown.step}" if shown else ""
    error = Lost(f"rank {rank} (process {process.pid}) {how}{step}")
    error.__dict__.update(rank=rank, pid=process.pid, step=shown.step if shown else 0)
    error.__dict__.update(remote_traceback=shown.stack if shown else "")
    if process.exitcode == -signal.SIGKILL:
        error.add_note(f"if memory ran out (`dmesg` tells): {retries.MEMORY}")
    return error


def _end_of(process: Any) -> str:
    process.join()
    code = process.exitcode
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def elsewhere(call: Callable[[], Path]) -> Path:
    """Calls in a process of its own, so that nothing parallel runs in this one before it forks its ranks."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def target() -> None:
        die_with_parent()
        try:
            sending.send(call())
        except BaseException as error:  # noqa: BLE001 - the parent raises it
            sending.send(portable(error))

    process = context.Process(target=target, name="prepare")
    process.start()
    try:
        multiprocessing.connection.wait([receiving, process.sentinel])
        told = _received(receiving)
    except BaseException:  # an interrupt that reached this process alone
        process.kill()
        raise
    finally:
        process.join()
    if told is None:
        raise RuntimeError(f"the process that prepares the data {_end_of(process)}")
    if isinstance(told, BaseException):
        raise told
    return told
