"""What a run asks of the machines."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a run asks of the machines."""

    workers: Annotated[int, Ge(1)] = 1  # processes that share each batch
    gpu: Annotated[float, Ge(0)] | None = None  # devices a worker; none: one where the machine has any
    cpu: Annotated[float, Gt(0)] | None = None  # cores a worker; none: an equal share, 1 under Ray
    host: Literal["auto", "local", "ray"] = "auto"  # auto: this process; Ray for several workers, and in jobs

    @property
    def on_ray(self) -> bool:
        """Whether Ray runs it; a submitted job is on the head, where the devices need not be."""
        submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        return self.host == "ray" or (self.host == "auto" and (self.workers > 1 or submitted))


def cpu_count() -> int:
    """Returns the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
