"""How the fields of a task lie in Arrow, and how their columns are seen as numpy arrays without a copy."""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tasks import fields as kinds
from tasks.columns import Mask, Masks, Pictures
from tasks.errors import UserError
from tasks.fields import (
    Boxes,
    ClassMap,
    Field,
    Image,
    Label,
    Labels,
    Number,
    ObjectMasks,
    Picture,
    Text,
    Tokens,
    Vector,
    Weight,
)

SOURCE = "@source"  # the column that says where a row came from
RAW = "@raw"  # of the schema's metadata: pictures are bare pixels

_DENSE: dict[type[Field], type] = {
    Image: np.uint8, Vector: np.float32, Number: np.float32, Weight: np.float32, Label: np.int64,
}  # fmt: skip
_RAGGED: dict[type[Field], tuple[type, tuple[int, ...]]] = {
    Tokens: (np.int32, ()), Labels: (np.int64, ()), Boxes: (np.float32, (4,)),
}  # fmt: skip
_SIZED = {  # structs of a height, a width, and what has them
    Picture: ("bytes", pa.large_binary()),
    ClassMap: ("bytes", pa.large_binary()),
    ObjectMasks: ("counts", pa.large_list(pa.large_binary())),
}


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
    if kind in _SIZED:
        return pa.struct([("height", pa.int32()), ("width", pa.int32()), _SIZED[kind]])
    if kind is Text:
        return pa.large_string()
    raise TypeError(f"no Arrow type for a field of kind {kind.__name__}")


def schema(fields: Mapping[str, Field], *, raw: bool = False) -> pa.Schema:
    columns = [pa.field(name, arrow_type(field), nullable=False) for name, field in fields.items()]
    return pa.schema([*columns, pa.field(SOURCE, pa.large_string())], {RAW: "1"} if raw else None)


def is_raw(batch: pa.RecordBatch) -> bool:
    """Whether the pictures of a batch are bare pixels."""
    return RAW.encode() in (batch.schema.metadata or {})


def batch_of(rows: Sequence[Mapping[str, Any]], fields: Mapping[str, Field], sources: Sequence[str]) -> pa.RecordBatch:
    """Returns checked rows, and where each came from, as one record batch."""
    arrays = [_array([row[name] for row in rows], field) for name, field in fields.items()]
    return pa.record_batch([*arrays, pa.array(sources, pa.large_string())], schema=schema(fields))


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
        starts = self.offsets.take(rows)
        lengths = self.offsets.take(rows + 1) - starts
        ends = lengths.cumsum()
        # Position of each value: its row's start, plus how far into the row it stands.
        shift = (starts - ends + lengths).repeat(lengths)
        shift += np.arange(len(shift))
        return self.values.take(shift, axis=0), lengths


@dataclass(frozen=True)
class TextColumn:
    """Strings: their UTF-8 bytes, one after another."""

    values: np.ndarray  # (bytes,) uint8
    offsets: np.ndarray  # (rows + 1,) int64

    def take(self, rows: np.ndarray) -> list[str]:
        return [bytes(view).decode() for view in _views(self.values, self.offsets, rows)]


@dataclass(frozen=True)
class PictureColumn:
    """Pictures of any size, encoded or as bare pixels."""

    values: np.ndarray  # (bytes,) uint8
    offsets: np.ndarray  # (rows + 1,) int64
    sizes: np.ndarray  # (rows, 2) int32: height, width
    channels: int
    nearest: bool
    raw: bool

    def take(self, rows: np.ndarray) -> Pictures:
        """Returns the pictures, views of the stored bytes or pixels."""
        views, sizes = _views(self.values, self.offsets, rows), self.sizes[rows].astype(np.int64)
        if self.raw:
            views = [v.reshape(h, w, self.channels) for v, (h, w) in zip(views, sizes.tolist(), strict=True)]
        return Pictures(views, sizes, self.channels, self.nearest)


@dataclass(frozen=True)
class MaskColumn:
    """Rows with any number of run-length encoded masks."""

    values: np.ndarray  # (bytes,) uint8
    offsets: np.ndarray  # (masks + 1,) int64: of each mask in the bytes
    owners: np.ndarray  # (rows + 1,) int64: of each row in the masks
    sizes: np.ndarray  # (rows, 2) int32

    def take(self, rows: np.ndarray) -> Masks:
        return Masks([self._row(row) for row in rows.tolist()])

    def _row(self, row: int) -> Mask:
        height, width = self.sizes[row].tolist()
        masks = np.arange(self.owners[row], self.owners[row + 1])
        return Mask(height, width, [bytes(view) for view in _views(self.values, self.offsets, masks)])


Column = DenseColumn | RaggedColumn | TextColumn | PictureColumn | MaskColumn


def _views(values: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    starts, ends = offsets.take(rows).tolist(), offsets.take(rows + 1).tolist()
    return [values[start:end] for start, end in zip(starts, ends, strict=True)]


def column(array: pa.Array, field: Field, *, raw: bool = False) -> Column:
    """Returns an Arrow column as numpy views of the very same memory."""
    kind = type(field)
    if kind in _DENSE:
        flat = array.storage if isinstance(array, pa.ExtensionArray) else array
        values = np.frombuffer(flat.buffers()[-1], _DENSE[kind])
        return DenseColumn(values.reshape(-1, *_shape(field))[array.offset : array.offset + len(array)])
    if kind in _SIZED:
        sizes = np.stack([_numbers(array.field(name), np.int32) for name in ("height", "width")], axis=1)
        inner = array.field(2)
        if kind is ObjectMasks:
            return MaskColumn(*_bytes(inner.values), _offsets(inner), sizes)
        assert isinstance(field, Picture)
        return PictureColumn(*_bytes(inner), sizes, field.channels, kind is ClassMap, raw)
    if kind in _RAGGED:
        dtype, inner = _RAGGED[kind]
        data, offsets = array.buffers()[-1], _offsets(array)
        values = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
        return RaggedColumn(values.reshape(-1, *inner)[: offsets[-1]], offsets)
    return TextColumn(*_bytes(array))


def _offsets(array: pa.Array) -> np.ndarray:
    buffer = array.buffers()[1]
    return np.frombuffer(buffer, np.int64)[: len(array) + 1] if buffer else np.zeros(1, np.int64)


def _bytes(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes of strings or binaries one after another, and where each one begins."""
    data = array.buffers()[-1]
    return np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8), _offsets(array)


def _numbers(array: pa.Array, dtype: type) -> np.ndarray:
    return np.frombuffer(array.buffers()[-1], dtype)[: len(array)]


# ---- fields in a manifest


def field_to_json(field: Field) -> str:
    """A field as it stands in a manifest: what a reader must declare to read this column."""
    return repr(field)


def field_of_json(text: str) -> Field:
    """Returns the field that a manifest describes, by its kind and plain values; raises UserError for another text."""
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("is no field")
        kind = getattr(kinds, call.func.id)
        if kind not in {*_DENSE, *_RAGGED, *_SIZED, Text}:
            raise ValueError("is no kind of field")
        return kind(**{str(word.arg): ast.literal_eval(word.value) for word in call.keywords})
    except (SyntaxError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"a manifest describes a field that is not known: {text}", str(error)) from None
