"""Averages of the weights on their way, which are often better than where the way ends. Settings need no torch."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Lt

from tasks.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """No average: what was learned last is judged, saved and used."""

    name: str = "none"  # none, ema or swa: whether an average of the weights is judged, saved and used

    def begins(self, step: int, total: int) -> bool:
        """Whether the weights after step `step` (from 0) of `total` enter the average."""
        return False

    def share(self, taken: int) -> float:
        """Returns the share of the new weights in the average, after `taken` weights have entered it."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Ema(Averaging):
    """An exponential moving average (Polyak and Juditsky, 1992; as used by Tarvainen and Valpola, 2017)."""

    decay: Annotated[float, Gt(0), Lt(1)] = 0.999  # share of the average that stays in each step; less in the first

    def begins(self, step: int, total: int) -> bool:
        return True

    def share(self, taken: int) -> float:
        # The first weights are far from those that are sought: they are forgotten sooner.
        return 1 - min(self.decay, (1 + taken) / (10 + taken))


@dataclass(frozen=True, kw_only=True)
class Swa(Averaging):
    """Stochastic weight averaging (Izmailov et al., 2018): the plain mean of the weights of the last part.

    Running statistics of normalisation layers are averaged as well, instead of computed anew over the training rows.
    """

    start: Annotated[float, Ge(0), Lt(1)] = 0.75  # share of the training after which weights are averaged

    def begins(self, step: int, total: int) -> bool:
        return step >= self.start * total

    def share(self, taken: int) -> float:
        return 1 / (taken + 1)


AVERAGES: dict[str, type[Averaging]] = {"none": Averaging, "ema": Ema, "swa": Swa}


def settings_class(name: str) -> type[Averaging]:
    if name not in AVERAGES:
        raise UserError(f"unknown average '{name}'", did_you_mean(name, AVERAGES))
    return AVERAGES[name]


class Average:
    """The average of some named tensors, which change in place."""

    def __init__(self, settings: Averaging, tensors: "dict[str, Tensor]") -> None:
        """Takes weights and buffers; those that are no floating-point numbers are left alone."""
        self.settings, self.taken = settings, 0
        self.live = {n: t for n, t in tensors.items() if t.is_floating_point()} if settings.name != "none" else {}
        self.mean: dict[str, Tensor] = {}  # empty as long as nothing has entered

    def take(self, step: int, total: int) -> None:
        """Lets the weights after a step into the average, if it is time."""
        if not self.live:
            return
        if not self.settings.begins(step, total):
            self.mean, self.taken = {}, 0  # of a training that ended sooner: more epochs were asked for since
            return
        import torch

        if not self.mean:
            self.mean = {name: tensor.detach().clone() for name, tensor in self.live.items()}
        else:
            now = [self.live[name].detach() for name in self.mean]
            torch._foreach_lerp_(list(self.mean.values()), now, self.settings.share(self.taken))
        self.taken += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the average in the place of the live tensors, and these back at the end; no number is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, mean in self.mean.items():
            live = self.live[name]
            live.data, mean.data = mean.data, live.data

    def state(self, tensors: "dict[str, Tensor]") -> "tuple[dict[str, Tensor], dict[str, Tensor]]":
        """Returns `tensors` with the average in them, and as `live/<name>` what it stands for, to go on from.

        Raises UserError for one that is not the tensor any more whose average was taken.
        """
        for name in self.mean:
            if tensors[name].data_ptr() != self.live[name].data_ptr():
                raise UserError(f"averaging: the network replaces its buffer '{name}', whose average then stands still",
                                "write into it by copy_(), or averaging.name=none")  # fmt: skip
        told = {name: self.mean.get(name, tensor) for name, tensor in tensors.items()}
        return told, {f"live/{name}": self.live[name].detach() for name in self.mean}

    def restore(self, told: "dict[str, Tensor]", taken: int) -> None:
        """Takes back what `state` gave: the live tensors hold the average, `told` what it stands for."""
        import torch

        self.taken = taken
        self.mean = {name: live.detach().clone() for name, live in self.live.items() if f"live/{name}" in told}
        with torch.no_grad():
            for name in self.mean:
                self.live[name].copy_(told[f"live/{name}"])
