"""A pool of processes for tests that need several ranks: forked once from a clean server, used by all tests."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch

from distributed.world import World, joined

PRELOADED = ["torch", "torch._dynamo", "distributed.hosts.job", "tests.ranks"]


def _serve(pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    while True:
        function, rank, size, meeting, args = pipe.recv()
        try:
            if size == 1:
                pipe.send((function(World(), *args), None))
                continue
            with joined(rank, size, torch.device("cpu"), meeting) as world:
                pipe.send((function(world, *args), None))
        except BaseException as error:  # the test that asked is to see it, whatever it is
            pipe.send((None, (error, traceback.format_exc())))


class Ranks:
    """Runs a function on several ranks at once: `ranks(2, function, *args)` returns what each rank returned."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.workers: list[tuple[Any, Any]] = []

    def __call__(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        while len(self.workers) < size:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self.workers.append((process, ours))
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(size):
                self.workers[rank][1].send((function, rank, size, f"file://{folder}/meeting", args))
            answers = [self.workers[rank][1].recv() for rank in range(size)]
        for _, failure in answers:
            if failure is not None:
                raise failure[0] from RuntimeError(failure[1])
        return [value for value, _ in answers]

    def close(self) -> None:
        for process, pipe in self.workers:
            process.kill()
            process.join()
            process.close()
            pipe.close()
