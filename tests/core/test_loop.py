"""What the loop does besides learning: it judges, stops, refuses, and borrows."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distributed import checkpoint, tally
from distributed.data.store import Store
from distributed.evaluation import Evaluator
from distributed.hosts import job
from distributed.hosts.job import Job
from distributed.loop import begin, learn, train
from distributed.model import Model, read
from distributed.world import World
from tasks.errors import RunFailed, UserError
from tests import runs

SHAPES = Path(__file__).parents[1] / "shapes.py"
SMALL = ("task.model=mlp", "data.limit=200", "data.batch_size=50", "checkpoint.background=false")


def told(one: Job, world: World | None = None) -> Iterator:
    """What the loop tells, but for that it is alive."""
    loop = train(one.run, Store(one.store, dict(one.run.task.fields)), one.directory, world or World(), None)
    return (progress for progress in loop if progress.kind != "alive")


def progresses(one: Job, world: World | None = None) -> list:
    return list(told(one, world))


def test_the_loop_yields_training_then_judgement_then_checkpoint_of_every_epoch(tmp_path, stores):
    one = runs.begin(tmp_path, stores, "digits", *SMALL, "train.epochs=2", "log.every=3", "checkpoint.every=2")
    kinds = [(p.kind, p.epoch, p.step) for p in progresses(one)]
    assert kinds == [
        ("checkpoint", 0, 2), ("train", 0, 3), ("train", 1, 4), ("validation", 1, 4), ("checkpoint", 1, 4),
        ("train", 1, 6), ("checkpoint", 1, 6), ("train", 2, 8), ("validation", 2, 8), ("checkpoint", 2, 8),
    ]  # fmt: skip


def test_a_host_may_ask_for_a_checkpoint_and_for_the_end(tmp_path, stores):
    one = runs.begin(tmp_path, stores, "digits", *SMALL, "train.epochs=5", "log.every=1")
    heard = []
    for progress in told(one):
        heard.append((progress.kind, progress.step))
        if progress.step == 2 and progress.kind == "train":
            progress.request("checkpoint")
        if progress.step == 3:
            progress.request("stop")
    assert heard == [("train", 1), ("train", 2), ("checkpoint", 2), ("train", 3), ("checkpoint", 3)]


def test_a_wish_told_to_a_checkpoints_progress_is_heard(tmp_path, stores):
    one = runs.begin(tmp_path, stores, "digits", *SMALL, "log.every=1000", "checkpoint.every=1")
    heard = []
    for progress in told(one):
        heard.append((progress.kind, progress.step))
        if progress.step == 2:
            progress.request("stop")
    assert heard == [("checkpoint", 1), ("checkpoint", 2)]


def test_a_run_that_stopped_early_and_is_resumed_is_at_its_end(tmp_path, stores):
    words = [*SMALL, "optimizer.lr=1e-12", "train.patience=2"]
    one = runs.train(tmp_path, stores, "digits", *words, "train.epochs=50")
    (one.directory / "summary.json").unlink()
    runs.work(World(), one.to_plain())
    assert runs.summary(one)["epochs"] == 3
    assert runs.summary(one)["stopped_early"]
    assert job.begin(runs.begin(tmp_path, stores, "digits", *words, "train.epochs=60")) == runs.summary(one)


def test_training_stops_early_when_the_objective_has_not_improved(tmp_path, stores):
    words = ["optimizer.lr=1e-12", "train.epochs=50", "train.patience=3", "train.objective=accuracy"]
    one = runs.train(tmp_path, stores, "digits", *SMALL, *words)
    assert runs.summary(one)["epochs"] == 4
    assert runs.summary(one)["best_step"] == 16, "at a tie the later one is the best"


def test_an_objective_that_falls_is_better_when_it_is_low(tmp_path, stores):
    one = runs.train(tmp_path, stores, "digits", *SMALL, "train.epochs=4", "train.objective=loss")
    losses = {row["step"]: row["loss"] for row in runs.rows(one) if row["kind"] == "validation"}
    assert runs.summary(one)["best_step"] == min(losses, key=losses.__getitem__)
    assert runs.summary(one)["higher_is_better"] is False


def test_an_objective_that_is_not_there_is_refused_with_the_nearest(tmp_path, stores):
    one = runs.begin(tmp_path, stores, "digits", *SMALL, "train.epochs=1", "train.objective=acuracy")
    with pytest.raises(UserError, match="train.objective=acuracy") as raised:
        progresses(one)
    assert "accuracy" in raised.value.hint


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_loss_that_is_not_finite_ends_the_training_and_the_last_good_checkpoint_stays_the_newest(
    tmp_path, stores, log_every
):
    words = [
        "optimizer.name=sgd",
        "schedule.name=constant",
        "optimizer.lr=1e12",
        "checkpoint.every=1",
        f"log.every={log_every}",
    ]
    one = runs.begin(tmp_path, stores, "digits", *SMALL, *words)
    with pytest.raises(RunFailed, match=r"the loss 'cross_entropy' is|are not finite at step"):
        progresses(one)
    found, passed_over = checkpoint.newest(one.directory)
    assert passed_over == []
    assert found is None or all(bool(tensor.isfinite().all()) for tensor in found.model.values())


def test_a_batch_that_the_workers_cannot_share_is_refused(tmp_path, stores):
    one = runs.begin(tmp_path, stores, "digits", "task.model=mlp", "data.batch_size=2")
    with pytest.raises(UserError, match=r"a batch of \d rows? cannot be shared by 3 workers"):
        progresses(one, World(0, 3))


def test_one_row_under_batch_normalisation_is_refused_with_layer_and_size(tmp_path, stores):
    one = runs.begin(tmp_path, stores, "digits", "data.batch_size=8", "data.micro_batch_size=1")
    with pytest.raises(UserError, match=r"batch normalisation in '1\.1' needs at least 2 rows"):
        progresses(one)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_learn_and_resume_to_the_bit(tmp_path, stores, dtype):
    words = [*SMALL, f"precision.dtype={dtype}", "train.epochs=3", "checkpoint.every=3"]
    whole = runs.train(tmp_path, stores, "digits", *words, name="whole")
    part = runs.begin(tmp_path, stores, "digits", *words, name="part")
    for progress in train(part.run, Store(part.store, dict(part.run.task.fields)), part.directory, World(), None):
        if progress.kind == "checkpoint":
            break
    runs.work(World(), part.to_plain())
    assert runs.distance(runs.parameters(whole), runs.parameters(part)) == 0
    assert all(t.dtype != getattr(torch, dtype) for t in runs.parameters(whole).values()), "weights stay float32"
    assert runs.summary(whole)["metrics"]["validation"]["accuracy"] > 0.5


# ---- borrowed networks


def test_a_student_saves_nothing_of_its_teacher_and_resumes(tmp_path, stores):
    runs.train(tmp_path, stores, "digits", *SMALL, "train.epochs=2", name="teacher")
    words = ["task.teacher=teacher", "train.epochs=2", "checkpoint.every=1"]
    one = runs.train(tmp_path, stores, f"{SHAPES}:Student", *words, name="student")
    assert set(runs.parameters(one)) == {"student.1.weight", "student.1.bias"}
    losses = [row["loss"] for row in runs.rows(one) if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    part = runs.begin(tmp_path, stores, f"{SHAPES}:Student", *words, name="part")
    for progress in train(part.run, Store(part.store, dict(part.run.task.fields)), part.directory, World(), None):
        if progress.step == 2:
            break
    runs.work(World(), part.to_plain())
    assert runs.distance(runs.parameters(one), runs.parameters(part)) == 0


def test_a_borrowed_network_is_frozen_and_the_best_of_its_run(tmp_path, stores):
    one = runs.train(tmp_path, stores, "digits", *SMALL, "train.epochs=2", name="teacher")
    network, facts = read("teacher", tmp_path / "runs", World())
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert facts["label"]["classes"] == [str(i) for i in range(10)]
    assert runs.distance(dict(network.state_dict()), runs.parameters(one, "best")) == 0
    with pytest.raises(UserError, match="no run 'techer'") as raised:
        read("techer", tmp_path / "runs", World())
    assert "teacher" in raised.value.hint


def student(tmp_path, stores, *words: str):
    runs.train(tmp_path, stores, "digits", "task.width=4", "data.limit=200", "train.epochs=1", name="teacher")
    return runs.begin(tmp_path, stores, f"{SHAPES}:Student", "task.teacher=teacher", *words, name="student")


def test_a_borrowed_network_is_not_changed_by_the_training_it_watches(tmp_path, stores):
    one = student(tmp_path, stores)
    model = Model.build(one.run, {}, World())
    before = {name: tensor.clone() for name, tensor in model.plain.teacher.state_dict().items()}
    network = model.learning()
    assert network.training
    assert not network.teacher.training
    network(torch.rand(4, 1, 8, 8), both=True)
    assert runs.distance(before, dict(model.plain.teacher.state_dict())) == 0


def test_a_borrowed_network_whose_weights_are_set_free_is_saved_with_the_run(tmp_path, stores):
    one = student(tmp_path, stores)
    model = Model.build(dataclasses.replace(one.run, task=dataclasses.replace(one.run.task, free=True)), {}, World())
    assert model.learning().teacher.training
    assert any(name.startswith("teacher.") for name in model.tensors())


def test_borrowing_a_network_does_not_fix_the_first_weights(tmp_path, stores):
    one = student(tmp_path, stores, "task.early=true")
    seeds = [dataclasses.replace(one.run, train=dataclasses.replace(one.run.train, seed=seed)) for seed in (1, 2)]
    first, second = (dict(Model.build(run, {}, World()).plain.student.state_dict()) for run in seeds)
    assert runs.distance(first, second) > 0


def test_entries_that_the_task_does_not_declare_are_refused(tmp_path, stores):
    one = runs.begin(tmp_path, stores, f"{SHAPES}:Adversarial")

    class Silent(type(one.run.task)):
        entries = ()

    with pytest.raises(UserError, match="the learning entries of build"):
        Model.build(dataclasses.replace(one.run, task=Silent()), {}, World())


# ---- evaluation


def _figures(world: World, plain: dict, limit: int) -> dict[str, float]:
    one = Job.from_plain(plain)
    run = dataclasses.replace(one.run, data=dataclasses.replace(one.run.data, limit=limit))
    store = Store(one.store, dict(run.task.fields))
    return Evaluator(run, store, "validation", world)(Model.build(run, store.facts, World()).plain)


@pytest.mark.parametrize("task", ["digits", "housing", "reviews", f"{SHAPES}:Detector", f"{SHAPES}:Words"])
@pytest.mark.parametrize("rows", [2, 7])
def test_the_figure_of_three_workers_is_that_of_one_also_where_a_rank_has_no_rows(tmp_path, stores, ranks, task, rows):
    one = runs.begin(tmp_path, stores, task, "precision.dtype=float64")
    alone = _figures(World(), one.to_plain(), rows)
    for figures in ranks(3, _figures, one.to_plain(), rows):
        assert figures == pytest.approx(alone, abs=1e-12)


POISON = """
from tasks.digits import Digits


class Poisoned(Digits):
    at: int = 7  # training row whose loss is not a number; below 0: all

    def loss(self, model, batch):
        wrong = model.training and bool(((batch["row"] == self.at) | (self.at < 0)).any())
        return {name: loss * (float("nan") if wrong else 1) for name, loss in super().loss(model, batch).items()}
"""


@pytest.fixture
def poisoned(tmp_path) -> str:
    (tmp_path / "poison.py").write_text(POISON)
    return f"{tmp_path}/poison.py:Poisoned"


def of_the_row(one: Job, row: int) -> int:
    """The step of the first epoch in which a training row is met."""
    learning = begin(one.run, Store(one.store, dict(one.run.task.fields)), World(), None)
    return next(step for step in range(learning.plan.steps) if row in learning.rows_of(step, 0))


@pytest.mark.parametrize("size", [1, 2])
def test_a_loss_that_is_not_finite_is_named_with_its_step_rank_and_rows(tmp_path, stores, ranks, poisoned, size):
    one = runs.begin(tmp_path, stores, poisoned, *SMALL, "log.every=1000", "train.epochs=1")
    step = of_the_row(one, 7)
    with pytest.raises(
        RunFailed, match=rf"the loss 'cross_entropy' is nan at step {step} on rank \d \(training rows"
    ) as told:
        ranks(size, runs.work, one.to_plain())
    assert told.value.step == step
    if size == 1:
        assert any(f"the first that is not finite in step {step}: the loss" in note for note in told.value.__notes__)
    assert 7 in told.value.rows


def test_a_loss_that_was_not_finite_long_ago_is_named_too(tmp_path, stores, poisoned, monkeypatch):
    monkeypatch.setattr(tally, "KEPT", 3)
    one = runs.begin(tmp_path, stores, poisoned, *SMALL[:2], "data.batch_size=20", "log.every=1000")
    step = of_the_row(one, 7)
    with pytest.raises(RunFailed, match=rf"at step {step} on rank 0 "):
        runs.work(World(), one.to_plain())


@pytest.mark.parametrize("size", [1, 2])
def test_steps_that_are_not_finite_can_be_left_out(tmp_path, stores, ranks, poisoned, size):
    words = (*SMALL, "train.epochs=2", "train.max_skipped=1", "precision.dtype=float64")
    one = runs.begin(tmp_path, stores, poisoned, *words)
    ranks(size, runs.work, one.to_plain())
    assert all(torch.isfinite(tensor).all() for tensor in runs.parameters(one).values())
    assert runs.summary(one)["epochs"] == 2


def test_a_step_that_is_left_out_changes_nothing(tmp_path, stores, poisoned, caplog):
    one = runs.begin(tmp_path, stores, poisoned, *SMALL, "train.max_skipped=1")
    learning = begin(one.run, Store(one.store, dict(one.run.task.fields)), World(), None)
    learning.state.step = of_the_row(one, 7)
    before = {name: tensor.clone() for name, tensor in learning.model.tensors().items()}
    learn(learning)
    assert runs.distance(before, learning.model.tensors()) == 0
    assert learning.updater.state()[0] == {}
    assert f"at step {learning.state.step} on rank 0" in caplog.text
    assert learning.tally.take() == {}


def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path, stores, poisoned):
    with pytest.raises(RunFailed, match="at step 2 on rank 0 .*, 3 steps in a row"):
        runs.train(tmp_path, stores, poisoned, *SMALL, "task.at=-1", "train.max_skipped=2")


ROOT = """
import torch
from torch import nn
from tasks.digits import Digits


class Root(nn.Module):
    def forward(self, x):
        return torch.where(x.sum(1, keepdim=True) > 0, x - 1e4, x).sqrt() if self.training else x


class Rooted(Digits):
    def network(self, facts, load):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Root())
"""


def test_the_first_tensor_that_is_not_finite_is_named(tmp_path, stores):
    (tmp_path / "root.py").write_text(ROOT)
    with pytest.raises(RunFailed, match="is nan at step 0 on rank 0") as told:
        runs.train(tmp_path, stores, f"{tmp_path}/root.py:Rooted", *SMALL)
    (note,) = [note for note in told.value.__notes__ if "first that is not finite" in note]
    assert "the output of 2, a Root" in note


SPOILT = """
from tasks.digits import Digits


class Poisoned(Digits):
    def transform(self, batch, draw, training):
        batch = super().transform(batch, draw, training)
        spoilt = training and bool((batch["row"] == 7).any())
        return {**batch, "image": batch["image"] * (float("nan") if spoilt else 1)}
"""


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_that_is_left_out_spoils_no_statistics_and_has_no_loss(tmp_path, stores, ranks, size):
    (tmp_path / "spoilt.py").write_text(SPOILT)
    words = ("task.model=cnn", "task.width=4", *SMALL[1:], "train.epochs=2", "train.max_skipped=1", "log.every=1")
    one = runs.begin(tmp_path, stores, f"{tmp_path}/spoilt.py:Poisoned", *words)
    left_out = of_the_row(one, 7) + 1
    ranks(size, runs.work, one.to_plain())
    assert all(torch.isfinite(tensor).all() for tensor in runs.parameters(one).values())
    [told] = [row for row in runs.rows(one) if row["step"] == left_out and row["kind"] == "train"]
    assert told["loss"] is None


def test_a_judged_model_of_several_entries_learns_again_as_a_whole(tmp_path, stores):
    one = runs.begin(tmp_path, stores, f"{SHAPES}:Adversarial")
    model = begin(one.run, Store(one.store, dict(one.run.task.fields)), World(), None).model
    model.plain.eval()
    model.learning()
    assert all(layer.training for layer in model.plain.modules())


TIED = """
from tests.shapes import Adversarial


class Tied(Adversarial):
    def build(self, facts, load):
        made = super().build(facts, load)
        made["discriminator"][0].weight = made["generator"][0].weight
        return made
"""


def test_a_parameter_that_two_optimizers_would_step_is_refused(tmp_path, stores):
    (tmp_path / "tied.py").write_text(TIED)
    with pytest.raises(UserError, match=r"'generator\.0\.weight' and 'discriminator\.0\.weight' .* are one parameter"):
        runs.train(tmp_path, stores, f"{tmp_path}/tied.py:Tied")
