"""What a user wants predicted, read by the kind of the task's one input: pictures, lines of text, rows of numbers."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.errors import BadRow, UserError
from tasks.fields import Field, Image, Picture, Text, Tokens, Vector
from tasks.formats import pictures, table


def read(path: Path, fields: Mapping[str, Field]) -> Iterator[dict[str, Any]]:
    """Yields rows with the one input of `fields` and no target. Raises UserError where the file does not fit.

    An Image or a Picture is a picture file, or a folder of them in the order of their names; Text and Tokens are the
    lines of a text file, blank ones left out; a Vector is a line of a CSV file, below an optional line of names.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder", "name what is to be predicted")
    if len(fields) == 1:
        [(name, field)] = fields.items()
        if isinstance(field, Image | Picture):
            return _pictures(path, name, field)
        if isinstance(field, Text | Tokens):
            return ({name: line} for line in lines(path))
        if isinstance(field, Vector):
            return _vectors(path, name, field)
    raise UserError(
        f"{path}: it is not obvious how a file holds {' and '.join(fields) or 'no input'}",
        "define inputs(self, path) in the task",
    )


def lines(path: Path, encoding: str = "utf-8") -> list[str]:
    """Returns the lines of a text file without the blank ones; raises UserError where there are none."""
    found = [line.strip() for line in table.text(path, encoding).splitlines()]
    found = [line for line in found if line]
    if not found:
        raise UserError(f"{path}: holds no text", "write one input a line")
    return found


def _pictures(path: Path, name: str, field: Image | Picture) -> Iterator[dict[str, Any]]:
    files = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith(".")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: holds no pictures", f"put {', '.join(sorted(pictures.SUFFIXES))} files there")
    for file in files:
        try:
            if isinstance(field, Picture):
                yield {name: pictures.normalised(file, field.channels)}
            else:
                yield {name: pictures.read(file, *field.shape)}
        except BadRow as error:
            raise UserError(f"{file}: {error}", "give a picture file, or a folder that holds nothing else") from error


def _vectors(path: Path, name: str, field: Vector) -> Iterator[dict[str, Any]]:
    for position, (line, cells) in enumerate(table.rows(path)):
        if position == 0 and not any(map(table.is_number, cells)):
            continue  # the names of the columns
        if len(cells) != field.length:
            raise UserError(f"{path}, line {line}: expected {field.length} numbers, got {len(cells)}", "one row a line")
        try:
            yield {name: table.numbers(cells, f"{path}, line {line}")}
        except BadRow as error:
            raise UserError(str(error), "a row to predict must be complete") from error
