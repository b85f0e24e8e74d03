"""Sentences and their translations: a file of tab-separated pairs, or two files that are aligned line by line."""

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tasks.errors import BadRow, UserError
from tasks.formats import table


class Pair(NamedTuple):
    """A sentence and its translation, as they stand in line `line` of their file; counted from 1."""

    line: int
    source: str
    target: str


def tabbed(path: Path, *, columns: tuple[int, int] = (1, 2), encoding: str = "utf-8") -> Iterator[Pair]:
    """Yields the pairs of a file with one pair a line, empty lines left out and further columns ignored.

    `columns` are those of source and target, counted from 1: (1, 2) as manythings.org has them, (2, 4) in the sentence
    pairs of Tatoeba, (2, 1) for the other direction. Raises UserError for a line with too few columns, for no pairs
    at all, and like `table.text`.
    """
    source, target = columns
    if source == target or min(columns) < 1:
        raise UserError(f"columns {source} and {target} are no pair", "columns count from 1, and the two must differ")
    found = False
    for line, content in _lines(path, encoding):
        if not content.strip():
            continue
        cells = content.split("\t")
        if len(cells) < max(columns):
            raise UserError(
                f"{path}, line {line}: expected at least {max(columns)} columns, got {len(cells)}",
                "put a tab between a sentence and its translation",
            )
        found = True
        yield Pair(line, cells[source - 1].strip(), cells[target - 1].strip())
    if not found:
        raise UserError(f"{path}: holds no pairs", "write a sentence, a tab and its translation in each line")


def aligned(source: Path, target: Path, *, encoding: str = "utf-8") -> Iterator[Pair]:
    """Yields line n of `source` with line n of `target`.

    Raises UserError where the two have different numbers of lines, or none, and like `table.text`.
    """
    ours, theirs = list(_lines(source, encoding)), list(_lines(target, encoding))
    if len(ours) != len(theirs):
        raise UserError(
            f"{source} has {len(ours)} lines, {target} has {len(theirs)}",
            "line n of one must translate line n of the other",
        )
    if not ours:
        raise UserError(f"{source}: holds no lines", "write one sentence a line")
    for (line, sentence), (_, translation) in zip(ours, theirs, strict=True):
        yield Pair(line, sentence.strip(), translation.strip())


def checked(pair: Pair, path: Path | str) -> Pair:
    """Returns a pair that can be learned; raises BadRow, naming `path`, for an empty side or a control character."""
    for side in ("source", "target"):
        sentence = getattr(pair, side)
        if not sentence:
            raise BadRow(f"{path}, line {pair.line}: the {side} is empty")
        odd = control_character(sentence)
        if odd:
            raise BadRow(f"{path}, line {pair.line}: the {side} holds the control character {odd}")
    return pair


def control_character(text: str) -> str:
    """Returns the first control character of a text as "U+0007", "" where there is none.

    They are what is left of a wrong encoding or a broken conversion, and no part of any language.
    """
    return next((f"U+{ord(one):04X}" for one in text if unicodedata.category(one) == "Cc"), "")


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """Numbers the lines of a text, whose ends are LF, CR LF, or CR alone.

    `str.splitlines` also breaks at U+2028, U+0085 and others, which stand inside sentences: the two sides of a
    corpus would no longer be aligned.
    """
    text = table.text(path, encoding)
    end = "\n" if "\n" in text else "\r"
    lines = text.removesuffix(end).split(end) if text else []
    return enumerate((line.removesuffix("\r") for line in lines), 1)
