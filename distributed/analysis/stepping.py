"""One optimizer step looked at from inside, of one rank or of several that are played one after another.

The step itself is `loop.learn`: what is looked at is exactly what training does.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from distributed import checkpoint, loop
from distributed.averaging import Average
from distributed.data import planned
from distributed.data.loader import Loader
from distributed.data.store import Store
from distributed.learning import Learning, begin
from distributed.run import Run
from distributed.update import Updater
from distributed.world import World
from tasks.columns import Ragged
from tasks.errors import RunFailed
from tasks.task import Batch, Task

Before = Callable[[nn.Module, Batch], None]  # called with network and batch just before a task's step


@dataclass
class Part:
    """What one micro-batch was, and what it gave."""

    rank: int
    rows: list[int]  # as the loader numbers them: of the training rows that the run uses
    units: float  # that its losses are a mean over
    losses: dict[str, float]  # empty where it has no units: a mean over nothing


@dataclass
class Seen:
    """What was seen of one step."""

    parts: list[Part] = field(default_factory=list)
    gradients: dict[str, float] = field(default_factory=dict)  # norm by parameter group, before clipping
    without: list[str] = field(default_factory=list)  # parameters that learn, and got no gradient
    not_finite: str = ""  # the first tensor that is not, in the order in which a step makes them
    failed: str = ""  # why training would end here


@dataclass(frozen=True)
class Ranks:
    """All ranks of a run in one process: they share the network, and each has its rows."""

    learning: Learning
    loaders: list[Loader]

    @classmethod
    def begin(cls, run: Run, store: Store, size: int, resume: checkpoint.Checkpoint | None) -> "Ranks":
        """Raises UserError as `learning.begin` does."""
        learning = begin(run, store, World(), resume)
        if size == 1:
            return cls(learning, [learning.loader])
        partners = run.task.partners
        loaders = [
            planned.loader(
                store, "train", run.data, run.train.seed, run.transform, World(rank, size), partners=partners
            )
            for rank in range(size)
        ]
        return cls(learning, loaders)

    @property
    def size(self) -> int:
        return len(self.loaders)

    def learn(self, ranks: list[int] | None = None, before: Before | None = None, *, look: bool = False) -> Seen:
        """Does the step number `learning.state.step`, of all ranks, or of some alone, and does not count it.

        With `look` the tensors are searched for one that is not finite, which costs several times the step.
        """
        chosen = list(range(self.size)) if ranks is None else ranks
        learning, seen = self.learning, Seen()
        step, plain = learning.state.step, learning.model.plain
        learning.set_free(step // learning.plan.steps)  # before the updater is stood in for
        updater = _Updater(learning.updater, learning, len(chosen), self.size, seen, look=look)
        found = _Search(seen) if look else None
        if found:
            found.tensors("the weights before the step: ", dict(plain.named_parameters()))
        whole = self._units() if self.size > 1 and type(learning.run.task).units is not Task.units else 0.0
        kept: list[Tensor] = []
        unmoved = learning.model.buffers()
        with found.hooked(plain) if found else contextlib.nullcontext():
            for rank in chosen:
                run = replace(learning.run, task=_watched(learning.run.task, rank, seen, found, before))
                one = replace(
                    learning, run=run, loader=self.loaders[rank], updater=cast(Updater, updater),
                    world=World() if self.size == 1 else _Alone(rank, self.size, whole=whole),
                    average=cast(Average, _NoAverage()),
                )  # fmt: skip
                try:
                    loop.learn(one)
                except RunFailed as error:
                    if not look:
                        raise
                    seen.failed = str(error)
                kept = kept or [buffer.clone() for buffer in plain.buffers()]
        if updater.left_out:  # the losses of a step that was left out are not counted, whatever rank they are of
            learning.tally.window = [(at, told) for at, told in learning.tally.window if at != step]
        learning.model.put_back(unmoved if updater.left_out else kept)  # those of rank 0 count
        if not updater.left_out:
            learning.average.take(step, learning.total)
        if found:
            found.tensors("the weights after the step: ", dict(plain.named_parameters()))
        return seen

    def _units(self) -> float:
        """The units of the whole global batch, which a rank alone cannot know."""
        learning = self.learning
        epoch, k = divmod(learning.state.step, learning.plan.steps)
        most = learning.run.data.micro_batch_size
        return sum(
            float(learning.run.task.units(batch))
            for loader in self.loaders for batch in loader.micro_batches(epoch, k, most)[1]
        )  # fmt: skip


@dataclass(frozen=True)
class _Alone(World):
    """One rank of several whose partners are played before and after it: nothing is exchanged."""

    whole: float = 0.0  # units of the global batch: the only sum over ranks that a step asks for

    def total(self, values: Tensor) -> Tensor:
        return torch.full_like(values, self.whole)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        return wishes


class _Updater:
    """Stands in for the updater: the ranks' gradients come together, and are looked at before the parameters move."""

    def __init__(self, updater: Updater, learning: Learning, played: int, size: int, seen: Seen, *, look: bool) -> None:
        self.updater, self.learning, self.left, self.size = updater, learning, played, size
        self.seen, self.look, self.left_out = seen, look, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.updater, name)

    def apply(self, step: int, factor: float) -> bool:
        self.left -= 1
        if self.left:
            return True
        scale = float(self.updater.scaler.get_scale())
        for name, entry in self.updater.entries.items():
            if self.learning.state.step % entry.settings.every:
                continue
            mine = [p for p in entry.parameters if p.requires_grad]
            for parameter in mine:
                if parameter.grad is not None and self.size > 1:
                    parameter.grad.div_(self.size)  # a mean over the ranks, as several processes make it
            for group in range(len(entry.optimizer.param_groups)):
                members = [p for p in entry.optimizer.param_groups[group]["params"] if p.grad is not None]
                title = name if len(entry.optimizer.param_groups) == 1 else f"{name} {group}"
                norm = torch.nn.utils.get_total_norm([p.grad for p in members if p.grad is not None])
                self.seen.gradients[title] = float(norm) / scale
        learning = [(n, p) for n, p in self.learning.model.plain.named_parameters() if p.requires_grad]
        stepping = {
            id(p)
            for entry in self.updater.entries.values() if self.learning.state.step % entry.settings.every == 0
            for p in entry.parameters
        }  # fmt: skip
        self.seen.without = [name for name, p in learning if id(p) in stepping and p.grad is None]
        if self.look:
            gradients = {name: p.grad for name, p in learning if p.grad is not None}
            _Search(self.seen).tensors("the gradient of ", gradients)
        self.left_out = not self.updater.apply(step, factor)
        return not self.left_out


class _NoAverage:
    """The average takes the weights when all ranks are done, with the buffers that count."""

    def take(self, step: int, total: int) -> None:
        pass


class _Search:
    """Looks for the first tensor that is not finite."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def tensors(self, what: str, value: Any, name: str = "") -> None:
        if self.seen.not_finite:
            return
        for path, tensor in tensors_of(value, name):
            odd = torch.isfinite(tensor).logical_not() if tensor.is_floating_point() else None
            if odd is not None and bool(odd.any()):
                shape = "x".join(map(str, tensor.shape)) or "scalar"
                value_ = tensor[odd].flatten()[0].item()
                self.seen.not_finite = f"{what}{path} ({shape}): {int(odd.sum())} of {odd.numel()} are {value_}"
                return

    @contextlib.contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """Looks at what every module gives, inner ones first."""

        def hook(name: str) -> Callable[..., None]:
            return lambda module, _, output: self.tensors(
                f"the output of {name or 'the network'}, a {type(module).__name__}", output
            )

        hooks = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
        try:
            yield
        finally:
            for one in hooks:
                one.remove()


def tensors_of(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a batch or an output, with their places in it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Ragged):
        yield name, value.values
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors_of(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from tensors_of(part, f"{name}[{index}]")


def _watched(task: Task, rank: int, seen: Seen, found: _Search | None, before: Before | None) -> Task:
    """Returns the task with a step that is looked at; all else, its class too, is as it was."""

    def step(model: nn.Module, batch: Batch, update: Any) -> dict[str, Tensor]:
        part = Part(rank, rows_of(batch), float(task.units(batch)), {})
        seen.parts.append(part)
        if found:
            found.tensors("the batch's column ", {name: column for name, column in batch.items() if name != "row"})
        if before:
            before(model, batch)
        losses = task.step(model, batch, update)
        part.losses = {name: float(loss.detach()) for name, loss in losses.items() if part.units}
        for name, value in part.losses.items():
            if found and not seen.not_finite and not math.isfinite(value):
                seen.not_finite = f"the loss '{name}': {value}"
        return losses

    watched = copy.copy(task)
    object.__setattr__(watched, "step", step)  # of this one object; settings are frozen, methods are no settings
    return watched


def rows_of(batch: Batch) -> list[int]:
    """Returns the numbers of a batch's rows; of several domains, those of the first."""
    return [int(row) for row in batch["row"]]
