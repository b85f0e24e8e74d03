"""Training on real Ray Train workers: the same training, and failures that are told as such."""

import json
from pathlib import Path

import pytest

from distributed.cli.main import run
from distributed.resources import cpu_count
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


def test_what_a_worker_raises_is_one_message_and_stands_in_the_run(tmp_path, stores, capfd):
    task = tmp_path / "own.py"
    task.write_text(TASK)
    words = ["train", f"{task}:Own", "--workers", "2", "--name", "x", "log.tensorboard=false", "task.trouble=user"]
    assert whipray(tmp_path, stores, *words) == 2
    error = json.loads(capfd.readouterr().out)["error"]
    assert error["message"] == "the data are of the wrong kind"


def test_more_workers_than_the_machine_can_ever_hold_are_refused_with_what_would_fit(tmp_path, stores, capfd):
    assert whipray(tmp_path, stores, "train", "digits", "--workers", "500") == 2
    error = json.loads(capfd.readouterr().out)["error"]
    assert "500 workers" in error["message"]
    assert "resources.workers=" in error["hint"]
    assert not (tmp_path / "runs").exists()


def test_a_range_of_workers_takes_what_this_machine_has_and_learns_the_same(tmp_path, stores, capfd):
    one = runs.train(tmp_path, stores, "digits", *MLP, name="one")
    words = ["train", "digits", *MLP, "log.tensorboard=false", "--workers", "1..2"]
    code = whipray(tmp_path, stores, *words, "--name", "ray")
    told = capfd.readouterr()
    assert code == 0, told.err
    ray = runs.Job(one.run, one.store, Path(json.loads(told.out)["run"]))
    assert runs.distance(runs.parameters(one), runs.parameters(ray)) < 1e-9
    assert runs.summary(ray)["workers"] == min(2, cpu_count())
    assert "workers: 1..2" in (ray.directory / "config.yaml").read_text()


def test_a_range_that_the_machine_cannot_even_begin_is_refused(tmp_path, stores, capfd):
    assert whipray(tmp_path, stores, "train", "digits", "--workers", "500..600") == 2
    assert "500 workers" in json.loads(capfd.readouterr().out)["error"]["message"]
