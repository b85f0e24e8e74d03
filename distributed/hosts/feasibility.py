"""Whether a cluster can ever hold a run's workers. Ray itself would wait for ever for what cannot come.

A worker sits on one node, so that workers fit node by node; all are alike, so that first-fit is exact. No Ray here:
plain numbers in, an answer out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from tasks.errors import UserError

Node = Mapping[str, float]  # resource -> quantity, such as {"CPU": 8.0, "GPU": 2.0}
UNLIMITED = 1_000_000  # nodes, where an autoscaler names no limit
SLACK = 1e-6  # Ray counts in units of 0.0001
SETTINGS = {"CPU": "resources.cpu", "GPU": "resources.gpu"}


def holds(node: Node, cpu: float, gpu: float) -> int:
    """Returns how many workers fit one node. A share of a device is a share of one device, never of two.

    Where a part of a device is left, as on a node that others use too, it counts as one device's.
    """
    by_cpu = math.floor(node.get("CPU", 0.0) / cpu + SLACK) if cpu else UNLIMITED
    devices = node.get("GPU", 0.0)
    if not gpu:
        by_gpu = UNLIMITED
    elif gpu < 1:
        whole = math.floor(devices + SLACK)
        by_gpu = whole * math.floor(1 / gpu + SLACK) + math.floor(max(0.0, devices - whole) / gpu + SLACK)
    else:
        by_gpu = math.floor(devices / gpu + SLACK)
    return min(by_cpu, by_gpu)


def most(cpu: float, gpu: float, nodes: Iterable[Node], may_add: Iterable[tuple[Node, int]] = ()) -> int:
    """Returns how many workers fit at once; `may_add` are kinds of nodes that an autoscaler starts, and how many."""
    there = sum(holds(node, cpu, gpu) for node in nodes)
    return there + sum(holds(node, cpu, gpu) * count for node, count in may_add)


def check(
    workers: int, cpu: float, gpu: float, nodes: Sequence[Node], may_add: Sequence[tuple[Node, int]] = ()
) -> None:
    """Raises UserError where the cluster can never hold so many workers; names what is short and what would fit.

    `cpu` and `gpu` are those of one worker.
    """
    if gpu > 1 and not float(gpu).is_integer():
        raise UserError(f"resources.gpu={_plain(gpu)}: above 1, a worker gets whole devices only",
                        f"resources.gpu={math.floor(gpu)} or resources.gpu={math.ceil(gpu)}")  # fmt: skip
    for key, value in (("CPU", cpu), ("GPU", gpu)):
        if 0 < value < 0.0001:
            raise UserError(
                f"{SETTINGS[key]}={_plain(value)}: Ray counts in steps of 0.0001", f"{SETTINGS[key]}=0.0001"
            )
    fits = most(cpu, gpu, nodes, may_add)
    if fits >= workers:
        return
    need = {"CPU": cpu, "GPU": gpu}
    kinds = [*((node, 1) for node in nodes), *may_add]
    totals = {key: sum(node.get(key, 0.0) * count for node, count in kinds) for key in need}
    short = [key for key in need if need[key] * workers > totals[key] + SLACK]
    asked = f"{workers} worker{'s' * (workers > 1)} of {_words(need)}"
    where = f"the cluster can never have more than {_words(totals, zero=short)} in all"
    if short:
        message = (
            f"{asked} ask{'s' * (workers == 1)} for {_words({key: need[key] * workers for key in short})}; {where}"
        )
    else:
        message = f"{asked} do not fit: a worker sits on one node, and the nodes have {_nodes(kinds)}"
    raise UserError(message, _nearest(workers, need, fits, kinds, short))


def _nearest(
    workers: int, need: dict[str, float], fits: int, kinds: Sequence[tuple[Node, int]], short: list[str]
) -> str:
    """The requests nearest to the refused one that would fit."""
    offers = [f"resources.workers={fits} is the most that fits"] if fits else []
    for key in short or [key for key in need if need[key]]:
        less = _less(key, workers, need, kinds)
        if less is not None:
            offers.append(f"{SETTINGS[key]}={_plain(less)}")
    if not offers and need["GPU"] and most(need["CPU"], 0, (), kinds) >= workers:
        offers.append("resources.gpu=0 trains without devices")
    return "; or ".join(offers) or "ask for less, or add nodes to the cluster"


def _less(key: str, workers: int, need: dict[str, float], kinds: Sequence[tuple[Node, int]]) -> float | None:
    """The largest smaller share a worker of one resource with which all workers fit; None where none does."""
    shares = {node.get(key, 0.0) / parts for node, _ in kinds for parts in range(1, workers + 1)}
    if key == "GPU":
        shares |= {1 / parts for parts in range(1, workers + 1)}
    shares = {math.floor(share) if share > 1 else math.floor(share * 100 + SLACK) / 100 for share in shares}
    for share in sorted(shares, reverse=True):
        other = {**need, key: share}
        if 0 < share < need[key] and most(other["CPU"], other["GPU"], (), kinds) >= workers:
            return share
    return None


def _words(quantities: Mapping[str, float], zero: Iterable[str] = ()) -> str:
    said = [f"{_plain(value)} {key}" for key, value in quantities.items() if value or key in zero]
    return " and ".join(said) or "no CPU or GPU"


def _nodes(kinds: Sequence[tuple[Node, int]]) -> str:
    counted: dict[str, int] = {}
    for node, count in kinds:
        words = _words({key: node.get(key, 0.0) for key in SETTINGS})
        counted[words] = counted.get(words, 0) + count
    return ", ".join(f"{words}{f' ({count} of them)' if count > 1 else ''}" for words, count in counted.items())


def _plain(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".") if value >= 0.0001 or not value else f"{value:g}"
