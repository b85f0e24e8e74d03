"""Pictures of words and their labels, listed in a text file: `path label` line by line, with a tab, a space or ICDAR's
comma and quotes between them.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from tasks.errors import BadRow, UserError
from tasks.formats import pairs, pictures, table

NAMES = ("gt.txt", "labels.txt")  # what the list is called, where only its folder is given
# A path may hold spaces too: it ends where the first suffix of a picture does.
_SPACED = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, sorted(pictures.SUFFIXES)))}))(?:\s+(.*))?", re.IGNORECASE)
# ICDAR 2013 and 2015, task "word recognition": word_1.png, "JOINT"; a quote or backslash inside has a backslash before.
_ICDAR = re.compile(r'(.+?),\s*"((?:[^"\\]|\\.)*)"')


class Word(NamedTuple):
    """One line of a list: a picture's path, relative to the list's folder, and what is written on the picture."""

    path: str
    label: str
    line: int


def words(path: Path, *, encoding: str = "utf-8") -> Iterator[Word]:
    """Yields the lines of a list, empty ones left out; `path` is the list, or a folder that holds gt.txt or labels.txt.

    The label is the rest of the line, spaces and quotes included. Raises UserError naming the line for one that
    names no picture and for a path that leaves the list's folder; for a list without lines; and like `table.text`.
    """
    path, found = list_of(path), False
    for line, content in enumerate(re.split(r"\r\n|\n|\r", table.text(path, encoding)), 1):
        content = content.strip()
        if not content:
            continue
        picture, label = _parsed(content, f"{path}, line {line}")
        _inside(picture, f"{path}, line {line}")
        found = True
        yield Word(picture, label, line)
    if not found:
        raise UserError(f"{path}: lists no pictures", "write a picture's path and its label in each line")


def read(path: Path, word: Word) -> tuple[Path, str]:
    """Returns where the picture of a word lies, and its label; `path` is what was given to `words`.

    Raises BadRow for an empty label, one with a control character, and a picture that is not there; UserError for a
    link that leads out of the list's folder.
    """
    path = list_of(path)
    place = f"{path}, line {word.line}"
    if not word.label:
        raise BadRow(f"{place}: the label of {word.path} is empty")
    odd = pairs.control_character(word.label)
    if odd:
        raise BadRow(f"{place}: the label of {word.path} holds the control character {odd}")
    picture = path.parent / word.path
    try:
        there = picture.is_file()  # false for a loop of links, which could not be resolved
    except OSError as error:  # a name too long, a folder that may not be entered
        raise BadRow(f"{place}: {word.path[:80]} cannot be read: {error.strerror}") from None
    if not there:
        raise BadRow(f"{place}: no such picture: {word.path}")
    if not picture.resolve().is_relative_to(path.parent.resolve()):
        raise UserError(f"{place}: {word.path} is a link out of {path.parent}", "put the pictures beside their list")
    return picture, word.label


def list_of(path: Path) -> Path:
    """Returns the list itself where a folder is given."""
    if not path.is_dir():
        return path
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path}: holds no {' or '.join(NAMES)}", "name the file that lists the pictures and their labels")


def _parsed(content: str, place: str) -> tuple[str, str]:
    """Returns path and label of a line; the label may be empty."""
    quoted = _ICDAR.fullmatch(content)
    if quoted:
        return quoted[1].strip(), re.sub(r"\\(.)", r"\1", quoted[2]).strip()
    picture, tab, label = content.partition("\t")
    if tab:
        return picture.strip(), label.strip()
    spaced = _SPACED.fullmatch(content)
    if not spaced:
        raise UserError(
            f"{place}: expected the path of a picture and its label, got '{content[:80]}'",
            "put a tab between them, or write a path that ends as pictures do: word_1.png label",
        )
    return spaced[1], spaced[2] or ""


def _inside(picture: str, place: str) -> None:
    """Raises UserError for a path that leads out of the folder on this or another system."""
    windows = PureWindowsPath(picture)  # knows both kinds of slash
    if not picture or windows.drive or windows.root or ".." in windows.parts or PurePosixPath(picture).is_absolute():
        raise UserError(
            f"{place}: the path '{picture[:80]}' is not one inside the list's folder",
            "write paths relative to the list, such as train/word_1.png",
        )
