"""From a split's rows to the batches of one worker: gathered column by column, on its device, transformed as told.

Needs neither a task nor a run: docs/data.md shows it feeding a plain PyTorch loop.
"""

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed.data.order import WINDOW, Plan, Portion, portions_with_partners, spread
from distributed.data.resident import Resident
from distributed.data.schema import PictureColumn
from distributed.data.store import Rows
from tasks.columns import CPU, Masks, Pictures, Ragged
from tasks.task import Batch, Draw

BLOCK_BYTES = 1 << 20  # gathered at once: small batches together, while they stay in a core's cache
Transform = Callable[[Batch, Any, bool], Batch]  # (batch, draw, training); of several domains: a dict of each
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

        With `prefetch`, so many global batches are made ahead by a thread; None: 2 where that is likely to pay. A
        transformation that draws from torch's own generator is never run ahead: its draws belong to a step.

        With `partners`, the transformation of a training batch also gets those rows of the global batch with which its
        rows are to be mixed, behind its own, and "partner" (rows, partners), their places; they are cut off after it.
        """
        _keep_freed_memory()
        sets = dict(rows) if isinstance(rows, Mapping) else {ONE: rows}
        self.plans = dict(plan) if isinstance(plan, Mapping) else {ONE: plan}
        self.plan = max(self.plans.values(), key=lambda one: one.rows)
        self.rank, self.world_size, self.device, self.partners = rank, world_size, device, partners
        self._sets = {name: _Set(one, self.plans[name], device, resident) for name, one in sets.items()}
        self._transform = transform
        with_pictures = any(_has_pictures(one) for one in sets.values())
        pays = device.type != "cpu" or (with_pictures and torch.get_num_threads() > 1)
        self._depth = (2 if pays else 0) if prefetch is None else prefetch
        self._ahead: ThreadPoolExecutor | None = None
        self._made: dict[tuple[int, int, int | None], Future[list[Batch]]] = {}
        self._looked = False

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self.plan.rows

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yields this rank's share of every global batch of an epoch, for training."""
        for k in range(self.plan.steps):
            yield from self.micro_batches(epoch, k)[1]

    def micro_batches(self, epoch: int, k: int, most: int | None = None) -> tuple[list[int], Iterator[Batch]]:
        """Returns how many rows this rank's micro-batches of global batch `k` have, and the batches, one by one.

        `most` is the size of a micro-batch; none: the share of a rank is one.
        """
        parts = self._portions(self.plan, epoch, k, most)
        sizes = [part.own for part in parts]
        if not self._depth:
            return sizes, self._batches(epoch, k, most)
        if not self._looked:  # at the first batch, in this thread: does it draw from torch's own generator?
            self._looked = True
            before = torch.get_rng_state()
            batches = list(self._batches(epoch, k, most))
            if torch.equal(before, torch.get_rng_state()):
                self._ahead = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
            else:
                self._depth = 0
            return sizes, iter(batches)
        assert self._ahead is not None
        wanted = [(*divmod(epoch * self.plan.steps + k + i, self.plan.steps), most) for i in range(self._depth + 1)]
        self._made = {key: future for key, future in self._made.items() if key in wanted}
        for key in wanted:
            if key not in self._made:
                self._made[key] = self._ahead.submit(lambda key=key: list(self._batches(*key)))
        return sizes, iter(self._made.pop(wanted[0]).result())

    def once(self, batch_size: int) -> Iterator[Batch]:
        """Yields this rank's contiguous share of the split, each row once, for evaluation."""
        start, end = spread(len(self), self.world_size, self.rank)
        firsts = range(start, end, batch_size)

        def upcoming(name: str, at: int) -> Iterator[tuple[Any, np.ndarray]]:
            distinct = self.plans[name].distinct or self.plans[name].rows
            for first in firsts[at:]:
                yield ("once", first, batch_size), np.arange(first, min(first + batch_size, end)) % distinct

        for at, first in enumerate(firsts):
            key = "once", first, batch_size
            gathered = {name: one.held(key) or one.batch(upcoming(name, at)) for name, one in self._sets.items()}
            yield self._transformed(gathered, 0, training=False)

    def _portions(self, plan: Plan, epoch: int, k: int, most: int | None) -> list[Portion]:
        return portions_with_partners(plan, epoch, k, self.partners, self.rank, self.world_size, most)

    def _batches(self, epoch: int, k: int, most: int | None) -> Iterator[Batch]:
        def upcoming(plan: Plan, index: int) -> Iterator[tuple[Any, np.ndarray]]:
            for later in range(k, min((k // WINDOW + 1) * WINDOW, plan.steps)):
                for number, part in enumerate(self._portions(plan, epoch, later, most)):
                    if later > k or number >= index:
                        yield (epoch, later, number, most), part.rows

        for index, part in enumerate(self._portions(self.plan, epoch, k, most)):
            key = epoch, k, index, most
            gathered = {name: one.held(key) or one.batch(upcoming(one.plan, index)) for name, one in self._sets.items()}
            if part.partner is None:
                yield self._transformed(gathered, epoch, training=True)
                continue
            for columns, _ in gathered.values():  # a global batch has as many rows of every domain
                columns["partner"] = torch.from_numpy(part.partner).to(self.device)
            yield _first(self._transformed(gathered, epoch, training=True), part.own, len(part.rows))

    def _transformed(self, gathered: dict[str, tuple[Batch, np.ndarray]], epoch: int, *, training: bool) -> Batch:
        """Transforms what was gathered; a batch of domains holds each one's columns, and "row" of the first."""
        draws = {
            name: Draw(self.plan.seed if name == ONE else _seed_of(self.plan.seed, name), epoch, rows, self.device)
            for name, (_, rows) in gathered.items()
        }
        if ONE in gathered:
            return self._transform(gathered[ONE][0], draws[ONE], training)
        batch: Batch = {name: columns for name, (columns, _) in gathered.items()}
        return {**self._transform(batch, draws, training), "row": next(iter(batch.values()))["row"]}


def _first(batch: Batch, own: int, rows: int) -> Batch:
    """The first `own` of the `rows` entries of every column: without the partners."""
    return {name: _cut_off(value, own, rows) for name, value in batch.items() if name != "partner"}


def _cut_off(value: Any, own: int, rows: int) -> Any:
    if isinstance(value, dict):
        return _first(value, own, rows)
    if isinstance(value, Ragged):
        kept = value.lengths[:own]
        return Ragged(value.values[: int(kept.sum())], kept)
    if isinstance(value, Pictures):
        return replace(value, data=value.data[:own], sizes=value.sizes[:own])
    if isinstance(value, Masks):
        return replace(value, rows=value.rows[:own])
    return value[:own] if isinstance(value, Tensor | list) and len(value) == rows else value


def _has_pictures(rows: Rows) -> bool:
    return any(isinstance(column, PictureColumn) and not column.raw for column in rows.shards[0].values())


def _seed_of(seed: int, domain: str) -> int:
    return seed ^ int.from_bytes(domain.encode()[:7].ljust(7, b"\0"), "little")


class _Set:
    """The rows of one set, gathered for several batches at once and handed out batch by batch."""

    def __init__(self, rows: Rows, plan: Plan, device: torch.device, resident: bool) -> None:
        self.rows: Rows | Resident = rows
        self.plan, self.device = plan, device
        if resident and Resident.fits(rows, device):
            self.rows = Resident(rows, device)
        self._most = max(1, BLOCK_BYTES // max(rows.row_bytes, 1))  # rows
        self._held: dict[Any, tuple[Batch, np.ndarray]] = {}

    def held(self, key: Any) -> tuple[Batch, np.ndarray] | None:
        """Returns a batch that was gathered with an earlier one."""
        return self._held.pop(key, None)

    def batch(self, upcoming: Iterator[tuple[Any, np.ndarray]]) -> tuple[Batch, np.ndarray]:
        """Gathers as many of the upcoming batches as fit a block; returns the first one's columns, and its rows."""
        first, rows = next(upcoming)
        keys, parts, total = [first], [rows], len(rows)
        for later, its_rows in upcoming:
            total += len(its_rows)
            if total > self._most:
                break
            keys.append(later)
            parts.append(its_rows)
        self._held = dict(zip(keys, self._gathered(parts), strict=True))
        return self._held.pop(first)

    def _gathered(self, parts: list[np.ndarray]) -> list[tuple[Batch, np.ndarray]]:
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        ends = np.cumsum([len(part) for part in parts]).tolist()
        bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        cut = {name: _cut(value, bounds, self.device) for name, value in self.rows.take(rows).items()}
        cut["row"] = _cut(rows, bounds, self.device)
        return [({name: values[i] for name, values in cut.items()}, part) for i, part in enumerate(parts)]


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

    2 cores of a shared x86-64 machine, November 2026; with it 4 ms.
    """
    if sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3
        with_tuning = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if with_tuning:
            with_tuning(mmap_threshold, 1 << 30)
            with_tuning(trim_threshold, 1 << 30)
