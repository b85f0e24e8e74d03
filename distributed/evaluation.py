"""Figures of a model on one split: every row counts once, whatever rank it lies on."""

from typing import Any

import torch
from torch import nn

from distributed.alive import MARK
from distributed.data import planned
from distributed.data.store import Store
from distributed.run import Run
from distributed.world import World
from tasks.errors import UserError, did_you_mean
from tasks.task import Facts, Metric, Task


class Evaluator:
    """`evaluator(model)` gives the figures of one split; a collective of all ranks."""

    def __init__(self, run: Run, store: Store, split: str, world: World) -> None:
        self.run, self.facts, self.world = run, store.facts, world
        self.loader = planned.loader(store, split, run.data, run.train.seed, run.transform, world, training=False)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Returns each metric of the task and, where it has one, "loss"; the same on every rank."""
        task, metrics = self.run.task, self.run.task.metrics(self.facts)
        loss = units = 0.0
        model.eval()
        share = -(-self.run.data.batch_size // self.world.size)  # no more than a rank holds in training
        for batch in self.loader.in_order(self.run.data.micro_batch_size or share):
            with self.run.precision.autocast(self.world.device):
                task.measure(metrics, task.predict(model, batch), batch)
                part = float(task.units(batch)) if _has_loss(task) else 0.0
                if part:
                    loss += sum(float(value) for value in task.loss(model, batch).values()) * part
                    units += part
            MARK.beats += 1
        figures = {name: _over_ranks(metric, self.world) for name, metric in metrics.items()}
        if _has_loss(task):
            sums = torch.tensor([loss, units], dtype=self.world.sums, device=self.world.device)
            loss, units = self.world.total(sums).tolist()
            figures["loss"] = loss / max(units, 1e-9)
        return figures


def _has_loss(task: Task) -> bool:
    """A task with a step of its own need not have a loss that can be looked at without learning."""
    return type(task).loss is not Task.loss or type(task).step is Task.step


def _over_ranks(metric: Metric, world: World) -> float:
    if world.size > 1:
        metric.merge(world.gather(metric.state()))
    return metric.compute()


def objective(run: Run, facts: Facts) -> tuple[str, bool]:
    """Returns which figure decides the best checkpoint and trial, and whether higher is better.

    Raises UserError for one that the task does not have.
    """
    metrics: dict[str, Any] = run.task.metrics(facts)
    name = run.train.objective or next(iter(metrics), "loss")
    if name not in metrics and not (name == "loss" and _has_loss(run.task)):
        figures = [*metrics, *(["loss"] if _has_loss(run.task) else [])]
        raise UserError(f"train.objective={name}: there is no such figure", did_you_mean(name, figures))
    return name, name in metrics and metrics[name].higher_is_better
