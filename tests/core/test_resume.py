"""A run that was stopped or killed goes on to the very bits of one that was not."""

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distributed import checkpoint
from distributed.data.store import Store
from distributed.hosts import job
from distributed.loop import train
from distributed.world import World
from tasks.digits import BUNDLED
from tasks.errors import UserError
from tests import runs

# Everything that has state: momenta, batch normalisation, early stopping, a plateau, half-summed losses.
WORDS = (
    "task.width=4", "train.epochs=3", "data.limit=400", "data.batch_size=64", "checkpoint.every=2", "log.every=3",
    "schedule.name=plateau", "schedule.patience=1", "train.clip_norm=1",
)  # fmt: skip
HOME = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, stores):
    return runs.train(tmp_path_factory.mktemp("whole"), stores, "digits", *WORDS)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop_at=st.integers(1, 20))
def test_a_run_abandoned_at_any_progress_ends_as_if_nothing_had_happened(tmp_path_factory, stores, whole, stop_at):
    one = runs.begin(tmp_path_factory.mktemp("run"), stores, "digits", *WORDS)
    store = Store(one.store, dict(one.run.task.fields))
    for count, _ in enumerate(train(one.run, store, one.directory, World(), None), start=1):
        if count == stop_at:
            break
    job.work(one, World())
    assert runs.distance(runs.parameters(one), runs.parameters(whole)) == 0
    assert runs.rows(one)[-1] == runs.rows(whole)[-1]
    assert runs.summary(one)["metrics"] == runs.summary(whole)["metrics"]


def _command(folder: Path, stores: Path) -> list[str]:
    words = [
        "train",
        "digits",
        *WORDS,
        "--no-ray",
        "--name",
        "x",
        "--runs",
        str(folder / "runs"),
        "--stores",
        str(stores),
    ]
    return [sys.executable, str(HOME / "whipray.py"), *words]


@pytest.fixture(scope="module")
def commanded(tmp_path_factory, stores) -> Path:
    """The folder of a run that the command trained without interruption, with as many threads as it likes."""
    folder = tmp_path_factory.mktemp("commanded")
    subprocess.run(_command(folder, stores), capture_output=True, timeout=120, check=True)
    return folder / "runs" / "digits" / "x"


@pytest.mark.parametrize("steps_before_the_kill", [2, 8])
def test_a_run_killed_by_kill_9_goes_on_bit_for_bit(tmp_path, stores, whole, commanded, steps_before_the_kill):
    folder = tmp_path / "runs" / "digits" / "x"
    process = subprocess.Popen(_command(tmp_path, stores), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    awaited = checkpoint.folder_of(folder, steps_before_the_kill)
    while not awaited.exists() and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"

    again = subprocess.run(_command(tmp_path, stores), capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    one, oracle = (job.Job(whole.run, whole.store, path) for path in (folder, commanded))
    assert runs.distance(runs.parameters(one), runs.parameters(oracle)) == 0
    assert runs.rows(one) == runs.rows(oracle)
    assert runs.summary(one)["metrics"] == runs.summary(oracle)["metrics"]


def test_a_finished_run_says_so_and_more_epochs_go_on_from_its_end(tmp_path, stores):
    one = runs.train(
        tmp_path, stores, "digits", "task.model=mlp", "data.limit=200", "train.epochs=1", "schedule.name=constant"
    )
    again = runs.begin(
        tmp_path, stores, "digits", "task.model=mlp", "data.limit=200", "train.epochs=1", "schedule.name=constant"
    )
    assert job.begin(again) == runs.summary(one)
    more = runs.train(
        tmp_path, stores, "digits", "task.model=mlp", "data.limit=200", "train.epochs=2", "schedule.name=constant"
    )
    assert runs.summary(more)["epochs"] == 2
    whole = runs.train(
        tmp_path,
        stores,
        "digits",
        "task.model=mlp",
        "data.limit=200",
        "train.epochs=2",
        "schedule.name=constant",
        name="whole",
    )
    assert runs.distance(runs.parameters(more), runs.parameters(whole)) == 0


def test_other_settings_under_the_same_name_are_refused_with_the_differences(tmp_path, stores):
    runs.begin(tmp_path, stores, "digits", "optimizer.lr=0.1")
    with pytest.raises(UserError, match=r"optimizer.lr: 0.1 before, 0.2 now"):
        runs.begin(tmp_path, stores, "digits", "optimizer.lr=0.2")


def test_a_run_does_not_go_on_with_other_data_in_silence(tmp_path, stores):
    raw = tmp_path / "digits.csv"
    lines = gzip.decompress(BUNDLED.read_bytes()).decode().splitlines()
    raw.write_text("\n".join(lines[:400]))
    runs.begin(tmp_path, stores, "digits", f"task.source.path={raw}")
    raw.write_text("\n".join(lines[400:900]))
    with pytest.raises(UserError, match="the raw data, or the code that reads them, changed"):
        runs.begin(tmp_path, stores, "digits", f"task.source.path={raw}")


def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(tmp_path, stores, whole, caplog):
    one = runs.begin(tmp_path, stores, "digits", *WORDS)
    store = Store(one.store, dict(one.run.task.fields))
    for progress in train(one.run, store, one.directory, World(), None):
        if progress.kind == "checkpoint" and progress.step == 8:
            break
    damaged = checkpoint.folder_of(one.directory, 8) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    job.work(one, World())
    assert "model.safetensors: has" in caplog.text
    assert runs.distance(runs.parameters(one), runs.parameters(whole)) == 0


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew_in_silence(tmp_path, stores):
    one = runs.train(tmp_path, stores, "digits", "task.model=mlp", "data.limit=100", "train.epochs=1")
    for manifest in one.directory.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{")
    with pytest.raises(UserError, match="no complete checkpoint is left"):
        job.work(one, World())


def test_two_processes_cannot_train_one_run(tmp_path, stores):
    one = runs.begin(tmp_path, stores, "digits")
    with job.owned(one.directory):
        again = subprocess.run(
            [*_command(tmp_path, stores)[:-5], "run", "--runs", str(tmp_path / "runs"), "--stores", str(stores)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert again.returncode == 2
    assert "another process is training this run" in again.stderr
