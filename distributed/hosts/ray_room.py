"""What a Ray cluster has room for at this moment, and which of its nodes are about to leave."""

import time
from dataclasses import dataclass
from typing import Any

import ray

from distributed.hosts import feasibility, ray_cluster


@dataclass(frozen=True)
class Room:
    """Places for workers that have so many cores and devices each."""

    cpu: float
    gpu: float

    def free(self) -> int:
        """Returns how many more workers fit now, beside all that anybody holds."""
        free = ray._private.state.available_resources_per_node()
        return feasibility.most(self.cpu, self.gpu, [free.get(node["NodeID"], {}) for node in staying()])

    def whole(self) -> int:
        """Returns how many workers fit on the nodes that are there, whoever uses them now."""
        return feasibility.most(self.cpu, self.gpu, [node["Resources"] for node in staying()])

    def may_grow(self) -> bool:
        """Returns whether an autoscaler starts nodes for workers that wait for them."""
        return feasibility.most(self.cpu, self.gpu, [], ray_cluster.may_add()) > 0


def staying() -> list[dict[str, Any]]:
    """Returns the nodes that answer and are not about to leave.

    A node that is gone counts as alive for 15 seconds more with Ray; its raylet refuses connections at once.
    """
    going = leaving()
    return [
        node
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] not in going
        and ray_cluster.takes_connections(node["NodeManagerAddress"], node["NodeManagerPort"])
    ]


def leaving() -> dict[str, float | None]:
    """Returns the nodes that were told to leave (a spot machine is taken back, say), and in how many seconds."""
    drained = ray._private.state.state.get_draining_nodes()
    return {node: deadline / 1000 - time.time() if deadline else None for node, deadline in drained.items()}
