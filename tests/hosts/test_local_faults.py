"""Several processes without Ray: whatever becomes of one of them, the run goes on by itself, to the same end."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from distributed import checkpoint, record
from distributed.hosts import hangs, retries
from tests.ranks import PRELOADED
from tests.runs import distance

# TROUBLE says what happens to rank 1 in the 8th step of its process, as often as TIMES says.
TASK = """
import os, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from torch.nn import functional
from tasks.task import Image, Label, Task

class Own(Task):
    fields = {"image": Image(1, 2, 2), "label": Label(classes=2)}
    recipe = {"data.batch_size": 10, "train.epochs": 2, "checkpoint.every": 5, "log.every": 1}

    def examples(self, source):
        return [{"image": [[[i % 256, i // 256], [0, 255]]], "label": i % 2} for i in range(200)]

    def build(self, facts, load):
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))

    def loss(self, model, batch):
        if model.training:
            calls.append(1)
            if len(calls) == 8 and torch.distributed.get_rank() == 1:
                trouble(os.environ.get("TROUBLE"))
            if os.environ.get("TROUBLE") == "slow":
                time.sleep(0.3 if torch.distributed.get_rank() else 0.1)
        return {"ce": functional.cross_entropy(model(batch["image"]), batch["label"])}

calls = []

def trouble(kind):
    marker = Path(os.environ.get("MARKER", "/nonexistent"))
    if kind is None or kind == "slow" or marker.exists() and len(marker.read_text()) >= int(os.environ.get("TIMES", 1)):
        return
    marker.open("a").write("x")
    if kind == "sleep":
        time.sleep(1000)  # for ever
    elif kind == "exit":
        sys.exit(3)
    elif kind == "vanish":
        os._exit(4)
    elif kind == "raise":
        raise ValueError("the moon is full")
    elif kind == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory")
    else:
        os.kill(os.getpid(), getattr(signal, kind))
"""
WORDS = ["--workers", "2", "--no-ray", "--name", "x", "log.tensorboard=false"]


def _command(words: list[str], environment: dict[str, str], said: Path) -> None:
    """The command in a forked process, without the seconds that importing torch takes."""
    os.setsid()
    os.environ.update(environment)
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from distributed.cli.main import run

    sys.exit(run(words))


@dataclass
class Told:
    """How a command ended."""

    code: int
    words: str
    run: Path

    def failure(self) -> dict[str, Any]:
        return json.loads((self.run / "failure.json").read_text())

    def log(self) -> str:
        return (self.run / "log.txt").read_text()

    def end(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """The weights, and the figures of every validation."""
        rows = [
            {name: value for name, value in row.items() if name in ("step", "epoch", "loss", "accuracy")}
            for row in record.read(self.run / record.METRICS)
            if row["kind"] == "validation"
        ]
        return checkpoint.chosen(self.run, "last").model, rows


@dataclass
class Place:
    """A folder to run commands in."""

    folder: Path
    stores: Path
    task: str = ""

    def __post_init__(self) -> None:
        (self.folder / "own.py").write_text(TASK)
        self.task = f"{self.folder / 'own.py'}:Own"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([*PRELOADED, "distributed.hosts.local", "distributed.cli.main"])

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "own.Own" / "x"

    def start(self, *words: str, **environment: str) -> Any:
        words = ("train", self.task, *WORDS, "--runs", str(self.folder / "runs"), "--stores", str(self.stores), *words)
        environment = {"MARKER": str(self.folder / "marker"), **environment}
        process = self.context.Process(target=_command, args=([*words], environment, self.folder / "said"))
        process.start()
        return process

    def wait(self, process: Any) -> Told:
        process.join(100)
        assert process.exitcode is not None, (self.folder / "said").read_text()
        assert not _alive(process.pid), "processes are left over"
        return Told(process.exitcode, (self.folder / "said").read_text(), self.run)

    def __call__(self, *words: str, **environment: str) -> Told:
        return self.wait(self.start(*words, **environment))


def _alive(session: int) -> list[str]:
    """The processes of a session that have not ended, after a moment to do so."""
    for _ in range(50):
        told = subprocess.run(["ps", "-o", "stat=,pid=", "-g", str(session)], capture_output=True, text=True).stdout
        alive = [line for line in told.splitlines() if not line.strip().startswith("Z")]
        if not alive:
            return []
        time.sleep(0.1)
    return alive


@pytest.fixture
def place(tmp_path, stores) -> Place:
    return Place(tmp_path, stores)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, stores) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    told = Place(tmp_path_factory.mktemp("uninterrupted"), stores)()
    assert told.code == 0, told.words
    return told.end()


def _is_equal(told: Told, end: tuple[dict[str, Tensor], list[dict[str, Any]]]) -> bool:
    weights, rows = told.end()
    return distance(weights, end[0]) == 0 and rows == end[1]


@pytest.mark.parametrize(
    ("trouble", "kind", "words"),
    [
        ("SIGKILL", "lost", "was killed by SIGKILL"),
        pytest.param("SIGSEGV", "lost", "was killed by SIGSEGV", marks=pytest.mark.slow),
        pytest.param("vanish", "lost", "ended with exit code 4", marks=pytest.mark.slow),
        pytest.param("exit", "lost", "ended itself with exit code 3", marks=pytest.mark.slow),
        ("raise", "user", "ValueError: the moon is full (own.py:"),
    ],
)
def test_a_run_goes_on_without_the_rank_that_failed_once(place, uninterrupted, trouble, kind, words):
    told = place(TROUBLE=trouble)
    assert told.code == 0, told.words
    [failed] = retries.read(told.run)
    assert (failed.kind, failed.rank) == (kind, 1)
    assert 5 <= failed.step <= 7
    line = next(line for line in told.words.splitlines() if "going on from step 5" in line)
    assert words in line
    assert "rank 1" in line
    assert "(1 of " in line
    assert "going on from step 5" in told.log()
    assert not (told.run / "failure.json").exists(), "a run that went on has not failed"
    assert not (told.run / ".pulse").exists()
    assert _is_equal(told, uninterrupted)


def test_a_rank_that_sleeps_for_ever_is_named_with_the_line_where_it_sleeps(place, uninterrupted):
    told = place("resources.hang=3", TROUBLE="sleep")
    assert told.code == 0, told.words
    [failed] = retries.read(told.run)
    assert (failed.kind, failed.rank) == ("hung", 1)
    line = 1 + TASK.splitlines().index("        time.sleep(1000)  # for ever")
    assert f"own.py:{line} in trouble" in failed.message
    stack = (told.run / hangs.STACKS / "rank-00001.txt").read_text()
    assert f'own.py", line {line} in trouble' in stack
    assert "waits for others" in (told.run / hangs.STACKS / "rank-00000.txt").read_text()
    assert _is_equal(told, uninterrupted)


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_and_ended(place, uninterrupted):
    told = place("resources.hang=3", TROUBLE="SIGSTOP")
    assert told.code == 0, told.words
    [failed] = retries.read(told.run)
    assert (failed.kind, failed.rank) == ("hung", 1)
    assert "has been stopped" in failed.message
    assert _is_equal(told, uninterrupted)


@pytest.mark.slow
def test_a_run_that_hangs_too_often_says_who_and_where(place):
    told = place("resources.hang=2", "resources.replace_hung=0", TROUBLE="sleep", TIMES="9")
    assert told.code == 1
    failure = told.failure()
    assert (failure["rank"], failure["kind"]) == (1, "Hung")
    assert failure["step"] == 7
    assert failure["pid"] != os.getpid()
    assert "in trouble" in failure["traceback"]
    assert "error: rank 1 (process" in told.words
    assert "stacks" in told.words


@pytest.mark.slow
def test_no_alarm_because_one_rank_is_three_times_slower_than_the_other(place):
    told = place("resources.hang=1.5", "train.epochs=1", TROUBLE="slow")
    assert told.code == 0, told.words
    assert retries.read(told.run) == []


@pytest.mark.slow
def test_a_rank_that_is_lost_again_and_again_ends_the_run_when_its_replacements_are_spent(place):
    told = place("checkpoint.every=100", "resources.replace_lost=2", TROUBLE="SIGKILL", TIMES="9")
    assert told.code == 1
    assert [one.kind for one in retries.read(told.run)] == ["lost"] * 3
    assert "going on from the beginning (1 of 2)" in told.words
    assert "resources.replace_lost" in told.words
    assert "SIGKILL" in told.failure()["message"]
    again = place("checkpoint.every=100", "resources.replace_lost=2", TROUBLE="SIGKILL", TIMES="9")
    assert again.code == 1
    assert len(retries.read(told.run)) == 4, "a driver that begins again knows what the earlier one has spent"


@pytest.mark.slow
def test_no_worker_is_replaced_where_none_may_be(place):
    told = place("resources.replace_lost=0", TROUBLE="SIGKILL")
    assert told.code == 1
    assert "going on" not in told.words
    assert "rank 1" in told.words
    assert place("resources.replace_lost=0").code == 0, "the same command goes on"


@pytest.mark.slow
def test_the_same_error_of_the_task_at_the_same_step_ends_the_run_at_once(place):
    """The 8th step of the first process is step 7; from its checkpoint 5 there, the 8th is another."""
    told = place("checkpoint.every=100", TROUBLE="raise", TIMES="9")
    assert told.code == 1
    assert len(retries.read(told.run)) == 1, "there is no checkpoint before it"
    assert "ValueError: the moon is full (own.py:" in told.words
    later = place(TROUBLE="raise", TIMES="9")
    assert later.code == 1
    assert [(one.kind, one.step) for one in retries.read(told.run)] == [("user", 7), ("user", 7)]


@pytest.mark.slow
def test_memory_that_runs_out_is_told_with_what_to_shrink(place):
    told = place("checkpoint.every=100", TROUBLE="memory", TIMES="9")
    assert told.code == 1
    assert "CUDA out of memory" in told.words
    assert "data.micro_batch_size" in told.words


def _until(condition: Callable[[], object], process: Any) -> None:
    while not condition() and process.exitcode is None:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_first_signal_saves_and_stops_and_the_same_command_goes_on(place, uninterrupted, number):
    process = place.start(TROUBLE="slow")
    _until(lambda: checkpoint.folder_of(place.run, 5).exists(), process)
    os.kill(process.pid, number)
    told = place.wait(process)
    assert told.code == 130, told.words
    assert retries.read(told.run) == []
    assert 5 <= checkpoint.chosen(told.run, "last").step < 40
    again = place()
    assert again.code == 0
    assert _is_equal(again, uninterrupted)


def test_the_second_interrupt_ends_at_once(place):
    process = place.start("log.every=1000", "resources.hang=none", TROUBLE="sleep")
    _until(lambda: (place.folder / "marker").exists(), process)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    words = (place.folder / "said").read_text()
    assert words.count("stopping after a checkpoint") == 1, "the ranks, which Ctrl-C reaches too, need not say it again"
    os.killpg(process.pid, signal.SIGINT)
    told = place.wait(process)
    assert told.code == 130, told.words
    assert "Traceback" not in told.words
    assert retries.read(told.run) == []


def test_ranks_go_with_a_killed_driver_and_the_same_command_goes_on(place, uninterrupted):
    process = place.start(TROUBLE="slow")
    _until(lambda: checkpoint.folder_of(place.run, 5).exists(), process)
    os.kill(process.pid, signal.SIGKILL)
    assert place.wait(process).code == -signal.SIGKILL
    again = place()
    assert again.code == 0, again.words
    assert _is_equal(again, uninterrupted)


def test_a_run_whose_directory_is_taken_away_ends_and_leaves_what_is_put_in_its_place(place):
    process = place.start("train.epochs=100", TROUBLE="slow")
    _until(lambda: checkpoint.folder_of(place.run, 5).exists(), process)
    place.run.rename(place.folder / "aside")
    place.run.mkdir()
    (place.run / "config.yaml").write_text("another run's")
    told = place.wait(process)
    assert told.code == 1, told.words
    assert "was removed, or moved, while it trained" in told.words
    assert "Traceback" not in told.words
    assert [path.name for path in place.run.iterdir()] == ["config.yaml"]


def test_a_preparation_ends_with_an_interrupt_of_its_parent_alone(place, tmp_path):
    slow = "        import time; Path(os.environ['MARKER']).touch(); time.sleep(1000)\n"
    (place.folder / "own.py").write_text(TASK.replace("(self, source):\n", f"(self, source):\n{slow}"))
    process = place.start("--stores", str(tmp_path / "fresh"))
    _until(lambda: (place.folder / "marker").exists(), process)
    os.kill(process.pid, signal.SIGINT)
    assert place.wait(process).code == 130
