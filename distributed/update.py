"""From losses to changed parameters: accumulate, scale, penalise, clip, step; for one optimizer or several."""

import contextlib
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distributed import optimizers
from distributed.optimizers import Optimizer
from distributed.parallel import Parallel
from distributed.precision import Precision
from distributed.run import Train
from distributed.timing import Times
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
        self, model: nn.Module, settings: dict[str, Optimizer], precision: Precision, world: World, *,
        train: Train = Train(), parallel: Parallel = Parallel(), times: Times | None = None,
        frozen: Collection[str] = (),
    ) -> None:  # fmt: skip
        """`frozen`: the parameters that do not learn for now; an entry may consist of them."""
        self.precision, self.train, self.world, self.times = precision, train, world, times or Times()
        self.scaler = precision.scaler(world.device)
        self.sharded = parallel.shard_optimizer and world.size > 1
        modules = dict(model.items()) if isinstance(model, nn.ModuleDict) else {ONLY: model}
        self.entries: dict[str, Entry] = {}
        self.waiting: set[str] = set()  # entries all of whose parameters are frozen for now
        for name, module in modules.items():
            prefix = _prefix(name)
            everything = {n: p for n, p in plain(module).named_parameters() if p.requires_grad or prefix + n in frozen}
            named = {n: p for n, p in everything.items() if p.requires_grad}
            if everything and not named:
                self.waiting.add(name)
            if named:
                one = settings[name]
                groups = optimizers.groups(one, named, everything)
                optimizer = optimizers.create(one, groups, sharded=self.sharded)
                self.entries[name] = Entry(module, one, optimizer, list(named.values()))
        if not self.entries:
            raise UserError(
                "the model has no parameters to train", "train.freeze must leave a part of what build() returns"
            )

    def modules(self) -> list[nn.Module]:
        """The modules that learn, as the ranks share them."""
        return [entry.module for entry in self.entries.values()]

    def accumulate(self, step: int, weight: float, *, last: bool) -> "Accumulate":
        return Accumulate(self, step, weight, last=last)

    def apply(self, step: int, factor: float) -> bool:
        """Steps every optimizer that has gradients, in the order of the entries, and drops the gradients.

        Returns False where train.max_skipped is set and a gradient is not finite: then nothing has changed.
        """
        stepping = [
            entry for entry in self.entries.values()
            if step % entry.settings.every == 0 and any(p.grad is not None for p in entry.parameters)
        ]  # fmt: skip
        sound = not self.train.max_skipped or _are_finite(stepping)  # the one look that waits for the device
        if sound:
            for entry in stepping:
                for group in entry.optimizer.param_groups:
                    group["lr"] = entry.settings.lr * factor * group["rate"]
                self._limit(entry)
                self.scaler.step(entry.optimizer)
            if stepping:
                self.scaler.update()
        for entry in stepping:
            for parameter in entry.parameters:
                parameter.grad = None
        return sound

    def _limit(self, entry: Entry) -> None:
        """Adds the L1 penalty to the gradients, and clips them: first each number, then their norm."""
        norm, value, penalty = self.train.clip_norm, self.train.clip_value, entry.settings.l1
        if norm is None and value is None and not penalty:
            return
        self.scaler.unscale_(entry.optimizer)
        if penalty:
            having = [p for p in entry.parameters if p.grad is not None]
            signs = torch._foreach_sign([p.detach() for p in having])
            torch._foreach_add_([p.grad for p in having], signs, alpha=penalty)  # type: ignore[no-matching-overload]
        if value is not None:
            nn.utils.clip_grad_value_(entry.parameters, value)
        if norm is not None:
            nn.utils.clip_grad_norm_(entry.parameters, norm)

    # ---- state

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the optimizers' tensors as `optimizer/<parameter>/<slot>`, and their plain numbers.

        Where the state is sharded it is a collective, and whole on rank 0 only.
        """
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        groups: dict[str, Any] = {}
        for name, entry in self.entries.items():
            told = self._whole(entry.optimizer)
            parameters = self._names(name, entry)
            for at, slots in told["state"].items():
                for slot, value in slots.items():
                    key = f"optimizer/{parameters[at]}/{slot}"
                    if isinstance(value, Tensor):
                        tensors[key] = value.detach()
                    else:
                        numbers[key] = value
            groups[name] = [_counters(group) for group in told["param_groups"]]
        return tensors, {"slots": numbers, "groups": groups, "scaler": self.scaler.state_dict()}

    def _whole(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        if self.sharded:
            optimizer.consolidate_state_dict(to=0)  # type: ignore[missing-attribute]
            if self.world.rank != 0:
                return {"state": {}, "param_groups": []}
        return optimizer.state_dict()

    def _names(self, entry_name: str, entry: Entry) -> list[str]:
        """The names of an entry's parameters, in the order of its optimizer's groups."""
        prefix = _prefix(entry_name)
        names = {id(p): prefix + name for name, p in plain(entry.module).named_parameters()}
        return [names[id(p)] for group in entry.optimizer.param_groups for p in group["params"]]

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Takes back what `state` gave; parameters that have learned nothing yet begin anew."""
        by_parameter: dict[str, dict[str, Any]] = {}
        for key, value in [*tensors.items(), *numbers["slots"].items()]:
            name, slot = key.removeprefix("optimizer/").rsplit("/", 1)
            by_parameter.setdefault(name, {})[slot] = value
        for name, entry in self.entries.items():
            learning = [p for group in entry.optimizer.param_groups for p in group["params"]]
            slots = [by_parameter.get(parameter) for parameter in self._names(name, entry)]
            saved = {"state": {}, "param_groups": []}
            for at, (parameter, found) in enumerate(zip(learning, slots, strict=True)):
                if found:
                    saved["state"][at] = {slot: _laid_out(value, parameter) for slot, value in found.items()}
            at, counters = 0, {group["key"]: group for group in numbers["groups"].get(name, ())}
            for group in entry.optimizer.param_groups:
                plain_group = {key: value for key, value in group.items() if key != "params"}
                places = list(range(at, at := at + len(group["params"])))
                known = counters.get(_key(group), {})
                counted = {key: value for key, value in known.items() if key in group}
                saved["param_groups"].append({**plain_group, **counted, "params": places})
            entry.optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(numbers["scaler"])


def _prefix(entry_name: str) -> str:
    """What the names of an entry's parameters begin with in the whole network."""
    return "" if entry_name == ONLY else f"{entry_name}."


def _are_finite(entries: Iterable[Entry]) -> bool:
    gradients = [p.grad for entry in entries for p in entry.parameters if p.grad is not None]
    return not gradients or bool(torch.isfinite(nn.utils.get_total_norm(gradients)))


def _laid_out(value: Any, parameter: Tensor) -> Any:
    """A copy of an optimizer's state, whose tensors are changed in place; in the memory layout of its parameter, as
    fused kernels go by the memory.
    """
    if not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape or parameter.is_contiguous():
        return value.clone()
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _key(group: dict[str, Any]) -> str:
    """What tells a group from the others, whatever parameters have joined it meanwhile."""
    return f"{group['rate']!r}/{group.get('weight_decay', 0.0)!r}"


def _counters(group: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a parameter group but the rate: some optimizers count there."""
    plain_numbers = {k: v for k, v in group.items() if isinstance(v, (int, float)) and math.isfinite(v)}
    return {**{k: v for k, v in plain_numbers.items() if k not in ("lr", "rate")}, "key": _key(group)}


class Accumulate:
    """The `update` of one micro-batch: backward of a loss into the gradients of one entry, and nothing more."""

    def __init__(self, updater: Updater, step: int, weight: float, *, last: bool) -> None:
        self.updater, self.step, self.weight, self.last = updater, step, weight, last
        self.seen: set[str] = set()

    def __call__(self, loss: Tensor, name: str = ONLY) -> None:
        """Raises ValueError for an entry that is not there, or updated twice in one step."""
        updater = self.updater
        if name not in updater.entries and name not in updater.waiting:
            raise ValueError(f"update(loss, {name!r}): the model's entries are {', '.join(updater.entries)}")
        if name in self.seen:
            raise ValueError(f"update(loss, {name!r}) is called twice in one step: add the losses up")
        self.seen.add(name)
        if name in updater.waiting:
            return
        entry = updater.entries[name]
        if self.step % entry.settings.every:
            return
        if self.weight == 0:
            # No units here: a mean over nothing is NaN, but the other ranks wait for these gradients.
            loss = torch.stack([p.sum() for p in entry.parameters]).sum() * 0
        elif self.weight != 1:
            loss = loss * self.weight
        with updater.precision.plain(updater.world.device):
            # The gradients of other entries are not this loss's affair, frozen or not.
            inputs = entry.parameters if len(updater.entries) > 1 else None
            with updater.times.within("backward"):
                updater.scaler.scale(loss).backward(inputs=inputs)

    def sync(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context of the micro-batch: ranks exchange gradients in the last one only."""
        modules = [] if self.last else self.updater.modules()
        return self.updater.world.no_sync(*modules)
