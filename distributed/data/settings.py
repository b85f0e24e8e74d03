"""Which rows a run uses, in what portions and order. No numpy here: a misspelt setting is answered at once."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which rows are used, and in what portions."""

    batch_size: Annotated[int, Ge(1)] = 128  # rows per optimizer step, all workers together
    micro_batch_size: Annotated[int, Ge(1)] | None = None  # most rows a worker takes at once; the rest accumulates
    order: Literal["shuffle", "length", "sequential"] = "shuffle"  # length: rows of like length share a batch
    sample: Literal["all", "balanced", "weighted"] = "all"  # each row once an epoch, each class alike, or by weight
    weights: str = ""  # the field of each row's weight, for data.sample=weighted; empty: the task's Weight
    prefetch: Annotated[int, Ge(0)] | None = None  # batches made ahead; none: 2 where a device or a decoder works
    resident: Literal["auto", "never"] = "auto"  # auto: a split that fits into the device's memory stays there
    pictures: Literal["encoded", "decoded"] = "encoded"  # decoded: keep a decoded copy of the store, and map it
    short_side: Annotated[int, Ge(8)] | None = None  # pixels to which the shorter side of larger pictures is reduced
    limit: Annotated[int, Ge(1)] | None = None  # use only so many rows of each split, for a quick try
    overfit: Annotated[int, Ge(1)] | None = None  # learn so many training rows, unaugmented, and be judged by them
    split: str | None = None  # train:validation:test or train:test, such as 8:1:1; none: the source's own, else 8:1:1
    split_seed: Annotated[int, Ge(0), Le(2**63 - 1)] = 0  # another number makes another split
    validation: Annotated[float, Gt(0), Le(0.5)] = 0.1  # share cut from train where there is no validation split
    folds: Annotated[int, Ge(2)] | None = None  # cross validation: how many folds
    fold: Annotated[int, Ge(0)] | None = None  # cross validation: which fold is the test split
    workers: Annotated[int, Ge(1)] | None = None  # processes that prepare data; none: one for each core
    max_bad: Annotated[float, Ge(0), Le(1)] = 0.01  # largest share of broken rows that is set aside with a warning

    @property
    def most(self) -> int | None:
        """Rows of a split that are used, at most."""
        return min((n for n in (self.overfit, self.limit) if n is not None), default=None)
