"""The losses of the steps since figures were last taken, and which of them was the first that is not finite."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from distributed.divergence import ADVICE, Odd, failure
from distributed.world import World
from tasks.errors import RunFailed

KEPT = 512  # steps whose losses stay apart
Told = list[tuple[dict[str, Tensor], float]]  # of a step: the losses of each micro-batch, and its units


class Tally:
    """Sums of losses over units, since figures were last taken.

    The losses stay where they are until then: reading one would wait for the device.
    """

    def __init__(self, world: World, sums: dict[str, float], units: float) -> None:
        self.world = world
        self.sums = {n: torch.tensor(v, dtype=world.sums, device=world.device) for n, v in sums.items()}
        self.units = units
        self.window: list[tuple[int, Told]] = []  # steps, and what each of them told
        self.odd: Odd | None = None  # the first of this rank among those that are summed up
        self.rows_of: Callable[[int, int], list[int]] = lambda step, micro_batch: []

    def add(self, step: int, told: Told) -> None:
        self.window.append((step, told))
        if len(self.window) == KEPT:
            self._fold()

    def _fold(self) -> None:
        """Sums up the window, so that it does not grow without end; what was not finite in it is kept in mind."""
        sums, self.units = self._summed()
        if self.odd is None and not all(math.isfinite(value) for value in sums.values()):
            self.odd = next(iter(self._odds(self.window)), None)
        self.sums, self.window = sums, []

    def take(self) -> dict[str, float]:
        """Returns the mean losses over all ranks, and begins anew; raises RunFailed where one is not finite."""
        sums, units = self.over_ranks()
        means = {name: value / max(units, 1e-9) for name, value in sums.items()}
        self.refuse_odd(means)
        self.begin_anew()
        return means

    def begin_anew(self) -> None:
        self.sums, self.units, self.window, self.odd = {}, 0.0, [], None

    def over_ranks(self) -> tuple[dict[str, float], float]:
        """Returns the sums of all ranks, and their units; a rank may have met losses that others have not."""
        own, own_units = self._summed()
        names = list(dict.fromkeys(name for mine in self.world.gather(list(own)) for name in mine))
        mine = [float(own.get(name, 0.0)) for name in names]
        *sums, units = self.world.total(
            torch.tensor([*mine, own_units], dtype=self.world.sums, device=self.world.device)
        ).tolist()
        return dict(zip(names, sums, strict=True)), units

    def _summed(self) -> tuple[dict[str, Tensor], float]:
        """Sums and units of this rank, added in the order of the steps, so that a resume adds up to the same bits."""
        sums, units = dict(self.sums), self.units
        for _, told in self.window:
            for losses, part in told:
                for name, loss in losses.items():
                    value = loss.to(self.world.sums) * part if part else loss.new_zeros((), dtype=self.world.sums)
                    sums[name] = sums[name] + value if name in sums else value
                units += part
        return sums, units

    def refuse_odd(self, figures: dict[str, float]) -> None:
        """Raises RunFailed naming step, rank and rows where a figure of the losses is not finite."""
        name = next((name for name, value in figures.items() if not math.isfinite(value)), None)
        if name is None:
            return
        odd = self.first_odd(self.window)
        raise failure(str(odd), odd) if odd else RunFailed(f"the loss '{name}' is {figures[name]}: {ADVICE}")

    def first_odd(self, window: list[tuple[int, Told]]) -> Odd | None:
        """Returns the first loss of any rank that is not finite, the same on all ranks; a collective."""
        mine = self.odd or next(iter(self._odds(window)), None)
        found: list[Odd] = [odd for odd in self.world.gather(mine) if odd]
        return sorted(found, key=lambda odd: (odd.step, odd.micro_batch, odd.rank))[0] if found else None

    def _odds(self, window: list[tuple[int, Told]]) -> Iterator[Odd]:
        for step, told in window:
            for index, (losses, part) in enumerate(told):
                for name, loss in losses.items():
                    if part and not math.isfinite(loss):
                        yield Odd(step, index, self.world.rank, name, float(loss), self.rows_of(step, index))
