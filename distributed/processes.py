"""What processes of this machine need that start others: an error that crosses a pipe, an end with their parent."""

import ctypes
import itertools
import multiprocessing
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, Protocol

from tasks.errors import place_of

MOST_WORDS = 20_000  # characters of a traceback that are passed on
PATIENCE = 1.0  # seconds of work that this process does by itself before it asks others: starting them costs as much


class Mapper(Protocol):
    """Yields `function(*fixed, item)` for every item, in their order, wherever each is worked out."""

    def __call__(self, function: Callable[..., bytes], fixed: tuple, items: Iterable[Any]) -> Iterator[bytes]: ...


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent is gone, however it went: nobody else would."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def portable(error: BaseException) -> BaseException:
    """The error as it can cross a pipe: itself where it pickles, else its words; with its place and traceback."""
    from multiprocessing.reduction import ForkingPickler

    told = {"place": place_of(error), "remote_traceback": "".join(traceback.format_exception(error))[-MOST_WORDS:]}
    error.__cause__ = error.__context__ = None
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:  # noqa: BLE001 - any failure to pickle means the same
        error = RuntimeError(f"{type(error).__name__}: {error}"[:MOST_WORDS])
    error.__dict__.update(told)
    return error


def in_processes(count: int) -> Mapper:
    """Returns a mapper over `count` forked processes, which are started when the work takes over a second."""

    def mapper(function: Callable[..., bytes], fixed: tuple, items: Iterable[Any]) -> Iterator[bytes]:
        rest, began = iter(items), time.monotonic()
        for item in rest:
            if count > 1 and time.monotonic() - began >= PATIENCE:
                yield from _forked(count, function, fixed, itertools.chain([item], rest))
                return
            yield function(*fixed, item)

    return mapper


_work: tuple[Callable[..., bytes], tuple] | None = None  # of a forked process: inherited, so that it need not pickle


def _begin(function: Callable[..., bytes], fixed: tuple) -> None:
    global _work  # noqa: PLW0603
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the work
    _work = function, fixed
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)  # one process a core


def _one(item: Any) -> bytes | BaseException:
    assert _work is not None
    function, fixed = _work
    try:
        return function(*fixed, item)
    except Exception as error:  # noqa: BLE001 - the parent raises it
        return portable(error)


def _forked(count: int, function: Callable[..., bytes], fixed: tuple, items: Iterator[Any]) -> Iterator[bytes]:
    context = multiprocessing.get_context("fork")
    waiting: deque[Future] = deque()
    with ProcessPoolExecutor(count, context, _begin, (function, fixed)) as pool:
        try:
            while True:
                # A few more than there are processes: enough to keep them busy, too few to fill the memory.
                waiting.extend(pool.submit(_one, item) for item in itertools.islice(items, 2 * count - len(waiting)))
                if not waiting:
                    return
                told = waiting.popleft().result()
                if isinstance(told, BaseException):
                    raise told
                yield told
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
