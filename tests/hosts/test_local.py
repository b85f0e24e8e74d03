"""Training on this machine without Ray, through the command itself."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2]
SMALL = ["task.model=mlp", "data.limit=200", "train.epochs=2"]

TASK = """
import os, signal, sys
import torch
from torch import nn
from torch.nn import functional
from tasks.task import Image, Label, Task, UserError

class Own(Task):
    trouble: str = ""  # what goes wrong at the third step
    fields = {"image": Image(1, 2, 2), "label": Label(classes=2)}
    recipe = {"data.batch_size": 10, "train.epochs": 2, "checkpoint.every": 1}

    def examples(self, source):
        return [{"image": [[[i % 256, i // 256], [0, 255]]], "label": i % 2} for i in range(200)]

    def build(self, facts, load):
        self_steps.clear()
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))

    def loss(self, model, batch):
        self_steps.append(1)
        mine = model.training and len(self_steps) == 3 and int(os.environ.get("LOCAL_TEST_RANK", rank())) == rank()
        if mine and self.trouble == "raise":
            raise RuntimeError("the network is on fire")
        if mine and self.trouble == "long":
            raise RuntimeError("on fire: " + "x" * 200_000)
        if mine and self.trouble == "user":
            raise UserError("the data are of the wrong kind", "use others")
        if mine and self.trouble == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if mine and self.trouble == "nan":
            return {"ce": model(batch["image"]).sum() * float("nan")}
        if mine and self.trouble == "pdb":
            breakpoint()
        return {"ce": functional.cross_entropy(model(batch["image"]), batch["label"])}

self_steps = []

def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
"""


@pytest.fixture
def own(tmp_path) -> str:
    path = tmp_path / "own.py"
    path.write_text(TASK)
    return f"{path}:Own"


def command_of(tmp_path: Path, stores: Path, *words: str) -> list[str]:
    folders = ["--runs", str(tmp_path / "runs"), "--stores", str(stores)]
    return [sys.executable, str(HOME / "whipray.py"), *words, *folders]


def whipray(
    tmp_path: Path, stores: Path, *words: str, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    command = command_of(tmp_path, stores, *words)
    # Ray, where another test has started it in this process, has put its own debugger in.
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONBREAKPOINT"}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        input=stdin,
        cwd=tmp_path,
        env={**ours, **environment},
    )


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_task_of_ones_own_trains_and_tells_a_program(tmp_path, stores, own, workers):
    told = whipray(tmp_path, stores, "train", own, "--workers", workers, "--no-ray", "--json", "--name", "x")
    assert told.returncode == 0, told.stderr
    result = json.loads(told.stdout)
    assert set(result) == {"run", "task", "epochs", "steps", "metrics", "seconds", "samples_per_second"}
    assert result["run"] == str(tmp_path / "runs" / "own.Own" / "x")
    assert set(result["metrics"]) == {"validation", "test"}
    assert (result["epochs"], result["steps"]) == (2, result["steps"])
    files = {path.name for path in Path(result["run"]).iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "metrics.parquet",
        "summary.json",
        "checkpoints",
    } <= files
    assert any(name.startswith("events.out.tfevents") for name in files)


def test_a_task_in_this_process_never_imports_ray(tmp_path, stores, own):
    code = (
        "import sys; from distributed.cli.main import run\n"
        f"code = run(['train', {own!r}, '--runs', {str(tmp_path / 'runs')!r}, '--stores', {str(stores)!r}])\n"
        "print(code, 'ray' in sys.modules)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HOME, timeout=120, check=True
    )
    assert told.stdout.splitlines()[-1] == "0 False"


def test_pdb_works_inside_loss(tmp_path, stores, own):
    told = whipray(tmp_path, stores, "train", own, "task.trouble=pdb", stdin="p 'rows', len(batch['label'])\nc\n")
    assert told.returncode == 0, told.stderr
    assert re.search(r"\('rows', \d+\)", told.stdout)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("trouble", "code", "words"),
    [
        ("raise", 1, "RuntimeError: the network is on fire"),
        ("user", 2, "the data are of the wrong kind"),
        ("nan", 1, "the loss 'ce' is nan"),
    ],
)
def test_what_goes_wrong_in_a_rank_is_one_message_and_stands_in_the_run(
    tmp_path, stores, own, workers, trouble, code, words
):
    told = whipray(
        tmp_path, stores, "train", own, f"task.trouble={trouble}", "--workers", workers, "--no-ray", "--name", "x", "log.every=1",
        LOCAL_TEST_RANK=str(int(workers) - 1),
    )  # fmt: skip
    assert told.returncode == code, told.stderr
    assert words in told.stderr
    assert "Traceback" not in told.stderr
    if trouble == "raise":
        assert "own.py" in told.stderr, "the place is the task's, whichever process it was"
    failure = json.loads((tmp_path / "runs" / "own.Own" / "x" / "failure.json").read_text())
    assert words.split(": ")[-1] in failure["message"]


def test_a_refused_run_leaves_nothing_behind(tmp_path, stores, own):
    told = whipray(tmp_path, stores, "train", own, "train.objective=acc", "--name", "x")
    assert told.returncode == 2
    assert "did you mean 'accuracy'?" in told.stderr
    assert not (tmp_path / "runs" / "own.Own" / "x").exists()


def test_a_refused_run_leaves_what_was_there_before(tmp_path, stores, own):
    folder = tmp_path / "runs" / "own.Own" / "x"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("precious")
    assert whipray(tmp_path, stores, "train", own, "train.objective=acc", "--name", "x").returncode == 2
    assert {path.name for path in folder.iterdir()} - {".lock"} == {"notes.txt"}


def test_an_error_of_any_length_crosses_from_a_rank(tmp_path, stores, own):
    told = whipray(
        tmp_path, stores, "train", own, "task.trouble=long", "--workers", "2", "--no-ray", LOCAL_TEST_RANK="1"
    )
    assert told.returncode == 1
    assert "on fire" in told.stderr


def test_training_goes_on_when_nobody_reads_its_words_any_more(tmp_path, stores, own):
    words = ["train", own, "train.epochs=30", "--name", "x", "--runs", str(tmp_path / "runs"), "--stores", str(stores)]
    process = subprocess.Popen(
        [sys.executable, str(HOME / "whipray.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=60)
    assert (tmp_path / "runs" / "own.Own" / "x" / "summary.json").exists()


def test_a_killed_rank_is_named_and_the_run_goes_on_when_started_again(tmp_path, stores, own):
    words = ["train", own, "--workers", "2", "--no-ray", "--name", "x"]
    told = whipray(tmp_path, stores, *words, "task.trouble=kill", "resources.replace_lost=0", LOCAL_TEST_RANK="1")
    assert told.returncode == 1
    assert "rank 1" in told.stderr
    assert "SIGKILL" in told.stderr
    failure = json.loads((tmp_path / "runs" / "own.Own" / "x" / "failure.json").read_text())
    assert (failure["rank"], "SIGKILL" in failure["message"]) == (1, True)
    again = whipray(tmp_path, stores, *words, "task.trouble=kill", LOCAL_TEST_RANK="5")
    assert again.returncode == 0, again.stderr
    history = (tmp_path / "runs" / "own.Own" / "x" / "log.txt").read_text()
    assert all(words in history for words in ("begins, 2 workers", "rank 1 failed", "goes on from step", "finished"))


def _started(tmp_path: Path, stores: Path, *words: str) -> subprocess.Popen[str]:
    command = command_of(tmp_path, stores, *words)
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )


def _await(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_one_interrupt_saves_and_stops_and_the_run_goes_on_later(tmp_path, stores, workers):
    words = [
        "train",
        "digits",
        "task.model=mlp",
        "train.epochs=400",
        "log.every=1",
        "--workers",
        workers,
        "--no-ray",
        "--name",
        "x",
    ]
    process = _started(tmp_path, stores, *words)
    _await(tmp_path / "runs" / "digits" / "x" / "checkpoints" / "last", process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    newest = max((tmp_path / "runs" / "digits" / "x" / "checkpoints").glob("step-*"))
    assert 0 < int(newest.name[5:]) < 400 * 23


def test_no_rank_outlives_a_killed_parent(tmp_path, stores):
    words = ["train", "digits", "task.model=mlp", "train.epochs=4000", "--workers", "2", "--no-ray", "--name", "x"]
    process = _started(tmp_path, stores, *words)
    _await(tmp_path / "runs" / "digits" / "x" / "checkpoints" / "last", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(100):
        alive = subprocess.run(
            ["ps", "-o", "stat=", "-g", str(process.pid)], capture_output=True, text=True, check=False
        ).stdout.split()
        if all(state.startswith("Z") for state in alive):
            break
        time.sleep(0.1)
    assert all(state.startswith("Z") for state in alive), "ranks are left over"
