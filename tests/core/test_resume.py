"""A run that was stopped or killed goes on to the very bits of one that was not."""

import contextlib
import gzip
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from distributed import checkpoint, durable
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
    while process.poll() is None and not any(path >= awaited for path in awaited.parent.glob("step-*")):
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


# ---- killed again and again, wherever it is


LEARN = (
    "task.model=mlp", "train.epochs=2", "data.limit=300", "data.batch_size=32", "checkpoint.every=3", "log.every=2",
)  # fmt: skip


class Deadly(durable.Operations):
    """Kills the process at its N-th operation on the disk, of whichever thread: before it, or in its middle."""

    def __init__(self, at: int, torn: bool) -> None:
        self.left, self.torn, self.lock = at, torn, threading.Lock()

    def _count(self, descriptor: int | None = None, data: bytes | memoryview = b"") -> None:
        with self.lock:
            self.left -= 1
            if self.left == 0:
                if descriptor is not None and self.torn:
                    os.write(descriptor, memoryview(data)[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

    def write(self, descriptor, data):
        self._count(descriptor, data)
        super().write(descriptor, data)

    def sync(self, descriptor):
        self._count()
        super().sync(descriptor)

    def rename(self, source, target):
        self._count()
        super().rename(source, target)


Kill = tuple[int, bool] | float  # at which operation, and whether in its middle; or after how many seconds


def _killed(plain: dict, kill: Kill) -> bool:
    """Trains in a forked process that is killed there; returns whether it was, or came to its end before."""
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)
            if isinstance(kill, tuple):
                durable.OPERATIONS = Deadly(*kill)
            job.work(job.Job.from_plain(plain), World())
            os._exit(0)
        finally:
            os._exit(1)
    if isinstance(kill, float):
        time.sleep(kill)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert status == 0 or os.WIFSIGNALED(status), "it failed by itself"
    return status != 0


@pytest.fixture(scope="module")
def forker():
    """A process without threads, which can be forked at will."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        yield pool


@pytest.fixture(scope="module", params=["true", "false"], ids=["background", "foreground"])
def learned(request, tmp_path_factory, stores):
    words = (*LEARN, f"checkpoint.background={request.param}")
    return words, runs.train(tmp_path_factory.mktemp("learned"), stores, "digits", *words)


operations = st.tuples(st.integers(1, 90), st.booleans())


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kills=st.lists(operations | st.floats(0.01, 0.6), min_size=1, max_size=4))
@example(kills=[(60, True), (2, False), (1, False), 0.2])
def test_a_run_killed_several_times_anywhere_records_and_learns_the_very_same(
    tmp_path_factory, stores, forker, learned, kills
):
    words, oracle = learned
    one = runs.begin(tmp_path_factory.mktemp("killed"), stores, "digits", *words)
    for kill in kills:
        if not forker.submit(_killed, one.to_plain(), kill).result():
            break
    job.work(one, World())
    assert runs.distance(runs.parameters(one), runs.parameters(oracle)) == 0
    assert runs.rows(one) == runs.rows(oracle)
    assert runs.summary(one)["metrics"] == runs.summary(oracle)["metrics"]
    assert not [path for path in one.directory.rglob(".*") if path.name != ".lock"]


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
    with contextlib.closing(train(one.run, store, one.directory, World(), None)) as progresses:
        next(progress for progress in progresses if progress.kind == "checkpoint" and progress.step >= 8)
    damaged = checkpoint.newest(one.directory)[0].path / "model.safetensors"
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
