"""Which split a row belongs to: the source's word, or a hash of its content or group; never its position."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from distributed.data.settings import Data
from tasks.errors import UserError

SPLITS = ("train", "validation", "test")
DEFAULT = "8:1:1"


def digest(values: Iterable[Any], seed: int = 0) -> bytes:
    """Returns 16 bytes that are equal for equal content, whatever container it stands in."""
    hasher = hashlib.blake2b(digest_size=16, key=seed.to_bytes(8, "little", signed=True))
    for value in values:
        if isinstance(value, str):
            data = value.encode("utf-8", "surrogatepass")
        elif isinstance(value, bytes):
            data = value
        else:
            data = np.ascontiguousarray(value).tobytes() if not _ragged(value) else digest(value)
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.digest()


def _ragged(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and (
        isinstance(value[0], str) or (isinstance(value[0], (list, tuple)) and len({len(part) for part in value}) > 1)
    )  # fmt: skip


def unit(content: bytes, seed: int) -> float:
    """Returns a number in [0, 1) for a row's digest: the same content always gets the same."""
    return (
        int.from_bytes(
            hashlib.blake2b(content, digest_size=8, key=seed.to_bytes(8, "little", signed=True)).digest(), "little"
        )
        / 2**64
    )


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


def assign(data: Data, given: list[str | None], contents: list[bytes]) -> list[str]:
    """Returns the split of every row from what the source says, and the digests of their contents or groups.

    Rows of equal digest share a split wherever the splits are ours.
    """
    units = [unit(content, data.split_seed) for content in contents]
    if data.folds is not None:
        splits = ["test" if int(u * data.folds) == data.fold else "train" for u in units]
    elif data.split is None and any(given):
        if not all(given):
            missing = given.index(None)
            raise UserError(f"the source names a split for some rows only (row {missing} has none)",
                            "name one for every row, or set data.split")  # fmt: skip
        odd = sorted({split for split in given if split not in SPLITS and split is not None})
        if odd:
            raise UserError(f"the source names a split '{odd[0]}'", f"splits are {', '.join(SPLITS)}")
        splits = [split or "" for split in given]
    else:
        train, validation, _ = shares(data.split or DEFAULT)
        splits = ["train" if u < train else "validation" if u < train + validation else "test" for u in units]
    if "validation" not in splits:
        # Another key than above: the share must be a fair sample of the training rows.
        again = [unit(content, data.split_seed ^ 0x5EED) for content in contents]
        splits = [
            "validation" if s == "train" and u < data.validation else s for s, u in zip(splits, again, strict=True)
        ]
    return splits
