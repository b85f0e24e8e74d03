"""The usual metrics as `Metric`s of the task contract, by torchmetrics, mergeable over any number of workers."""

from typing import Any

import torch
import torchmetrics
from torchmetrics import classification, regression


class FromTorchmetrics:
    """A torchmetrics metric behind the `Metric` protocol."""

    def __init__(self, metric: torchmetrics.Metric, *, higher_is_better: bool | None = None) -> None:
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


def accuracy() -> FromTorchmetrics:
    """Share of rows whose class is predicted right."""
    return FromTorchmetrics(_Share().set_dtype(torch.float64))


class _Share(torchmetrics.MeanMetric):
    higher_is_better = True

    def update(self, value: torch.Tensor, weight: torch.Tensor) -> None:  # type: ignore[override]
        super().update((value == weight).double())  # predicted and true classes, (B,) each


def f1(classes: int) -> FromTorchmetrics:
    """F1 of every class, averaged; of the second class alone where there are two."""
    if classes == 2:
        return FromTorchmetrics(classification.BinaryF1Score())
    return FromTorchmetrics(classification.MulticlassF1Score(num_classes=classes, average="macro"))


def rmse() -> FromTorchmetrics:
    """Root of the mean squared error, in the target's unit."""
    return FromTorchmetrics(regression.MeanSquaredError(squared=False).set_dtype(torch.float64))


def r2() -> FromTorchmetrics:
    """Share of the target's variance that is explained: 1 is perfect, 0 is no better than the mean."""
    return FromTorchmetrics(regression.R2Score().set_dtype(torch.float64))
