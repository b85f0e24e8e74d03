"""Folders of pictures: a folder a class, below train, val and test where the source splits itself; or one flat folder.

Only names are looked at here; the pictures' content is the affair of `tasks/formats/pictures.py`.
"""

import logging
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tasks.errors import BadRow, UserError
from tasks.formats import pictures

log = logging.getLogger("whipray")

SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
JUNK = {"__macosx", "thumbs.db", "desktop.ini"}  # what macOS and Windows leave, in lower case
LAYOUT = "put the pictures of each class into a folder of its own, named like the class"
UNFOLLOWED = "put the files themselves there, or name the folder that holds them all"
Parts = tuple[str, ...]  # a path, seen from the folder that was named
Group = str | Callable[[str], str]


class Listed(NamedTuple):
    """A reference to one picture."""

    path: str  # absolute
    label: str  # the name of its class
    split: str | None = None  # train, validation or test where the source says so
    group: str | None = None


class _Tree(NamedTuple):
    folders: list[Parts]
    files: list[Parts]  # those whose names end as a picture's
    skipped: dict[str, list[str]]  # reason -> paths

    def below(self, folder: Parts) -> list[Parts]:
        return [one for one in self.folders if one[:-1] == folder]


def read(folder: Path, group: Group | None = None) -> list[Listed]:
    """Lists the pictures of a folder that holds a folder for each class, in the order of their paths.

    The class folders may lie in train, val (or valid, validation) and test, and all of it in one folder more; what is
    deeper in a class folder belongs to the class. `group` gets each picture's path, seen from `folder`, and says which
    belong together, such as those of a patient: a function, or a regular expression whose group `group`, else its
    first group, else its whole match counts. What is left out is told in a warning.

    Raises UserError for a class without pictures, fewer than two classes, two that differ in case only, one that
    validation or test alone have, and for what is not followed: links that lead outside or to a folder that was listed
    before, pipes, devices.
    """
    tree = _walked(folder)
    homes = _homes(folder, tree)
    classes = {one: _one_line(one[-1]) for home in homes for one in tree.below(home)}
    for one, name in classes.items():
        if name != one[-1]:
            log.warning("%s: the class folder %r is read as the class %r", folder, "/".join(one), name)
    _check(folder, homes, classes)
    found, filled = [], set()
    for parts in tree.files:
        here = next((parts[: len(home) + 1] for home in homes if parts[: len(home)] == home), ())
        if here not in classes:
            tree.skipped["in no class folder"].append("/".join(parts))
            continue
        filled.add(here)
        found.append(_listed(folder, parts, classes[here], homes[here[:-1]], group))
    for empty in sorted(classes.keys() - filled):
        raise UserError(f"{folder}: the class folder {'/'.join(empty)!r} holds no pictures", "fill or remove it")
    _tell(folder, tree.skipped)
    return found


def flat(folder: Path, pattern: str = r"(?P<label>.+)_\d+", group: Group | None = None) -> list[Listed]:
    """Lists the pictures of one folder whose names tell their class, in the order of their names.

    `pattern` is a regular expression that a whole name must match, without its ending; its group `label` is the class:
    `cat_12.png` is a `cat`. Raises UserError where no name matches, and like `read`.
    """
    if "label" not in _compiled(pattern).groupindex:
        raise UserError(f"the pattern '{pattern}' has no group 'label'", r"write (?P<label>.+) for the class")
    tree = _walked(folder)
    found, names = [], {}
    for parts in tree.files:
        match = _compiled(pattern).fullmatch(Path(parts[0]).stem)
        if len(parts) > 1 or not match:
            reason = "in deeper folders" if len(parts) > 1 else f"whose names do not match '{pattern}'"
            tree.skipped[reason].append("/".join(parts))
            continue
        label = _one_line(match["label"])
        names[(label,)] = label
        found.append(_listed(folder, parts, label, None, group))
    if not found:
        raise UserError(f"{folder}: no picture has a name that matches '{pattern}'", "check the pattern and the folder")
    _check(folder, {(): None}, names)
    _tell(folder, tree.skipped)
    return found


def path_of(listed: Listed) -> Path:
    """Returns where a picture lies; raises BadRow where that is no text that UTF-8 can hold."""
    try:
        listed.path.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{listed.path!a}: the name is not UTF-8") from None
    return Path(listed.path)


# ---- listing


def _walked(folder: Path) -> _Tree:
    """Lists all that lies below a folder and is not left out; raises UserError for what cannot be followed."""
    tree = _Tree([], [], defaultdict(list))
    waiting: list[Parts] = [()]
    seen = set()
    while waiting:
        here = waiting.pop()
        path = folder.joinpath(*here)
        try:
            status = path.stat()
            if (status.st_dev, status.st_ino) in seen:
                raise UserError(f"{path}: leads to a folder that was listed before", UNFOLLOWED)
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    kind = _kind(folder, entry)
                    if kind == "folder":
                        tree.folders.append((*here, entry.name))
                        waiting.append((*here, entry.name))
                    elif kind == "picture":
                        tree.files.append((*here, entry.name))
                    else:
                        tree.skipped[kind].append("/".join((*here, entry.name)))
        except OSError as error:
            raise UserError(f"{path}: cannot be listed: {error.strerror}", "check the path and its rights") from error
    tree.folders.sort()
    tree.files.sort()
    return tree


def _kind(folder: Path, entry: os.DirEntry[str]) -> str:
    """Returns "folder", "picture" or why an entry is left out."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.name.casefold() in JUNK:
        return "of the operating system"
    if entry.is_symlink():
        try:
            target = Path(entry.path).resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: a link that leads to itself
            raise UserError(f"{entry.path}: is a link that leads nowhere", UNFOLLOWED) from None
        if not target.is_relative_to(folder.resolve()):
            raise UserError(f"{entry.path}: is a link out of the folder, to {target}", UNFOLLOWED)
    if entry.is_dir():
        return "folder"
    if not entry.is_file():
        raise UserError(f"{entry.path}: is a pipe, a socket or a device", "a folder of pictures holds plain files")
    return "picture" if Path(entry.name).suffix.lower() in pictures.SUFFIXES else "that are no pictures by their names"


def _listed(folder: Path, parts: Parts, label: str, split: str | None, group: Group | None) -> Listed:
    path = "/".join(parts)
    return Listed(str(folder.absolute() / path), label, split, None if group is None else _group(folder, path, group))


def _group(folder: Path, path: str, group: Group) -> str:
    if not isinstance(group, str):
        return group(path)
    match = _compiled(group).search(path)
    if match is None:
        raise UserError(f"{folder / path}: the pattern '{group}' finds no group in its path", "correct the pattern")
    found = match["group"] if "group" in match.re.groupindex else match[min(match.re.groups, 1)]
    return (found or "").encode(errors="backslashreplace").decode()


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)  # which remembers what it compiled
    except re.error as error:
        raise UserError(f"the pattern '{pattern}' is no regular expression: {error}", "see Python's re") from None


def _tell(folder: Path, skipped: dict[str, list[str]]) -> None:
    if skipped:
        told = [f"{len(paths)} {reason} (such as {min(paths)!r})" for reason, paths in sorted(skipped.items())]
        log.warning("%s: left out %s", folder, "; ".join(told))


# ---- classes and splits


def _homes(folder: Path, tree: _Tree) -> dict[Parts, str | None]:
    """Returns the folders that hold the class folders, and the split of each one."""
    inner = ()
    while len(tree.below(inner)) == 1:  # a folder in a folder, as archives have it
        [only] = tree.below(inner)
        if not tree.below(only) or any(parts[:-1] in (inner, only) for parts in tree.files):
            break
        inner = only
    splits = {one: SPLITS[one[-1].casefold()] for one in tree.below(inner) if one[-1].casefold() in SPLITS}
    others = [one for one in tree.below(inner) if one not in splits]
    if not splits or (others and len(splits) == 1):  # a class may be called `train`
        return {inner: None}
    names = ", ".join(one[-1] for one in splits)
    if others:
        raise UserError(f"{folder}: beside {names} there is {others[0][-1]!r}", "keep splits and classes apart")
    if "train" not in splits.values() or len(set(splits.values())) < len(splits):
        raise UserError(f"{folder}: its splits are {names}", "expected are train, and at most one val and one test")
    return dict(splits)


def _one_line(name: str) -> str:
    """Returns a name without line ends and the like, in the composed form of its letters (macOS takes them apart)."""
    name = unicodedata.normalize("NFC", name)
    return " ".join("".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else " " for c in name).split())


def _check(folder: Path, homes: dict[Parts, str | None], classes: dict[Parts, str]) -> None:
    for home in homes:
        if not any(one[:-1] == home for one in classes):
            raise UserError(f"{folder.joinpath(*home)}: holds no class folders", LAYOUT)
    seen: dict[tuple[Parts, str], Parts] = {}
    spelt: dict[str, str] = {}
    for one, name in classes.items():
        same = seen.setdefault((one[:-1], name), one) != one
        if same or spelt.setdefault(name.casefold(), name) != name:
            raise UserError(f"{folder}: two classes are called {name!r} and {spelt[name.casefold()]!r}", "rename one")
    learned = {name for one, name in classes.items() if homes[one[:-1]] in ("train", None)}
    for one, name in classes.items():
        if name not in learned:
            raise UserError(
                f"{folder}: the class {name!r} is in {one[-2]} and not in train",
                "give train pictures of it, or take it out",
            )
    if len(set(classes.values())) < 2:
        raise UserError(f"{folder}: has one class only, {next(iter(classes.values()))!r}", f"{LAYOUT}: two or more")
