"""Which rows make up which batch: pure functions of (seed, epoch, batch), never of how many workers there are."""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from tasks.errors import UserError

WINDOW = 100  # batches that are sorted by length together, where order is "length"


def _round(values: np.ndarray, key: int) -> np.ndarray:
    """One keyed round function of the permutation: SplitMix64's finaliser on uint64."""
    values = (values + np.uint64(key)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(32))


def _key(*parts: int) -> int:
    """A 64-bit key of small integers: FNV-1a over their bytes, then one multiplication."""
    key = 0xCBF29CE484222325
    for part in parts:
        for byte in (part % 2**64).to_bytes(8, "little"):
            key = ((key ^ byte) * 0x100000001B3) % 2**64
    return key * 0x9E3779B97F4A7C15 % 2**64


def seed_of(*parts: int) -> int:
    """Returns a seed below 2^63 for torch's generator, from small integers such as (seed, step, micro-batch, rank)."""
    return _key(*parts) >> 1


def permuted(positions: np.ndarray, rows: int, *key: int) -> np.ndarray:
    """Returns where a random permutation of `rows` puts `positions`, in O(positions) time and memory.

    A Feistel network of six rounds on as many bits as `rows` needs, walked along its cycle until it falls below `rows`
    (Black and Rogaway, 2002): on average fewer than twice. positions int64 (n,), below `rows` -> int64 (n,).
    """
    bits = max(2, (rows - 1).bit_length())
    low = bits // 2  # the halves may differ by a bit: each round changes one by a function of the other
    masks = np.uint64((1 << (bits - low)) - 1), np.uint64((1 << low) - 1)
    keys = [_key(round_, *key) for round_ in range(6)]
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), bool)
    with np.errstate(over="ignore"):
        while outside.any():
            x = values[outside]
            halves = [x >> np.uint64(low), x & masks[1]]
            for round_, k in enumerate(keys):
                halves[round_ % 2] ^= _round(halves[1 - round_ % 2], k) & masks[round_ % 2]
            values[outside] = (halves[0] << np.uint64(low)) | halves[1]
            outside = values >= np.uint64(rows)
    return values.astype(np.int64)


def spread(total: int, parts: int, index: int) -> tuple[int, int]:
    """Returns start and end of part `index` of `total` things in `parts` parts whose sizes differ by one at most."""
    return index * total // parts, (index + 1) * total // parts


def shuffled(positions: np.ndarray, rows: int, *key: int) -> np.ndarray:
    """Returns the rows at `positions` of an endless order: one permutation of all rows after another."""
    turn, within = np.divmod(positions, rows)
    out = np.empty_like(positions)
    for one in np.unique(turn).tolist():
        mine = turn == one
        out[mine] = permuted(within[mine], rows, *key, *([one] if one else []))
    return out


class Sample(Protocol):
    """Which row stands at each position of an epoch, where not every row stands there once."""

    def __call__(self, positions: np.ndarray, seed: int, epoch: int) -> np.ndarray: ...


class Balanced:
    """Every class as often as any other: of each run of as many positions as there are classes, one is of each."""

    def __init__(self, labels: np.ndarray) -> None:  # (rows,) int64
        self.by_class = np.argsort(labels, kind="stable")
        _, counts = np.unique(labels, return_counts=True)
        self.starts = np.concatenate([[0], np.cumsum(counts)])

    def __call__(self, positions: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        classes = len(self.starts) - 1
        turn, slot = np.divmod(positions, classes)
        # Each turn begins with another class, so that a batch smaller than the number of classes sees all in time.
        chosen = (slot + permuted(turn % 2**16, 2**16, seed, epoch)) % classes
        out = np.empty_like(positions)
        for one in np.unique(chosen).tolist():
            start, end = self.starts[one : one + 2].tolist()
            mine = chosen == one
            out[mine] = self.by_class[start + shuffled(turn[mine], end - start, seed, epoch, one)]
        return out


class Weighted:
    """Every row in proportion to its weight, as evenly as that goes: systematic resampling (Kitagawa, 1996)."""

    def __init__(self, weights: np.ndarray) -> None:  # (rows,) float32, none negative
        odd = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
        if len(odd) or not weights.sum():
            raise UserError(
                f"row {odd[0]} has the weight {weights[odd[0]]}" if len(odd) else "all rows have the weight 0",
                "a weight is a number from 0 on, and not all of them are 0",
            )
        self.until = np.cumsum(weights, dtype=np.float64)
        self.last = int(np.flatnonzero(weights)[-1])  # where rounding would go beyond it

    def __call__(self, positions: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        rows = len(self.until)
        offset = (seed_of(seed, epoch) >> 10) * 2.0**-53
        points = (shuffled(positions, rows, seed, epoch) + offset) * (self.until[-1] / rows)
        return np.minimum(np.searchsorted(self.until, points, side="right"), self.last)


@dataclass(frozen=True)
class Plan:
    """The order of one split's rows: `batch(epoch, k)` are the rows of global batch k."""

    rows: int  # that an epoch has
    batch_size: int
    seed: int
    order: str = "shuffle"
    lengths: np.ndarray | None = None  # (rows,) int64: what "length" sorts by
    sample: Sample | None = None  # none: every row once
    distinct: int | None = None  # rows that there are, where fewer than an epoch has: then they come again
    _latest: dict[tuple[int, int], list[np.ndarray]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def steps(self) -> int:
        """Global batches an epoch: ceil(rows / batch_size)."""
        return -(-self.rows // self.batch_size)

    def batch(self, epoch: int, k: int) -> np.ndarray:
        """Returns the rows of global batch `k`, int64 (about batch_size,)."""
        window = (epoch, k // WINDOW)
        batches = self._latest.get(window)
        if batches is None:
            batches = self._window(*window)
            if len(self._latest) > 1:  # two: one who makes batches ahead is in the next window already
                self._latest.clear()
            self._latest[window] = batches
        return batches[k % WINDOW]

    def _window(self, epoch: int, window: int) -> list[np.ndarray]:
        """The batches of one window: so many at once cost little more than one."""
        owners = range(window * WINDOW, min((window + 1) * WINDOW, self.steps))
        bounds = [spread(self.rows, self.steps, k) for k in owners]
        positions = np.arange(bounds[0][0], bounds[-1][1])
        distinct = self.distinct or self.rows
        if self.order == "sequential":
            return _cut(positions % distinct, [end - start for start, end in bounds])
        if self.sample is not None:
            rows = self.sample(positions, self.seed, epoch)
        else:
            rows = shuffled(positions, distinct, self.seed, epoch)
        if self.order == "shuffle":
            return _cut(rows, [end - start for start, end in bounds])
        if self.lengths is None:
            raise UserError("data.order=length needs a column whose rows differ in length", "use data.order=shuffle")
        rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        # Which batch of the window takes which run of the sorted rows is drawn, so that lengths come in any order.
        places = permuted(np.arange(len(bounds)), len(bounds), self.seed, epoch, window).tolist()
        runs = _cut(rows, [bounds[k][1] - bounds[k][0] for k in np.argsort(places)])
        return [runs[place] for place in places]


def _cut(rows: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return np.split(rows, np.cumsum(sizes)[:-1])


def portions(batch: np.ndarray, rank: int, world_size: int, micro_batch_size: int | None) -> list[np.ndarray]:
    """Returns the micro-batches of one worker: its share of the global batch, cut into equal parts."""
    if world_size == 1 and (micro_batch_size is None or micro_batch_size >= len(batch)):
        return [batch]
    start, end = spread(len(batch), world_size, rank)
    mine = batch[start:end]
    parts = max(1, -(-len(mine) // (micro_batch_size or max(len(mine), 1))))
    return [mine[slice(*spread(len(mine), parts, i))] for i in range(parts)]


class Portion(NamedTuple):
    """What one worker needs of a global batch for one micro-batch."""

    rows: np.ndarray  # int64: its own rows, and after them those partners that are not among them
    own: int  # how many are its own
    partner: np.ndarray | None = None  # (rows, partners) int64: places in `rows`; those beyond `own` are their own


def portions_with_partners(
    plan: Plan, epoch: int, k: int, partners: int, rank: int, world_size: int, micro_batch_size: int | None
) -> list[Portion]:
    """Returns the micro-batches of one worker, each row with `partners` others of the same global batch.

    Who is whose partner is the plan's, whatever worker a row falls to: partner j stands a drawn number of places
    behind, another one for each j and batch.
    """
    batch = plan.batch(epoch, k)
    if not partners:
        return [Portion(rows, len(rows)) for rows in portions(batch, rank, world_size, micro_batch_size)]
    count = len(batch)
    steps = permuted(np.arange(partners) % max(count - 1, 1), max(count - 1, 1), plan.seed, epoch, k) + 1
    found = []
    for mine in portions(np.arange(count), rank, world_size, micro_batch_size):
        theirs = (mine[:, None] + steps) % count
        others = np.setdiff1d(theirs, mine)
        place = np.empty(count, np.int64)
        place[mine], place[others] = np.arange(len(mine)), np.arange(len(mine), len(mine) + len(others))
        themselves = np.arange(len(mine), len(mine) + len(others))[:, None].repeat(partners, 1)
        found.append(
            Portion(batch[np.concatenate([mine, others])], len(mine), np.concatenate([place[theirs], themselves]))
        )
    return found


def smallest_portion(plan: Plan, world_size: int, micro_batch_size: int | None) -> int:
    """Returns the fewest rows that any worker ever gets in one micro-batch."""
    batches = {plan.rows // plan.steps, -(-plan.rows // plan.steps)}
    shares = {share for batch in batches for share in (batch // world_size, -(-batch // world_size))}
    # One row above the micro-batch size makes two halves: the larger share can have the smaller parts.
    return min(share // max(1, -(-share // (micro_batch_size or max(share, 1)))) for share in shares)
