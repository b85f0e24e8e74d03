"""The settings of a sweep."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge


@dataclass(frozen=True, kw_only=True)
class Trials:
    count: Annotated[int, Ge(1)] = 16  # trials in all, the one with the task's defaults among them
    search: Literal["tpe", "random", "grid"] = "tpe"  # how the next trial's settings are chosen
    scheduler: Literal["asha", "none"] = "asha"  # which trials are stopped early
    concurrent: Annotated[int, Ge(1)] | None = None  # trials at once; none: as many as the resources hold
    seed: Annotated[int, Ge(0)] = 0  # of the search, not of the trainings
    grace: Annotated[int, Ge(1)] = 3  # epochs before a trial may be stopped
    factor: Annotated[int, Ge(2)] = 3  # of the trials that get that far, one in so many goes on
