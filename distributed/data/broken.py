"""Rows that cannot be read: named, counted, and refused where they are too many."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tasks.errors import BadRow, UserError
from tasks.task import Task

OnError = Literal["skip", "stop"]


@dataclass(frozen=True)
class Skipped:
    """One raw row that was set aside."""

    where: str
    reason: str


@contextlib.contextmanager
def blamed(task: Task, method: str, where: str = "") -> Iterator[None]:
    """Lets an error that no task should raise say in which of its methods it arose, and at which row."""
    place = f"in {type(task).__name__}.{method}" + (f" of {where}" if where else "")
    try:
        yield
    except (BadRow, UserError):
        raise
    except SystemExit as error:  # it would end the command in silence, as if all were well
        raise UserError(
            f"{place}: sys.exit({error.code!r}) was called", "raise BadRow for a row to set aside"
        ) from error
    except Exception as error:
        error.add_note(place)
        raise


@contextlib.contextmanager
def placed(where: str) -> Iterator[None]:
    """Lets an error say at which row it arose."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error.message}", error.hint) from error


def where_of(number: int, reference: Any) -> str:
    return f"row {number} ({reference})" if isinstance(reference, (str, int, Path)) else f"row {number}"


def set_aside(skipped: list[Skipped], one: Skipped, on_error: OnError) -> None:
    if on_error == "stop":
        raise UserError(f"{one.where}: {one.reason}", "mend the row, or set broken rows aside: --on-error skip")
    skipped.append(one)


def refuse_if_too_many(skipped: list[Skipped], count: int, total: int, most: float) -> None:
    if skipped and count > most * total:
        raise UserError(
            f"{count} of {total} rows are broken; the first: {skipped[0].where}: {skipped[0].reason}",
            f"mend them, or allow more than {most:.0%}: data.max_bad=0.5",
        )
