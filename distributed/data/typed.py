"""The code of a class that was typed into a notebook: no file holds it, but the session remembers its cells."""

import ast
import contextlib
import dis
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType

from tasks.errors import UserError


def is_typed(module: str) -> bool:
    """Returns whether a module is a session of somebody who types, and no file."""
    file = getattr(sys.modules.get(module), "__file__", None)  # "<stdin>" where `python -` reads it
    return module == "__main__" and not (file and Path(file).is_file())


def tree(cls: type) -> ast.Module:
    """Returns what takes part in a class: its definition, and those of all that it names, each as it was last given.

    Raises UserError where the session remembers no cells, as that of `python` alone does not.
    """
    cells = getattr(sys.modules["__main__"], "In", None)  # as IPython keeps them, without its magics
    known: dict[str, ast.stmt] = {}
    for statement in _statements(cells if isinstance(cells, list) else []):
        known |= dict.fromkeys(_bound(statement), statement)
    if cls.__name__ not in known:
        raise UserError(f"{cls.__name__}: its code is in no file, so that a change in how it reads would go unseen",
                        "put the class into a file: FILE.py:Class")  # fmt: skip
    waiting, found = [base.__name__ for base in cls.__mro__], {}
    while waiting:
        name = waiting.pop()
        if name in known and name not in found:
            found[name] = known[name]
            waiting += _free(compile(ast.Module([known[name]], []), "a cell", "exec", dont_inherit=True))
    # One statement may bind several names; the order of the cells says nothing.
    return ast.Module(list({id(found[name]): found[name] for name in sorted(found)}.values()), [])


def _statements(cells: Iterable[str]) -> Iterable[ast.stmt]:
    for cell in cells:
        with contextlib.suppress(SyntaxError):  # it was refused when it was typed, too
            yield from ast.parse(cell).body


def _free(code: CodeType) -> Iterator[str]:
    """The names that code looks up among those of its module."""
    yield from (one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_NAME", "LOAD_GLOBAL"))
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _free(inner)


def _bound(statement: ast.stmt) -> list[str]:
    """The names that a statement at the top of a cell gives a meaning to."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    return [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
