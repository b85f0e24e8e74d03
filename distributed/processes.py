"""What processes of this machine need that start others: an error that crosses a pipe, an end with their parent."""

import contextlib
import ctypes
import itertools
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol

from tasks.errors import UserError, place_of

MOST_WORDS = 20_000  # characters of a traceback that are passed on


class Mapper(Protocol):
    """Where work is done: `over` yields `function(*fixed, item)` for every item, in their order."""

    @property
    def same_disk(self) -> bool:
        """Whether it is done where this machine's files are."""
        ...

    def over(self, function: Callable[..., bytes], fixed: tuple, items: Iterable[Any]) -> Iterator[bytes]: ...


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent is gone, however it went: nobody else would."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def portable(error: BaseException) -> BaseException:
    """The error as it can cross a pipe: itself where it pickles, else its words; with its place and traceback."""
    from multiprocessing.reduction import ForkingPickler

    told = {
        "place": place_of(error), "remote_traceback": "".join(traceback.format_exception(error))[-MOST_WORDS:],
        "__notes__": getattr(error, "__notes__", []),
    }  # fmt: skip
    error.__cause__ = error.__context__ = None
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:  # noqa: BLE001 - any failure to pickle means the same
        error = RuntimeError(f"{type(error).__name__}: {error}"[:MOST_WORDS])
    error.__dict__.update(told)
    return error


@dataclass(frozen=True)
class Processes:
    """A mapper over forked processes of this machine."""

    count: int
    few: int  # portions that this process works out by itself, where there are no more of them
    same_disk: bool = True

    def over(self, function: Callable[..., bytes], fixed: tuple, items: Iterable[Any]) -> Iterator[bytes]:
        rest = iter(items)
        first = list(itertools.islice(rest, self.few + 1)) if self.count > 1 else []
        everything = itertools.chain(first, rest)
        if len(first) > self.few:
            # Nothing was worked out here before: an open file would be shared, with its place in it.
            yield from _forked(self.count, function, fixed, everything)
        else:
            yield from (function(*fixed, item) for item in everything)


_work: tuple[Callable[..., bytes], tuple] | None = None  # of a forked process: inherited, so that it need not pickle


def _begin(function: Callable[..., bytes], fixed: tuple) -> None:
    global _work  # noqa: PLW0603
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the work
    signal.signal(signal.SIGUSR1, _stop)
    _work = function, fixed
    multiprocessing.util.Finalize(None, _end, exitpriority=-1000)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)  # one process a core


def _end() -> None:
    """Ends a forked process whose work is done; one that waited for a task's own threads might never end."""
    flush()
    os._exit(0)


def flush() -> None:
    """Writes out what a forked process would say a second time; words that nobody reads any more are let go."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()


class _Stopped(BaseException):
    """Nobody waits for this portion any more."""


_busy = False  # whether this forked process works out a portion: only then may a signal end what it does
_over = False  # whether the portions that wait in the queue are to be left alone


def _stop(number: int, frame: Any) -> None:
    global _over  # noqa: PLW0603
    _over = True
    if _busy:
        raise _Stopped


def _one(item: Any) -> bytes | BaseException:
    global _busy  # noqa: PLW0603
    assert _work is not None
    function, fixed = _work
    try:
        _busy = True
        return b"" if _over else function(*fixed, item)
    except _Stopped:
        return b""
    except Exception as error:  # noqa: BLE001 - the parent raises it
        return portable(error)
    finally:
        _busy = False


def _forked(count: int, function: Callable[..., bytes], fixed: tuple, items: Iterator[Any]) -> Iterator[bytes]:
    context = multiprocessing.get_context("fork")
    waiting: deque[Future] = deque()
    forked: list[Any] = []
    try:
        with ProcessPoolExecutor(count, context, _begin, (function, fixed)) as pool:
            forked = _started(pool)
            try:
                while True:
                    # A few more than there are processes: enough to keep them busy, too few to fill the memory.
                    some = itertools.islice(items, 2 * count - len(waiting))
                    waiting.extend(pool.submit(_one, item) for item in some)
                    if not waiting:
                        return
                    told = waiting.popleft().result()
                    if isinstance(told, BaseException):
                        raise told
                    yield told
            except BrokenProcessPool:
                raise
            except BaseException:
                for one in forked:  # whoever is in the middle of a portion need not end it
                    os.kill(one.pid, signal.SIGUSR1)
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    except BrokenProcessPool:
        # The others were ended by SIGTERM then, or by themselves.
        codes = [one.exitcode for one in forked if one.exitcode not in (None, 0, -signal.SIGTERM)]
        raise _died(codes[0] if codes else -signal.SIGTERM) from None


def _started(pool: ProcessPoolExecutor) -> list[Any]:
    """Starts all processes of a pool; returns them. Raises UserError where the machine has no room for so many."""
    before = multiprocessing.active_children()
    try:
        pool.submit(os.getpid)
    except OSError as error:
        for one in [one for one in multiprocessing.active_children() if one not in before]:
            one.kill()  # the pool has forgotten them, and this process would wait for them at its end
            one.join()
        raise UserError(
            f"no more processes can be started: {error.strerror}",
            "take fewer, such as data.workers=1; `ulimit -u` and free memory are the bounds",
        ) from None
    return [one for one in multiprocessing.active_children() if one not in before]


def _died(code: int) -> UserError:
    if code >= 0:
        return UserError(f"a process that prepares rows ended itself with exit code {code}",
                         "data.workers=1 shows at which row: look for os._exit there")  # fmt: skip
    return UserError(
        f"a process that prepares rows was killed by {signal.Signals(-code).name}",
        "where memory ran out (`dmesg` tells), take fewer processes: data.workers=1; a reader may also have crashed",
    )
