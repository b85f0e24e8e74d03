"""What a run asks of the machines."""

import os
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt


class Workers(int):
    """How many processes share each batch: a number, or a range such as 2..8, which follows what the cluster has.

    It counts as the most that there may be; `least` is what it takes to begin.
    """

    WORDS = "a whole number, at least 1, or a range such as 2..8"
    least: int

    def __new__(cls, told: "int | str") -> "Workers":
        """Raises ValueError for what is neither a number nor a range, or below 1."""
        match = re.fullmatch(r"(?:(\d{1,9})\.\.)?(\d{1,9})", str(told))
        if not match or not 1 <= int(match[1] or match[2]) <= int(match[2]):
            raise ValueError(f"expected {cls.WORDS}, got {told!r}")
        workers = super().__new__(cls, match[2])
        workers.least = int(match[1] or match[2])
        return workers

    @property
    def plain(self) -> int | str:
        """As it is written in YAML."""
        return str(self) if self.least < self else int(self)

    def __str__(self) -> str:
        return f"{self.least}..{int(self)}" if self.least < self else repr(int(self))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(cls)


ONE = Workers(1)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a run asks of the machines."""

    workers: Workers = ONE  # processes that share each batch; 2..8: as many as the cluster has room for
    gpu: Annotated[float, Ge(0)] | None = None  # devices a worker; none: one where the machine has any
    cpu: Annotated[float, Gt(0)] | None = None  # cores a worker; none: an equal share, 1 under Ray
    host: Literal["auto", "local", "ray"] = "auto"  # auto: this process; Ray for several workers, and in jobs
    hang: Annotated[float, Gt(0), Lt(600)] | None = 300.0  # seconds in which no worker gets on: one hangs; none: never
    replace_lost: Annotated[int, Ge(0)] = 3  # times that workers which were killed are replaced before the run gets on
    replace_hung: Annotated[int, Ge(0)] = 3  # the same for a worker that hangs

    @property
    def on_ray(self) -> bool:
        """Whether Ray runs it; a submitted job is on the head, where the devices need not be."""
        submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        return self.host == "ray" or (self.host == "auto" and (self.workers > 1 or submitted))


def cpu_count() -> int:
    """Returns the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
