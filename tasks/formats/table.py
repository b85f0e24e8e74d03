"""Delimited text: CSV and TSV, plain or gzipped, with a checked encoding and a fixed number of columns."""

import codecs
import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tasks.errors import BadRow, UserError

MAX_BYTES = 2**31  # of text, unpacked: a table is read whole, and a small .gz may unpack to a thousand times its size
MISSING = {"", "na", "n/a", "nan", "null", "none", "?"}  # how tables say that a number is not known, in lower case


def text(path: Path, encoding: str = "utf-8") -> str:
    """Reads a whole text file; a byte order mark decides over `encoding`. Raises UserError naming file and line."""
    raw = _content(path)
    for mark, marked in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if raw.startswith(mark):
            raw, encoding = raw[len(mark) :], marked
    try:
        decoded = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: is not {encoding}: byte 0x{raw[error.start]:02x} at column "
            f"{error.start - raw.rfind(bytes([10]), 0, error.start)}",
            "say which encoding it is, such as task.source.encoding=gb18030, or save the file as UTF-8",
        ) from None
    except LookupError:
        raise UserError(f"unknown encoding '{encoding}'", "usual ones are utf-8, gb18030, utf-16, latin-1") from None
    if "\0" in decoded:
        line = decoded[: decoded.index("\0")].count("\n") + 1
        raise UserError(
            f"{path}, line {line}: holds a NUL character", "this is no text file, or one of another encoding"
        )
    return decoded


def _content(path: Path) -> bytes:
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a file", "name the file itself")
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as packed:
            raw = packed.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "check the path") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path}: cannot be read: {reason}", "a broken download is the usual cause") from error
    if len(raw) > MAX_BYTES:
        raise UserError(f"{path}: unpacks to over {MAX_BYTES} bytes", "unpack it and split it into smaller files")
    return raw


def rows(
    path: Path, *, columns: int | None = None, delimiter: str = "", encoding: str = "utf-8", quotes: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, cells) for each line of a table, empty lines left out.

    An empty `delimiter` means a tab in a .tsv file, a comma in others. With `quotes=False` a quote is a character like
    any other. Raises UserError naming the line for a row with another number of cells than `columns` (than the first
    row where None), an unclosed quote, or a cell over 131,072 characters; and where there are no rows at all.
    """
    delimiter = delimiter.replace("\\t", "\t") or ("\t" if ".tsv" in path.suffixes else ",")
    if len(delimiter) != 1:
        raise UserError(
            f"the delimiter '{delimiter}' has {len(delimiter)} characters", "name the one between the cells"
        )
    lines = io.StringIO(text(path, encoding), newline="")
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=quoting)
    found = False
    try:
        for cells in reader:
            if not cells:
                continue
            columns = columns or len(cells)
            if len(cells) != columns:
                raise UserError(
                    f"{path}, line {reader.line_num}: expected {columns} cells, got {len(cells)}",
                    "give every row the same number of cells; put quotes around text that holds the delimiter",
                )
            found = True
            yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}", "check the quotes of this line") from error
    if not found:
        raise UserError(f"{path}: is empty", "a table has one row a line")


def records(
    path: Path, needed: Sequence[str], *, delimiter: str = "", encoding: str = "utf-8", quotes: bool = True
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, cells by column) for each row below the header, which the first line is.

    Raises UserError where a needed column is not there, two have one name, or no row follows; and like `rows`.
    """
    lines = rows(path, delimiter=delimiter, encoding=encoding, quotes=quotes)
    _, first = next(lines)
    header = [name.strip() for name in first]
    if all(map(is_number, header)):
        raise UserError(f"{path}: the first line holds numbers", "the first line must name the columns")
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise UserError(f"{path}: two columns are called '{doubled[0]}'", "give each column its own name")
    missing = [name for name in needed if name not in header]
    if missing:
        raise UserError(
            f"{path}: no column '{missing[0]}'; the first line names {', '.join(header)[:300]}",
            "name the columns in the first line, or say which is meant in task.source.*",
        )
    found = False
    for line, cells in lines:
        found = True
        yield line, dict(zip(header, cells, strict=True))
    if not found:
        raise UserError(f"{path}: holds no rows, only the names of columns", "add rows, or check the path")


def is_number(cell: str) -> bool:
    """Whether a cell is a number, NaN and infinity included."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


def number(cell: str, place: str) -> float:
    """Reads one finite number.

    Raises BadRow for a missing value, NaN or infinity, which a row may have; UserError beginning with `place` for
    text, which means that the column is no column of numbers.
    """
    cell = cell.strip()
    if cell.lower() in MISSING:
        raise BadRow(f"{place}: the number is missing ('{cell}')")
    try:
        value = float(cell.replace("_", "?"))  # Python would read 1_000
    except ValueError:
        comma = cell.count(",") == 1 and cell.replace(",", "").lstrip("+-").isdigit()
        hint = "write a decimal point instead of a comma" if comma else "only numbers may stand in this column"
        raise UserError(f"{place}: expected a number, got '{cell[:40]}'", hint) from None
    if not math.isfinite(value):
        raise BadRow(f"{place}: expected a finite number, got '{cell}'")
    return value


def numbers(cells: Sequence[str], place: str) -> list[float]:
    """Reads finite numbers; raises like `number`, naming the column by its position."""
    return [number(cell, f"{place}, column {column}") for column, cell in enumerate(cells, 1)]
