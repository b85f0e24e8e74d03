"""From losses to changed parameters: accumulate, scale, clip, schedule, step; for one optimizer or several."""

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distributed import optimizers
from distributed.optimizers import Optimizer
from distributed.precision import Precision
from distributed.world import World, plain
from tasks.errors import UserError

ONLY = "model"  # name of the entry where a model has but one


@dataclass
class Entry:
    """One part of the model that learns by an optimizer of its own."""

    module: nn.Module  # wrapped
    settings: Optimizer
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]


class Updater:
    """Holds the optimizers of a model, and is the only place where a parameter changes.

    `accumulate(...)` gives the `update` that a task's step calls; `apply(factor)` then steps all optimizers together.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: dict[str, Optimizer],
        precision: Precision,
        clip_norm: float | None,
        world: World,
    ) -> None:
        self.precision, self.clip_norm, self.world = precision, clip_norm, world
        self.scaler = precision.scaler(world.device)
        modules = dict(model.items()) if isinstance(model, nn.ModuleDict) else {ONLY: model}
        self.entries: dict[str, Entry] = {}
        for name, module in modules.items():
            parameters = [p for p in module.parameters() if p.requires_grad]
            if parameters:
                one = settings[name]
                self.entries[name] = Entry(module, one, optimizers.create(one, parameters), parameters)
        if not self.entries:
            raise UserError("the model has no parameters to train", "build() must return a network that can learn")

    def accumulate(self, step: int, weight: float, *, last: bool) -> "Accumulate":
        return Accumulate(self, step, weight, last=last)

    def apply(self, step: int, factor: float) -> None:
        """Steps every optimizer that has gradients, in the order of the entries, and drops the gradients."""
        stepping = [entry for entry in self.entries.values() if step % entry.settings.every == 0]
        for entry in stepping:
            for group in entry.optimizer.param_groups:
                group["lr"] = entry.settings.lr * factor
            if self.clip_norm is not None:
                self.scaler.unscale_(entry.optimizer)
                torch.nn.utils.clip_grad_norm_(entry.parameters, self.clip_norm)
            self.scaler.step(entry.optimizer)
        if stepping:
            self.scaler.update()
        for entry in stepping:
            entry.optimizer.zero_grad(set_to_none=True)

    def is_finite(self) -> bool:
        """Whether all weights that learn are finite; waits for the device."""
        weights = [parameter.detach() for entry in self.entries.values() for parameter in entry.parameters]
        return bool(torch.isfinite(torch.nn.utils.get_total_norm(weights)))

    # ---- state

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the optimizers' tensors as `optimizer/<parameter>/<slot>`, and their plain numbers."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        for name, parameter, slots in self._slots():
            for slot, value in slots.get(parameter, {}).items():
                key = f"optimizer/{name}/{slot}"
                if isinstance(value, Tensor):
                    tensors[key] = value.detach().contiguous()
                else:
                    numbers[key] = value
        groups = {name: _counters(entry.optimizer) for name, entry in self.entries.items()}
        return tensors, {"slots": numbers, "groups": groups, "scaler": self.scaler.state_dict()}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        by_parameter: dict[str, dict[str, Any]] = {}
        for key, value in [*tensors.items(), *numbers["slots"].items()]:
            name, slot = key.removeprefix("optimizer/").rsplit("/", 1)
            by_parameter.setdefault(name, {})[slot] = value
        names = {id(parameter): name for name, parameter, _ in self._slots()}
        for name, entry in self.entries.items():
            saved = entry.optimizer.state_dict()
            order = [p for group in entry.optimizer.param_groups for p in group["params"]]
            saved["state"] = {
                i: by_parameter[names[id(p)]] for i, p in enumerate(order) if names[id(p)] in by_parameter
            }
            for group, counters in zip(saved["param_groups"], numbers["groups"][name], strict=True):
                group |= counters
            entry.optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(numbers["scaler"])

    def _slots(self) -> Iterable[tuple[str, nn.Parameter, dict[nn.Parameter, dict[str, Any]]]]:
        for entry_name, entry in self.entries.items():
            prefix = "" if entry_name == ONLY else f"{entry_name}."
            for name, parameter in plain(entry.module).named_parameters():
                if parameter.requires_grad:
                    yield prefix + name, parameter, entry.optimizer.state  # type: ignore[misc]


def _counters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The numbers of each parameter group but the rate: some optimizers count there."""
    return [
        {k: v for k, v in group.items() if isinstance(v, (int, float)) and k != "lr" and math.isfinite(v)}
        for group in optimizer.param_groups
    ]


class Accumulate:
    """The `update` of one micro-batch: backward of a loss into the gradients of one entry, and nothing more."""

    def __init__(self, updater: Updater, step: int, weight: float, *, last: bool) -> None:
        self.updater, self.step, self.weight, self.last = updater, step, weight, last
        self.seen: set[str] = set()

    def __call__(self, loss: Tensor, name: str = ONLY) -> None:
        """Raises ValueError for an entry that is not there, or updated twice in one step."""
        updater = self.updater
        if name not in updater.entries:
            raise ValueError(f"update(loss, {name!r}): the model's entries are {', '.join(updater.entries)}")
        if name in self.seen:
            raise ValueError(f"update(loss, {name!r}) is called twice in one step: add the losses up")
        self.seen.add(name)
        entry = updater.entries[name]
        if self.step % entry.settings.every:
            return
        if self.weight == 0:
            # No units here: a mean over nothing is NaN, but the other ranks wait for these gradients.
            loss = torch.stack([p.sum() for p in entry.parameters]).sum() * 0
        elif self.weight != 1:
            loss = loss * self.weight
        with torch.autocast(updater.world.device.type, enabled=False):
            # The gradients of other entries are not this loss's affair, frozen or not.
            inputs = entry.parameters if len(updater.entries) > 1 else None
            updater.scaler.scale(loss).backward(inputs=inputs)

    def sync(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context of the micro-batch: ranks exchange gradients in the last one only."""
        modules = [] if self.last else [entry.module for entry in self.updater.entries.values()]
        return self.updater.world.no_sync(*modules)
