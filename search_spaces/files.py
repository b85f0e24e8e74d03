"""Reads search spaces from YAML files, those beside this file by name, and says file and line of what is wrong.

Stricter than `yaml.safe_load`: no repeated keys, no tags, caps on size, depth and aliases. Unquoted `1e-4` is the
number it looks like (YAML 1.1 takes it for a string).
"""

import re
from pathlib import Path
from typing import Any

import yaml

from search_spaces.dimensions import SpaceError, nearest, shown
from search_spaces.space import Space, space_of

HERE = Path(__file__).parent
MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
MAX_ALIASES = 100
MAX_VALUES = 10_000  # after aliases are written out
NAME = r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*"
PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}


def for_task(task: str) -> Space:
    """Returns the search space of a task: the one of its name, else the default one."""
    own = HERE / f"{task}.yaml"
    known = len(task) < 100 and re.fullmatch(NAME, task) and own.is_file()
    return load(own if known else HERE / "default.yaml")


def load(path_or_name: str | Path) -> Space:
    """Returns the space of a YAML file, or of `search_spaces/NAME.yaml`; raises SpaceError with file and line."""
    path = find(path_or_name)
    place = str(path.relative_to(HERE.parent)) if path.is_relative_to(HERE) else str(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpaceError(f"cannot read the search space {place}: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise SpaceError(f"the search space {place} is larger than {MAX_BYTES // 1024} KiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise SpaceError(f"{place}:{line}: not UTF-8 text", "save the file as UTF-8") from None
    data, origins = read(text, place)
    return space_of(data, path.stem, origins)


def find(path_or_name: str | Path) -> Path:
    """Returns the file that is meant: a file of that path, else one of ours of that name."""
    path = Path(path_or_name)
    name = str(path_or_name)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            raise SpaceError(f"the search space {shown(name)} is a folder", "name a YAML file in it")
    except OSError:  # a name that no file can have: too long
        pass
    if len(name) < 100 and re.fullmatch(NAME, name) and (HERE / f"{name}.yaml").is_file():
        return HERE / f"{name}.yaml"
    ours = sorted(str(file.relative_to(HERE).with_suffix("")) for file in HERE.rglob("*.yaml"))
    raise SpaceError(f"there is no search space {shown(name)}, as a file or in search_spaces", nearest(name, ours))


def read(text: str, place: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the mapping that a YAML text holds, and the origin of each of its top keys."""
    try:
        loader = Loader(text)
        root = loader.get_single_node()
        if root is None:
            raise SpaceError(f"the search space {place} is empty", "see search_spaces/default.yaml for an example")
        if not isinstance(root, yaml.MappingNode):
            raise NodeError("a search space maps settings to ranges", root)
        data = plain_data(loader, root)
        origins = {key.value: f"{place}:{key.start_mark.line + 1}" for key, _ in root.value}
        return data, origins
    except NodeError as error:
        raise SpaceError(f"{place}:{error.line}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        tab = "'\\t'" in str(error.problem)
        problem = "a tab where only spaces may be" if tab else error.problem or error.context
        hint = "indent with spaces" if tab else ""
        raise SpaceError(f"{place}{line}: not YAML: {problem}", hint) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise SpaceError(f"{place}:{line}: not YAML: a control character") from None


class NodeError(Exception):
    """Something wrong with one node of the file."""

    def __init__(self, message: str, node: yaml.Node | yaml.Event) -> None:
        super().__init__(message)
        self.line = node.start_mark.line + 1


class Loader(yaml.SafeLoader):
    """Composes nodes, but not without end."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.aliases = 0
        self.values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.depth > MAX_DEPTH or self.aliases > MAX_ALIASES:
            raise NodeError("nested too deeply" if self.depth > MAX_DEPTH else "too many aliases", self.peek_event())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def plain_data(loader: Loader, node: yaml.Node, depth: int = 0) -> Any:
    """Returns what a node holds; an alias may stand for much, or for itself, so both are counted again here."""
    loader.values += 1
    if loader.values > MAX_VALUES or depth > MAX_DEPTH:
        raise NodeError("too much once its aliases are written out", node)
    if node.tag not in PLAIN_TAGS:
        raise NodeError(
            f"{node.tag.replace('tag:yaml.org,2002:', '!!')} is not plain data (quote it to mean text)", node
        )
    if isinstance(node, yaml.SequenceNode):
        return [plain_data(loader, item, depth + 1) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        data: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise NodeError("a key must be a name", key_node)
            key = plain_data(loader, key_node, depth + 1)
            if not isinstance(key, str):
                raise NodeError(f"'{key_node.value}' is no name", key_node)
            if key in data:
                raise NodeError(f"'{key}' is there twice", key_node)
            data[key] = plain_data(loader, value_node, depth + 1)
        return data
    if node.tag.endswith(":str"):
        looks_like_number = getattr(node, "style", None) is None and re.fullmatch(
            r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", node.value
        )
        return float(node.value) if looks_like_number else node.value
    try:
        return loader.construct_object(node)
    except (ValueError, KeyError, IndexError, yaml.YAMLError):
        raise NodeError(f"cannot be read as {node.tag.rpartition(':')[2]}", node) from None
