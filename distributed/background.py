"""One thread that does one thing at a time for a thread that need not wait for it.

It is no daemon, and holds nothing but the call that is under way: a process that fails elsewhere ends when that is
done. What a call raises is raised to whoever asks next.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Does calls one after the other: in its thread, or, where there is to be none, in the caller's."""

    def __init__(self, name: str, threaded: bool) -> None:
        self.name, self.threaded = name, threaded
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[Any] | None = None
        self._results: list[Any] = []

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Waits for the call before this one, and raises what it raised; begins this one."""
        self.wait()
        if not self.threaded:
            self._results.append(function(*args))
            return
        if self._thread is None:
            from concurrent.futures import ThreadPoolExecutor

            self._thread = ThreadPoolExecutor(1, self.name)
        self._pending = self._thread.submit(function, *args)

    def wait(self) -> None:
        """Returns when nothing is under way; raises what the last call raised, once."""
        if self._pending is None:
            return
        from concurrent.futures import wait

        wait([self._pending])  # Ctrl-C ends the wait, and the call is still pending
        pending, self._pending = self._pending, None
        self._results.append(pending.result())

    def results(self, wait: bool = False) -> list[Any]:
        """Returns what the calls returned that ended since it was last asked; raises what one raised."""
        if wait or (self._pending and self._pending.done()):
            self.wait()
        results, self._results = self._results, []
        return results

    def close(self) -> None:
        """Waits for the call under way, and ends the thread; raises as `wait` does."""
        try:
            self.wait()
        finally:
            if self._thread:
                self._thread.shutdown()
                self._thread = None
