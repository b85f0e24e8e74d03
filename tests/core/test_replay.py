"""`replay` executes a step of a run again: its rows, its draws, its bits."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest

from distributed import checkpoint, saved
from distributed.analysis import replay
from distributed.analysis.replay import Replayed
from distributed.hosts.job import Job
from tasks.errors import RunFailed, UserError
from tests import runs
from tests.core.test_zoo import SHAPES, ZOO

EVERY = ("checkpoint.every=1", "checkpoint.keep=100", "log.every=1")
OWN = '''
import torch
from tasks.task import Label, Task, Vector

class Odd(Task):
    """Its row of 13 makes a number that is not finite."""

    fields = {"point": Vector(2), "label": Label(classes=2)}
    recipe = {"data.batch_size": 8, "train.epochs": 3, "data.split": "8:1:1"}

    def examples(self, source):
        return [{"point": [i, HURT if i == 13 else 1], "label": i % 2} for i in range(40)]

    def build(self, facts, load):
        return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sequential(Root(), torch.nn.Linear(3, 2)))

class Root(torch.nn.Module):
    def forward(self, x):
        WRONG
        return x - x.abs().detach().where(x.abs() > 1e6, 0) / 0 if (x.abs() > 1e6).any() else x
'''


def replayed(one: Job, step: int, **options) -> Replayed:
    found = saved.find(str(one.directory), one.run.runs)
    return replay.replay(found, replay.begin(found, one.store, step), **options)


def own(tmp_path: Path, hurt: str, wrong: str = "pass") -> str:
    path = tmp_path / f"own_{abs(hash((hurt, wrong)))}.py"
    path.write_text(OWN.replace("HURT", hurt).replace("WRONG", wrong))
    return f"{path}:Odd"


@pytest.mark.parametrize("name", ["digits cnn", "two optimizers", "units", "photos", "two domains", "noise"])
@pytest.mark.parametrize("start", ["a checkpoint", "the beginning"])
def test_a_step_of_one_process_comes_out_again_to_the_bit(tmp_path, stores, name, start):
    task, words = ZOO[name]
    one = runs.train(tmp_path, stores, task, *words, *EVERY, "train.epochs=2")
    step = runs.summary(one)["steps"] - 2
    wanted = checkpoint.chosen(one.directory, str(step + 1))
    for folder in (one.directory / "checkpoints").glob("step-*"):
        if start == "the beginning" or int(folder.name[5:]) >= step - 1:
            shutil.rmtree(folder)
    told = replayed(one, step)
    assert told.start == (step - 2 if start == "a checkpoint" else 0)
    assert told.difference == 0
    assert runs.distance(told.learning.model.tensors(), wanted.model) == 0
    assert not wanted.optimizer or runs.distance(told.learning.updater.state()[0], wanted.optimizer) == 0
    assert told.not_finite == "" and all(map(math.isfinite, told.losses.values()))


@pytest.mark.parametrize("more", [["averaging.name=ema"], ["schedule.name=plateau", "schedule.patience=1"]])
def test_what_the_loop_keeps_beside_the_weights_is_kept(tmp_path, stores, more):
    words = ["task.model=mlp", "data.limit=200", "train.epochs=5", "optimizer.lr=0.3", "checkpoint.keep=9", *more]
    one = runs.train(tmp_path, stores, "digits", *words)
    wanted = checkpoint.chosen(one.directory, "20")
    for folder in (one.directory / "checkpoints").glob("step-*"):
        shutil.rmtree(folder)
    learning = replayed(one, 19).learning
    tensors, _ = learning.average.state(learning.model.tensors())
    assert runs.distance(tensors, wanted.model) == 0
    assert (
        learning.state.plateaus.history[:4]
        == [row["accuracy"] for row in runs.rows(one) if row["kind"] == "validation"][:4]
    )


@pytest.mark.parametrize("name", ["digits cnn", "units", "noise", "two optimizers"])
def test_a_step_of_several_ranks_comes_out_again_in_one_process(tmp_path, stores, ranks, name):
    task, words = ZOO[name]
    more = ["precision.dtype=float64", "train.epochs=2", "resources.workers=2", "data.micro_batch_size=3"]
    more += ["log.every=1", "checkpoint.every=5", "train.steps=6", "checkpoint.keep=9"]
    one = runs.begin(tmp_path, stores, task, *words, *more)
    ranks(2, runs.work, one.to_plain())
    wanted = checkpoint.chosen(one.directory, "5")
    for folder in (one.directory / "checkpoints").glob("step-*"):
        shutil.rmtree(folder)
    told = replayed(one, 4)
    assert {part.rank for part in told.parts} == {0, 1} and len(told.parts) > 2
    assert told.difference is not None and told.difference < 1e-9
    assert runs.distance(told.learning.model.tensors(), wanted.model) < 1e-9
    alone = replayed(one, 4, rank=1)
    assert [part.rows for part in alone.parts] == [part.rows for part in told.parts if part.rank == 1]
    assert [part.losses for part in alone.parts] == [
        pytest.approx(part.losses, abs=1e-9) for part in told.parts if part.rank == 1
    ]


def test_a_failing_step_leaves_what_is_needed_to_execute_it_again(tmp_path, stores):
    task = own(tmp_path, "1e30")
    with pytest.raises(RunFailed) as caught:
        runs.train(tmp_path, stores, task, "log.every=2")
    directory = tmp_path / "runs" / task.rpartition("/")[2].replace(".py:", ".") / "run"
    told = json.loads((directory / "failure.json").read_bytes())
    assert told["kind"] == "RunFailed" and 0 < len(told["rows"]) <= 64
    assert any(f"replay {directory} --step {told['step']} --rank {told['rank']}" in n for n in caught.value.__notes__)
    found = saved.find(str(directory), tmp_path / "runs")
    one = Job(found.run, stores / directory.parent.name / saved.environment(directory)["store"], directory)
    again = replayed(one, told["step"], rank=told["rank"])
    assert again.parts[0].rows == told["rows"]
    assert again.not_finite.startswith("the output of 1.0, a Root")
    assert math.isnan(again.losses["cross_entropy"])


def test_what_the_task_raises_is_raised_again_at_its_rows(tmp_path, stores):
    task = own(tmp_path, "1e30", "assert (x.abs() < 1e6).all(), 'too large'")
    with pytest.raises(AssertionError):
        runs.train(tmp_path, stores, task)
    directory = tmp_path / "runs" / task.rpartition("/")[2].replace(".py:", ".") / "run"
    told = saved.failure(directory)
    assert told is not None and told["rows"]
    found = saved.find(str(directory), tmp_path / "runs")
    one = Job(found.run, stores / directory.parent.name / saved.environment(directory)["store"], directory)
    with pytest.raises(AssertionError, match="too large") as caught:
        replayed(one, told["step"])
    assert caught.value.__dict__["rows"] == told["rows"]


def test_the_debugger_stops_before_the_step_with_network_and_batch_at_hand(tmp_path, stores, monkeypatch):
    one = runs.train(tmp_path, stores, "digits", "task.model=mlp", "data.limit=200", "train.epochs=1")
    stops = []

    def stop() -> None:
        here = sys._getframe(1).f_locals
        stops.append((here["model"].training, here["batch"]["image"].shape))

    monkeypatch.setattr(sys, "breakpointhook", stop)
    replayed(one, 2, debugger=True)
    assert stops == [(True, (50, 1, 8, 8))]


def test_what_cannot_be_executed_again_is_refused(tmp_path, stores):
    one = runs.train(tmp_path, stores, "digits", "task.model=mlp", "data.limit=200", "train.epochs=1")
    for step, said in ((-1, "steps 0 to 3"), (4, "steps 0 to 3")):
        with pytest.raises(UserError, match=said):
            replayed(one, step)
    with pytest.raises(UserError, match="the run has 1 worker"):
        replayed(one, 2, rank=1)
    environment = one.directory / "environment.json"
    environment.write_text(json.dumps({**json.loads(environment.read_bytes()), "store": "0123"}))
    with pytest.raises(UserError, match="changed since this run began"):
        replayed(one, 2)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, stores):
    one = runs.train(tmp_path, stores, "digits", "task.model=mlp", "data.limit=200", "train.epochs=2", *EVERY)
    (one.directory / "checkpoints" / "step-00000003" / "model.safetensors").write_bytes(b"torn")
    found = saved.find(str(one.directory), one.run.runs)
    begun = replay.begin(found, one.store, 3)
    assert begun.start == 2 and "step-00000003" in begun.notes[0]


def test_the_run_is_not_changed_by_being_executed_again(tmp_path, stores):
    one = runs.train(tmp_path, stores, f"{SHAPES}:Detector", "train.epochs=2")
    before = {path: path.read_bytes() for path in one.directory.rglob("*") if path.is_file()}
    replayed(one, 5)
    assert before == {path: path.read_bytes() for path in one.directory.rglob("*") if path.is_file()}
