"""What can be said of a task by looking at a step or two in one process: checks of `whipray verify`."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed.analysis import predict
from distributed.analysis.stepping import Ranks, rows_of, tensors_of
from distributed.data import planned
from distributed.data.loader import ONE
from distributed.data.store import Store
from distributed.evaluation import Evaluator
from distributed.learning import begin
from distributed.run import Run
from distributed.world import World
from tasks.errors import BadRow, UserError, place_of
from tasks.fields import check_row
from tasks.task import Batch, Example

EXACT = 1e-9  # how far two float64 trainings may be apart that are the same but for the order of their sums
KEYED = 1e-5  # relative; a row's augmentation in another batch: float32 may be added up in another order
FEW = 4  # rows that are predicted


@dataclass(frozen=True)
class Check:
    """What was looked at, what was seen, and whether it is as it must be; None: not to be decided, `seen` says why."""

    name: str
    seen: str
    ok: bool | None


Checks = list[Check]


def tried(name: str, call: Callable[[], Checks]) -> Checks:
    """Returns the checks of a call; whatever it raises is a check that has failed."""
    try:
        return call()
    except UserError as error:
        return [Check(name, f"{error.message}; {error.hint}" if error.hint else error.message, ok=False)]
    except Exception as error:  # noqa: BLE001 - of a task's own code: it is what is looked for
        place = place_of(error)
        words = str(error).strip().splitlines() or [""]
        return [Check(name, f"{type(error).__name__}: {words[0]}" + (f" ({place})" if place else ""), ok=False)]


def one_step(run: Run, store: Store) -> Checks:
    """A training step and an evaluation: they work, are finite, reach every parameter, and can be repeated."""
    ranks = Ranks.begin(run, store, 1, None)
    seen = ranks.learn(look=True)
    rows = sum(len(part.rows) for part in seen.parts)
    losses = ", ".join(f"{name} {value:.4g}" for part in seen.parts[:1] for name, value in part.losses.items())
    norms = ", ".join(f"{norm:.3g}" for norm in seen.gradients.values())
    checks = [
        Check("a training step", seen.failed or f"{rows} rows: {losses}; gradient norm {norms}", ok=not seen.failed),
        _finite(run, seen.not_finite),
        Check("every parameter gets a gradient", _named(seen.without) or "all do", ok=not seen.without),
    ]  # fmt: skip
    again = Ranks.begin(run, store, 1, None)
    second = again.learn(look=True)
    equal = same(ranks.learning.model.tensors(), again.learning.model.tensors()) and seen.parts == second.parts
    checks.append(
        Check("the same step twice gives the same bits", "it does" if equal else "losses or weights differ", ok=equal)
    )
    figures = Evaluator(run, store, "validation", World())(ranks.learning.model.plain)
    odd = [name for name, value in figures.items() if not np.isfinite(value)]
    told = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    checks.append(Check("an evaluation", told or "no figures", ok=not odd))
    return checks


def _finite(run: Run, odd: str) -> Check:
    if run.precision.dtype == "float16" and odd.startswith("the gradient of "):
        # Its scale is sought from above: the first steps of a sound training are left out for this.
        return Check("all is finite in it", f"{odd}: the loss scaler leaves such a step out", ok=None)
    return Check("all is finite in it", odd or "batch, outputs, losses, gradients, weights", ok=not odd)


def _named(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def order_of_rows(run: Run, store: Store) -> Checks:
    """Whether a batch teaches the same with its rows in another order."""
    name = "the order of the rows in a batch does not matter"
    learning = begin(run, store, World(), None)
    [batch] = learning.loader.micro_batches(0, 0)[1]
    turned = _turned(batch)
    if turned is None:
        return [Check(name, "not looked at: the batch has columns that cannot be put in another order", ok=None)]

    def gradients(one: Batch) -> dict[str, Tensor]:
        network = learning.model.learning()
        torch.manual_seed(0)
        update = learning.updater.accumulate(0, 1.0, last=True)
        run.task.step(network, one, update)
        named = {n: p for n, p in learning.model.plain.named_parameters() if p.grad is not None}
        found = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        for parameter in named.values():
            parameter.grad = None
        return found

    return [exact(name, "gradients", apart(gradients(batch), gradients(turned)), run)]


def exact(name: str, what: str, by: float, run: Run) -> Check:
    """Judges a difference that is none but for rounding where the task is exact."""
    reason = run.task.invariance
    if by <= EXACT or reason == "exact":
        return Check(name, f"{what} differ by {by:.1e} in float64", ok=by <= EXACT)
    return Check(name, f"{what} differ by {by:.1e} in float64; the task says why: {reason}", ok=None)


def apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to the largest number where that is above 1."""
    if a.keys() != b.keys():
        return float("inf")
    both = [(a[name].double(), b[name].double()) for name in a if a[name].numel()]
    scale = max([1.0, *(float(one.abs().max()) for one, _ in both)])
    return max([0.0, *(float((one - other).abs().max()) for one, other in both)]) / scale


def agreement(pairs: list[tuple[float, float]]) -> tuple[bool, str]:
    """Returns whether losses of trainings in two ways agree, seed by seed, and the figures in words.

    Their mean difference is within 3 standard errors, or within a tenth of the loss.
    """
    apart = [other - one for one, other in pairs]
    mean, loss = statistics.fmean(apart), statistics.fmean(one for one, _ in pairs)
    error = statistics.stdev(apart) / len(apart) ** 0.5
    words = f"over {len(pairs)} seeds the loss {loss:.4g} differs by {mean:+.2g} (standard error {error:.2g})"
    return abs(mean) <= max(3 * error, 0.1 * abs(loss)), words


def equal(one: float, other: float) -> bool:
    """Returns whether two figures are the same but for rounding."""
    both_odd = one != one and other != other
    return both_odd or one == other or abs(one - other) <= EXACT * max(1.0, abs(one))


def _turned(batch: Batch) -> Batch | None:
    """The batch with its rows backwards; None where a column is of another kind than can be turned."""
    if batch and any(isinstance(part, dict) for part in batch.values()):
        parts = {name: _turned(part) for name, part in batch.items() if isinstance(part, dict)}
        if any(part is None for part in parts.values()):
            return None
        return {**parts, "row": batch["row"].flip(0)}
    rows, turned = len(batch["row"]), {}
    for name, column in batch.items():
        if isinstance(column, Tensor) and column.ndim and len(column) == rows:
            turned[name] = column.flip(0)
        elif isinstance(column, list) and len(column) == rows:
            turned[name] = column[::-1]
        elif isinstance(column, Tensor) and not column.ndim:
            turned[name] = column
        else:
            return None
    return turned


def keyed_draws(run: Run, store: Store) -> Checks:
    """Whether a row is augmented in the same way, whatever other rows share its (micro-)batch."""
    name = "a row is augmented the same in any batch"
    whole = _by_row(run, store, 1)
    for size in (2, 3):
        for row, columns in _by_row(run, store, size).items():
            for column, value in columns.items():
                if not _alike(whole[row][column], value):
                    reason = run.task.invariance
                    seen = f"'{column}' of row {row[1]} is another one beside other rows"
                    if reason != "exact":
                        return [Check(name, f"{seen}; the task says why: {reason}", ok=None)]
                    return [Check(name, f"{seen}: take all random numbers from `draw`", ok=False)]
    return [Check(name, f"{len(whole)} rows in batches of 3 sizes", ok=True)]


def _by_row(run: Run, store: Store, size: int) -> dict[tuple[str, int], dict[str, Tensor]]:
    """The first global batch as so many ranks see it, row by row: (domain, row) -> columns."""
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    for rank in range(size):
        loader = planned.loader(
            store, "train", run.data, run.train.seed, run.transform, World(rank, size), partners=run.task.partners
        )
        torch.manual_seed(rank)
        [batch] = loader.micro_batches(0, 0)[1]
        domains = {name: part for name, part in batch.items() if isinstance(part, dict)} or {ONE: batch}
        for domain, columns in domains.items():
            rows = rows_of(columns)
            for index, row in enumerate(rows):
                found[domain, row] = {
                    name: column[index]
                    for name, column in columns.items()
                    if isinstance(column, Tensor | list) and len(column) == len(rows) and isinstance(column[0], Tensor)
                }
    return found


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two rows are the same where both have numbers: one may be padded to a longer neighbour."""
    if a.ndim != b.ndim:
        return False
    common = tuple(slice(0, min(one, other)) for one, other in zip(a.shape, b.shape, strict=True))
    return torch.allclose(a[common].double(), b[common].double(), rtol=KEYED, atol=KEYED, equal_nan=True)


def predictions(run: Run, store: Store) -> Checks:
    """Whether rows without their targets can be predicted."""
    name = "rows without targets are predicted"
    if store.domains("train"):
        return [Check(name, "not looked at: the rows are of several domains", ok=None)]
    learning = begin(run, store, World(), None)
    rows = list(_untargeted(run, store))
    told = predict.columns(run, learning.model.plain.eval(), store.facts, World(), rows)
    short = [column for column, values in told.items() if len(values) != len(rows)]
    odd = [
        path for column, values in told.items() for path, one in tensors_of(values, column) if not one.isfinite().all()
    ]
    problem = f"'{_named(short)}' have not one entry a row" if short else f"{odd[0]} is not finite" if odd else ""
    return [Check(name, problem or f"{len(rows)} rows: {', '.join(told) or 'no columns'}", ok=not problem)]


def _untargeted(run: Run, store: Store) -> Iterable[dict[str, Any]]:
    """A few raw rows, read as they are for prediction."""
    task, found = run.task, 0
    targets = {name for name, field in task.fields.items() if field.target}
    for example in task.examples(task.source):
        if found == FEW:
            return
        reference = example.reference if isinstance(example, Example) else example
        try:
            row = {name: value for name, value in task.row(reference).items() if name not in targets}
            yield check_row(task.encode(row, store.facts), task.fields, store.facts, targets=False)
            found += 1
        except BadRow:  # set aside when the data were prepared
            continue
