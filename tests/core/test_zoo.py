"""One contract for every task: it learns its tiny data, resumes to the bit, and is what it says on several ranks."""

import math
from pathlib import Path

import pytest

from distributed import catalogue, config
from distributed.data.store import Store
from distributed.hosts import job
from distributed.loop import train
from distributed.world import World
from tasks.errors import UserError
from tests import runs

SHAPES = Path(__file__).parents[1] / "shapes.py"
FASHION = Path(__file__).parents[2] / "tasks" / "bundled" / "fashion"  # under the genuine file names
# task, settings that make it small, entries of the model
ZOO = {
    "digits": ("digits", ["task.model=mlp", "data.limit=300"]),
    "digits cnn": ("digits", ["task.width=4", "data.limit=300", "schedule.name=constant"]),
    "fashion": ("fashion", ["task.model=mlp", "data.limit=300"]),
    "mnist": ("mnist", ["task.model=mlp", "data.limit=300", f"task.source.path={FASHION}"]),
    "housing": ("housing", []),
    "reviews": ("reviews", ["data.limit=200"]),
    "two optimizers": (f"{SHAPES}:Adversarial", []),
    "boxes": (f"{SHAPES}:Detector", []),
    "units": (f"{SHAPES}:Words", []),
    "photos": (f"{SHAPES}:Photos", ["data.prefetch=2"]),
    "decoded photos": (f"{SHAPES}:Photos", ["data.pictures=decoded", "data.short_side=20", "data.sample=balanced"]),
    "two domains": (f"{SHAPES}:Unpaired", []),
    "noise": (f"{SHAPES}:Noisy", []),
}
EXACT = [name for name in ZOO if name not in ("digits cnn", "noise")]


def words(name: str, *more: str) -> list[str]:
    return [*ZOO[name][1], *more]


@pytest.mark.parametrize("name", ZOO)
def test_a_task_learns(tmp_path, stores, name):
    one = runs.train(tmp_path, stores, ZOO[name][0], *words(name, "train.epochs=6"))
    losses = [row["loss"] for row in runs.rows(one) if row["kind"] == "train"]
    assert all(map(math.isfinite, losses))
    if name != "two optimizers":  # whose losses are a contest
        assert losses[-1] < losses[0]
    assert set(runs.summary(one)["metrics"]) == {"validation", "test"}


@pytest.mark.parametrize("name", ZOO)
def test_a_task_resumes_to_the_bit(tmp_path, stores, name):
    more = ["train.epochs=2", "checkpoint.every=3", "log.every=2", "checkpoint.background=false"]
    whole = runs.train(tmp_path, stores, ZOO[name][0], *words(name, *more), name="whole")
    part = runs.begin(tmp_path, stores, ZOO[name][0], *words(name, *more), name="part")
    for progress in train(part.run, Store(part.store, dict(part.run.task.fields)), part.directory, World(), None):
        if progress.kind == "checkpoint":
            break
    job.work(part, World())
    assert runs.distance(runs.parameters(whole), runs.parameters(part)) == 0


@pytest.mark.parametrize("name", EXACT)
def test_a_task_that_says_exact_is_the_same_on_two_ranks_and_in_micro_batches(tmp_path, stores, ranks, name):
    more = ["precision.dtype=float64", "train.epochs=2", "train.steps=12"]
    one = runs.train(tmp_path, stores, ZOO[name][0], *words(name, *more), name="one")
    assert "exact" in one.run.task.invariance  # of all its networks, or of this one
    two = runs.begin(tmp_path, stores, ZOO[name][0], *words(name, *more, "data.micro_batch_size=5"), name="two")
    ranks(2, runs.work, two.to_plain())
    assert runs.distance(runs.parameters(one), runs.parameters(two)) < 1e-9
    for here, there in zip(runs.rows(one), runs.rows(two), strict=True):
        assert here == pytest.approx(there, abs=1e-7)


def _until_the_first_checkpoint(world: World, plain: dict) -> None:
    one = job.Job.from_plain(plain)
    for progress in train(one.run, Store(one.store, dict(one.run.task.fields)), one.directory, world, None):
        if progress.kind == "checkpoint":
            break


def test_two_ranks_with_dropout_and_batch_normalisation_resume_to_the_bit(tmp_path, stores, ranks):
    more = ["train.epochs=3", "log.every=2", "checkpoint.background=false"]  # the first one is told of at once
    whole, part = (runs.begin(tmp_path, stores, *ZOO["noise"][:1], *more, name=name) for name in ("whole", "part"))
    ranks(2, runs.work, whole.to_plain())
    ranks(2, _until_the_first_checkpoint, part.to_plain())
    ranks(2, runs.work, part.to_plain())
    assert runs.distance(runs.parameters(whole), runs.parameters(part)) == 0
    assert runs.rows(whole)[-4:] == runs.rows(part)[-4:]
    assert runs.summary(whole)["metrics"] == runs.summary(part)["metrics"]


def _elsewhere(world: World, plain: dict, other: dict) -> None:
    runs.work(world, other if world.rank else plain)


def test_ranks_that_see_different_checkpoints_refuse_to_train(tmp_path, stores, ranks):
    here = runs.train(tmp_path, stores, "digits", *words("digits", "train.epochs=1"), name="here")
    there = runs.begin(tmp_path, stores, "digits", *words("digits", "train.epochs=1"), name="there")
    with pytest.raises(UserError, match="the ranks see different checkpoints"):
        ranks(2, _elsewhere, here.to_plain(), there.to_plain())


def test_a_task_with_batch_normalisation_trains_on_two_ranks(tmp_path, stores, ranks):
    two = runs.begin(tmp_path, stores, "digits", *words("digits cnn", "train.epochs=4"))
    ranks(2, runs.work, two.to_plain())
    assert runs.summary(two)["metrics"]["validation"]["accuracy"] > 0.5
    assert two.run.task.invariance != "exact"


@pytest.mark.parametrize("name", ZOO)
def test_every_setting_of_a_task_says_what_it_means(name):
    settings = config.settings_of(catalogue.find(ZOO[name][0]), "task")
    assert [one.name for one in settings.values() if not one.meaning] == []
