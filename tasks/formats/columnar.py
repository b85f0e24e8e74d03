"""Tables in columns: Parquet, Arrow IPC and Feather files, folders of them, and data sets of Hugging Face `datasets`.

Files are told by their content, not by their names. They are read batch by batch, and each batch is validated in
full before it is used: Arrow's own code trusts offsets and indices.
"""

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from tasks.errors import UserError, did_you_mean

SUFFIXES = {".parquet", ".pq", ".arrow", ".feather", ".ipc"}
ROWS = 256  # that are Python values at a time: of pictures, some 30 MB
# Words in names of files and folders, as `datasets` reads them (its page "Structure your repository").
SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")
_NUMBERED = re.compile(r"(.*-)?(\d{5})-of-(\d{5})(.*)")
# Extension types that are nothing but a name for what they are stored as. Any other could mean anything.
_KNOWN = re.compile(r"datasets\.features\.features\.Array[2-5]DExtensionType|arrow\.fixed_shape_tensor|arrow\.json")
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream (Arrow columnar format, "IPC streaming format")
BROKEN = "download or write the file again; a broken or partial download is the usual cause"


def rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Yields (split, row) of a file or folder, with all columns or those named; the split as its name says, or None.

    Values are plain Python ones, None where there is none, and numpy arrays for fixed-shape tensors. What `datasets`
    calls Image or Audio is the bytes of the file; None where only a path is kept, for it leads to another machine.
    Raises UserError naming the file for a broken one, an extension type that is not known, a column or a shard that
    is not there, and, where no columns are named, files that differ in theirs.
    """
    found, known = files(path), None
    for split, file in found:
        with _opened(file) as (source, kind, schema):
            known = known or set(schema.names)
            odd = sorted(known ^ set(schema.names))
            if columns is None and odd:
                raise UserError(f"{file}: it or {found[0][1]} has no column '{odd[0]}'", "name the columns to read")
            for name in columns or ():
                _refuse_absent(file, name, schema.names)
            wanted = list(dict.fromkeys(schema.names if columns is None else columns))
            for batch in _batches(file, source, kind, [schema.names.index(name) for name in wanted]):
                batch.validate(full=True)
                for start in range(0, batch.num_rows, ROWS):
                    part = batch.slice(start, ROWS)
                    for values in zip(*(_values(part.column(name)) for name in wanted), strict=True):
                        yield split, dict(zip(wanted, values, strict=True))


def class_names(path: Path, column: str) -> list[str]:
    """Returns the names of a ClassLabel's numbers, as `datasets` writes them into a file's metadata; [] without them.

    Raises UserError where the column is not there, or the metadata are broken.
    """
    _, file = files(path)[0]
    with _opened(file) as (_, _, schema):
        _refuse_absent(file, column, schema.names)
    try:
        feature = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        for name in ("info", "features", column):
            feature = feature.get(name, {})
        feature = feature.get("feature", feature)  # of a list of classes
        names = feature.get("names", [])
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: its metadata of `datasets` are broken: {error}", BROKEN) from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise UserError(f"{file}: the classes of '{column}' are no list of different names", BROKEN)
    return names


def files(path: Path) -> list[tuple[str | None, Path]]:
    """Returns (split, file) for each file of a data set, in order.

    A folder is one that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has written, or any with such files
    below it; hidden files, and those whose name begins with `_` or `cache-`, are no part of it. Raises UserError
    where there are none, where a shard of those that are numbered `-00000-of-00002` is not there, and for columns
    that are names of folders.
    """
    if not path.is_dir():
        return [(split_of(PurePath(path.name)), _regular(path))]
    saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    found = list(_saved(path) if saved else _below(path))
    if not found:
        raise UserError(f"{path}: holds no {', '.join(sorted(SUFFIXES))} files", "name a file, or a folder of them")
    _refuse_gaps(found)
    return [(split_of(file.relative_to(path)), _regular(file)) for file in found]


def split_of(path: PurePath) -> str | None:
    """Returns train, validation or test where the name of a file, or else of a folder that it lies in, says so."""
    for part in reversed(path.parts):
        words = _WORD.findall(part.lower())
        if words:
            return SPLITS[words[-1]]  # the last: test-suite-train-00000-of-00001.parquet
    return None


# ---- folders


def _below(path: Path) -> Iterator[Path]:
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        hidden = any(part.startswith((".", "_")) for part in inside.parts) or file.name.startswith("cache-")
        if file.suffix.lower() not in SUFFIXES or hidden or file.is_dir():
            continue
        if any("=" in part for part in inside.parts[:-1]):
            raise UserError(f"{file}: a folder is named like a column and its value", "write it into the files")
        yield file


def _saved(path: Path) -> Iterator[Path]:
    """What `save_to_disk` says that it wrote: leftovers of `map` lie beside it."""
    if (path / "dataset_dict.json").exists():
        for split in _list_in(path / "dataset_dict.json", "splits"):
            yield from _saved(path / _name(path / "dataset_dict.json", split))
        return
    state = path / "state.json"
    for entry in _list_in(state, "_data_files"):
        yield path / _name(state, entry.get("filename") if isinstance(entry, dict) else None)


def _list_in(file: Path, key: str) -> list[Any]:
    try:
        found = json.loads(file.read_bytes())[key]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is not what `datasets` writes: {error!r}", BROKEN) from None
    if not isinstance(found, list) or not found:
        raise UserError(f"{file}: '{key}' is no list, or empty", BROKEN)
    return found


def _name(file: Path, name: Any) -> str:
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
        raise UserError(f"{file}: names {name!r}, which is no file or folder beside it", BROKEN)
    return name


def _refuse_gaps(found: list[Path]) -> None:
    """Raises UserError where one of N numbered shards is not there: rows would be lost without a word."""
    there: dict[tuple[Any, ...], set[int]] = defaultdict(set)
    for file in found:
        numbered = _NUMBERED.fullmatch(file.name)
        if numbered:
            before, number, count, after = numbered.groups()
            there[file.parent, before or "", int(count), after].add(int(number))
    for (folder, before, count, after), numbers in there.items():
        missing = sorted(set(range(count)) - numbers)
        if missing:
            name = f"{before}{missing[0]:05d}-of-{count:05d}{after}"
            raise UserError(f"{folder}: of {count} shards {len(missing)} are missing, such as {name}", BROKEN)


def _regular(file: Path) -> Path:
    if not file.is_file():
        raise UserError(f"{file}: no such file", "check the path; a data set consists of plain files")
    return file


# ---- files


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[pa.NativeFile, str, pa.Schema]]:
    """Opens a file and tells its kind and schema; what Arrow says of a broken one becomes a UserError."""
    try:
        with pa.OSFile(str(path)) as file:  # no memory map: a file that becomes shorter would kill the process
            begin = file.read(8)
            kinds = {b"PAR1": "parquet", b"ARROW1": "file", b"\xff\xff\xff\xff": "stream"}
            kind = next((kind for mark, kind in kinds.items() if begin.startswith(mark)), "")
            if not kind:
                hint = "it is Feather 1, which is no longer read: write Feather 2" if begin[:4] == b"FEA1" else BROKEN
                raise UserError(f"{path}: is neither Parquet nor Arrow: it begins with {begin!r}", hint)
            schema = parquet.read_schema(file) if kind == "parquet" else _reader(file, kind).schema
            twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
            if twice is not None:
                raise UserError(f"{path}: two columns are called '{twice}'", "give each column its own name")
            for field in schema:
                _refuse_extensions(path, field)
            yield file, kind, schema
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: dates of no calendar
        raise UserError(f"{path}: cannot be read: {str(error)[:300] or type(error).__name__}", BROKEN) from error


def _batches(path: Path, file: pa.NativeFile, kind: str, fields: list[int]) -> Iterator[pa.RecordBatch]:
    """Yields the batches of a file with the columns of these numbers."""
    if kind == "parquet":
        file.seek(0)
        table = parquet.ParquetFile(file, page_checksum_verification=True)
        yield from table.iter_batches(ROWS, columns=[table.schema_arrow.names[number] for number in fields])
        return
    reader = _reader(file, kind, fields)
    if kind == "file":
        yield from map(reader.get_batch, range(reader.num_record_batches))
        return
    yield from reader
    # The reader takes the end of the file for the end of the stream: a lost batch would go unnoticed.
    file.seek(file.size() - len(_END))
    if file.read() != _END:
        raise UserError(f"{path}: is truncated: it has no end mark", BROKEN)


def _reader(file: pa.NativeFile, kind: str, fields: list[int] | None = None) -> Any:
    file.seek(0)
    opened = pa.ipc.open_stream if kind == "stream" else pa.ipc.open_file
    return opened(file, options=pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False))


def _refuse_absent(path: Path, column: str, names: list[str]) -> None:
    if column not in names:
        raise UserError(f"{path}: no column '{column}'", did_you_mean(column, names) or "check its name")


def _refuse_extensions(path: Path, field: pa.Field) -> None:
    named = (field.metadata or {}).get(b"ARROW:extension:name", b"").decode(errors="replace")
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType):
        named, kind = kind.extension_name, kind.storage_type
    if named and not _KNOWN.fullmatch(named):
        raise UserError(f"{path}: column '{field.name}' has the unknown type '{named[:80]}'", "store a plain type")
    for number in range(kind.num_fields):
        _refuse_extensions(path, kind.field(number))


def _values(column: pa.Array) -> list[Any]:
    if isinstance(column, pa.FixedShapeTensorArray):
        return [one.to_numpy() if one.is_valid else None for one in column]
    if isinstance(column, pa.ExtensionArray):
        return _values(column.storage)
    if _is_media(column.type):
        return [one and one["bytes"] for one in column.to_pylist()]
    if pa.types.is_list(column.type) and _is_media(column.type.value_type):
        return [many and [one and one["bytes"] for one in many] for many in column.to_pylist()]
    return column.to_pylist()


def _is_media(kind: pa.DataType) -> bool:
    """Whether this is how `datasets` keeps a picture or a sound: struct<bytes, path>."""
    return pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}
