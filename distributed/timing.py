"""Where the time of an optimizer step goes: data, forward, backward, optimizer, communication.

A mark costs a fraction of a microsecond on CPUs and never waits for a device. On CUDA it is the device's time that
counts: in one step of seven the marks are events on its stream, which are read when the figures are taken. A batch
that is made while the device still computes therefore costs nothing there, and one that it waits for does.
"""

import itertools
from collections.abc import Iterable
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Part = Literal["data", "forward", "backward", "optimizer", "communication"]
PARTS: tuple[Part, ...] = ("data", "forward", "backward", "optimizer", "communication")
SAMPLED = 7  # one step in so many is timed on a CUDA device; a prime, because batches are made in blocks of 2^n


class Times:
    """Adds up the time of each part of a step.

    `begin(part)` ends the part before it; `with times.within(part):` puts one into another, whose time stops
    meanwhile; `end()` ends the step, and what comes until the next `begin` is nobody's.
    """

    def __init__(self, device: "torch.device | None" = None, log_every: int = 1) -> None:
        """`log_every`: steps between two calls of `take`, so that each has at least one timed step on CUDA."""
        self.part: Part | None = None
        self.since = 0.0
        self.steps = 0  # ended since the last take
        self.sums = dict.fromkeys(PARTS, 0.0)  # seconds of this process, of those steps
        self.device = _Device(min(SAMPLED, log_every)) if device is not None and device.type == "cuda" else None

    def begin(self, part: Part | None) -> Part | None:
        """Gives the time from here on to a part; returns the part that it ends."""
        now, before = perf_counter(), self.part
        if before is not None:
            self.sums[before] += now - self.since
        self.part, self.since = part, now
        if self.device is not None:
            self.device.begin(part)
        return before

    def within(self, part: Part) -> "_Within":
        """Returns a context whose time is the part's; what was under way goes on behind it."""
        return _Within(self, part)

    def end(self) -> None:
        """Ends a step."""
        self.begin(None)
        self.steps += 1
        if self.device is not None:
            self.device.end()

    def take(self, modules: "Iterable[torch.nn.Module]" = ()) -> dict[str, float]:
        """Returns `time/<part>`, mean milliseconds a step since the last call, and begins anew; empty without steps.

        `modules` are those that the ranks share: what a backward waits for their gradients is communication. To be
        called where the device has been waited for anyway: steps that it has not finished are left out.
        """
        if not self.steps:
            return {}
        means = {part: 1e3 * seconds / self.steps for part, seconds in self.sums.items()}
        self.steps, self.sums = 0, dict.fromkeys(PARTS, 0.0)
        if self.device is not None:
            means = self.device.take() or means
        waited = min(waited_for_gradients(modules), means["backward"])
        means["backward"] -= waited
        means["communication"] += waited
        return {f"time/{part}": round(mean, 4) for part, mean in means.items()}


class _Within:
    __slots__ = ("before", "part", "times")

    def __init__(self, times: Times, part: Part) -> None:
        self.times, self.part = times, part

    def __enter__(self) -> None:
        self.before = self.times.begin(self.part)

    def __exit__(self, *error: object) -> None:
        self.times.begin(self.before)


class _Device:
    """Marks on the stream of a CUDA device, in one step of `every`."""

    def __init__(self, every: int) -> None:
        self.every, self.step = every, 0
        self.timed: list[list[tuple[Part | None, Any]]] = []  # steps that ended: what began, and its event
        self.now: list[tuple[Part | None, Any]] = []
        self.free: list[Any] = []  # events to be used again

    def begin(self, part: Part | None) -> None:
        if self.step % self.every == self.every - 1:  # not the first: it follows on what took the figures
            event = self.free.pop() if self.free else _event()
            event.record()
            self.now.append((part, event))

    def end(self) -> None:
        if self.now:
            self.timed.append(self.now)
            self.now = []
        self.step += 1

    def take(self) -> dict[Part, float]:
        """Returns mean milliseconds of the timed steps that the device has finished; empty where there is none."""
        done = [step for step in self.timed if step[-1][1].query()]
        self.timed = [step for step in self.timed if not step[-1][1].query()]
        sums = dict.fromkeys(PARTS, 0.0)
        for step in done:
            for (part, event), (_, following) in itertools.pairwise(step):
                if part is not None:
                    sums[part] += event.elapsed_time(following)
            self.free += [event for _, event in step]
        return {part: total / len(done) for part, total in sums.items()} if done else {}


def _event() -> Any:
    import torch

    return torch.cuda.Event(enable_timing=True)


def waited_for_gradients(modules: "Iterable[torch.nn.Module]") -> float:
    """Returns the milliseconds that a backward waits for gradients of other ranks after its own are computed.

    From what DistributedDataParallel measures itself, on gloo and NCCL alike: in each of the first ten steps, then in
    every hundredth; the mean of all of them. What it exchanges while gradients are still computed costs nothing and
    does not count. 0 for modules of one rank.
    """
    waited = 0.0
    for module in modules:
        told = getattr(module, "_get_ddp_logging_data", dict)()
        exchanged = told.get("avg_backward_comm_time", 0) - told.get("avg_backward_compute_comm_overlap_time", 0)
        waited += max(exchanged, 0) / 1e6  # nanoseconds
    return waited
