"""What a run's checkpoint says about files: read by the task, encoded with the run's facts, predicted in batches."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distributed import model
from distributed.analysis.evaluate import device_of
from distributed.data import schema
from distributed.data.derive import Wanted, of_rows
from distributed.data.loader import Loader
from distributed.data.order import Plan
from distributed.data.store import Rows
from distributed.run import Run
from distributed.saved import Saved
from distributed.world import World
from tasks.errors import BadRow, UserError
from tasks.fields import Facts, Field, Label, Labels, check_row
from tasks.task import Ragged, Task

Prediction = dict[str, Any]  # "file", "row" (its number in the file, from 1), and the columns of `task.predict`


def predict(found: Saved, files: Iterable[Path], which: str = "best") -> Iterator[Prediction]:
    """Yields what the run predicts for each row of the files, in their order; classes by name.

    Raises UserError naming the file, and the row in it, that cannot be read.
    """
    task = found.run.task
    files = [part for file in files for part in _expanded(task, file)]
    for (file, number), told in _predicted(found, which, lambda facts: _checked(task, facts, files)):
        yield {"file": str(file), "row": number, **told}


def predict_rows(found: Saved, rows: Iterable[Mapping[str, Any]], which: str = "best") -> Iterator[Prediction]:
    """Yields what the run predicts for rows as `Task.row` returns them, without "file" and "row".

    Raises UserError naming the row, counted from 1, that does not fit the task's fields.
    """
    task = found.run.task

    def checked(facts: Facts) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in enumerate(rows, start=1):
            try:
                yield number, check_row(task.encode(dict(row), facts), task.fields, facts, targets=False)
            except BadRow as error:
                raise UserError(f"row {number}: {error}", "a row to predict must be complete") from error

    return (told for _, told in _predicted(found, which, checked))


def _predicted(
    found: Saved, which: str, checked: Callable[[Facts], Iterator[tuple[Any, dict[str, Any]]]]
) -> Iterator[tuple[Any, Prediction]]:
    """Yields what is predicted for each checked row, with what marks the row."""
    run, world = found.run, World(device=device_of(found.run))
    net, facts = model.read(str(found.directory), run.runs, world, which)
    rows = checked(facts)
    while chunk := list(itertools.islice(rows, run.data.batch_size)):
        told = columns(run, net, facts, world, [row for _, row in chunk])
        for index, (mark, _) in enumerate(chunk):
            yield mark, {name: values[index] for name, values in told.items()}


def columns(
    run: Run, net: nn.Module, facts: Facts, world: World, rows: Sequence[Mapping[str, Any]]
) -> dict[str, list[Any]]:
    """Returns what `task.predict` says about checked rows without targets, as plain values, one entry a row."""
    task = run.task
    inputs = {name: field for name, field in task.fields.items() if not field.target}
    wanted = Wanted.of(run.data)
    if wanted:
        rows = of_rows(rows, inputs, wanted)
    batch = schema.batch_of(rows, inputs, [""] * len(rows))
    raw = wanted is not None and wanted.decoded
    seen = {name: schema.column(batch.column(name), field, raw=raw) for name, field in inputs.items()}
    gathered = Rows([seen], np.array([0, len(rows)]))
    plan = Plan(len(rows), len(rows), run.train.seed, "sequential")
    loader = Loader(gathered, plan, run.transform, device=world.device)
    [ready] = loader.in_order(len(rows))
    with torch.no_grad(), run.precision.autocast(world.device):
        predicted = task.predict(net, ready)
    return {name: _plain(values, task.fields.get(name), facts.get(name, {})) for name, values in predicted.items()}


def _expanded(task: Task, path: Path) -> list[Path]:
    """The files of a folder, as `Task.inputs` takes them; a task that reads in its own way gets the folder itself."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder", "name what is to be predicted")
    if not path.is_dir() or type(task).inputs is not Task.inputs:
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")) or [path]


def _checked(task: Task, facts: Facts, files: Iterable[Path]) -> Iterator[tuple[tuple[Path, int], dict[str, Any]]]:
    """Yields file and number of the row in it, with the row, encoded and checked."""
    for file in files:
        number = 0
        try:
            for number, row in enumerate(task.inputs(file), start=1):
                yield (file, number), check_row(task.encode(dict(row), facts), task.fields, facts, targets=False)
        except BadRow as error:
            # A reader that fails in the middle of a row has not counted it yet, and says itself where it stands.
            where = "" if str(file) in str(error) else f"{file}, row {max(number, 1)}: "
            raise UserError(f"{where}{error}", "a row to predict must be complete") from error
        if not number:
            raise UserError(f"{file}: holds nothing to predict", "is it the right file?")


def _plain(values: Any, field: Field | None, facts: Facts) -> list[Any]:
    """One column as plain values, one entry a row; numbers of classes by name."""
    if isinstance(values, Ragged):
        values = values.split()
    plain = values.detach().cpu().tolist() if isinstance(values, Tensor) else [_value(value) for value in values]
    names = facts.get("classes") if isinstance(field, (Label, Labels)) else None
    return [_by_name(value, names) for value in plain] if names else plain


def _value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist()
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _by_name(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_by_name(one, names) for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value
