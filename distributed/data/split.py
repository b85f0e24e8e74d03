"""Which split a row belongs to: the source's word, or a hash of its content or group; never its position."""

import hashlib
from collections.abc import Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any

import numpy as np

from distributed.data.settings import Data
from tasks.errors import UserError

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)
DEFAULT = "8:1:1"
NUMBERS = "biuf"  # numpy's kinds: bool, int, unsigned, float


def digest(content: Any, column: str = "") -> bytes:
    """Returns 16 bytes that are equal for equal content, whatever container and type of number it stands in.

    The content is text, bytes, numbers, arrays, None, and lists, sets and dicts of these; raises UserError for
    anything else, naming the column, which is a row's own name for it where `content` is a row.
    """
    hasher = hashlib.blake2b(digest_size=16)
    _feed(hasher, content, column)
    return hasher.digest()


def _feed(hasher: "hashlib.blake2b", value: Any, column: str) -> None:
    """Hashes a value so that no other value has the same bytes: its kind, its size, its parts."""
    if isinstance(value, (int, float)) or hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        array = np.asarray(value)
        value = array if array.dtype.kind in NUMBERS else array.tolist() if array.dtype.kind in "OUS" else value
    if isinstance(value, (list, tuple)):
        numbers = _numbers(value)
        value = value if numbers is None else numbers

    if isinstance(value, np.ndarray) and value.dtype.kind in NUMBERS:
        data = _plain(value)
        _head(hasher, f"{data.dtype}{data.shape}", data.nbytes)
        hasher.update(data.data)
    elif isinstance(value, (bytes, bytearray)):
        _head(hasher, "bytes", len(value))
        hasher.update(value)
    elif isinstance(value, (str, PurePath, int)):  # an int that no array holds
        data = str(value).encode("utf-8", "surrogatepass")
        _head(hasher, "integer" if isinstance(value, int) else "text", len(data))
        hasher.update(data)
    elif value is None:
        _head(hasher, "none", 0)
    elif isinstance(value, (list, tuple)):
        _head(hasher, "list", len(value))
        for part in value:
            _feed(hasher, part, column)
    elif isinstance(value, Set):
        _head(hasher, "set", len(value))
        for part in sorted(digest(part, column) for part in value):
            hasher.update(part)
    elif isinstance(value, Mapping):
        _head(hasher, "dict", len(value))
        for key, part in sorted(value.items(), key=lambda item: digest(item[0])):
            _feed(hasher, key, column)
            _feed(hasher, part, column or str(key))
    else:
        raise UserError(
            f"column '{column}' holds a {type(value).__name__}, which cannot be told to be equal to another",
            "let row() give text, numbers, arrays, or lists and dicts of these",
        )


def _head(hasher: "hashlib.blake2b", kind: str, size: int) -> None:
    hasher.update(f"{kind} {size};".encode())


def _numbers(values: list | tuple | np.ndarray) -> np.ndarray | None:
    """Returns a list of numbers, or of lists of one length each, as the array that it could be; None for another."""
    if isinstance(values, np.ndarray):
        return values if values.dtype.kind in NUMBERS else None
    kinds = set(map(type, values))
    if all(issubclass(kind, (bool, int, float, np.number, np.bool_)) for kind in kinds):
        array = np.asarray(values)
    elif all(issubclass(kind, (list, tuple, np.ndarray)) for kind in kinds):
        parts = [part for part in map(_numbers, values) if part is not None]
        if len(parts) < len(values) or len({part.shape for part in parts}) > 1:
            return None
        array = np.stack(parts)
    else:
        return None
    return array if array.dtype.kind in NUMBERS else None


def _plain(array: np.ndarray) -> np.ndarray:
    """Numbers in the first type that holds them all exactly, so that those of uint8, 1 and 1.0 have the same bytes."""
    if array.dtype.kind == "f":
        array = array.astype(np.float64) + 0.0  # -0.0 equals 0.0
        if array.size and not ((np.abs(array).max() < 2**63) and (array == np.floor(array)).all()):
            return np.ascontiguousarray(array).reshape(array.shape)  # numpy makes () to (1,)
        array = array.astype(np.int64)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    # uint8 first: a picture is hashed eight times as fast as in int64.
    kind = next(k for k in (np.uint8, np.int64, np.uint64) if np.iinfo(k).min <= low and high <= np.iinfo(k).max)
    return np.ascontiguousarray(array, kind).reshape(array.shape)


def unit(content: bytes, seed: int) -> float:
    """Returns a number in [0, 1) for a row's digest: the same content always gets the same."""
    key = seed.to_bytes(8, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=key).digest(), "little") / 2**64


def units(content: bytes, seed: int) -> tuple[float, float]:
    """Returns the two numbers by which `assign` splits a row, of a row's or its group's digest.

    The second one, of another key, cuts validation from train: that share must be a fair sample of the training rows.
    """
    return unit(content, seed), unit(content, seed ^ 0x5EED)


def shares(rule: str) -> tuple[float, float, float]:
    """Returns the shares of train, validation and test of a rule such as 8:1:1, or 8:2 (train : test)."""
    try:
        parts = [float(part) for part in rule.split(":")]
    except ValueError:
        parts = []
    if len(parts) not in (2, 3) or min(parts) < 0 or not 0 < parts[0] < float("inf"):
        raise UserError(
            f"data.split={rule}: expected two or three shares", "write train:validation:test, such as 8:1:1"
        )
    train, validation, test = parts if len(parts) == 3 else (parts[0], 0.0, parts[1])
    total = train + validation + test
    return train / total, validation / total, test / total


def check(data: Data) -> None:
    """Raises UserError for split settings that contradict one another."""
    if data.split is not None:
        shares(data.split)
    if (data.folds is None) != (data.fold is None):
        raise UserError("data.folds and data.fold belong together", "such as data.folds=5 data.fold=0")
    if data.folds is not None and data.fold is not None and data.fold >= data.folds:
        raise UserError(f"data.fold={data.fold}: folds are counted 0..{data.folds - 1}", "")


def joined(units: np.ndarray, identities: np.ndarray) -> np.ndarray:
    """Returns the units (rows, 2) so that rows of equal content share theirs, also where their groups differ.

    Groups that have a content in common become one: else a duplicate would be on both sides of a split.
    """
    _, content = np.unique(identities, return_inverse=True)
    first, group = np.unique(units, axis=0, return_inverse=True)
    group = group.reshape(-1)
    pairs = np.unique(np.stack([content, group], axis=1), axis=0)
    if len(pairs) == len(np.unique(content)):
        return units
    leader = list(range(len(first)))
    # Who leads must not depend on the size of its unit, else one split would win: the digits behind say it.
    chance = (first[:, 0] * 2.0**26 % 1.0).tolist()

    def led(one: int) -> int:
        while leader[one] != one:
            leader[one] = one = leader[leader[one]]
        return one

    same = pairs[:-1, 0] == pairs[1:, 0]
    for one, other in zip(pairs[:-1][same, 1].tolist(), pairs[1:][same, 1].tolist(), strict=True):
        low, high = sorted((led(one), led(other)), key=chance.__getitem__)
        leader[high] = low
    return first[np.array([led(one) for one in range(len(first))])[group]]


def assign(data: Data, given: Sequence[str | None], units: np.ndarray) -> np.ndarray:
    """Returns the split of every row, as its place in SPLITS, from what the source says and from `units` (rows, 2).

    Rows of equal units share a split wherever the splits are ours.
    """
    first, again = units.T
    if data.folds is not None:
        splits = np.where((first * data.folds).astype(int) == data.fold, TEST, TRAIN)
    elif data.split is None and any(given):
        if not all(given):
            missing = list(given).index(None)
            raise UserError(f"the source names a split for some rows only (row {missing} has none)",
                            "name one for every row, or set data.split")  # fmt: skip
        odd = sorted({split for split in given if split is not None} - set(SPLITS))
        if odd:
            raise UserError(f"the source names a split '{odd[0]}'", f"splits are {', '.join(SPLITS)}")
        splits = np.array([SPLITS.index(split) for split in given if split is not None])
    else:
        train, validation, _ = shares(data.split or DEFAULT)
        splits = np.where(first < train, TRAIN, np.where(first < train + validation, VALIDATION, TEST))
    if not (splits == VALIDATION).any():
        splits = np.where((splits == TRAIN) & (again < data.validation), VALIDATION, splits)
    return splits
