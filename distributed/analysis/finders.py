"""The learning rate that suits a task, by a range test; of the size of a micro-batch tells room.py.

It learns by the very loop that trains, with weights that are thrown away; no run is touched.
"""

import dataclasses
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distributed.analysis.evaluate import device_of
from distributed.data.store import Store
from distributed.learning import begin
from distributed.loop import learn
from distributed.run import Run
from distributed.schedules import Schedule
from distributed.world import World
from tasks.errors import RunFailed, UserError, did_you_mean

DIVERGED = 4.0  # times the best loss, at which a range test ends (as in fastai's)
MOMENTUM = 0.9  # of the loss that is watched while rates rise: about 10 steps


@dataclass(frozen=True)
class RangeTest:
    """The loss of each step of a range test, at the rate of that step."""

    entry: str
    rates: list[float]
    losses: list[float]
    diverged: bool  # ended before the highest rate

    @property
    def smooth(self) -> list[float]:
        return smoothed(self.losses)

    @property
    def suggestion(self) -> float | None:
        return steepest(self.rates, self.losses)

    @property
    def lowest(self) -> float | None:
        """The rate at which the smoothed loss is lowest: too high to train with; a tenth of it often is good."""
        return self.rates[int(np.argmin(self.smooth))] if self.rates else None


def learning_rate(
    run: Run, store_path: Path, *, entry: str | None = None, steps: int = 100, lowest: float = 1e-7,
    highest: float = 10.0, show: Callable[[int, float, float], None] = lambda step, rate, loss: None,
) -> RangeTest:  # fmt: skip
    """Learns while the rate of one optimizer rises exponentially (Smith, 2017, section 3.3).

    Ends when the loss, smoothed, is 4 times its best, or not finite. The same seed gives the same figures.

    Raises UserError for an entry that the task does not have, and for bounds that are none.
    """
    entry = check(run, entry, steps, lowest, highest)
    # The weights that it begins with, at one rate after the other: nothing else may change meanwhile.
    train = dataclasses.replace(run.train, unfreeze=(), max_skipped=0)
    run = dataclasses.replace(run, schedule=Schedule(), train=train)
    learning = begin(run, Store(store_path, dict(run.task.fields)), World(device=device_of(run)), None)
    optimizer = learning.updater.entries[entry]
    rates: list[float] = []
    losses: list[float] = []
    mean, best = 0.0, math.inf
    for step in range(steps):
        rate = lowest * (highest / lowest) ** (step / (steps - 1))
        optimizer.settings = dataclasses.replace(optimizer.settings, lr=rate)
        learn(learning)
        learning.state.step += 1
        try:
            loss = sum(learning.tally.take().values())
        except RunFailed:  # not finite
            return RangeTest(entry, rates, losses, diverged=True)
        rates.append(rate)
        losses.append(loss)
        show(step + 1, rate, loss)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * loss
        now = mean / (1 - MOMENTUM ** (step + 1))
        best = min(best, now)
        if now > best + (DIVERGED - 1) * abs(best):
            return RangeTest(entry, rates, losses, diverged=True)
    return RangeTest(entry, rates, losses, diverged=False)


def check(run: Run, entry: str | None, steps: int, lowest: float, highest: float) -> str:
    """Returns the name of the optimizer that is meant; raises UserError for one that is not there, and for bounds."""
    if not 0 < lowest < highest or not math.isfinite(highest):
        raise UserError(f"rates from {lowest:g} to {highest:g}: the first must be above 0 and below the second",
                        "--lowest 1e-7 --highest 10")  # fmt: skip
    if steps < 10:
        raise UserError(f"{steps} steps are too few to see a curve", "--steps 100")
    there = list(run.optimizers)
    if entry is None:
        if len(there) > 1:
            raise UserError(f"this task has several optimizers: {', '.join(there)}", f"--entry {there[0]}")
        return there[0]
    if entry not in there:
        hint = did_you_mean(entry, there) if len(there) > 1 else "leave out --entry"
        raise UserError(f"this task has no optimizer '{entry}'", hint)
    return entry


def smoothed(losses: list[float]) -> list[float]:
    """Returns the mean of each loss and its neighbours on both sides, so that a fall stays where it is.

    Neighbours weigh by a Gaussian of a 40th of the steps. What exceeds the beginning by more than the best falls below
    it is cut to that: else one explosion would hide what came before it.
    """
    values = np.asarray(losses, float)
    if not len(values):
        return []
    start = float(np.median(values[: max(1, len(values) // 10)]))
    values = np.minimum(values, start + (start - values.min()))
    places = np.arange(len(values))
    width = max(1.0, len(values) / 40)
    weights = np.exp(-0.5 * ((places[:, None] - places[None]) / width) ** 2)
    return ((weights * values).sum(1) / weights.sum(1)).tolist()


def steepest(rates: list[float], losses: list[float]) -> float | None:
    """Returns the rate at which the smoothed loss falls most a factor of the rate, before its lowest point.

    None where it never falls further than by twice the scatter of the losses at the lowest rates.
    """
    if len(losses) < 3:
        return None
    curve, first = np.asarray(smoothed(losses)), np.asarray(losses[: max(3, len(losses) // 10)])
    bottom = int(curve.argmin())
    if curve[: len(first)].mean() - curve[bottom] <= 2 * first.std() or bottom == 0:
        return None
    slopes = np.gradient(curve, np.log(np.asarray(rates)))
    return rates[int(slopes[: bottom + 1].argmin())]


def plot(found: RangeTest, title: str) -> bytes:
    """Returns the curve as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", xlabel="learning rate", ylabel="loss", title=title)
    axes.plot(found.rates, found.losses, color="0.75", label="each step")
    axes.plot(found.rates, found.smooth, color="C0", label="smoothed")
    if found.smooth:
        low, high = min(found.losses), found.smooth[0]
        axes.set_ylim(low - 0.1 * (high - low) - 1e-9, high + 0.6 * (high - low) + 1e-9)
    if found.suggestion is not None:
        axes.axvline(found.suggestion, color="C3", linestyle="--", label=f"falls most: {found.suggestion:.2g}")
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()
