"""What a cluster can hold: tables of numbers, and the same counted one worker after the other."""

import copy
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed import config
from distributed.hosts.feasibility import check, holds, most
from distributed.resources import Workers
from distributed.run import resolve
from tasks.errors import UserError

SMALL = {"CPU": 2.0}
BOX = {"CPU": 16.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("node", "cpu", "gpu", "expected"),
    [
        (SMALL, 1, 0, 2),
        (SMALL, 0.5, 0, 4),
        (SMALL, 0.1, 0, 20),  # 2 / 0.1 is not quite 20 in floats
        (SMALL, 1.5, 0, 1),
        (SMALL, 3, 0, 0),
        (SMALL, 1, 1, 0),
        (BOX, 1, 1, 2),
        (BOX, 12, 1, 1),
        (BOX, 1, 0.5, 4),
        (BOX, 1, 0.6, 2),  # two thirds of a device are left over on either
        (BOX, 0.1, 0.3, 6),
        ({"CPU": 4.0, "GPU": 0.5}, 1, 0.5, 1),  # the other half is somebody else's
        ({"CPU": 4.0, "GPU": 1.5}, 1, 0.25, 4),
        ({"CPU": 4.0, "GPU": 1.5}, 1, 1, 1),
        ({}, 1, 0, 0),
    ],
)
def test_a_node_holds(node: dict[str, float], cpu: float, gpu: float, expected: int) -> None:
    assert holds(node, cpu, gpu) == expected


def test_nodes_that_an_autoscaler_may_start_count_too() -> None:
    assert most(1, 1, [SMALL], [(BOX, 3)]) == 6
    check(6, 1, 1, [SMALL], [(BOX, 3)])


@pytest.mark.parametrize(
    ("workers", "cpu", "gpu", "nodes", "message", "hint"),
    [
        (4, 1, 0, [SMALL], "4 workers of 1 CPU ask for 4 CPU; the cluster can never have more than 2 CPU in all",
         "resources.workers=2 is the most that fits; or resources.cpu=0.5"),
        (1, 8, 0, [SMALL], "1 worker of 8 CPU asks for 8 CPU; the cluster can never have more than 2 CPU in all",
         "resources.cpu=2"),
        (2, 1, 1, [SMALL], "2 workers of 1 CPU and 1 GPU ask for 2 GPU; the cluster can never have more than 2 CPU",
         "resources.gpu=0 trains without devices"),
        (4, 1, 1, [BOX], "ask for 4 GPU", "resources.workers=2 is the most that fits; or resources.gpu=0.5"),
        (2, 3, 0, [{"CPU": 4.0}, SMALL], "the nodes have 4 CPU, 2 CPU",
         "resources.workers=1 is the most that fits; or resources.cpu=2"),
        (3, 3, 0, [{"CPU": 5.0}] * 2, "5 CPU (2 of them)",
         "resources.workers=2 is the most that fits; or resources.cpu=2"),
        (1, 1, 0, [], "0 CPU in all", "ask for less, or add nodes to the cluster"),
        (1, 1, 1.5, [BOX], "above 1, a worker gets whole devices only", "resources.gpu=1 or resources.gpu=2"),
        (1, 0.00001, 0, [BOX], "steps of 0.0001", "resources.cpu=0.0001"),
    ],
)  # fmt: skip
def test_too_much_is_refused_with_the_nearest_request_that_fits(
    workers: int, cpu: float, gpu: float, nodes: list[dict[str, float]], message: str, hint: str
) -> None:
    with pytest.raises(UserError) as raised:
        check(workers, cpu, gpu, nodes)
    assert message in raised.value.message
    assert raised.value.hint == hint


SHARES = st.sampled_from([0, 0.1, 0.25, 0.3, 0.5, 0.6, 1, 2, 3])
NODES = st.lists(st.fixed_dictionaries({"CPU": st.integers(0, 12), "GPU": st.integers(0, 4)}), max_size=4)


@given(SHARES, SHARES, NODES, st.integers(1, 20))
def test_counting_equals_placing_one_worker_after_the_other(
    cpu: float, gpu: float, nodes: list[dict[str, float]], workers: int
) -> None:
    if not cpu and not gpu:
        cpu = 1
    placed = _place(workers, cpu, gpu, nodes)
    assert min(workers, most(cpu, gpu, nodes)) == placed
    if placed == workers:
        check(workers, cpu, gpu, nodes)
        return
    with pytest.raises(UserError) as raised:
        check(workers, cpu, gpu, nodes)
    for offer in raised.value.hint.split("; or "):  # what is offered does fit
        setting, equals, value = offer.partition("=")
        number = float(value.split()[0]) if equals else 0.0
        if setting == "resources.workers":
            assert _place(int(number), cpu, gpu, nodes) == number
        elif setting == "resources.cpu":
            assert _place(workers, number, gpu, nodes) == workers
        elif setting == "resources.gpu":
            assert _place(workers, cpu, number, nodes) == workers


def _place(workers: int, cpu: float, gpu: float, nodes: list[dict[str, float]]) -> int:
    """First-fit in hundredths, device by device."""
    free = [(round(node["CPU"] * 100), [100] * node["GPU"]) for node in nodes]
    need, share = round(cpu * 100), round(gpu * 100)
    for placed in range(workers):
        for index, (cores, devices) in enumerate(free):
            if cores < need:
                continue
            left = _take(devices, share)
            if left is not None:
                free[index] = (cores - need, left)
                break
        else:
            return placed
    return workers


def _take(devices: list[int], share: int) -> list[int] | None:
    if share <= 100:
        for index, free in enumerate(devices):
            if free >= share:
                return [*devices[:index], free - share, *devices[index + 1 :]]
        return None if share else devices
    wanted = math.ceil(share / 100)
    whole = [index for index, free in enumerate(devices) if free == 100][:wanted]
    return [0 if index in whole else free for index, free in enumerate(devices)] if len(whole) == wanted else None


@pytest.mark.parametrize(("word", "least", "most"), [("1", 1, 1), ("2", 2, 2), ("2..8", 2, 8), ("3..3", 3, 3)])
def test_workers_are_a_number_or_a_range_and_count_as_the_most(word: str, least: int, most: int) -> None:
    run = resolve("digits", config.from_words([f"resources.workers={word}"]))
    workers = run.resources.workers
    assert (workers.least, workers) == (least, most)
    copied = copy.deepcopy(workers)
    assert (copied.least, copied) == (least, most)
    assert f"{Workers(workers.plain)}" == f"{workers}"
    assert type(run.values["resources.workers"]) in (int, str), "plain data, for YAML and JSON"


def test_a_range_survives_the_runs_own_file(tmp_path: Path) -> None:
    written = tmp_path / "config.yaml"
    written.write_text(config.to_yaml(resolve("digits", config.from_words(["resources.workers=2..8"])).values))
    again = resolve("digits", config.from_yaml(written))
    assert (again.resources.workers.least, again.resources.workers) == (2, 8)


@pytest.mark.parametrize("word", ["0", "-1", "8..2", "0..2", "2...8", "2..", "..8", "1.0", "x", "true", ""])
def test_anything_else_is_no_number_of_workers(word: str) -> None:
    with pytest.raises(UserError, match=r"expected a whole number, at least 1, or a range such as 2\.\.8"):
        resolve("digits", config.from_words([f"resources.workers={word}"]))


@pytest.mark.parametrize("kind", [Exception, RuntimeError, OSError, SystemExit])
def test_a_ray_that_does_not_start_is_told_with_the_way_without_it(monkeypatch, kind):
    from distributed.hosts import ray_cluster

    def init(**_):
        raise kind("The current node timed out during startup.\nMore")

    monkeypatch.setattr(ray_cluster.ray, "init", init)
    for name in (*ray_cluster.QUIET, "RAY_AUTH_TOKEN", ray_cluster.LOOPBACK):
        monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match="Ray does not start on this machine: The current node timed out") as refused:
        ray_cluster._start()
    assert "--no-ray" in refused.value.hint
