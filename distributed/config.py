"""How settings are read: one dotted name, one type, one place it came from; anything else is refused.

Settings are the annotated fields of frozen dataclasses that live beside what they configure; the comment behind a
field is its meaning. This file knows none of them by name; `run.py` assembles them. No torch here.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

import yaml

from tasks.errors import UserError, did_you_mean

COMMAND_LINE = "command line"
GIVE_CREDENTIALS = (
    "give credentials in the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, "
    "GOOGLE_APPLICATION_CREDENTIALS"
)


@dataclass(frozen=True)
class Setting:
    """One thing that can be set."""

    name: str  # dotted
    type: Any
    default: Any
    owner: Any  # the class that it is a field of

    @property
    def meaning(self) -> str:
        """The comment behind the field; read when somebody asks, since it takes the parsing of a whole file."""
        return _comments(self.owner).get(self.name.rpartition(".")[2], "")


@dataclass(frozen=True)
class Given:
    """A value that somebody gave, and where."""

    value: Any
    origin: str  # "command line", "FILE:LINE", "recipe of TASK", "search space FILE:LINE"

    @property
    def text(self) -> bool:
        return self.origin == COMMAND_LINE


Givens = dict[str, Given]


@functools.cache
def settings_of(cls: type, prefix: str) -> dict[str, Setting]:
    """Returns the settings of a frozen dataclass by dotted name; nested dataclasses nest the names."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found: dict[str, Setting] = {}
    for field in dataclasses.fields(cls):
        name, kind = f"{prefix}.{field.name}", hints[field.name]
        if dataclasses.is_dataclass(field.default) and not isinstance(field.default, type):
            found |= settings_of(type(field.default), name)
        else:
            default = None if field.default is dataclasses.MISSING else field.default
            found[name] = Setting(name, kind, default, cls)
    return found


@functools.cache
def _comments(cls: type) -> dict[str, str]:
    """The comment behind each annotated field, from the source of the class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            continue  # built in, or made at run time
        for line in source.splitlines():
            match = re.match(r"    (\w+)\s*:\s*[^#]*?#\s*(.+)$", line)
            if match:
                found[match[1]] = match[2].strip()
    return found


# ---- reading values


def build(cls: type, prefix: str, given: Mapping[str, Given]) -> Any:
    """Returns an instance of a settings class, its defaults overridden by what is given below `prefix`."""
    values = {}
    for field in dataclasses.fields(cls):
        name = f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(field.default) and not isinstance(field.default, type):
            values[field.name] = build(type(field.default), name, given)
        elif name in given:
            values[field.name] = parse(settings_of(cls, prefix)[name], given[name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            setting = settings_of(cls, prefix)[name]
            raise UserError(f"{name} must be given: {setting.meaning or describe(setting.type)}",
                            f"write {name}=..., {describe(setting.type)}")  # fmt: skip
    return cls(**values)


def parse(setting: Setting, given: Given) -> Any:
    """Returns a given value as the setting's type; raises UserError naming setting and origin."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    value = _from_text(setting.type, given.value) if given.text else given.value
    try:
        if _has_stray_bool(setting.type, value):  # pydantic would take true for 1
            raise UserError(
                f"{setting.name}={given.value} ({given.origin}): expected {describe(setting.type)}, got {value!r}",
                "YAML reads yes, no, on and off as true or false: put quotes around the word",
            )
        adapter = TypeAdapter(setting.type, config=ConfigDict(allow_inf_nan=False))
        parsed = adapter.validate_python(value)
    except ValidationError:
        hint = setting.meaning and f"{setting.name}: {setting.meaning}"
        options = _options(setting.type)
        if options and isinstance(value, str) and get_close_matches(value, options, n=1):
            hint = did_you_mean(value, options)
        raise UserError(
            f"{setting.name}={given.value} ({given.origin}): expected {describe(setting.type)}, got {given.value!r}",
            hint,
        ) from None
    if parsed and "path" in getattr(setting.type, "__metadata__", ()):
        if is_uri(parsed):
            refuse_credentials(parsed)
            return parsed
        return str(Path(parsed).expanduser().absolute())
    return parsed


def _from_text(kind: Any, text: Any) -> Any:
    """A word of the command line as the nearest Python value; pydantic does the rest."""
    if not isinstance(text, str):
        return text
    if text.lower() in ("none", "null") and _allows(kind, type(None)):
        return None
    if kind is Any:
        return _guess(text)
    if _allows(kind, tuple):
        return [part.strip() for part in text.strip("[]()").split(",") if part.strip()]
    return text


def _guess(text: str) -> Any:
    """A word of no known type: the number that it looks like (1e-3 too), else what YAML reads."""
    with contextlib.suppress(ValueError):
        return float(text) if set(text) & set(".eE") else int(text)
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError):
        return text


def _has_stray_bool(kind: Any, value: Any) -> bool:
    if isinstance(value, bool):
        return not _allows(kind, bool)
    if isinstance(value, (list, tuple)):
        items = [item for part in _parts(kind) if typing.get_origin(part) is tuple for item in typing.get_args(part)]
        return (
            bool(items) and not any(_allows(item, bool) for item in items) and any(isinstance(v, bool) for v in value)
        )
    return False


def _parts(kind: Any) -> Iterable[Any]:
    if typing.get_origin(kind) is typing.Annotated:
        return _parts(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [part for option in typing.get_args(kind) for part in _parts(option)]
    return [kind]


def _allows(kind: Any, wanted: type) -> bool:
    return any(part is Any or (typing.get_origin(part) or part) is wanted for part in _parts(kind))


def _options(kind: Any) -> list[str]:
    return [str(o) for part in _parts(kind) if typing.get_origin(part) is typing.Literal for o in typing.get_args(part)]


def describe(kind: Any) -> str:
    """Returns a type in words: "a whole number, at least 1", "cnn or mlp"."""
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "none",
        Any: "a value",
    }
    if typing.get_origin(kind) is typing.Annotated:
        inner, *extras = typing.get_args(kind)
        bounds = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
        said = [f"{word} {getattr(e, key)}" for e in extras for key, word in bounds.items() if hasattr(e, key)]
        return ", ".join([describe(inner) if "path" not in extras else "a path", *said])
    parts = list(_parts(kind))
    if len(parts) > 1 or typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(str(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        plural = {int: "whole numbers", float: "numbers", str: "words"}
        items = typing.get_args(kind)
        count = "" if items[-1] is Ellipsis else f"{len(items)} "
        return f"a list of {count}{plural.get(items[0], 'values')}"
    return words.get(kind) or getattr(kind, "WORDS", None) or getattr(kind, "__name__", str(kind))


# ---- paths that are URIs


def is_uri(place: str | Path) -> bool:
    """Returns whether a path is a URI such as s3://bucket/folder."""
    return re.match(r"[a-z][a-z0-9+.-]+:/", str(place)) is not None


def as_uri(place: str | Path) -> str:
    """Returns a URI as it was before a Path made one slash of its two; hdfs:///x must then be hdfs://default/x."""
    scheme, _, rest = str(place).partition(":/")
    if rest.startswith("/"):
        return str(place)
    return f"{scheme}:///{rest}" if scheme == "file" else f"{scheme}://{rest}"


def refuse_credentials(uri: str) -> None:
    """Raises UserError where a URI holds a password or a key: runs and logs keep what they are given."""
    try:
        parts = urlsplit(as_uri(uri))
    except ValueError as error:  # it may hold a password all the same, and is not repeated
        raise UserError(f"not a URI: {error}", "write s3://bucket/folder, gs://bucket/folder") from None
    user, _, host = parts.netloc.rpartition("@")
    query = unquote(parts.query)
    if (
        ":" in user
        or (user and parts.scheme == "s3")
        or re.search(r":(?!\d*$)", re.sub(r"\[.*\]", "", host))  # user:pass/word@bucket: the slash ends the host
        or "@" in query
        or re.search(r"(^|&)[^=]*(key|secret|token|passw|credential|sig)[^=]*=", query, re.IGNORECASE)
    ):
        raise UserError(
            f"{parts.scheme}://...: a URI must hold no credentials, which runs and logs would keep",
            GIVE_CREDENTIALS,
        )


# ---- where values come from


def from_words(words: Iterable[str]) -> Givens:
    """Reads `name=value` words of the command line."""
    found: Givens = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UserError(
                f"'{word}' is not understood",
                f"settings are written name=value, such as {word if '.' in word else 'optimizer.lr'}=0.1",
            )
        if name in found:
            raise UserError(f"'{name}' is given twice ({COMMAND_LINE})", "keep one of the two")
        found[name] = Given(value, COMMAND_LINE)
    return found


MAX_YAML_BYTES, MAX_YAML_DEPTH = 1 << 20, 20


class _Loader(yaml.SafeLoader):
    """Plain YAML alone: no aliases, which can make much out of little, no tags, and no bottomless nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, self.depth = self.peek_event(), self.depth + 1
        if isinstance(event, yaml.AliasEvent):
            self._refuse(f"aliases such as *{event.anchor} are not read", "write the value itself", event)
        if getattr(event, "tag", None):
            self._refuse(
                f"tags such as {event.tag.replace('tag:yaml.org,2002:', '!!')} are not read",
                "write the value without it",
                event,
            )
        if self.depth > MAX_YAML_DEPTH:
            self._refuse(f"is nested more than {MAX_YAML_DEPTH} deep", "is it the right file?", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node and node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and ":" in node.value:
            self._refuse(
                f"YAML 1.1 reads {node.value} as one number to the base of 60", f"put quotes around it: '{node.value}'",
                event,
            )  # fmt: skip
        return node

    def _refuse(self, problem: str, hint: str, event: yaml.Event) -> NoReturn:
        raise yaml.composer.ComposerError(None, None, problem, event.start_mark, hint)


def from_yaml(path: Path) -> Givens:
    """Reads a YAML file of settings, nested or dotted, each with its file and line as origin.

    Raises UserError for what is no plain YAML, doubled keys, and files out of all proportion.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read: {why}", "check the path given to --config") from None
    if len(text) > MAX_YAML_BYTES:
        raise UserError(f"{path}: is too large for a file of settings", "is it the right file?")
    try:
        node = yaml.compose(text, _Loader)
        found: Givens = {}
        if node is not None:
            _walk(node, "", path, found, yaml.SafeLoader(""))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = "indent with spaces, not tabs" if "\\t" in str(problem) else "write plain YAML: `optimizer: {lr: 0.1}`"
        raise UserError(f"{where}: {problem}", getattr(error, "note", None) or hint) from None
    return found


def _walk(node: yaml.Node, prefix: str, path: Path, found: Givens, loader: Any) -> None:
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:{node.start_mark.line + 1}: expected names with values, got {node.value!r:.60}",
                        "write settings as `optimizer: {lr: 0.1}`")  # fmt: skip
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{path}:{key.start_mark.line + 1}: expected a name, got a list or a map",
                            "write settings as `optimizer: {lr: 0.1}`")  # fmt: skip
        name = f"{prefix}{key.value}"
        origin = f"{path}:{key.start_mark.line + 1}"
        if isinstance(value, yaml.MappingNode):
            _walk(value, f"{name}.", path, found, loader)
            continue
        if name in found:
            raise UserError(f"'{name}' is given twice ({found[name].origin} and {origin})", "keep one of the two")
        try:
            found[name] = Given(loader.construct_object(value, deep=True), origin)
        except ValueError as error:  # a day that no month has, a number of thousands of digits
            raise UserError(f"{name} ({origin}): {error}", "put quotes around it where text is meant") from None


def to_yaml(values: Mapping[str, Any]) -> str:
    """Returns dotted values as nested YAML; reading it back gives equal values."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[last] = list(value) if isinstance(value, tuple) else value
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes floats so that YAML 1.1 reads them as floats again: 1.0e-05, never 1e-05."""


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    text = repr(value)
    if math.isfinite(value) and "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _float)
