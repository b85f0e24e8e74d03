"""What decides what a store holds, as one number: raw files, reading code, split rule, and the source's settings."""

import ast
import dataclasses
import hashlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distributed import durable
from distributed.data import schema, typed
from distributed.data.settings import Data
from distributed.data.store import FORMAT
from tasks.classifier import Classifier
from tasks.errors import UserError
from tasks.task import Task

CONTENT_BYTES = 64 << 20  # sources up to here are fingerprinted by content, larger ones by names, sizes and times
TRAINING = (
    "transform", "build", "loss", "step", "units", "predict", "metrics", "measure", "inputs", "network", "row_loss",
    "mixed", "__post_init__",
)  # fmt: skip


def fingerprint(task: Task, data: Data) -> str:
    """Returns 32 hex digits over raw source, reader, split rule and `task.source.*`; raises UserError without it."""
    described = {
        "format": FORMAT,
        "fields": {name: schema.field_to_json(field) for name, field in task.fields.items()},
        "version": task.version,
        "code": _reading_code(type(task)),
        "source": {k: v for k, v in asdict(task.source).items() if not _is_path(task, k)},
        "split": [data.split, data.split_seed, data.validation, data.folds, data.fold],
        "files": [_file_identity(path) for path in guarded(task).files()],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _is_path(task: Task, name: str) -> bool:
    """Paths are identified by what they hold, so that a moved source is not prepared again."""
    from distributed.config import settings_of

    return "path" in getattr(settings_of(type(task.source), "source")[f"source.{name}"].type, "__metadata__", ())


def _reading_code(cls: type) -> list[str]:
    """The code that may take part in reading, so that an edited reader makes its stores stale.

    That is all of a task's modules, and of those that they import and nobody has installed, but what only training
    looks at: networks, and the methods named in TRAINING.
    """
    waiting = [base.__module__ for base in cls.__mro__ if base not in (Task, Classifier, object)]
    found: dict[str, str] = {}
    while waiting:
        name = waiting.pop(0)
        if name not in found and (tree := typed.tree(cls) if typed.is_typed(name) else _tree(name)):
            kept = [node for node in tree.body if not (isinstance(node, ast.ClassDef) and "forward" in _methods(node))]
            for node in kept:
                if isinstance(node, ast.ClassDef):
                    node.body = [part for part in node.body if getattr(part, "name", "") not in TRAINING]
            reading = ast.Module(kept, [])
            found[name] = ast.dump(reading)
            waiting += [one for one in _imported(reading) if _may_read(one)]
    return sorted(found.values())  # the order of imports says nothing


def _tree(name: str) -> ast.Module | None:
    """The source of a module that is imported already or can be found, parsed."""
    module = sys.modules.get(name)
    try:
        if module:
            return ast.parse(inspect.getsource(module))
        spec = importlib.util.find_spec(name)
        return ast.parse(Path(spec.origin).read_text("utf-8")) if spec and spec.origin else None
    except (OSError, TypeError, ValueError, ImportError, SyntaxError):
        return None


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _may_read(name: str) -> bool:
    """Whether an imported module may decide what is read: one of our readers, or a user's own."""
    top = name.partition(".")[0]
    if top in ("tasks", "distributed", "search_spaces"):
        return name.startswith(("tasks.formats.", "tasks.bundled."))
    if top in sys.stdlib_module_names:
        return False
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    places = [spec.origin or "", *(spec.submodule_search_locations or [])] if spec else [""]
    return places[0] != "" and not any("site-packages" in place or "dist-packages" in place for place in places)


def _methods(node: ast.ClassDef) -> set[str]:
    return {part.name for part in node.body if isinstance(part, ast.FunctionDef)}


def _file_identity(root: Path) -> list[Any]:
    files = sorted(_walk(root)) if root.is_dir() else [root]
    try:
        stats = [(path, path.stat()) for path in files]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file or folder", "check task.source.path") from None
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}", "check task.source.path") from None
    if sum(stat.st_size for _, stat in stats) <= CONTENT_BYTES:
        return [[str(p.relative_to(root)), durable.checksum(p), s.st_size] for p, s in stats if p.is_file()]
    return [[str(p.relative_to(root)), s.st_size, s.st_mtime_ns] for p, s in stats]


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent) / name for name in files if not name.startswith("."))


def guarded(task: Task) -> Task:
    """Returns the task as its readers may see it: `task.source.*`, and no other setting."""
    settings = {field.name for field in dataclasses.fields(task)} - {"source"}

    def look(self: Task, name: str) -> Any:
        if name in settings:
            raise UserError(
                f"{type(task).__name__} reads 'task.{name}' while preparing data; there only task.source.* may be read",
                "move the setting into the task's Source, or use it in transform() or build()",
            )
        return object.__getattribute__(self, name)

    copy = object.__new__(type(type(task).__name__, (type(task),), {"__getattribute__": look}))
    copy.__dict__.update(task.__dict__)
    return copy
