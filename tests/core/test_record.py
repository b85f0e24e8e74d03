"""What a run leaves behind while it trains, also when the disk is full or the process dies."""

import errno
import json
import os

import pytest
from pyarrow import parquet
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from distributed import durable, record, saved
from distributed.hosts import job
from distributed.world import World
from tasks.errors import RunFailed
from tests import runs

SMALL = ("task.model=mlp", "data.limit=200", "data.batch_size=50", "train.epochs=2")


def full_disk_at(count: int) -> type[durable.Operations]:
    """Operations whose N-th write finds the disk full after half of it."""

    class Full(durable.Operations):
        left = count

        def write(self, descriptor, data):
            Full.left -= 1
            if Full.left == 0:
                os.write(descriptor, memoryview(data)[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write(descriptor, data)

    return Full


def test_a_row_that_is_lost_to_a_full_disk_stops_no_training_and_spoils_no_other(tmp_path, monkeypatch, caplog):
    recorder = record.Recorder(tmp_path, record.Log(tensorboard=False), None)
    monkeypatch.setattr(durable, "OPERATIONS", full_disk_at(2)())
    for step in (1, 2, 3):
        recorder.add("train", 0, step, {"loss": 1.0}, {})
    assert [row["step"] for row in record.read(tmp_path / "metrics.jsonl")] == [1, 3]
    assert "a row was lost" in caplog.text


def test_a_torn_row_is_left_out_by_whoever_reads(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n\xff\xfe\n3\n{"step": 2}\n{"step"')
    assert [row["step"] for row in record.read(path)] == [1, 2]


def test_a_figure_that_is_not_finite_is_null_and_the_parquet_table_holds_all_rows(tmp_path):
    recorder = record.Recorder(tmp_path, record.Log(tensorboard=False), None)
    recorder.add("train", 0, 1, {"loss": float("nan")}, {})
    recorder.add("validation", 1, 1, {"accuracy": 0.5}, {})
    recorder.conclude({}, 1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"] is None
    table = parquet.read_table(tmp_path / "metrics.parquet").to_pylist()
    assert [(row["kind"], row["accuracy"]) for row in table] == [("train", None), ("validation", 0.5)]


def _events(folder):
    return [event for path in sorted(folder.glob("events.out.*")) for event in EventFileLoader(str(path)).Load()]


def test_tensorboard_sees_scalars_settings_and_where_a_resumed_run_began_again(tmp_path):
    recorder = record.Recorder(tmp_path, record.Log(), None)
    recorder.add("train", 0, 5, {"loss": 1.5}, {})
    recorder.close()
    recorder = record.Recorder(tmp_path, record.Log(), 3, {"optimizer.lr": 0.1, "task.none": None})
    recorder.add("train", 0, 5, {"loss": 2.5}, {})
    recorder.conclude({"test/accuracy": 0.9}, 5)
    recorder.close()
    events = _events(tmp_path)
    tags = {(event.step, value.tag) for event in events if event.HasField("summary") for value in event.summary.value}
    assert {(5, "train/loss"), (5, "best/test/accuracy")} <= tags
    assert any("hparams" in tag for _, tag in tags)
    assert [event.step for event in events if event.HasField("session_log")] == [4]


@pytest.mark.parametrize("mode", ["before", "after"])
def test_a_save_that_fails_anywhere_loses_nothing_and_the_run_goes_on_to_the_same_end(
    tmp_path, stores, monkeypatch, mode
):
    """Every third file operation of a whole training fails once; the oracle is the training that met no failure."""
    whole = runs.train(tmp_path, stores, "digits", *SMALL, "checkpoint.every=3", name="whole")

    class Failing(durable.Operations):
        def __init__(self, at: int) -> None:
            self.left, self.fired = at, False

        def _fires(self) -> None:
            self.left -= 1
            if self.left == 0:
                self.fired = True
                raise OSError(errno.EIO, "Input/output error")

        def write(self, descriptor, data):
            if mode == "before":
                self._fires()
            super().write(descriptor, data)
            if mode == "after":
                self._fires()

        def sync(self, descriptor):
            self._fires()
            super().sync(descriptor)

        def rename(self, source, target):
            if mode == "before":
                self._fires()
            super().rename(source, target)
            if mode == "after":
                self._fires()

    at, fired = 1, True
    while fired:
        one = runs.begin(tmp_path, stores, "digits", *SMALL, "checkpoint.every=3", name=f"{mode}{at}")
        failing = Failing(at)
        with monkeypatch.context() as patch:
            patch.setattr(durable, "OPERATIONS", failing)
            try:
                job.work(one, World())
            except (OSError, RunFailed):
                pass
        fired = failing.fired
        if saved.summary(one.directory) is None:
            job.work(one, World())
        assert runs.distance(runs.parameters(whole), runs.parameters(one)) == 0
        assert runs.distance(runs.parameters(whole, "best"), runs.parameters(one, "best")) == 0
        assert runs.summary(whole)["metrics"] == runs.summary(one)["metrics"]
        assert not list(one.directory.rglob("*.part"))
        at += 3
    assert at > 60


def test_a_wish_to_stop_from_before_does_not_stop_a_run_that_begins_again(tmp_path, stores):
    one = runs.begin(tmp_path, stores, "digits", *SMALL)
    saved.ask_to_stop(one.directory)
    runs.train(tmp_path, stores, "digits", *SMALL)
    assert saved.summary(one.directory) is not None


def test_a_cause_takes_the_place_of_an_echo_and_not_the_other_way_round(tmp_path):
    saved.write_failure(tmp_path, 0, RuntimeError("Connection closed by peer [127.0.0.1]"))
    saved.write_failure(tmp_path, 1, RuntimeError("out of paper"))
    saved.write_failure(tmp_path, 0, RuntimeError("something later"))
    assert (saved.failure(tmp_path)["rank"], saved.failure(tmp_path)["message"]) == (1, "out of paper")
