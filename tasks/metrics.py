"""The usual metrics as `Metric`s of the task contract, mergeable over any number of workers.

The three that nearly every run asks for are a few sums each; the rest is torchmetrics, whose import takes as long as
that of torch, and would stand before the first step.
"""

import abc
import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import torchmetrics


class FromTorchmetrics:
    """A torchmetrics metric behind the `Metric` protocol."""

    def __init__(self, metric: "torchmetrics.Metric", *, higher_is_better: bool | None = None) -> None:
        known = metric.higher_is_better if higher_is_better is None else higher_is_better
        if known is None:
            raise TypeError(f"say whether a higher {type(metric).__name__} is better: higher_is_better=True or False")
        self.metric = metric
        self.higher_is_better: bool = known

    def update(self, predicted: Any, target: Any) -> None:
        self.metric.update(_to_cpu(predicted), _to_cpu(target))

    def state(self) -> dict[str, Any]:
        return {"count": self.metric.update_count, **self.metric.metric_state}

    def merge(self, states: list[dict[str, Any]]) -> None:
        self.metric.reset()
        seen = [state for state in states if state["count"]]
        for state in seen:
            part = self.metric.clone()
            part.reset()
            for name, value in state.items():
                if name != "count":
                    setattr(part, name, value)
            part._update_count = state["count"]  # merge_state weighs means by it; there is no public way to set it
            self.metric.merge_state(part)
        self.metric._update_count = sum(state["count"] for state in seen)

    def compute(self) -> float:
        return float(self.metric.compute())


def _to_cpu(value: Any) -> Any:
    """On the CPU, and in float64, so that sums do not depend on how the rows were batched."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return value.double() if value.is_floating_point() else value


def _wide(value: Tensor) -> Tensor:
    """In float64, where it is; Apple's devices have none."""
    return (value.cpu() if value.device.type == "mps" else value).double()


class Sums(abc.ABC):
    """A figure that follows from some sums over the rows, kept in float64."""

    higher_is_better = True

    def __init__(self) -> None:
        self.count = 0  # of updates
        self.sums = [0.0]

    @abc.abstractmethod
    def parts(self, predicted: Tensor, target: Tensor) -> list[Tensor | float]:
        """What some rows add to each of the sums."""

    @abc.abstractmethod
    def figure(self, *sums: float) -> float:
        """What follows from the sums; NaN where it is not defined."""

    def added(self, one: list[float], other: list[float]) -> list[float]:
        """The sums over the rows of both."""
        return [mine + part for mine, part in zip(one, other, strict=True)]

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Takes a prediction for each target; raises ValueError where they are not of one shape."""
        if predicted.shape != target.shape:  # torch would compare each with each
            raise ValueError(f"predictions {tuple(predicted.shape)} and targets {tuple(target.shape)} differ in shape")
        parts = [float(part) for part in self.parts(predicted.detach(), target.detach())]
        self.sums = self.added(self.sums, parts) if self.count else parts
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "sums": self.sums}

    def merge(self, states: list[dict[str, Any]]) -> None:
        seen = [state["sums"] for state in states if state["count"]]
        self.count = sum(state["count"] for state in states)
        self.sums = functools.reduce(self.added, seen) if seen else [0.0]

    def compute(self) -> float:
        return self.figure(*self.sums) if self.count else float("nan")


class _Accuracy(Sums):
    def parts(self, predicted: Tensor, target: Tensor) -> list[Tensor | float]:
        return [(predicted == target).sum(), target.numel()]

    def figure(self, *sums: float) -> float:
        right, rows = sums
        return right / rows if rows else float("nan")


class _RMSE(Sums):
    higher_is_better = False

    def parts(self, predicted: Tensor, target: Tensor) -> list[Tensor | float]:
        return [(_wide(predicted) - _wide(target)).square().sum(), target.numel()]

    def figure(self, *sums: float) -> float:
        squared, values = sums
        return math.sqrt(squared / values) if values else float("nan")


class _R2(Sums):
    """Squares around the mean, instead of squares: of large targets these would differ by less than is kept of them.

    Two such sums are joined as Chan, Golub and LeVeque (1983) do.
    """

    def parts(self, predicted: Tensor, target: Tensor) -> list[Tensor | float]:
        wanted = _wide(target)
        mean = wanted.mean() if target.numel() else 0.0
        return [(_wide(predicted) - wanted).square().sum(), mean, (wanted - mean).square().sum(), target.numel()]

    def added(self, one: list[float], other: list[float]) -> list[float]:
        residual, mean, spread, values = one
        more, its_mean, its_spread, its_values = other
        whole = values + its_values
        if not whole:
            return one
        apart, share = its_mean - mean, its_values / whole
        return [residual + more, mean + apart * share, spread + its_spread + apart * apart * values * share, whole]

    def figure(self, *sums: float) -> float:
        residual, _, spread, _ = sums
        return 1 - residual / spread if spread > 0 else float("nan")


def accuracy() -> Sums:
    """Share of rows whose class is predicted right."""
    return _Accuracy()


def f1(classes: int) -> FromTorchmetrics:
    """F1 of every class, averaged; of the second class alone where there are two."""
    from torchmetrics import classification

    if classes == 2:
        return FromTorchmetrics(classification.BinaryF1Score())
    return FromTorchmetrics(classification.MulticlassF1Score(num_classes=classes, average="macro"))


def rmse() -> Sums:
    """Root of the mean squared error, in the target's unit."""
    return _RMSE()


def r2() -> Sums:
    """Share of the target's variance that is explained: 1 is perfect, 0 is no better than the mean."""
    return _R2()
