"""What the columns of a task's rows hold: plain declarations, checked row by row while a store is prepared.

A field says how one value of a row must look (`check`) and what the training rows teach about it (`facts`).
How it is laid out in Arrow is the store's affair (`distributed/data/schema.py`). No torch here.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from tasks.errors import BadRow, UserError, did_you_mean

Facts = dict[str, Any]
LARGEST = np.finfo(np.float32).max  # what real numbers are stored as


@dataclass(frozen=True)
class Field:
    """One column. `target` marks what is to be learned: it is absent when predicting, and is no part of a
    row's content when duplicates are kept on one side of a split.
    """

    target: bool = field(default=False, kw_only=True)

    def check(self, value: Any, facts: Facts) -> Any:
        """Returns the value as it is stored; raises BadRow for one that cannot be."""
        raise TypeError(f"{type(self).__name__} does not say how to check a value")

    def check_parsed(self, value: Any) -> Any:
        """Returns the value as far as it can be checked before there are facts, which are learned from it.

        Raises BadRow for a value that no facts could make right.
        """
        return self.check(value, {})

    def learner(self) -> "Learner":
        """Returns what takes the column's training values, one by one, and gives the facts: nothing by default."""
        return Learner()

    def facts(self, values: Iterable[Any]) -> Facts:
        """What the training rows teach about this column."""
        learner = self.learner()
        for value in values:
            learner.add(value)
        return learner.facts()


class Learner:
    """Learns facts from values that come one by one; this one learns nothing."""

    def add(self, value: Any) -> None:
        pass

    def facts(self) -> Facts:
        return {}


def _array(value: Any, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    array = _as_array(value)
    if array.dtype.kind not in "biuf":
        raise BadRow(f"expected numbers, got {array.dtype}")
    if array.shape != shape:
        raise BadRow(f"expected shape {shape}, got {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadRow("holds a NaN or an infinity")
    if np.dtype(dtype).kind == "f" and array.size and np.abs(array).max() > LARGEST:
        raise BadRow(f"holds a number that {np.dtype(dtype)} cannot: {array.flat[np.abs(array).argmax()]}")
    if np.dtype(dtype).kind in "iu" and array.dtype.kind == "f" and (array != np.floor(array)).any():
        raise BadRow(f"expected whole numbers, got {array[array != np.floor(array)].flat[0]}")
    if np.dtype(dtype).kind in "iu" and array.size:
        limits = np.iinfo(dtype)
        if array.min() < limits.min or array.max() > limits.max:
            raise BadRow(f"expected values of {limits.min}..{limits.max}, got {array.min()}..{array.max()}")
    return array.astype(dtype)


def _as_array(value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:  # ragged nested lists
        raise BadRow(f"is no array of numbers: {error}") from error


class _Moments(Learner):
    """Mean and standard deviation a component, in float64, block by block (Chan et al. 1983, parallel update)."""

    BLOCK = 256  # values: it is the operations that cost, not the numbers

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, np.float64(0), np.float64(0)
        self.waiting: list[Any] = []

    def add(self, value: Any) -> None:
        self.waiting.append(value)
        if len(self.waiting) == self.BLOCK:
            self._take_in()

    def _take_in(self) -> None:
        block = np.asarray(self.waiting, np.float64)  # (n, ...)
        self.waiting.clear()
        count, mean = len(block), block.mean(0)
        total, delta = self.count + count, mean - self.mean
        self.squares = self.squares + ((block - mean) ** 2).sum(0) + delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def facts(self) -> Facts:
        if self.waiting:
            self._take_in()
        if not self.count:
            return {}
        std = np.sqrt(self.squares / self.count)
        # A constant column has no scale of its own: 1 leaves it as it is instead of dividing by zero.
        return {"mean": self.mean.tolist(), "std": np.where(std > 1e-12, std, 1.0).tolist()}


class _Shades(Learner):
    """Mean and standard deviation a channel, of pixels scaled to 0..1: exact, of how often each shade occurs."""

    def __init__(self, channels: int) -> None:
        self.seen = np.zeros((channels, 256), np.int64)

    def add(self, value: Any) -> None:
        for channel, plane in enumerate(np.asarray(value, np.uint8).reshape(len(self.seen), -1)):
            self.seen[channel] += np.bincount(plane, minlength=256)

    def facts(self) -> Facts:
        if not self.seen.any():
            return {}
        shades, share = np.arange(256) / 255, self.seen / self.seen.sum(1, keepdims=True)
        mean = share @ shades
        std = np.sqrt((share * (shades - mean[:, None]) ** 2).sum(1))
        return {"mean": mean.tolist(), "std": np.where(std > 1e-12, std, 1.0).tolist()}


class _Classes(Learner):
    """The classes by name, and how many training rows each one has."""

    def __init__(self, declared: list[str]) -> None:
        self.declared = declared
        self.counts: dict[Any, int] = {}

    def add(self, value: Any) -> None:
        value = value if isinstance(value, str) else int(value)
        self.counts[value] = self.counts.get(value, 0) + 1

    def facts(self) -> Facts:
        counts = self.counts
        if self.declared:
            classes = list(self.declared)
        elif any(isinstance(value, str) for value in counts):
            classes = sorted(map(str, counts))
        else:
            classes = [str(number) for number in range(max(counts, default=-1) + 1)]
        by_name = {
            classes[v] if not isinstance(v, str) and 0 <= v < len(classes) else str(v): n for v, n in counts.items()
        }
        return {"classes": classes, "counts": [by_name.get(name, 0) for name in classes]}


@dataclass(frozen=True)
class Image(Field):
    """A picture of one fixed size: uint8 (channels, height, width)."""

    channels: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, self.height, self.width)

    def check(self, value: Any, facts: Facts) -> np.ndarray:
        return _array(value, self.shape, np.uint8)

    def learner(self) -> Learner:
        return _Shades(self.channels)


@dataclass(frozen=True)
class Vector(Field):
    """A fixed number of real numbers: float32 (length,)."""

    length: int

    def check(self, value: Any, facts: Facts) -> np.ndarray:
        return _array(value, (self.length,), np.float32)

    def learner(self) -> Learner:
        return _Moments()


@dataclass(frozen=True)
class Number(Field):
    """One real number: float32 ()."""

    def check(self, value: Any, facts: Facts) -> np.ndarray:
        return _array(value, (), np.float32)

    def learner(self) -> Learner:
        return _Moments()


@dataclass(frozen=True)
class Weight(Number):
    """How often a row is drawn, relative to others, with data.sample=weighted: float32 (), from 0 on.

    It is neither an input of the network nor something to be learned.
    """

    target: bool = field(default=True, kw_only=True)

    def check(self, value: Any, facts: Facts) -> np.ndarray:
        weight = super().check(value, facts)
        if weight < 0:
            raise BadRow(f"a weight is 0 at least, got {weight}")
        return weight

    def learner(self) -> Learner:
        return Learner()


@dataclass(frozen=True)
class Label(Field):
    """One of several classes: int64 (). A row gives a class by its number, or by its name.

    The classes are `names`, or 0..`classes`-1, or what the training rows show.
    """

    names: tuple[str, ...] = ()
    classes: int = 0
    target: bool = field(default=True, kw_only=True)

    def check(self, value: Any, facts: Facts) -> np.ndarray:
        known = facts.get("classes") or self._declared
        if isinstance(value, str):
            if value not in known:
                raise BadRow(f"unknown class '{value}'; {did_you_mean(value, known)}")
            return np.int64(known.index(value))  # type: ignore[return-value]
        number = _array(value, (), np.int64)
        if not 0 <= number < len(known):
            raise BadRow(f"class {number} is outside 0..{len(known) - 1}")
        return number

    def check_parsed(self, value: Any) -> Any:
        if self._declared:
            return self.check(value, {})
        if not isinstance(value, str) and _array(value, (), np.int64) < 0:
            raise BadRow(f"class {value} is below 0")
        return value

    @functools.cached_property
    def _declared(self) -> list[str]:
        return list(self.names) or [str(number) for number in range(self.classes)]

    def learner(self) -> Learner:
        return _Classes(self._declared)


@dataclass(frozen=True)
class Text(Field):
    """A string, stored as UTF-8."""

    def check(self, value: Any, facts: Facts) -> str:
        if not isinstance(value, str):
            raise BadRow(f"expected text, got {type(value).__name__}")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise BadRow(f"is no text that UTF-8 can hold: {error.reason}") from error
        return value


@dataclass(frozen=True)
class Tokens(Field):
    """A sequence of word numbers of any length: int32 (length,)."""

    dtype: ClassVar[type] = np.int32

    def check(self, value: Any, facts: Facts) -> np.ndarray:
        array = _as_array(value)
        return _array(array if array.size else array.astype(np.int32), (array.size,), np.int32)


@dataclass(frozen=True)
class Labels(Field):
    """Any number of classes, one for each object of a row: int64 (objects,)."""

    dtype: ClassVar[type] = np.int64
    target: bool = field(default=True, kw_only=True)

    def check(self, value: Any, facts: Facts) -> np.ndarray:
        array = _as_array(value)
        return _array(array if array.size else array.astype(np.int64), (array.size,), np.int64)


@dataclass(frozen=True)
class Boxes(Field):
    """Any number of boxes, one for each object of a row: float32 (objects, 4), x1 y1 x2 y2 in pixels."""

    dtype: ClassVar[type] = np.float32
    target: bool = field(default=True, kw_only=True)

    def check(self, value: Any, facts: Facts) -> np.ndarray:
        array = _as_array(value)
        array = array if array.size else array.astype(np.float32).reshape(-1, 4)
        boxes = _array(array, (*array.shape[:1], 4), np.float32)
        if (boxes[:, 2:] <= boxes[:, :2]).any():
            raise BadRow("a box has no area: x2 must exceed x1, y2 must exceed y1")
        return boxes


@dataclass(frozen=True)
class Picture(Field):
    """A picture of any size, kept as JPEG or PNG and decoded while training: batches hold it as `Pictures`.

    A row gives the bytes of a picture file of any usual format, its path, or an array (height, width[, channels]).
    """

    channels: int = 3  # 1: grey, 3: RGB

    def check(self, value: Any, facts: Facts) -> dict[str, Any]:
        from tasks.formats import pictures

        if isinstance(value, dict):
            return pictures.looked_at(value, self.channels)
        return pictures.normalised(value, self.channels)


@dataclass(frozen=True)
class ClassMap(Picture):
    """The class of every pixel, 0..254, and 255 where it does not count; kept as PNG. Batches hold it as `Pictures`.

    A row gives a palette or grey PNG (its bytes or its path), or an array (height, width).
    """

    channels: int = 1
    target: bool = field(default=True, kw_only=True)

    def check(self, value: Any, facts: Facts) -> dict[str, Any]:
        from tasks.formats import pictures

        if isinstance(value, dict):
            return pictures.looked_at(value, 1)
        return pictures.class_map(value)


@dataclass(frozen=True)
class ObjectMasks(Field):
    """A mask for each object of a row, run-length encoded as COCO does it. Batches hold it as `Masks`.

    A row gives RLE dicts {"size": [height, width], "counts": bytes}, or an array (objects, height, width).
    """

    target: bool = field(default=True, kw_only=True)

    def check(self, value: Any, facts: Facts) -> dict[str, Any]:
        from pycocotools import mask

        if isinstance(value, dict) and set(value) == {"height", "width", "counts"}:
            return value
        if isinstance(value, np.ndarray):
            if value.ndim != 3:
                raise BadRow(f"expected masks of shape (objects, height, width), got {value.shape}")
            planes = np.asfortranarray((value != 0).astype(np.uint8).transpose(1, 2, 0))
            height, width = value.shape[1:]
            encoded: Any = mask.encode(planes) if len(value) else []
            counts = [one["counts"] for one in encoded]
            return {"height": height, "width": width, "counts": counts}
        try:
            sizes = {tuple(one["size"]) for one in value}
            counts = [c.encode() if isinstance(c := one["counts"], str) else bytes(c) for one in value]
        except (TypeError, KeyError) as error:
            raise BadRow(f"expected run-length encoded masks with size and counts: {error!r}") from error
        if len(sizes) > 1:
            raise BadRow(f"its masks differ in size: {sorted(sizes)}")
        height, width = next(iter(sizes), (0, 0))
        return {"height": int(height), "width": int(width), "counts": counts}


def check_parsed(row: Mapping[str, Any], fields: Mapping[str, Field], *, whole: bool) -> dict[str, Any]:
    """Returns the parsed row with its declared columns checked as far as that goes before there are facts.

    A `whole` row has them all; otherwise an `encode` is to come that makes those which are not there. Raises BadRow
    naming the field for a value that no facts could make right.
    """
    checked = dict(row)
    for name, column in fields.items():
        if whole or name in row:
            with _named(name, row.get(name)):
                checked[name] = column.check_parsed(row[name])
    return checked


@contextlib.contextmanager
def _named(name: str, value: Any) -> Iterator[None]:
    if value is None:
        raise BadRow(f"'{name}' is missing")
    try:
        yield
    except BadRow as error:
        raise BadRow(f"'{name}': {error}") from error


def check_row(
    row: Mapping[str, Any], fields: Mapping[str, Field], facts: Facts, *, targets: bool = True
) -> dict[str, Any]:
    """Returns the row with every declared field checked and nothing else in it; raises BadRow naming the field.

    With `targets=False` the targets may be missing, as when predicting.
    """
    stray = sorted(set(row) - set(fields))
    if stray:
        raise UserError(
            f"a row holds '{stray[0]}', which the task does not declare in `fields`",
            did_you_mean(stray[0], fields) or "declare it, or let `encode` leave it out",
        )
    checked = {}
    for name, column in fields.items():
        value = row.get(name)
        if value is None and column.target and not targets:
            continue
        with _named(name, value):
            checked[name] = column.check(value, facts.get(name, {}))
    return checked
