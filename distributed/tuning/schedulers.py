"""Schedulers: whether a trial goes on after an epoch; pure, deterministic from the order of reports."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Literal, Protocol

Decision = Literal["continue", "stop"]


class Scheduler(Protocol):
    """What the sweep asks after every evaluation of a trial."""

    def report(self, trial_id: str, epoch: int, value: float | None) -> Decision: ...


class Never:
    """Lets every trial run to its end."""

    def __init__(self, *, grace: int, factor: int, higher_is_better: bool) -> None:
        pass

    def report(self, trial_id: str, epoch: int, value: float | None) -> Decision:
        return "continue"


class Asha:
    """Asynchronous successive halving (Li et al., 2020, arXiv:1810.05934), in the variant that stops.

    Rungs stand at epochs grace, grace * factor, grace * factor^2 ... A trial that reaches one goes on if it is in the
    top 1/factor (at least one) of all that have reached it so far. Nobody waits, so the first to come goes on; equals
    go on too. A trial that reports less often than the rungs stand is judged at the highest it has passed. A value
    that is no number always stops.
    """

    def __init__(self, *, grace: int, factor: int, higher_is_better: bool) -> None:
        self._grace, self._factor = grace, factor
        self._sign = 1 if higher_is_better else -1
        self._rungs: dict[int, dict[str, float]] = defaultdict(dict)  # epoch -> trial -> value, higher is better

    def report(self, trial_id: str, epoch: int, value: float | None) -> Decision:
        if value is None or math.isnan(value):
            return "stop"
        if epoch < self._grace:
            return "continue"
        level = self._grace
        while level * self._factor <= epoch:
            level *= self._factor
        rung = self._rungs[level]
        if trial_id in rung:
            return "continue"
        rung[trial_id] = self._sign * value
        better = sum(other > rung[trial_id] for other in rung.values())
        return "continue" if better < max(1, len(rung) // self._factor) else "stop"


SCHEDULERS: dict[str, Callable[..., Scheduler]] = {"asha": Asha, "none": Never}
