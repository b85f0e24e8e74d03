"""The rows of a store that are looked at, at most 20,000 of a split, or 5,000 where pictures must be decoded."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distributed.analysis import alike
from distributed.data.split import digest
from distributed.data.store import Store
from tasks.fields import (
    Boxes,
    Facts,
    Field,
    Image,
    Label,
    Labels,
    Number,
    ObjectMasks,
    Picture,
    Tokens,
    Vector,
)

MOST_ROWS, MOST_PICTURES = 20_000, 5_000  # of a split
MOST_BYTES = 256 << 20  # of a split's rows of one shape
LISTED = 20  # rows of one doubt


@dataclass(frozen=True)
class Doubt:
    """Something to look at, the rows where it was seen (at most 20 of them), and where those came from."""

    kind: str
    split: str
    message: str
    rows: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class View:
    """The rows of one split that are looked at."""

    split: str
    fields: dict[str, Field]
    facts: Facts
    numbers: np.ndarray  # (N,) of the rows in their split
    columns: dict[str, Any]  # as `Rows.take` gives them
    identities: np.ndarray  # (N,) V16: of the inputs' content
    thumbnails: dict[str, np.ndarray]  # of each input picture, (N, 16, 18) float32; NaN where it cannot be read
    broken: dict[str, dict[int, str]]  # of each column of pictures: why which of these rows cannot be read

    def __len__(self) -> int:
        return len(self.numbers)

    def inputs(self, *kinds: type[Field]) -> list[str]:
        return [name for name, one in self.fields.items() if isinstance(one, kinds) and not one.target]

    def of_kind(self, *kinds: type[Field]) -> list[str]:
        return [name for name, one in self.fields.items() if isinstance(one, kinds)]

    def labels(self) -> list[str]:
        return [name for name in self.of_kind(Label) if self.fields[name].target]

    def names(self, label: str) -> list[str]:
        """The names of a field's classes; their numbers where it has none."""
        return self.facts.get(label, {}).get("classes") or [str(n) for n in range(int(self.columns[label].max()) + 1)]

    def doubt(self, kind: str, message: str, positions: Any = ()) -> Doubt:
        return Doubt(kind, self.split, message, self.numbers[list(positions)[:LISTED]].tolist())


def of_split(store: Store, split: str) -> View:
    fields, whole = store.fields, store.rows(split)
    most = MOST_PICTURES if any(isinstance(one, Picture) for one in fields.values()) else MOST_ROWS
    rows = store.rows(split, limit=max(1, min(most, MOST_BYTES // max(whole.row_bytes, 1))))
    columns = rows.take(np.arange(len(rows)))
    thumbs, broken = {}, {}
    for name, one in fields.items():
        if isinstance(one, Image) and not one.target:
            thumbs[name] = alike.thumbnails(columns[name])
        elif isinstance(one, Picture):
            thumbs[name], broken[name] = alike.thumbnails_of_any_size(columns[name])
    numbers = np.arange(len(whole)) if rows.subset is None else rows.subset
    seen = {name: thumb for name, thumb in thumbs.items() if not fields[name].target}
    return View(split, fields, store.facts, numbers, columns, _identities(fields, columns, len(rows)), seen, broken)


def _identities(fields: dict[str, Field], columns: dict[str, Any], count: int) -> np.ndarray:
    """Returns (N,) V16, the same for rows of the same inputs; of the same targets, where there are no inputs."""
    inputs = {name: one for name, one in fields.items() if not one.target} or fields
    parts: dict[str, Any] = {}
    for name, one in inputs.items():
        column = columns[name]
        if isinstance(one, (Tokens, Labels, Boxes)):
            column = np.split(column[0], np.cumsum(column[1])[:-1])
        if isinstance(one, Picture):
            column = column.data
        if isinstance(one, ObjectMasks):
            column = column.rows
        parts[name] = column
    rows = [digest({name: part[row] for name, part in parts.items()}) for row in range(count)]
    return np.frombuffer(b"".join(rows), "V16")


def dense(view: View) -> tuple[list[str], np.ndarray]:
    """Returns the names and values of all numbers that each row has as inputs: (N, numbers) float32."""
    names, parts = [], [np.empty((len(view), 0), np.float32)]
    for name in view.inputs(Number):
        names.append(f"'{name}'")
        parts.append(view.columns[name][:, None])
    for name in view.inputs(Vector):
        values = view.columns[name]
        called = view.facts.get(name, {}).get("names") or [str(place) for place in range(values.shape[1])]
        names += [f"'{name}', component {one}" for one in called]
        parts.append(values)
    return names, np.concatenate(parts, axis=1)


def listed(words: list[str], most: int = 8) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
