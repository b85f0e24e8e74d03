"""How several workers exchange gradients: the settings of DistributedDataParallel. No torch here."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How several workers exchange gradients; nothing of it acts where there is one."""

    bucket_mib: Annotated[float, Gt(0)] = 25.0  # gradients that are sent at once: MiB; smaller ones leave sooner
    bucket_views: bool = True  # gradients are views of what is sent, which saves a copy of all of them
    static_graph: bool = False  # the same parameters get gradients in every step: some exchanges need no waiting
    find_unused: bool = False  # parameters may get no gradient in a step; costs a walk over the graph each time
    compress: Literal["none", "bfloat16", "float16"] = "none"  # gradients travel in 16 bits: half of what is sent
    shard_optimizer: bool = False  # each worker keeps its share of the optimizer's state (ZeRO, stage 1)
