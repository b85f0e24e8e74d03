"""A command whose words nobody reads: its terminal is gone, its pipe is closed, its file is on a full disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2]

STREAMS = [
    "closed",
    "broken",
    pytest.param("full", marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="")),
]


def _start(words: list[str], stdout: str, stderr: str) -> subprocess.Popen[str]:
    """Begins a command whose streams are "read", "closed", pipes without a reader ("broken") or on a "full" disk."""

    def opened(kind: str) -> int:
        if kind == "full":
            return os.open("/dev/full", os.O_WRONLY)
        if kind == "broken":
            receiving, sending = os.pipe()
            os.close(receiving)
            return sending
        return subprocess.PIPE

    closing = "".join(f" {number}>&-" for number, kind in ((1, stdout), (2, stderr)) if kind == "closed")
    command = ["sh", "-c", f'exec "$@"{closing}', "sh", sys.executable, str(HOME / "whipray.py"), *words]
    files = opened(stdout), opened(stderr)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=files[0], stderr=files[1], text=True)
    for file in files:
        if file != subprocess.PIPE:
            os.close(file)
    return process


def _code(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=100)
    return process.returncode


@pytest.mark.parametrize("kind", STREAMS)
def test_exit_codes_do_not_depend_on_readers(kind: str) -> None:
    assert _code(_start(["tasks"], kind, "read")) == 0
    assert _code(_start(["train", "digitz"], kind, kind)) == 2


def test_a_program_that_closed_stderr_gets_its_object() -> None:
    out, _ = _start(["train", "digitz", "--json"], "read", "closed").communicate(timeout=60)
    assert "digitz" in json.loads(out)["error"]["message"]


@pytest.mark.parametrize("kind", [STREAMS[0], pytest.param("broken", marks=pytest.mark.slow), STREAMS[2]])
def test_a_training_needs_no_reader(kind: str, tmp_path: Path, stores: Path) -> None:
    words = ["train", "housing", "train.epochs=1", "--name", "x", "--runs", str(tmp_path), "--stores", str(stores)]
    assert _code(_start(words, kind, kind)) == 0
    assert (tmp_path / "housing" / "x" / "summary.json").exists()


def test_a_training_whose_terminal_is_gone_saves_when_it_is_to_end(tmp_path: Path, stores: Path) -> None:
    words = ["train", "housing", "train.epochs=10000", "--name", "x", "--runs", str(tmp_path), "--stores", str(stores)]
    process, run = _start(words, "broken", "broken"), tmp_path / "housing" / "x"
    while not any(run.glob("checkpoints/step-*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert _code(process) == 130
    assert not (run / "failure.json").exists()
