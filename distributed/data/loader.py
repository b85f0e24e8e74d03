"""From a split's rows to the batches of one worker: gathered column by column, on its device, transformed as told.

Needs neither a task nor a run: docs/engine.md shows it feeding a plain PyTorch loop.
"""

import ctypes
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.data.order import WINDOW, Plan, Portion, portions_with_partners, spread
from distributed.data.resident import Resident
from distributed.data.schema import PictureColumn
from distributed.data.store import Rows
from tasks.columns import CPU, Masks, Pictures, Ragged
from tasks.errors import UserError
from tasks.task import Batch, Draw

BLOCK_BYTES = 1 << 20  # gathered at once: small batches together, while they stay in a core's cache
Transform = Callable[[Batch, Any, bool], Batch]  # (batch, draw, training); of several domains: a dict of each
Key = tuple[int, int, int, int | None]  # epoch, global batch, micro-batch in it, most rows of a micro-batch
ONE = ""  # the name of the only set, where there are no domains


def untouched(batch: Batch, draw: Any, training: bool) -> Batch:
    """The transformation that changes nothing."""
    return batch


class Loader:
    """Gathers whole batches column by column; nothing here is done row by row."""

    def __init__(
        self, rows: Rows | Mapping[str, Rows], plan: Plan | Mapping[str, Plan], transform: Transform = untouched, *,
        rank: int = 0, world_size: int = 1, device: torch.device = CPU, prefetch: int | None = 0, resident: bool = True,
        partners: int = 0,
    ) -> None:  # fmt: skip
        """`rows` and `plan` are one, or one for each domain: a batch then holds each domain's columns by its name.

        With `prefetch`, so many (micro-)batches are made ahead by a thread; None: 2 where that is likely to pay. A
        transformation that draws from torch's own generator is never run ahead: its draws belong to a step.

        With `partners`, the transformation of a training batch also gets those rows of the global batch with which its
        rows are to be mixed, behind its own, and "partner" (rows, partners), their places; they are cut off after it.
        """
        _keep_freed_memory()
        sets = dict(rows) if isinstance(rows, Mapping) else {ONE: rows}
        plans = dict(plan) if isinstance(plan, Mapping) else {ONE: plan}
        self.plan = max(plans.values(), key=lambda one: one.rows)
        self.rank, self.world_size, self.device = rank, world_size, device
        self._sets = {
            name: _Set(one, plans[name], partners, rank, world_size, device, resident) for name, one in sets.items()
        }
        self._lead = next(one for one in self._sets.values() if one.plan is self.plan)
        self._transform = transform
        pays = device.type != "cpu" or (any(map(_has_pictures, sets.values())) and torch.get_num_threads() > 1)
        self._depth = (2 if pays else 0) if prefetch is None else prefetch
        self._ahead: ThreadPoolExecutor | None = None
        self._coming: dict[Key, Future[Batch]] = {}

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self.plan.rows

    @property
    def rows(self) -> int:
        """Rows of all domains together."""
        return sum(len(one.rows) for one in self._sets.values())

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yields this rank's share of every global batch of an epoch, for training."""
        for k in range(self.plan.steps):
            yield from self.micro_batches(epoch, k)[1]

    def micro_batches(self, epoch: int, k: int, most: int | None = None) -> tuple[list[int], Iterator[Batch]]:
        """Returns how many rows this rank's micro-batches of global batch `k` have, and the batches, one by one.

        `most` is the size of a micro-batch; none: the share of a rank is one.
        """
        sizes = [portion.own for portion in self._lead.portions(epoch, k, most)]
        return sizes, (self._next((epoch, k, index, most)) for index in range(len(sizes)))

    def rows_of(self, epoch: int, k: int, index: int, most: int | None = None) -> list[int]:
        """Returns the rows of one of this rank's micro-batches; of several domains those of the longest."""
        portion = self._lead.portions(epoch, k, most)[index]
        return portion.rows[: portion.own].tolist()

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Yields this rank's contiguous share of the split, each row once, for evaluation.

        A domain whose rows have all been seen is missing from the batches that follow.
        """
        shares = {name: one.in_order(batch_size) for name, one in self._sets.items()}
        while True:
            gathered = {name: one for name, share in shares.items() if (one := next(share, None))}
            if not gathered:
                return
            yield self._transformed(gathered, 0, training=False)

    # ---- making batches, ahead of time where that is wanted

    def _next(self, key: Key) -> Batch:
        if not self._depth:
            return self._made(key)
        if self._ahead is None:  # the first batch shows whether the transformation may be run ahead
            with _Watch() as watch:
                batch = self._made(key)
            if watch.drew:
                self._depth = 0
            else:
                self._ahead = ThreadPoolExecutor(1, "prefetch", _use, (self.device,))
            return batch
        wanted = list(itertools.islice(self._following(key), self._depth + 1))
        self._coming = {key: future for key, future in self._coming.items() if key in wanted}
        for later in wanted:
            if later not in self._coming:
                self._coming[later] = self._ahead.submit(self._watched, later)
        return self._coming.pop(key).result()

    def _following(self, key: Key) -> Iterator[Key]:
        """Yields the keys from this one on, into the epochs that follow."""
        epoch, k, first, most = key
        while True:
            for index in range(first, len(self._lead.portions(epoch, k, most))):
                yield epoch, k, index, most
            first, k = 0, k + 1
            if k == self.plan.steps:
                epoch, k = epoch + 1, 0

    def _watched(self, key: Key) -> Batch:
        with _Watch() as watch:
            batch = self._made(key)
        if watch.drew:
            raise UserError(
                f"the task's transform drew from torch's own generator ({watch.drew}), at other times than before",
                "draw from its argument `draw`, or set data.prefetch=0",
            )
        return batch

    def _made(self, key: Key) -> Batch:
        return self._transformed({name: one.batch(key) for name, one in self._sets.items()}, key[0], training=True)

    def _transformed(self, gathered: dict[str, tuple[Batch, Portion]], epoch: int, *, training: bool) -> Batch:
        """Transforms what was gathered; a batch of domains holds each one's columns, and "row" of the first."""
        draws = {
            name: Draw(self._sets[name].plan.seed, epoch, portion.rows, self.device)
            for name, (_, portion) in gathered.items()
        }
        for columns, portion in gathered.values():
            if portion.partner is not None:
                columns["partner"] = torch.from_numpy(portion.partner).to(self.device)
        if ONE in gathered:
            columns, portion = gathered[ONE]
            return _own(self._transform(columns, draws[ONE], training), portion)
        batch: Batch = {name: columns for name, (columns, _) in gathered.items()}
        made = self._transform(batch, draws, training)
        made |= {name: _own(made[name], portion) for name, (_, portion) in gathered.items()}
        return {**made, "row": made[next(iter(gathered))]["row"]}


def _own(batch: Batch, portion: Portion) -> Batch:
    """A transformed batch without the rows that were there as partners only."""
    if portion.partner is None:
        return batch
    rows, own = len(portion.rows), portion.own
    return {name: _cut_off(value, own, rows) for name, value in batch.items() if name != "partner"}


def _cut_off(value: Any, own: int, rows: int) -> Any:
    if isinstance(value, Ragged):
        kept = value.lengths[:own]
        return Ragged(value.values[: int(kept.sum())], kept)
    if isinstance(value, Pictures):
        return replace(value, data=value.data[:own], sizes=value.sizes[:own])
    if isinstance(value, Masks):
        return replace(value, rows=value.rows[:own])
    return value[:own] if isinstance(value, Tensor | np.ndarray | list) and len(value) == rows else value


def _has_pictures(rows: Rows) -> bool:
    return any(isinstance(column, PictureColumn) and not column.raw for column in rows.shards[0].values())


def _use(device: torch.device) -> None:
    if device.type == "cuda":  # a thread has a current device of its own
        torch.cuda.set_device(device)


class _Watch(TorchDispatchMode):
    """Notices which of this thread's operations draw from torch's own generator; `drew` names one, else is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.drew = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not (kwargs or {}).get("generator"):
            self.drew = str(func)
        return func(*args, **(kwargs or {}))


# ---- gathering


class _Set:
    """The rows of one set, gathered for several batches at once and handed out batch by batch."""

    def __init__(
        self, rows: Rows, plan: Plan, partners: int, rank: int, world_size: int, device: torch.device, resident: bool
    ) -> None:
        self.rows: Rows | Resident = Resident(rows, device) if resident and Resident.fits(rows, device) else rows
        self.plan, self.device, self.partners, self.rank, self.world_size = plan, device, partners, rank, world_size
        self._most = max(1, BLOCK_BYTES // max(rows.row_bytes, 1))  # rows
        self._gathered: dict[Any, tuple[Batch, Portion]] = {}

    def portions(self, epoch: int, k: int, most: int | None) -> list[Portion]:
        return portions_with_partners(self.plan, epoch, k, self.partners, self.rank, self.world_size, most)

    def batch(self, key: Key) -> tuple[Batch, Portion]:
        """Returns the columns of a micro-batch, and its rows; later ones are gathered with it, up to a block."""
        if key not in self._gathered:
            self._gather(self._upcoming(key))
        return self._gathered.pop(key)

    def _upcoming(self, key: Key) -> Iterator[tuple[Key, Portion]]:
        epoch, k, first, most = key
        for later in range(k, min((k // WINDOW + 1) * WINDOW, self.plan.steps)):
            for index, portion in enumerate(self.portions(epoch, later, most)):
                if later > k or index >= first:
                    yield (epoch, later, index, most), portion

    def in_order(self, batch_size: int) -> Iterator[tuple[Batch, Portion]]:
        """Yields this rank's share of the set as it is stored."""
        start, end = spread(len(self.rows), self.world_size, self.rank)
        firsts = range(start, end, batch_size)
        for at, first in enumerate(firsts):
            if first not in self._gathered:
                ranges = ((f, np.arange(f, min(f + batch_size, end))) for f in firsts[at:])
                self._gather((f, Portion(rows, len(rows))) for f, rows in ranges)
            yield self._gathered.pop(first)

    def _gather(self, upcoming: Iterator[tuple[Any, Portion]]) -> None:
        """Gathers as many of the upcoming batches as fit a block, one at least."""
        keys, portions, total = [], [], 0
        for key, portion in upcoming:
            total += len(portion.rows)
            if keys and total > self._most:
                break
            keys.append(key)
            portions.append(portion)
        rows = np.concatenate([portion.rows for portion in portions])
        ends = np.cumsum([len(portion.rows) for portion in portions]).tolist()
        bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        cut = {name: _cut(value, bounds, self.device) for name, value in self.rows.take(rows).items()}
        cut["row"] = _cut(rows, bounds, self.device)
        self._gathered = {
            key: ({name: values[i] for name, values in cut.items()}, portion)
            for i, (key, portion) in enumerate(zip(keys, portions, strict=True))
        }


def _cut(value: Any, bounds: list[tuple[int, int]], device: torch.device) -> list[Any]:
    """Cuts a gathered column into the columns of batches: views of one block, on the device."""
    if isinstance(value, np.ndarray):
        value = _on(value, device)
    if isinstance(value, Tensor):
        return [value[start:end] for start, end in bounds]
    if isinstance(value, Pictures):
        return [replace(value, data=value.data[a:b], sizes=value.sizes[a:b], device=device) for a, b in bounds]
    if isinstance(value, Masks):
        return [Masks(value.rows[start:end], device) for start, end in bounds]
    if isinstance(value, Ragged):
        return _cut_ragged(value.values, value.lengths, value.lengths.cpu().numpy(), bounds)
    if isinstance(value, tuple):
        return _cut_ragged(_on(value[0], device), _on(value[1], device), value[1], bounds)
    return [value[start:end] for start, end in bounds]  # text


def _cut_ragged(values: Tensor, lengths: Tensor, known: np.ndarray, bounds: list[tuple[int, int]]) -> list[Ragged]:
    """`known` are the lengths as this process has them at hand, whatever device the tensors lie on."""
    until = np.concatenate([[0], np.cumsum(known)])
    firsts, lasts = until[[start for start, _ in bounds]].tolist(), until[[end for _, end in bounds]].tolist()
    parts = [
        Ragged(values[first:last], lengths[start:end])
        for (start, end), first, last in zip(bounds, firsts, lasts, strict=True)
    ]
    if values.ndim > 1 or values.device.type != "cpu":
        return parts
    # Filled up for all batches at once: one batch at a time would cost five times as much.
    longest = [max(1, int(known[start:end].max(initial=0))) for start, end in bounds]
    begins = np.concatenate([[0], np.cumsum([(e - s) * wide for (s, e), wide in zip(bounds, longest, strict=True)])])
    counts = np.array([end - start for start, end in bounds])
    within = np.concatenate([np.arange(count) for count in counts])
    row_begins = begins[:-1].repeat(counts) + within * np.array(longest).repeat(counts)
    places = (row_begins - until[:-1]).repeat(known)
    places += np.arange(len(places))
    filled = np.zeros(int(begins[-1]), values.numpy().dtype)
    filled[places] = values.numpy()
    whole = torch.from_numpy(filled)
    return [
        Ragged(part.values, part.lengths, whole[begin : begin + (end - start) * wide].view(end - start, wide))
        for part, begin, (start, end), wide in zip(parts, begins.tolist(), bounds, longest, strict=False)
    ]


def _on(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # only from pinned memory is a copy made beside the computation
    return tensor.to(device, non_blocking=True)


@functools.cache
def _keep_freed_memory() -> None:
    """Lets glibc reuse large blocks instead of handing them back: a fresh 38 MB batch costs 33 ms of page faults.

    2 cores of a shared x86-64 machine, November 2026; with it 4 ms. It holds for the whole process.
    """
    if sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3
        tune = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        # An older glibc refuses so large a threshold; the second one alone would make things worse.
        if tune and tune(mmap_threshold, 1 << 30):
            tune(trim_threshold, 1 << 30)
