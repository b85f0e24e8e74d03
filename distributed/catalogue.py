"""From what a user writes to a task class: a registered name, `module:Class`, or `file.py:Class`. No torch here."""

import importlib
import importlib.util
import inspect
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from tasks import TASKS
from tasks.errors import UserError, did_you_mean

TYPED = "__main__"  # module of a class that was typed into a notebook: no file holds it, no other process finds it
loading: list[Path] = []  # files that are being imported, to find a task in them


def listed() -> dict[str, tuple[str, str]]:
    """Returns every registered task: name -> (where, title); packages add theirs by the entry point whipray.tasks."""
    found = dict(TASKS)
    for point in entry_points(group="whipray.tasks"):
        found.setdefault(point.name, (point.value, f"from {point.dist.name if point.dist else point.module}"))
    return found


def check(reference: str) -> None:
    """Raises UserError for a task that cannot be meant, before anything heavy is imported."""
    where, colon, _ = reference.partition(":")
    if not colon and (where.endswith(".py") or ("/" in where and Path(where).exists())):
        raise UserError(f"'{reference}' does not say which class of the file is meant", f"write {reference}:MyTask")
    if where.endswith(".py"):
        if not Path(where).exists():
            near = [str(path) for path in Path(where).parent.glob("*.py")] if Path(where).parent.is_dir() else []
            raise UserError(f"{where}: no such file", did_you_mean(where, near))
    elif not colon and reference not in TASKS and reference not in listed():
        raise UserError(f"unknown task '{reference}'", did_you_mean(reference, listed()))


def canonical(reference: str) -> str:
    """Returns a reference that means the same in any working directory."""
    where, colon, name = reference.partition(":")
    return f"{Path(where).absolute()}:{name}" if colon and where.endswith(".py") else reference


def folder_name(reference: str) -> str:
    """Returns the name under which runs and stores of a task lie: the registered name, or STEM.CLASS."""
    where, colon, name = reference.partition(":")
    if not colon:
        return reference
    stem = Path(where).stem if where.endswith(".py") else where.rpartition(".")[2]
    stem = "notebook" if where == TYPED else stem
    return re.sub(r"[^A-Za-z0-9._-]", "_", f"{stem}.{name}")


def find(reference: str) -> type[Any]:
    """Returns the task class; raises UserError naming what is missing, with the nearest names."""
    check(reference)
    where, _, name = (reference if ":" in reference else (TASKS.get(reference) or listed()[reference])[0]).partition(
        ":"
    )
    module = _load_file(Path(where)) if where.endswith(".py") else _import(where, reference)
    task = getattr(module, name, None)
    from tasks.task import Task

    if not (inspect.isclass(task) and issubclass(task, Task)):
        if where == TYPED and task is None:
            raise UserError(f"'{name}' was defined in a notebook, and is not defined here",
                            "define it here too; what other processes are to find lies in a file")  # fmt: skip
        there = [n for n, v in vars(module).items() if inspect.isclass(v) and issubclass(v, Task) and v is not Task]
        kind = "is no task: let it derive from tasks.task.Task" if task is not None else "is not there"
        raise UserError(f"{where}: '{name}' {kind}", did_you_mean(name, there))
    return task


def reference_of(task: type[Any]) -> str:
    """Returns the reference by which `find` gives a class: the inverse of it.

    A class that was typed into a notebook is found in this process only. Raises UserError where no name leads to it.
    """
    name, where = task.__qualname__, task.__module__
    module = sys.modules.get(where)
    if getattr(module, name, None) is not task:
        raise UserError(f"{where}: no name of the module leads to this class {name}",
                        "define it at the top of a module or a cell, under a name of its own")  # fmt: skip
    file = getattr(module, "__file__", None)
    if where == TYPED and not (file and Path(file).is_file()):
        return f"{TYPED}:{name}"
    registered = [known for known, (there, _) in listed().items() if there == f"{where}:{name}"]
    if registered:
        return registered[0]
    if file and where == TYPED:  # the script that runs: it must not be run once more to find the class
        sys.modules.setdefault(_module_name(Path(file).absolute()), sys.modules[where])
    if file and (where == TYPED or where == _module_name(Path(file))):
        return f"{Path(file).absolute()}:{name}"
    return f"{where}:{name}"


def _import(where: str, reference: str) -> Any:
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name and (where == error.name or where.startswith(f"{error.name}.")):
            raise UserError(f"task '{reference}': no module '{where}'", "is it installed, and spelt right?") from None
        raise UserError(f"task '{reference}' needs the package '{error.name}'", f"pip install {error.name}") from error


def _load_file(path: Path) -> Any:
    """Imports a file under a name of its own, once, so that its classes are the same at every look."""
    path = path.absolute()
    name = _module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: is no Python file", "a task of your own is written FILE.py:Class")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # What lies beside the file can be imported by it, as when Python runs it.
    sys.path.append(str(path.parent))
    loading.append(path)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, (SyntaxError, ImportError)):
            line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            raise UserError(f"{path}{line}: {error}", "correct the file; --debug shows where") from error
        raise
    finally:
        loading.pop()
    return module


def _module_name(path: Path) -> str:
    return f"whipray_file_{re.sub(r'[^A-Za-z0-9]', '_', str(path))}"
