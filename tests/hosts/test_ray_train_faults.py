"""A run on Ray survives its workers, its nodes and its driver, follows the size of the cluster, and stays the same run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import Tensor

from distributed import checkpoint, record
from distributed.hosts import retries
from tests.hosts.conftest import Head, _kill_session
from tests.hosts.test_local import HOME
from tests.runs import distance

pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray takes 127.0.0.1 for this machine's address elsewhere

# In the 8th step of its process the last rank meets the first trouble that lies in the folder, and takes it away.
TASK = """
import os, signal, time
from pathlib import Path
import torch
from torch import nn
from torch.nn import functional
from tasks.task import Image, Label, Task

FOLDER = Path({folder!r})

class Own(Task):
    fields = {{"image": Image(1, 2, 2), "label": Label(classes=2)}}
    recipe = {{"data.batch_size": 10, "train.epochs": 4, "checkpoint.every": 5, "log.every": 1, "precision.dtype": "float64"}}

    def examples(self, source):
        return [{{"image": [[[i % 256, i // 256], [0, 255]]], "label": i % 2}} for i in range(200)]

    def build(self, facts, load):
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))

    def loss(self, model, batch):
        if model.training:
            calls.append(1)
            ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
            if len(calls) == 8 and ranks > 1 and torch.distributed.get_rank() == ranks - 1:
                for trouble in sorted((FOLDER / "troubles").glob("*"))[:1]:
                    trouble.unlink()
                    meet(trouble.name.partition("-")[2])
            if (FOLDER / "slow").exists():
                time.sleep(0.5)
        return {{"ce": functional.cross_entropy(model(batch["image"]), batch["label"])}}

calls = []

def meet(trouble):
    if trouble == "sleep":
        time.sleep(10000)
    elif trouble == "exit":
        os._exit(3)
    elif trouble == "raise":
        raise ValueError("the moon is full")
    else:
        os.kill(os.getpid(), getattr(signal, trouble))
"""


@dataclass
class Place:
    """A folder to run commands in, against a cluster."""

    folder: Path
    stores: Path
    head: Head
    started: list[int] = field(default_factory=list)  # processes, each the leader of a session

    def __post_init__(self) -> None:
        (self.folder / "own.py").write_text(TASK.format(folder=str(self.folder)))
        (self.folder / "troubles").mkdir()

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "own.Own" / "x"

    @property
    def slow(self) -> Path:
        """While it is there, a step takes half a second more."""
        return self.folder / "slow"

    def log(self) -> str:
        return (self.run / "log.txt").read_text() if (self.run / "log.txt").exists() else ""

    def start(self, *words: str, name: str = "x") -> subprocess.Popen[str]:
        # A test cannot wait for hours: a resize is worth its while at once.
        program = "from distributed.hosts import ray_train; ray_train.RESTART = 0.0\nimport sys\nfrom distributed.cli.main import run\nsys.exit(run(sys.argv[1:]))"
        options = ["--name", name, "--runs", str(self.folder / "runs"), "--stores", str(self.stores)]
        started = subprocess.Popen(
            [sys.executable, "-c", program, "train", f"{self.folder / 'own.py'}:Own", *words, *options],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=HOME,
            env={**os.environ, **self.head.environment, **LOOPBACK, "RAY_ADDRESS": self.head.address},
        )  # fmt: skip
        self.started.append(started.pid)
        return started

    def __call__(self, *words: str, name: str = "x") -> tuple[int, str]:
        return self.end_of(self.start(*words, name=name))

    def end_of(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        said, _ = process.communicate(timeout=250)
        return process.returncode, said

    def until(self, happened: Callable[[], Any], process: subprocess.Popen[str]) -> None:
        """Waits for something; a command that ends before is shown."""
        began = time.monotonic()
        while not happened():
            assert process.poll() is None, self.end_of(process)[1] + self.log()
            if time.monotonic() - began > 200:
                os.killpg(process.pid, signal.SIGKILL)
                raise AssertionError(self.end_of(process)[1] + self.log())
            time.sleep(0.1)

    def saved(self) -> int:
        """The step of the newest checkpoint, 0 where there is none."""
        return retries.newest_step(self.run) or 0

    def steps(self) -> int:
        return len(record.read(self.run / record.METRICS)) if (self.run / record.METRICS).exists() else 0

    def end(self, name: str = "x") -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """The weights, and the figures of every validation."""
        run = self.run.with_name(name)
        rows = [
            {name: value for name, value in row.items() if not record.is_measured(name)}
            for row in record.read(run / record.METRICS)
            if row["kind"] == "validation"
        ]
        return checkpoint.chosen(run, "last").model, rows

    def workers(self) -> list[int]:
        """Processes that train this run."""
        return [json.loads(path.read_bytes())["pid"] for path in (self.run / ".ray").glob("rank-*.json")]


@pytest.fixture
def place(tmp_path: Path, stores: Path, head: Head) -> Iterator[Place]:
    one = Place(tmp_path, stores, head)
    yield one
    for session in one.started:
        _kill_session(session)


def _gone(processes: list[int]) -> bool:
    """Whether processes are gone, after a moment to go."""
    there = [psutil.Process(pid) for pid in processes if psutil.pid_exists(pid)]
    return not psutil.wait_procs(there, timeout=20)[1]


def test_a_run_whose_worker_is_killed_leaves_and_hangs_goes_on_by_itself_to_the_same_bits(place):
    code, said = place("--workers", "2", "resources.host=local", name="undisturbed")
    assert code == 0, said
    for trouble in ("1-SIGKILL", "2-exit", "3-sleep"):
        (place.folder / "troubles" / trouble).touch()
    code, said = place("--workers", "2", "resources.hang=4")
    assert code == 0, said + place.log()
    weights, rows = place.end()
    expected, expected_rows = place.end("undisturbed")
    assert distance(weights, expected) == 0.0
    assert rows == expected_rows
    assert [one.kind for one in retries.read(place.run)] == ["lost", "lost", "hung"]
    assert all(one.rank == 1 for one in retries.read(place.run))
    assert said.count("going on from step") == 3, said
    assert "time.sleep(10000)" in (place.run / "stacks" / "rank-00001.txt").read_text()
    assert not (place.run / ".ray").exists()


def test_what_the_task_raises_ends_the_run_with_its_message(place):
    (place.folder / "troubles" / "1-raise").touch()
    code, said = place("--workers", "2", "resources.replace_lost=0", "checkpoint.every=100")
    assert code == 1
    assert "the moon is full" in said
    assert "own.py" in said


@pytest.mark.slow
def test_a_driver_is_stopped_and_another_one_killed_and_the_same_command_goes_on_to_the_same_bits(place):
    code, said = place("--workers", "2", "resources.host=local", name="undisturbed")
    assert code == 0, said
    place.slow.touch()
    first = place.start("--workers", "2", "checkpoint.every=1000")
    place.until(lambda: place.steps() > 3, first)
    workers = place.workers()
    first.send_signal(signal.SIGTERM)
    code, said = place.end_of(first)
    assert code == 130, said
    saved = place.saved()
    assert saved % 17, "a checkpoint amid an epoch of 17 steps"
    assert len(workers) == 2
    assert _gone(workers)

    second = place.start("--workers", "2")
    place.until(lambda: place.saved() > saved, second)
    workers = place.workers()
    second.kill()
    place.end_of(second)
    assert len(workers) == 2
    assert _gone(workers), "a worker is left over"
    place.slow.unlink()
    code, said = place("--workers", "2")
    assert code == 0, said
    assert distance(place.end()[0], place.end("undisturbed")[0]) == 0.0
    assert place.end()[1] == place.end("undisturbed")[1]
    assert place.log().count("goes on from step") == 2


# ---- nodes that come and go


@dataclass
class Node:
    """A node of a cluster."""

    raylet: psutil.Process
    id: str


NODE = """
import signal, sys
from ray._private.node import Node
from ray._private.parameter import RayParams
Node(RayParams(gcs_address=sys.argv[1], num_cpus=3, num_gpus=0, object_store_memory=80_000_000, min_worker_port=0,
               max_worker_port=0), head=False, shutdown_at_exit=False, spawn_reaper=False)
print("ready", flush=True)
signal.pause()
"""


@contextlib.contextmanager
def node(head: Head) -> Iterator[Node]:
    """A node with 3 CPUs, which the head has not; `ray start` joins no cluster on loopback."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | head.environment
    started = subprocess.Popen(
        [sys.executable, "-c", NODE, head.address], env=ours | LOOPBACK | {"RAY_enable_worker_prestart": "0"},
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert started.stdout is not None
        assert "ready" in started.stdout.readline()
        members = [one for one in psutil.process_iter() if _session(one) == started.pid]
        raylet = next(one for one in members if one.name() == "raylet")
        yield Node(raylet, next(word[10:] for word in raylet.cmdline() if word.startswith("--node_id=")))
    finally:
        _kill_session(started.pid)
        started.wait()
        started.stdout.close()


def _session(process: psutil.Process) -> int | None:
    with contextlib.suppress(OSError):
        return os.getsid(process.pid)
    return None


def _drain(head: Head, one: Node, seconds: int) -> None:
    """Tells a node that it is taken back in so many seconds, as a cloud's notice does."""
    subprocess.run(
        [Path(sys.executable).parent / "ray", "drain-node", "--address", head.address, "--node-id", one.id,
         "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
         "--deadline-remaining-seconds", str(seconds)],
        env={**os.environ, **head.environment, **LOOPBACK}, check=True, capture_output=True, timeout=60,
    )  # fmt: skip


def _at_work(place: Place, workers: int) -> bool:
    """Whether so many workers have learned something after they began."""
    notes = [line for line in place.log().splitlines() if "worker" in line and " on cpu" in line]
    return bool(notes) and f"{workers} worker" in notes[-1] and len(place.workers()) == workers


@pytest.mark.slow
def test_a_range_of_workers_follows_nodes_that_come_die_and_leave_and_learns_what_one_process_learns(place):
    words = ["train.epochs=20", "checkpoint.every=50"]
    code, said = place("--workers", "1", "resources.host=local", *words, name="undisturbed")
    assert code == 0, said
    place.slow.touch()
    with contextlib.ExitStack() as nodes:
        first = nodes.enter_context(node(place.head))
        run = place.start("--workers", "1..2", "resources.cpu=3", *words)
        place.until(lambda: _at_work(place, 1) and place.steps() > 2, run)
        second = nodes.enter_context(node(place.head))
        place.until(lambda: _at_work(place, 2), run)
        assert "room for 2 workers: saving" in place.log()

        second.raylet.kill()
        place.until(lambda: _at_work(place, 1), run)
        assert [one.kind for one in retries.read(place.run)] == ["lost"]

        before = place.saved()
        _drain(place.head, first, 60)
        place.until(lambda: "waiting: the cluster has room for 0" in place.log(), run)
        assert first.raylet.is_running(), "saved before the deadline"
        assert place.saved() > before
        nodes.enter_context(node(place.head))
        place.until(lambda: place.log().count("goes on from step") == 3 and _at_work(place, 1), run)
        assert f"goes on from step {place.saved()}" in place.log()
        place.slow.unlink()
        code, said = place.end_of(run)
    assert code == 0, said + place.log()
    assert len(retries.read(place.run)) == 1, "to move is no failure"
    assert distance(place.end()[0], place.end("undisturbed")[0]) < 1e-9
