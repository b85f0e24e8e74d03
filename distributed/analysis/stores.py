"""What lies in a store, and whether it is still what was written: for `whipray data show` and `data verify`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distributed import durable
from distributed.data.store import FORMAT, Store
from tasks.errors import UserError
from tasks.fields import Boxes, Field, Label, Labels, ObjectMasks, Picture, Text, Tokens

MANIFEST = "manifest.json"
SAMPLES, WIDTH = 3, 80  # rows and characters of the samples


@dataclass(frozen=True)
class Damage:
    """A shard that is not what was written, and the rows that it should hold."""

    file: str
    split: str
    first: int
    last: int
    problem: str

    def __str__(self) -> str:
        return f"{self.file} (rows {self.first}..{self.last} of {self.split}): {self.problem}"


# ---- verifying


def verify(path: Path) -> dict[str, Any]:
    """Checks every shard of a store against its checksum, and its Arrow content in full; returns what was checked.

    Raises UserError naming each damaged shard and its rows.
    """
    manifest = durable.read_manifest(path, (FORMAT,))
    shards = list(_shards(manifest))
    damages = [damage for shard in shards if (damage := _damage(path, manifest, *shard))]
    if damages:
        raise UserError(
            f"{path}: {len(damages)} of {len(shards)} shards are damaged: {'; '.join(map(str, damages))}",
            f"remove {path}; it is prepared again from the raw data",
        )
    durable.verify(path, manifest, checksums=False)  # and nothing lies there that does not belong to it
    store = Store(path)
    for split in manifest["splits"]:
        store.rows(split)
    return {
        "store": str(path), "shards": len(shards), "rows": sum(last - first + 1 for _, _, first, last in shards),
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
    }  # fmt: skip


def _shards(manifest: dict[str, Any]) -> Iterator[tuple[str, str, int, int]]:
    """Yields (file, split, first row, last row) of every shard."""
    for split, shards in manifest["splits"].items():
        first = 0
        for shard in shards:
            yield shard["file"], split, first, first + shard["rows"] - 1
            first += shard["rows"]


def _damage(path: Path, manifest: dict[str, Any], file: str, split: str, first: int, last: int) -> Damage | None:
    problem = _file_problem(path / file, manifest["files"].get(file)) or _arrow_problem(path / file, last - first + 1)
    return Damage(file, split, first, last, problem) if problem else None


def _file_problem(file: Path, entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "the manifest has no checksum for it"
    if not file.exists():
        return "is missing"
    size = file.stat().st_size
    if size != entry["bytes"]:
        return f"has {size} bytes instead of {entry['bytes']}"
    return "" if durable.checksum(file) == entry["crc32"] else "its checksum differs"


def _arrow_problem(file: Path, rows: int) -> str:
    try:
        batch = _batch(file)
        batch.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        return f"is no valid Arrow file: {str(error).splitlines()[0]}"
    return "" if batch.num_rows == rows else f"holds {batch.num_rows} rows instead of {rows}"


def _batch(file: Path) -> pa.RecordBatch:
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_file(source).get_batch(0)


# ---- showing


def describe(path: Path, samples: int = SAMPLES) -> dict[str, Any]:
    """Returns fields, rows, classes, sizes, facts in short, skipped rows and a few rows of a store."""
    store = Store(path)
    manifest = store.manifest
    return {
        "store": str(path), "fields": manifest["fields"],
        "splits": {split: _split(store, split) for split in manifest["splits"]}, "facts": _short(manifest["facts"]),
        "skipped": manifest["skipped"], "duplicates": manifest["duplicates"],
        "samples": _samples(path, manifest, samples),
    }  # fmt: skip


def _split(store: Store, split: str) -> dict[str, Any]:
    shards = store.manifest["splits"][split]
    batches = [_batch(store.path / shard["file"]) for shard in shards]
    return {
        "rows": sum(shard["rows"] for shard in shards),
        "bytes": sum(store.manifest["files"][shard["file"]]["bytes"] for shard in shards),
        "classes": balance(store, split),
        "sizes": {
            name: sizes for name, field in store.fields.items()
            if (sizes := _sizes(field, [batch.column(name) for batch in batches]))
        },
    }  # fmt: skip


def balance(store: Store, split: str) -> dict[str, dict[str, int]]:
    """Returns how often each class occurs in a split, of every column of labels or of lists of them."""
    batches = [_batch(store.path / shard["file"]) for shard in store.manifest["splits"][split]]
    fields = [name for name, field in store.fields.items() if isinstance(field, (Label, Labels))]
    return {
        name: _balance([b.column(name) for b in batches], store.facts.get(name, {}).get("classes")) for name in fields
    }


def _balance(columns: list[pa.Array], classes: list[str] | None) -> dict[str, int]:
    counts: dict[int, int] = {}
    for column in columns:
        flat = column.flatten() if isinstance(column, pa.LargeListArray) else column
        for one in flat.value_counts().to_pylist():
            counts[one["values"]] = counts.get(one["values"], 0) + one["counts"]
    names = dict(enumerate(classes or ()))
    return {names.get(number, str(number)): counts.get(number, 0) for number in sorted({*names, *counts})}


def _sizes(field: Field, columns: list[pa.Array]) -> dict[str, Any]:
    """Returns how large the rows of a column are that have no size of their own in its declaration."""
    if not sum(map(len, columns)):
        return {}
    if isinstance(field, Picture):
        sides = np.concatenate([np.stack([c.field("width"), c.field("height")], axis=1) for c in columns]).astype(int)
        order = np.argsort(sides.prod(1), kind="stable")
        places = {"smallest": 0, "median": len(order) // 2, "largest": -1}
        return {"of": "pixels", **{name: "x".join(map(str, sides[order[at]])) for name, at in places.items()}}
    if isinstance(field, ObjectMasks):
        return {"of": "masks", **_quantiles([column.field("counts").value_lengths() for column in columns])}
    if isinstance(field, (Tokens, Labels, Boxes)):
        kind = "tokens" if isinstance(field, Tokens) else "objects"
        return {"of": kind, **_quantiles([column.value_lengths() for column in columns])}
    if isinstance(field, Text):
        return {"of": "characters", **_quantiles([pc.call_function("utf8_length", [column]) for column in columns])}
    return {}


def _quantiles(counts: list[pa.Array]) -> dict[str, Any]:
    numbers = np.concatenate([count.to_numpy() for count in counts])
    shares = {"smallest": 0, "median": 0.5, "95 %": 0.95, "largest": 1}
    told = {name: int(np.quantile(numbers, share, method="nearest")) for name, share in shares.items()}
    return {**told, "in all": int(numbers.sum())}


def _samples(path: Path, manifest: dict[str, Any], count: int) -> list[dict[str, Any]]:
    shards = manifest["splits"].get("train") or next(iter(manifest["splits"].values()))
    batch = _batch(path / shards[0]["file"]).slice(0, count)
    classes = {field: facts.get("classes") for field, facts in manifest["facts"].items()}
    return [
        {name: _seen(batch.column(name)[row], classes.get(name)) for name in batch.schema.names}
        for row in range(batch.num_rows)
    ]  # fmt: skip


def _seen(scalar: Any, classes: list[str] | None) -> Any:
    """One value as a person looks at it: a class by name, the beginning of a long one, an array by its figures."""
    if isinstance(scalar.type, pa.FixedShapeTensorType):
        array = scalar.to_numpy()
        if array.size <= 16:
            return [float(f"{value:.4g}") for value in array.reshape(-1)]
        shape = "x".join(map(str, array.shape))
        return f"{array.dtype} {shape}: {array.min():.4g}..{array.max():.4g}, mean {array.mean():.4g}"
    if isinstance(scalar, pa.StructScalar):
        return _figures(scalar.as_py())
    value = scalar.as_py()
    if classes and isinstance(value, int) and value < len(classes):
        return classes[value]
    if isinstance(value, list):
        text = ", ".join(map(str, value[:10]))
        return f"{len(value)} values: {text}{' ...' if len(value) > 10 else ''}"
    return value if not isinstance(value, str) or len(value) <= WIDTH else f"{value[: WIDTH - 3]}..."


def _figures(value: dict[str, Any]) -> str:
    """The size of a picture, or the number of masks."""
    size = f"{value['width']}x{value['height']}"
    if "counts" in value:
        return f"{len(value['counts'])} masks of {size}"
    data = value["bytes"]
    kind = "JPEG" if data[:2] == b"\xff\xd8" else "PNG" if data[:4] == b"\x89PNG" else "pixels"
    return f"{kind} {size}, {len(data):,} bytes"


def _short(value: Any, most: int = 12) -> Any:
    """Facts without the long parts, such as a vocabulary."""
    if isinstance(value, dict):
        if len(value) > most:
            first = ", ".join(f"{key}: {entry}" for key, entry in list(value.items())[:3])
            return f"{len(value)} entries, such as {first}"
        return {key: _short(entry, most) for key, entry in value.items()}
    if isinstance(value, list) and len(value) > most:
        first = ", ".join(f"{one:.4g}" if isinstance(one, float) else str(one) for one in value[:3])
        return f"{len(value)} values, such as {first}"
    return value
