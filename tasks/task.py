"""The task contract: what one learning problem says about itself, and nothing about how it is run.

A task is a subclass of `Task`. All but `examples`, `row` and `build` has a default that follows from `fields`.
Its annotated attributes are its settings: typed, frozen, searchable as `task.<name>`; a trailing comment is the
setting's meaning as `whipray config` shows it.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, dataclass_transform, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tasks.columns import Masks, Pictures, Ragged
from tasks.errors import BadRow, UserError
from tasks.fields import (
    Boxes,
    ClassMap,
    Facts,
    Field,
    Image,
    Label,
    Labels,
    Learner,
    Number,
    ObjectMasks,
    Picture,
    Text,
    Tokens,
    Vector,
    Weight,
)  # fmt: skip

__all__ = [
    "BadRow", "Batch", "Boxes", "ClassMap", "Draw", "Example", "Facts", "Field", "FilePath", "Image", "Label", "Labels",
    "Load", "Masks", "Metric", "Number", "ObjectMasks", "Picture", "Pictures", "Ragged", "Source", "Task", "Text",
    "Tokens", "Update", "UserError", "Vector", "Weight",
    "frozen",
]  # fmt: skip

# column -> tensor (B, ...), Ragged, Pictures, Masks, or list of B strings; "row" holds the rows' numbers. Of several
# domains: domain -> such a dict.
Batch = dict[str, Any]
Load = Callable[[str], tuple[nn.Module, Facts]]
FilePath = Annotated[str, "path"]  # a setting of this type is made absolute where it is given


class Update(Protocol):
    """Accumulates the gradients of one loss; `name` is the entry of the ModuleDict that learns from it."""

    def __call__(self, loss: Tensor, name: str = "model") -> None: ...


class Metric(Protocol):
    """One figure over all rows of a split, mergeable over workers (`tasks/metrics.py` has the usual ones)."""

    higher_is_better: bool

    def update(self, predicted: Any, target: Any) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def merge(self, states: list[dict[str, Any]]) -> None:
        """Becomes what one metric would be that had seen the rows of all `states`, in that order."""
        ...

    def compute(self) -> float: ...


class Example(NamedTuple):
    """A cheap reference to one row of the raw source: a path, an offset, or the row itself."""

    reference: Any
    split: str | None = None  # train, validation or test where the source says so
    group: str | None = None  # rows of one group (patient, writer, document) stay on one side of a split
    domain: str | None = None  # one of several unpaired sets, such as horses and zebras; a batch has rows of each


class Draw:
    """Random numbers for augmentation, one a row, that depend on (seed, epoch, row) and nothing else.

    So a row meets the same fate whatever batch, worker or micro-batch it falls into. SplitMix64 (Steele, Lea and
    Flood, 2014) over a counter; each call of one `Draw` gives new numbers.
    """

    def __init__(self, seed: int, epoch: int, rows: np.ndarray, device: torch.device | str = "cpu") -> None:
        self._seed, self._epoch, self._rows, self._device = seed, epoch, rows, torch.device(device)
        self._calls = 0

    @functools.cached_property
    def _keyed(self) -> np.ndarray:  # (B,) uint64
        key = _mix_one(_mix_one(self._seed % 2**64) ^ self._epoch)
        return mix(np.asarray(self._rows).astype(np.uint64) ^ np.uint64(key))

    def _unit(self) -> np.ndarray:  # (B,) float64 in [0, 1)
        # Four calls at once: on a few hundred numbers it is the operations that cost, not the numbers.
        at = self._calls % len(NEXT)
        if at == 0:
            bits = mix(self._keyed + (NEXT + np.uint64(self._calls)))
            self._ahead = (bits >> np.uint64(11)) * 2.0**-53
        self._calls += 1
        return self._ahead[at]

    def _there(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self._device.type == "cpu" else tensor.to(self._device)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Returns (B,) float32 in [low, high)."""
        below = np.nextafter(np.float32(high), np.float32(low))  # float32 may round up to `high` itself
        return self._there(np.minimum((low + (high - low) * self._unit()).astype(np.float32), below))

    def integers(self, low: int, high: int) -> Tensor:
        """Returns (B,) int64 in low..high-1."""
        values = ((high - low) * self._unit()).astype(np.int64)
        values += low
        return self._there(values)

    def chance(self, probability: float) -> Tensor:
        """Returns (B,) bool, each true with `probability`."""
        return self._there(self._unit() < probability)

    def normal(self) -> Tensor:
        """Returns (B,) float32 from the standard normal distribution (Box and Muller, 1958)."""
        radius, angle = np.sqrt(-2 * np.log1p(-self._unit())), 2 * np.pi * self._unit()
        return self._there((radius * np.cos(angle)).astype(np.float32))


NEXT = np.arange(1, 5, dtype=np.uint64)[:, None]  # the calls that a Draw computes at once


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function on uint64 (..., ), wrapping around."""
    values = values + np.uint64(0x9E3779B97F4A7C15)  # a copy; arrays wrap without a warning
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(31)
    return values


def _mix_one(value: int) -> int:
    """The same on one Python number, which is ten times as fast as an array of one."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ value >> shift) * factor % 2**64
    return value ^ value >> 31


@contextlib.contextmanager
def frozen(*nets: nn.Module) -> Iterator[None]:
    """Lets `nets` judge: gradients pass through them, but they collect none; on leaving all is as it was."""
    learning = [p for net in nets for p in net.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the raw data are. These settings, and no others, decide what a store holds."""

    path: FilePath = ""  # file or folder of the raw data; empty: what comes with whipray


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class Task:
    """One learning problem. See docs/write-a-task.md."""

    fields: ClassVar[Mapping[str, Field]] = {}
    entries: ClassVar[tuple[str, ...]] = ()  # names of the ModuleDict's entries that learn, where there are several
    recipe: ClassVar[Mapping[str, Any]] = {}  # dotted machinery settings with which this task trains well
    version: ClassVar[int] = 1  # raise it when a change of the reader must make stored data stale
    partners: ClassVar[int] = 0  # other rows of its batch that each row is mixed with: 1 for mixup, 3 for mosaic
    invariance: ClassVar[str] = "exact"  # or the reason why another number of workers is equal in distribution only

    source: Source = Source()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclass(frozen=True, kw_only=True)(cls)

    # ---- preparing: once, before any training; only `task.source.*` may be read here

    def files(self) -> list[Path]:
        """The files and folders that the rows come from; a change in one makes the stored data stale.

        By default all that `source` names in settings of type FilePath.
        """
        kinds = get_type_hints(type(self.source), include_extras=True)
        paths = [name for name, kind in kinds.items() if "path" in getattr(kind, "__metadata__", ())]
        return [Path(path) for name in paths if (path := getattr(self.source, name))]

    def examples(self, source: Source) -> Iterable[Example | Any]:
        """Lists the raw rows: `Example(reference, split, group)`, or bare references."""
        raise TypeError(f"{type(self).__name__} does not say where its rows come from: define examples(self, source)")

    def row(self, reference: Any) -> dict[str, Any]:
        """Reads and parses one row; raises BadRow(reason) for a broken one. A reference may be the row itself."""
        return reference

    def facts(self, rows: Iterable[Mapping[str, Any]]) -> Facts:
        """What the training rows teach: a dict a column. By default what each field knows to ask.

        The rows can be gone through more than once, and need not fit the memory together.
        """
        learners = {name: field.learner() for name, field in self.fields.items()}
        wanted = {name for name, learner in learners.items() if type(learner) is not Learner}
        seen: set[str] = set()
        for row in rows.only(wanted) if hasattr(rows, "only") else rows:
            for name in wanted:
                if name in row:
                    learners[name].add(row[name])
            seen = seen or set(row)
        return {name: learner.facts() for name, learner in learners.items() if name in seen or name not in wanted}

    def encode(self, row: dict[str, Any], facts: Facts) -> dict[str, Any]:
        """Turns a parsed row into the declared fields, knowing the facts (words -> numbers)."""
        return row

    # ---- training

    def transform(self, batch: Batch, draw: Draw, training: bool) -> Batch:
        """Turns a whole batch of columns into a whole batch of tensors, on the device.

        By default pictures become float32 in 0..1 (a list of B tensors (C, H, W), where they differ in size), class
        maps lists of B tensors (H, W) int64, masks lists of B tensors (objects, H, W) uint8; tokens are padded with 0
        and get a `<name>_length` (B,), and columns with any number of objects a row become lists of B tensors.
        Of several domains, `batch` and `draw` hold one each by name.
        """
        if isinstance(draw, dict):
            return {name: Task.transform(self, batch[name], one, training) for name, one in draw.items()}
        out = dict(batch)
        for name, field in self.fields.items():
            if name not in batch:
                continue
            if isinstance(field, Image):
                out[name] = batch[name].to(torch.float32).div_(255)
            elif isinstance(field, Tokens):
                out[name], out[f"{name}_length"] = batch[name].padded().long(), batch[name].lengths
            elif isinstance(field, ClassMap):
                out[name] = [classes[0].long() for classes in batch[name].decoded()]
            elif isinstance(field, Picture):
                out[name] = [picture.to(torch.float32).div_(255) for picture in batch[name].decoded()]
            elif isinstance(field, ObjectMasks):
                out[name] = batch[name].decoded()
            elif isinstance(batch[name], Ragged):
                out[name] = batch[name].split()
        return out

    def build(self, facts: Facts, load: Load) -> nn.Module:
        """Returns the network, or a ModuleDict with one entry an optimizer.

        `load("RUN")` gives the frozen network of another run and its facts, for a teacher.
        """
        raise TypeError(f"{type(self).__name__} has no network: define build(self, facts, load)")

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The losses by name, each a mean over the batch's units; their sum is minimised, each one is logged."""
        name, target = self._target()
        output = self._output(model, batch)
        if isinstance(target, Label):
            return {"cross_entropy": functional.cross_entropy(output, batch[name])}
        return {"squared_error": functional.mse_loss(output.reshape(batch[name].shape), batch[name])}

    def step(self, model: nn.Module, batch: Batch, update: Update) -> dict[str, Tensor]:
        """What is learned from one (micro-)batch: hands losses to `update`, returns those to be logged."""
        losses = self.loss(model, batch)
        first, *others = losses.values()
        update(sum(others, first))
        return losses

    def units(self, batch: Batch) -> int | Tensor:
        """How many units the losses of this batch are a mean over: its rows, unless a task says otherwise."""
        return len(batch["row"])

    # ---- using

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """What a user wants back: columns with one entry a row."""
        name, target = self._target()
        output = self._output(model, batch)
        if isinstance(target, Label):
            scores = output.float().softmax(-1)
            return {name: scores.argmax(-1), "score": scores.amax(-1)}
        return {name: output.reshape(len(batch["row"]), *([-1] if isinstance(target, Vector) else []))}

    def metrics(self, facts: Facts) -> dict[str, Metric]:
        """The figures of a split by name; the first one decides which checkpoint or trial is best."""
        from tasks import metrics

        _, target = self._target()
        if isinstance(target, Label):
            return {"accuracy": metrics.accuracy()}
        return {"rmse": metrics.rmse(), "r2": metrics.r2()}

    def measure(self, metrics: dict[str, Metric], prediction: dict[str, Any], batch: Batch) -> None:
        """Feeds the metrics with the predictions for one batch: by default each with the target's column."""
        for metric in metrics.values():
            name, _ = self._target()
            metric.update(prediction[name], batch[name])

    def inputs(self, path: Path) -> Iterable[dict[str, Any]]:
        """Reads what a user wants predicted: rows without targets. By default a picture, or a text file's lines."""
        from tasks.formats import inputs

        return inputs.read(path, {name: field for name, field in self.fields.items() if not field.target})

    def network_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The tensors of a batch that the network is called with, by name, in the order of its `forward`.

        By default the fields that are no targets, then the lengths of tokens. An exported network takes them.
        """
        inputs = [name for name, field in self.fields.items() if not field.target]
        lengths = [f"{name}_length" for name in inputs if isinstance(self.fields[name], Tokens)]
        return {name: batch[name] for name in inputs + lengths}

    # ---- what the defaults share

    def _target(self) -> tuple[str, Field]:
        targets = {name: f for name, f in self.fields.items() if f.target and not isinstance(f, Weight)}
        if len(targets) != 1 or not isinstance(next(iter(targets.values())), (Label, Number, Vector)):
            caller = inspect.stack()[1].function
            raise TypeError(
                f"{type(self).__name__}.{caller} must be defined: its default is for a task with one Label, Number or "
                f"Vector as target, here the targets are {sorted(targets) or 'none'}"
            )
        return next(iter(targets.items()))

    def _output(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(*self.network_inputs(batch).values())
