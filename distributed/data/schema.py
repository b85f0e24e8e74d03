"""How the fields of a task lie in Arrow, and how their columns are seen as numpy arrays without a copy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.fields import Boxes, Field, Image, Label, Labels, Number, Text, Tokens, Vector

_DENSE: dict[type[Field], type] = {Image: np.uint8, Vector: np.float32, Number: np.float32, Label: np.int64}
_RAGGED: dict[type[Field], tuple[type, tuple[int, ...]]] = {
    Tokens: (np.int32, ()), Labels: (np.int64, ()), Boxes: (np.float32, (4,)),
}  # fmt: skip


def _shape(field: Field) -> tuple[int, ...]:
    if isinstance(field, Image):
        return field.shape
    return (field.length,) if isinstance(field, Vector) else ()


def arrow_type(field: Field) -> pa.DataType:
    """Returns the Arrow type of a field; raises TypeError for a kind of field that has none."""
    kind = type(field)
    if kind in _DENSE:
        element = pa.from_numpy_dtype(_DENSE[kind])
        return pa.fixed_shape_tensor(element, _shape(field)) if _shape(field) else element
    if kind in _RAGGED:
        dtype, inner = _RAGGED[kind]
        element = pa.from_numpy_dtype(dtype)
        return pa.large_list(pa.list_(element, inner[0]) if inner else element)
    if kind is Text:
        return pa.large_string()
    raise TypeError(f"no Arrow type for a field of kind {kind.__name__}")


def schema(fields: Mapping[str, Field]) -> pa.Schema:
    return pa.schema([pa.field(name, arrow_type(field), nullable=False) for name, field in fields.items()])


def batch_of(rows: Sequence[Mapping[str, Any]], fields: Mapping[str, Field]) -> pa.RecordBatch:
    """Returns checked rows as one record batch."""
    arrays = [_array([row[name] for row in rows], field) for name, field in fields.items()]
    return pa.record_batch(arrays, schema=schema(fields))


def _array(values: list[Any], field: Field) -> pa.Array:
    kind = type(field)
    if kind in _DENSE:
        block = np.ascontiguousarray(np.stack([np.asarray(v, _DENSE[kind]) for v in values]))
        flat = pa.array(block.reshape(-1))
        if not _shape(field):
            return flat
        storage = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(_shape(field))))
        return pa.ExtensionArray.from_storage(arrow_type(field), storage)
    if kind in _RAGGED:
        dtype, inner = _RAGGED[kind]
        lengths = [len(v) for v in values]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        flat = pa.array(np.concatenate([np.asarray(v, dtype).reshape(-1) for v in values]))
        return pa.LargeListArray.from_arrays(
            offsets, pa.FixedSizeListArray.from_arrays(flat, inner[0]) if inner else flat
        )
    return pa.array(values, arrow_type(field))


# ---- columns as numpy sees them


@dataclass(frozen=True)
class DenseColumn:
    """Rows of one shape: (rows, ...)."""

    values: np.ndarray

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.values.take(rows, axis=0)


@dataclass(frozen=True)
class RaggedColumn:
    """Rows of any length, one after another."""

    values: np.ndarray  # (sum of lengths, ...)
    offsets: np.ndarray  # (rows + 1,) int64

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the values of the rows one after another, and the rows' lengths."""
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        # Position of each value: its row's start, plus how far into the row it stands.
        shift = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
        return self.values.take(shift + np.arange(lengths.sum()), axis=0), lengths


@dataclass(frozen=True)
class TextColumn:
    """Strings: their UTF-8 bytes, one after another."""

    values: np.ndarray  # (bytes,) uint8
    offsets: np.ndarray  # (rows + 1,) int64

    def take(self, rows: np.ndarray) -> list[str]:
        return [bytes(self.values[self.offsets[r] : self.offsets[r + 1]]).decode() for r in rows]


Column = DenseColumn | RaggedColumn | TextColumn


def column(array: pa.Array, field: Field) -> Column:
    """Returns an Arrow column as numpy views of the very same memory."""
    kind = type(field)
    if kind in _DENSE:
        flat = array.storage if isinstance(array, pa.ExtensionArray) else array
        values = np.frombuffer(flat.buffers()[-1], _DENSE[kind])
        return DenseColumn(values.reshape(-1, *_shape(field))[array.offset : array.offset + len(array)])
    offsets = np.frombuffer(array.buffers()[1], np.int64)[: len(array) + 1]
    data = array.buffers()[-1]
    if kind in _RAGGED:
        dtype, inner = _RAGGED[kind]
        values = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
        return RaggedColumn(values.reshape(-1, *inner)[: offsets[-1]], offsets)
    return TextColumn(np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8), offsets)


def field_to_json(field: Field) -> str:
    """A field as it stands in a manifest: what a reader must declare to read this column."""
    return repr(field)
