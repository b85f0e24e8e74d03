"""Learning-rate schedules: pure functions from a step to the factor that scales every optimizer's `lr`."""

import math
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Gt, Le

from tasks.errors import UserError, did_you_mean

Factor = Annotated[float, Gt(0), Le(1)]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What every schedule has; by itself it is constant."""

    name: str = "constant"  # constant, step, multistep, exponential, cosine, plateau, onecycle or polynomial
    warmup: Annotated[float, Ge(0)] = 0.0  # linear warm-up from 0 before any schedule: epochs

    @property
    def spans(self) -> bool:
        """Whether it is stretched over the whole training, so that the last step stands at its end."""
        return False

    def factor(self, progress: float, epochs: float, plateau: "Plateaus") -> float:
        """Returns the factor at `progress` epochs of `epochs`, both counted after the warm-up."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    every: Annotated[float, Gt(0)] = 30.0  # epochs between two falls
    gamma: Factor = 0.1  # factor of each fall

    def factor(self, progress: float, epochs: float, plateau: "Plateaus") -> float:
        return self.gamma ** math.floor(progress / self.every)


@dataclass(frozen=True, kw_only=True)
class MultiStep(Schedule):
    milestones: tuple[float, ...] = (0.5, 0.75)  # when it falls: epochs, or shares of the whole where below 1
    gamma: Factor = 0.1  # factor of each fall

    def factor(self, progress: float, epochs: float, plateau: "Plateaus") -> float:
        return self.gamma ** sum(progress >= (m * epochs if m < 1 else m) for m in self.milestones)


@dataclass(frozen=True, kw_only=True)
class Exponential(Schedule):
    gamma: Factor = 0.95  # factor an epoch

    def factor(self, progress: float, epochs: float, plateau: "Plateaus") -> float:
        return self.gamma**progress


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    floor: Annotated[float, Ge(0), Le(1)] = 0.0  # factor at the end
    restart: Annotated[float, Ge(1e-6)] | None = None  # epochs of the first period; none: one period for all
    stretch: Annotated[float, Ge(1), Le(1e6)] = 1.0  # each period is so many times as long as the one before

    @property
    def spans(self) -> bool:
        return self.restart is None

    def factor(self, progress: float, epochs: float, plateau: "Plateaus") -> float:
        """Half a cosine down (Loshchilov and Hutter, 2017), begun anew after every period."""
        period = max(epochs, 1e-9)
        if self.restart:
            growth, whole = self.stretch - 1, progress / self.restart
            ended = math.log1p(whole * growth) / math.log(self.stretch) if growth else whole
            ended = math.floor(ended + 1e-9)  # a period that ends here has ended, whatever the last bit says
            progress -= self.restart * ((self.stretch**ended - 1) / growth if growth else ended)
            progress, period = max(progress, 0.0), self.restart * self.stretch**ended
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(progress / period, 1.0))) / 2


@dataclass(frozen=True, kw_only=True)
class Plateau(Schedule):
    gamma: Factor = 0.1  # factor of each fall
    patience: Annotated[int, Ge(1)] = 3  # evaluations without a new best before it falls
    floor: Annotated[float, Ge(0), Le(1)] = 0.0  # least factor

    def factor(self, progress: float, epochs: float, plateau: "Plateaus") -> float:
        return max(self.gamma ** plateau.falls(self.patience), self.floor)


@dataclass(frozen=True, kw_only=True)
class OneCycle(Schedule):
    rise: Annotated[float, Gt(0), Le(0.9)] = 0.3  # share of the training that the rise takes
    start: Factor = 0.04  # factor at the beginning
    end: Annotated[float, Gt(0), Le(1)] = 4e-6  # factor at the end

    @property
    def spans(self) -> bool:
        return True

    def factor(self, progress: float, epochs: float, plateau: "Plateaus") -> float:
        """Up to `lr` and down again, half a cosine each (Smith and Topin, 2018)."""
        share = min(progress / max(epochs, 1e-9), 1.0)
        if share < self.rise:
            return _between(self.start, 1.0, share / self.rise)
        return _between(1.0, self.end, (share - self.rise) / (1 - self.rise))


@dataclass(frozen=True, kw_only=True)
class Polynomial(Schedule):
    power: Annotated[float, Gt(0)] = 1.0  # 1: a straight line
    floor: Annotated[float, Ge(0), Le(1)] = 0.0  # factor at the end

    @property
    def spans(self) -> bool:
        return True

    def factor(self, progress: float, epochs: float, plateau: "Plateaus") -> float:
        share = min(progress / max(epochs, 1e-9), 1.0)
        return self.floor + (1 - self.floor) * (1 - share) ** self.power


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Schedule, "step": Step, "multistep": MultiStep, "exponential": Exponential, "cosine": Cosine,
    "plateau": Plateau, "onecycle": OneCycle, "polynomial": Polynomial,
}  # fmt: skip


def settings_class(name: str) -> type[Schedule]:
    if name not in SCHEDULES:
        raise UserError(f"unknown schedule '{name}'", did_you_mean(name, SCHEDULES))
    return SCHEDULES[name]


def _between(a: float, b: float, share: float) -> float:
    return b + (a - b) * (1 + math.cos(math.pi * share)) / 2


@dataclass
class Plateaus:
    """How the objective went: what plateau and early stopping decide by. Resumable as a list of numbers."""

    history: list[float] = field(default_factory=list)  # one a evaluation, higher is better

    def since_best(self) -> int:
        """Evaluations since the best one; a NaN is never the best."""
        best, at = -math.inf, -1
        for index, value in enumerate(self.history):
            if value > best:
                best, at = value, index
        return len(self.history) - 1 - at

    def is_best(self) -> bool:
        """Whether no evaluation was better than the last; at a tie, more training counts as better."""
        return bool(self.history) and self.history[-1] >= max(v for v in [-math.inf, *self.history] if v == v)

    def falls(self, patience: int) -> int:
        """How many times `patience` evaluations in a row brought no new best."""
        best, waited, falls = -math.inf, 0, 0
        for value in self.history:
            if value > best:
                best, waited = value, 0
            else:
                waited += 1
            if waited == patience:
                falls, waited = falls + 1, 0
        return falls


def factor(schedule: Schedule, step: int, steps_per_epoch: int, total_steps: int, plateaus: Plateaus) -> float:
    """Returns the factor of step `step` (from 0) out of `total_steps`."""
    warmup = schedule.warmup * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = total_steps - warmup
    progress = (step - warmup) * (left / max(left - 1, 1) if schedule.spans else 1)
    return schedule.factor(progress / steps_per_epoch, left / steps_per_epoch, plateaus)
