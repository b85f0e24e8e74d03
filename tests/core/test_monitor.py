"""Where a step's time goes, what the machine does meanwhile, and what is said about it."""

import json
import threading
import time

import pytest
import torch
from torch import nn

from distributed import monitor, timing
from distributed.analysis import flops
from distributed.cli.progress import Lines, _left
from distributed.data.store import Store
from distributed.model import Model
from distributed.monitor import Course, Monitor, hint
from distributed.parallel import Parallel
from distributed.timing import PARTS, Times, waited_for_gradients
from distributed.world import World
from tests import runs

MS = 1e-3


# ---- a step's time


def test_a_mark_ends_the_part_before_it_and_what_lies_between_two_steps_is_nobodys():
    times = Times()
    for _ in range(2):
        times.begin("data")
        time.sleep(10 * MS)
        times.begin("forward")
        time.sleep(20 * MS)
        with times.within("backward"):
            time.sleep(30 * MS)
        times.begin("optimizer")
        times.end()
        time.sleep(200 * MS)
    told = times.take()
    assert list(told) == [f"time/{part}" for part in PARTS]
    assert told["time/data"] >= 10 and told["time/forward"] >= 20 and told["time/backward"] >= 30
    assert told["time/communication"] == 0 and sum(told.values()) < 200
    assert times.take() == {}, "no step since"


def test_a_part_within_another_gives_back_to_it_also_after_an_error():
    times = Times()
    times.begin("forward")
    with pytest.raises(ValueError), times.within("backward"):
        raise ValueError
    assert times.part == "forward"


class Stream:
    """A device's stream in miniature: events get their times in the order in which the work before them is done."""

    def __init__(self) -> None:
        self.now, self.finished = 0.0, True

    def event(self) -> "Event":
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def record(self) -> None:
        self.at, self.finished = self.stream.now, self.stream.finished

    def query(self) -> bool:
        return self.finished

    def elapsed_time(self, later: "Event") -> float:
        return later.at - self.at


def _step(times: Times, stream: Stream, **durations: float) -> None:
    for part, duration in durations.items():
        times.begin(part)
        stream.now += duration
    times.end()


def test_on_a_device_its_own_time_counts_in_one_step_of_seven(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(timing, "_event", stream.event)
    times = Times(torch.device("cuda"), 50)
    for step in range(14):
        scale = 1 if step in (6, 13) else 100  # the others are not timed
        _step(times, stream, data=1.0 * scale, forward=2.0 * scale, backward=4.0 * scale, optimizer=3.0 * scale)
    told = times.take()
    assert (told["time/data"], told["time/forward"], told["time/backward"], told["time/optimizer"]) == (1, 2, 4, 3)


def test_a_step_that_the_device_has_not_finished_is_left_for_the_next_figures(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(timing, "_event", stream.event)
    times = Times(torch.device("cuda"), 1)
    _step(times, stream, data=1.0, forward=5.0)
    stream.finished = False
    _step(times, stream, data=3.0, forward=7.0)
    assert times.take()["time/forward"] == 5
    stream.finished = True
    for _, event in times.device.timed[0]:
        event.finished = True
    _step(times, stream, data=1.0, forward=1.0)
    assert times.take()["time/forward"] == 4, "of 7 and 1"
    assert len(times.device.free) == 6, "events are used again"


def _wait_for(world: World, seconds: float) -> float:
    """One rank is late with every gradient; returns what the other one waits for it a step, in milliseconds."""
    module = world.wrap(nn.Linear(4, 4), Parallel())
    for _ in range(8):
        if world.rank == 1:
            time.sleep(seconds)
        module(torch.ones(2, 4)).sum().backward()
    waited = waited_for_gradients([module])
    world.agree(True)
    return waited


def test_what_a_rank_waits_for_the_gradients_of_a_late_one_is_communication(ranks):
    prompt, late = ranks(2, _wait_for, 0.03)
    assert prompt > 15 > late
    assert waited_for_gradients([nn.Linear(4, 4)]) == 0, "one rank waits for nobody"


def test_rows_of_a_run_say_where_its_time_went_and_what_the_machine_did(tmp_path, stores, monkeypatch):
    monkeypatch.setattr(monitor, "INTERVAL", 0.01)
    monkeypatch.setattr(Monitor.__init__, "__defaults__", (0.01,))
    one = runs.train(tmp_path, stores, "housing", "train.epochs=3", "log.flops=true", "log.peak_tflops=0.5")
    rows = [json.loads(line) for line in (one.directory / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if row["kind"] == "train"]
    assert all({f"time/{part}" for part in PARTS} <= row.keys() for row in training)
    assert all(row["time/forward"] > 0 and row["time/backward"] > 0 for row in training)
    seen = {name for row in training for name in row}
    assert {"cpu", "memory_mib", "host_memory_mib", "tflops", "mfu"} <= seen
    assert not any("time/" in name or name == "cpu" for row in rows if row["kind"] == "validation" for name in row)
    assert not [thread for thread in threading.enumerate() if thread.name == "monitor"], "it ends with the run"


def test_a_run_that_is_not_watched_has_no_thread_and_no_columns_of_the_machine(tmp_path, stores):
    one = runs.train(tmp_path, stores, "housing", "train.epochs=1", "log.machine=false")
    assert "cpu" not in (one.directory / "metrics.jsonl").read_text()


# ---- the machine


def test_means_since_the_last_look_are_taken_and_begin_anew():
    told = iter([1.0, 3.0, 10.0])
    watched = Monitor(torch.device("cpu"), interval=3600)
    watched.close()
    watched.sources = {"figure": lambda: next(told)}
    watched.ended = _Ticks(2)
    watched._look()
    assert watched.take() == {"figure": 2.0}
    assert watched.take() == {}


class _Ticks:
    """An event that is waited for so many times before it is set."""

    def __init__(self, count: int) -> None:
        self.left = count

    def wait(self, seconds: float) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_figure_that_a_driver_refuses_is_left_out_and_the_others_stay():
    def refused() -> float:
        raise RuntimeError("not supported on this device")

    watched = Monitor(torch.device("cpu"), interval=3600)
    watched.close()
    watched.sources = {"gpu": refused, "cpu": lambda: 50.0}
    watched.ended = _Ticks(3)
    watched._look()
    assert watched.take() == {"cpu": 50.0} and list(watched.sources) == ["cpu"]


def test_cores_and_memory_of_this_process_are_seen():
    busy = monitor._of_process()
    busy["cpu"]()
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        pass
    assert 0 < busy["cpu"]() <= 110
    assert 10 < busy["memory_mib"]() < busy["host_memory_mib"]() * 10


# ---- what is said about it

DATA = {"time/data": 30.0, "time/forward": 40.0, "time/backward": 30.0}
EXCHANGE = {"time/data": 10.0, "time/forward": 40.0, "time/communication": 50.0}
HEALTHY = {"time/data": 5.0, "time/forward": 45.0, "time/backward": 45.0, "time/communication": 5.0}
SETTINGS = {
    "data.prefetch": None, "data.pictures": "encoded", "data.resident": "auto", "parallel.compress": "none",
    "precision.compile": "no",
}  # fmt: skip


@pytest.mark.parametrize(("figures", "changed", "expected"), [
    (HEALTHY, {}, None),
    ({}, {}, None),
    ({"time/data": 0.0}, {}, None),
    (DATA, {}, "the training waits for data, 30% of its time: data.pictures=decoded"),
    (DATA, {"data.prefetch": 0}, "data.prefetch=2"),
    (DATA, {"data.resident": "never"}, "data.resident=auto"),
    (DATA, {"data.pictures": "decoded"}, "a cheaper transform"),
    (EXCHANGE, {}, "the workers wait for each other, 50% of the time: parallel.compress=bfloat16"),
    (EXCHANGE, {"parallel.compress": "float16"}, "a larger data.batch_size means fewer exchanges"),
    ({**HEALTHY, "gpu": 95.0}, {}, None),
    ({**HEALTHY, "gpu": 30.0}, {}, "the device is busy 30 % of the time, though data are there"),
    ({**HEALTHY, "gpu": 30.0}, {}, "precision.compile=reduce-overhead"),
    ({**DATA, "gpu": 30.0}, {}, "waits for data"),
    ({"time/data": 30.0, "time/communication": 40.0, "time/forward": 30.0}, {}, "wait for each other"),
])  # fmt: skip
def test_the_hint_names_what_holds_a_training_up_and_a_setting_that_helps(figures, changed, expected):
    told = hint(figures, {**SETTINGS, **changed})
    assert told is None if expected is None else expected in told


@pytest.mark.parametrize(("figures", "changed", "advice"), [
    (DATA, {"data.pictures": "decoded"}, "data.pictures="),
    (EXCHANGE, {"parallel.compress": "bfloat16"}, "parallel.compress="),
    ({**HEALTHY, "gpu": 30.0}, {"precision.compile": "default"}, "precision.compile="),
])  # fmt: skip
def test_the_hint_recommends_nothing_that_is_set_already(figures, changed, advice):
    assert advice in hint(figures, SETTINGS) and advice not in hint(figures, {**SETTINGS, **changed})


def _rows(milliseconds: float, steps: int = 100) -> list[dict]:
    return [
        {"kind": "begin", "step": 0},
        {"kind": "train", "step": steps, "time/data": 0.9 * milliseconds, "time/forward": 0.1 * milliseconds},
        {"kind": "validation", "epoch": 1, "step": steps, "accuracy": 0.5},
    ]


def test_nothing_is_said_before_twenty_seconds_of_training():
    for milliseconds, spoken in ((199, False), (201, True)):
        course = Course(SETTINGS)
        for row in _rows(milliseconds):
            course.add(row)
        assert (course.hint() is not None) == spoken


def test_a_row_counts_for_as_many_steps_as_it_is_a_mean_of():
    course = Course(SETTINGS)
    course.add({"kind": "begin", "step": 100})
    course.add({"kind": "train", "step": 110, "time/data": 1000.0, "time/forward": 1000.0})
    course.add({"kind": "train", "step": 200, "time/data": 100.0, "time/forward": 900.0})
    assert "19%" not in (course.hint() or "")
    assert course.hint() is None, "10 x 1000 + 90 x 100 of 10 x 2000 + 90 x 1000 ms are 17 %"


def test_the_hint_is_shown_once_when_it_is_clear_and_not_again_at_the_end(tmp_path, stores, capsys):
    one = runs.begin(tmp_path, stores, "housing")
    with Lines(one) as lines:
        for row in _rows(1000):
            lines(row)
    assert capsys.readouterr().out.count("hint: the training waits for data, 90% of its time") == 1


def test_a_line_has_loss_speed_use_and_time_left_and_none_of_the_other_columns(tmp_path, stores, capsys):
    one = runs.begin(tmp_path, stores, "housing", "train.epochs=1")
    lines = Lines(one)
    row = {"epoch": 0, "time": 1.0, "loss": 0.25, "lr": 0.1, "samples_per_second": 1234.5, "gpu": 87.2, "cpu": 30.0,
           "time/data": 1.0, "memory_mib": 9.0}  # fmt: skip
    lines({"kind": "begin", "step": 0})
    lines({"kind": "train", "step": 1, **row})
    words = capsys.readouterr().out
    assert words.startswith("step 1  loss 0.25  1,234 samples/s  gpu 87 %  ") and words.endswith(" left\n")
    assert "memory" not in words and "data" not in words and "cpu" not in words


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (45, "45 s"), (719, "12 min"), (12_000, "3 h 20 min")])
def test_the_time_left_is_told_in_units_that_fit(seconds, words):
    assert _left(seconds) == words


# ---- operations


def test_operations_of_a_row_are_those_of_its_products(tmp_path, stores):
    one = runs.begin(tmp_path, stores, "digits", "task.model=mlp", "data.batch_size=50")
    store = Store(one.store, dict(one.run.task.fields))
    network = Model.build(one.run, store.facts, World()).plain
    weights = [layer.weight.numel() for layer in network.modules() if isinstance(layer, nn.Linear)]
    # Forward, gradients of weights, gradients of what goes in but for the first layer: 2 operations a weight each.
    expected = 2 * (3 * sum(weights) - weights[0])
    assert flops.per_row(one.run, store, torch.device("cpu")) == expected


@pytest.mark.parametrize(("name", "dtype", "tf32", "expected"), [
    ("NVIDIA H100 80GB HBM3", "bfloat16", "no", 989.4),
    ("NVIDIA H100 80GB HBM3", "float32", "all", 494.7),
    ("NVIDIA H100 PCIe", "float32", "no", 51.0),
    ("NVIDIA A100-SXM4-40GB", "float16", "no", 312.0),
    ("NVIDIA A10G", "float16", "no", None),
    ("NVIDIA H100 80GB HBM3", "float64", "no", None),
])  # fmt: skip
def test_the_peak_of_a_device_is_that_of_the_numbers_in_use(tmp_path, stores, monkeypatch, name, dtype, tf32, expected):
    one = runs.begin(tmp_path, stores, "housing", f"precision.dtype={dtype}", f"precision.tf32={tf32}")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert flops.peak(torch.device("cuda"), one.run) == expected
    assert flops.peak(torch.device("cpu"), one.run) is None


def test_counting_operations_changes_nothing_of_what_is_learned(tmp_path, stores):
    words = ("task.model=cnn", "data.limit=200", "data.batch_size=50", "train.epochs=1")
    plain = runs.train(tmp_path, stores, "digits", *words, name="plain")
    counted = runs.train(tmp_path, stores, "digits", *words, "log.flops=true", name="counted")
    assert runs.distance(runs.parameters(plain), runs.parameters(counted)) == 0
