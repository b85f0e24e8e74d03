"""Commands are called in this process through the door that the shell uses; one tiny trained run serves all tests."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distributed.cli.main import run

TINY = ("task.model=mlp", "train.epochs=1", "data.limit=200", "log.tensorboard=false")


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Exactly one object on stdout."""
        return json.loads(self.out)


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Path:
    """A folder of runs with one finished run, digits/tiny; tests that change it work on a copy."""
    runs = tmp_path_factory.mktemp("trained") / "runs"
    assert run(["train", "digits", *TINY, "--name", "tiny", "--runs", str(runs), "--stores", str(stores)]) == 0
    return runs


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of the folder of runs, to be changed."""
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def whipray(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Answer]:
    """Calls one command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def call(*words: Any) -> Answer:
        capsys.readouterr()
        code = run([str(word) for word in words])
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(whipray: Callable[..., Answer]) -> Callable[..., str]:
    """Calls a command that must be refused as the user's mistake; returns message and hint."""

    def call(*words: Any) -> str:
        answer = whipray(*words, "--json")
        assert answer.code == 2, answer
        error = answer.json["error"]
        assert "Traceback" not in answer.err
        return f"{error['message']}\n{error['hint']}"

    return call


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A file that can be predicted."""
    path = tmp_path / "one.png"
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(path)
    return path
