"""Stores made from stores: pictures reduced or decoded once, for all who train on them, keyed by what was done."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distributed import durable
from distributed.data import convert, schema, shards
from distributed.data.parts import Progress
from distributed.data.settings import Data
from distributed.data.store import FORMAT, Rows, Store
from distributed.processes import Mapper
from tasks.columns import Masks, Pictures
from tasks.errors import UserError
from tasks.fields import Boxes, ClassMap, Field, ObjectMasks, Picture

CHUNK = 64  # pictures that are made together


@dataclass(frozen=True)
class Wanted:
    """What becomes of the pictures."""

    decoded: bool  # bare pixels: mapped, they cost no decoding
    short_side: int | None  # pixels to which the shorter side of a larger picture is reduced

    @classmethod
    def of(cls, data: Data) -> "Wanted | None":
        """What a run's settings ask for; None where that is the store as it is."""
        wanted = cls(data.pictures == "decoded", data.short_side)
        return None if wanted == cls(False, None) else wanted


def derived(
    path: Path, wanted: Wanted, *, workers: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Path:  # fmt: skip
    """Returns the store that holds the pictures of the one at `path` as they are wanted, made now if it is not there.

    It lies beside its parent, and is made once, by whoever comes first; the others wait. Raises UserError for a store
    without pictures, and for boxes or masks, which would no longer fit pictures that are made smaller.
    """
    parent = Store(path)
    _refuse_unfit(parent, wanted)
    told = {"parent": path.name, "digest": durable.digest_of(parent.manifest), **wanted.__dict__}
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    target = path.with_name(f"{path.name}-{key}")
    if target.exists():
        return _checked(target)
    with convert.exclusively(target):
        if target.exists():
            return _checked(target)
        _make(parent, wanted, told, target, convert.on_this_machine(workers), progress)
    return target


def _checked(path: Path) -> Path:
    try:
        durable.verify(path, Store(path).manifest)
    except UserError as error:
        raise UserError(error.message, f"remove {path} and it is made again") from None
    return path


def _refuse_unfit(store: Store, wanted: Wanted) -> None:
    setting = "data.pictures=decoded" if wanted.decoded else f"data.short_side={wanted.short_side}"
    if not any(isinstance(field, Picture) for field in store.fields.values()):
        raise UserError(
            f"{setting}: the data hold no pictures of any size", "leave it out; an Image is decoded already"
        )
    placed = [name for name, field in store.fields.items() if isinstance(field, Boxes | ObjectMasks)]
    if wanted.short_side and placed:
        raise UserError(f"data.short_side={wanted.short_side}: '{placed[0]}' would no longer fit the smaller pictures",
                        "leave it out, and let the task scale pictures and boxes together")  # fmt: skip


def _make(
    parent: Store, wanted: Wanted, told: Mapping[str, Any], target: Path, mapper: Mapper, progress: Progress
) -> None:
    manifest = {name: parent.manifest[name] for name in ("facts", "fields", "skipped", "duplicates")}
    splits: dict[str, Any] = {}
    total = sum(parent.counts().values())
    whole = {"format": FORMAT, "splits": splits, "derived": dict(told), **manifest}
    with shards.publishing(target, whole) as folder:
        writer = shards.Shards(folder, schema.schema(parent.fields, raw=wanted.decoded))
        for done, made in enumerate(mapper.over(remade, (parent.path, wanted), _chunks(parent)), start=1):
            writer.take(made)
            progress("pictures", min(done * CHUNK, total), total)
        splits |= writer.finish()
        shards.seal(folder, splits)


def _chunks(store: Store) -> Iterator[tuple[str, str, int, int]]:
    for split in store.manifest["splits"]:
        for domain in store.domains(split) or [""]:
            rows = len(store.rows(split, domain=domain or None))
            yield from ((split, domain, start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK))


def remade(path: Path, wanted: Wanted, chunk: tuple[str, str, int, int]) -> bytes:
    """Returns rows of a store with their pictures as they are wanted, as an Arrow file."""
    split, domain, start, end = chunk
    store, rows, sources = _opened(path, split, domain)
    taken = rows.take(np.arange(start, end))
    columns = {name: _plain(taken[name], field, wanted) for name, field in store.fields.items()}
    made = [{name: values[i] for name, values in columns.items()} for i in range(end - start)]
    batch = schema.batch_of(made, store.fields, sources[start:end])
    return shards.batches_as_file(
        schema.schema(store.fields, raw=wanted.decoded), [batch], {"groups": [(split, domain)], "skipped": []}
    )


@functools.lru_cache(maxsize=4)
def _opened(path: Path, split: str, domain: str) -> tuple[Store, Rows, list[str]]:
    store = Store(path)
    return store, store.rows(split, domain=domain or None), store.sources(split, domain or None)


def of_rows(rows: Sequence[Mapping[str, Any]], fields: Mapping[str, Field], wanted: Wanted) -> list[dict[str, Any]]:
    """Returns checked rows, such as those to predict, with their pictures as a derived store would hold them."""
    made = [dict(row) for row in rows]
    for name, field in fields.items():
        if isinstance(field, Picture):
            for row in made:
                data, size = row[name]["bytes"], np.array([[row[name]["height"], row[name]["width"]]])
                one = Pictures([data], size, field.channels, isinstance(field, ClassMap))
                row[name] = _picture(one, 0, wanted)
    return made


def _plain(values: Any, field: Field, wanted: Wanted) -> Any:
    """One column of a few rows as `schema.batch_of` takes them, one entry a row."""
    if isinstance(values, Pictures):
        return [_picture(values, row, wanted) for row in range(len(values))]
    if isinstance(values, Masks):
        return [one._asdict() for one in values.rows]
    if isinstance(values, tuple):
        return np.split(values[0], np.cumsum(values[1])[:-1])
    return values


def _picture(pictures: Pictures, row: int, wanted: Wanted) -> dict[str, Any]:
    from tasks.formats.pictures import jpeg, png

    height, width = pictures.sizes[row].tolist()
    one = Pictures(pictures.data[row : row + 1], pictures.sizes[row : row + 1], pictures.channels, pictures.nearest)
    if wanted.short_side and min(height, width) > wanted.short_side:
        scale = wanted.short_side / min(height, width)
        pixels = one.resized((round(height * scale), round(width * scale)))[0]
    elif wanted.decoded:
        pixels = one.decoded()[0]
    else:
        return {"bytes": bytes(pictures.data[row]), "height": height, "width": width}
    array = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    if wanted.decoded:
        return {"bytes": array.tobytes(), "height": array.shape[0], "width": array.shape[1]}
    is_jpeg = bytes(pictures.data[row][:2]) == b"\xff\xd8"
    return (jpeg if is_jpeg else png)(array)
