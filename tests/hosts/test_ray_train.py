"""Training on real Ray Train workers: the same training, and failures that are told as such."""

import json
from pathlib import Path

import pytest

from distributed.cli.main import run
from tests import runs
from tests.hosts.test_local import TASK

# Ray leaves sockets to the garbage collector and uses deprecated names of its own; neither is an error of a test.
pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
MLP = ("task.model=mlp", "precision.dtype=float64", "train.steps=20", "data.batch_size=50")


def whipray(tmp_path: Path, stores: Path, *words: str) -> int:
    return run([*words, "--runs", str(tmp_path / "runs"), "--stores", str(stores), "--json"])


def test_two_ray_workers_learn_what_one_process_learns(tmp_path, stores, capfd):
    one = runs.train(tmp_path, stores, "digits", *MLP, name="one")
    code = whipray(
        tmp_path, stores, "train", "digits", *MLP, "log.tensorboard=false", "--workers", "2", "--name", "ray"
    )
    told = capfd.readouterr()
    assert code == 0, told.err
    result = json.loads(told.out)
    assert result["metrics"]["test"] == pytest.approx(runs.summary(one)["metrics"]["test"], abs=1e-9)
    ray = runs.Job(one.run, one.store, Path(result["run"]))
    assert runs.distance(runs.parameters(one), runs.parameters(ray)) < 1e-9
    for here, there in zip(runs.rows(one), runs.rows(ray), strict=True):
        assert here == pytest.approx(there, abs=1e-9)
    assert runs.summary(ray)["workers"] == 2
    assert "epoch 0/20  step 20" in told.err, "the driver must show what the workers record"


def test_a_worker_killed_by_kill_9_fails_the_run_which_goes_on_when_started_again(tmp_path, stores, capfd, monkeypatch):
    task = tmp_path / "own.py"
    # The worker dies at its third step unless it finds that it died before.
    marker = tmp_path / "died"
    task.write_text(
        TASK.replace(
            'if mine and self.trouble == "kill":',
            f'if mine and rank() == 1 and not os.path.exists({str(marker)!r}):\n            open({str(marker)!r}, "w").close()',
        )
    )
    words = ["train", f"{task}:Own", "--workers", "2", "--name", "x"]
    assert whipray(tmp_path, stores, *words) == 1
    assert "rank" in json.loads(capfd.readouterr().out)["error"]["message"]
    assert marker.exists()
    assert whipray(tmp_path, stores, *words) == 0
    assert json.loads(capfd.readouterr().out)["epochs"] == 2


def test_more_workers_than_the_machine_can_ever_hold_are_refused_with_what_would_fit(tmp_path, stores, capfd):
    assert whipray(tmp_path, stores, "train", "digits", "--workers", "500") == 2
    error = json.loads(capfd.readouterr().out)["error"]
    assert "500 workers" in error["message"]
    assert "resources.workers=" in error["hint"]
    assert not (tmp_path / "runs").exists()
