"""Every way in which ranks exchange gradients and state is the same training."""

import pytest

from tasks.errors import UserError
from tests import runs

MLP = ("task.model=mlp", "precision.dtype=float64", "train.steps=12", "data.batch_size=50")
CNN = ("task.width=4", "precision.dtype=float64", "train.steps=12", "data.batch_size=50", "precision.sync_norm=true")


@pytest.fixture(scope="module")
def one(tmp_path_factory, stores):
    return runs.train(tmp_path_factory.mktemp("one"), stores, "digits", *MLP)


@pytest.mark.parametrize(
    "words",
    [
        ("parallel.bucket_mib=0.001",),
        ("parallel.bucket_views=false",),
        ("parallel.static_graph=true",),
        ("parallel.find_unused=true",),
        ("parallel.shard_optimizer=true",),
        ("parallel.shard_optimizer=true", "data.micro_batch_size=9"),
    ],
)
def test_settings_of_the_exchange_change_nothing_that_is_learned(tmp_path, stores, ranks, one, words):
    two = runs.begin(tmp_path, stores, "digits", *MLP, *words)
    ranks(2, runs.work, two.to_plain())
    assert runs.distance(runs.parameters(one), runs.parameters(two)) < 1e-9


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_gradients_in_16_bits_are_nearly_the_same(tmp_path, stores, ranks, one, kind):
    words = [word for word in MLP if "float64" not in word]
    two = runs.begin(tmp_path, stores, "digits", *words, f"parallel.compress={kind}")
    ranks(2, runs.work, two.to_plain())
    assert 1e-6 < runs.distance(runs.parameters(one), runs.parameters(two)) < 0.05


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_sharded_state_is_saved_whole_and_goes_on_on_any_number_of_ranks(tmp_path, stores, ranks, optimizer):
    words = ("task.model=mlp", "precision.dtype=float64", "data.limit=200", "data.batch_size=50", "schedule.name=constant",
             f"optimizer.name={optimizer}", "optimizer.layer_decay=0.5", "train.epochs=4")  # fmt: skip
    if optimizer == "sgd":
        words = (*words, "optimizer.momentum=0.9")
    whole = runs.train(tmp_path, stores, "digits", *words, name="whole")
    parts = runs.begin(tmp_path, stores, "digits", *words, "parallel.shard_optimizer=true", name="parts")
    for size, stop in ((3, 4), (1, 8), (2, None)):
        ranks(size, runs.work_until, parts.to_plain(), stop)
    assert runs.distance(runs.parameters(whole), runs.parameters(parts)) < 1e-9
    assert runs.summary(parts)["workers"] == 2


@pytest.mark.parametrize("size", [2, 3])
def test_synchronised_normalisation_is_exact_over_ranks(tmp_path, stores, ranks, size):
    one = runs.train(tmp_path, stores, "digits", *CNN, name="one")
    several = runs.begin(tmp_path, stores, "digits", *CNN, name="several")
    ranks(size, runs.work, several.to_plain())
    assert runs.distance(runs.parameters(one), runs.parameters(several)) < 1e-9
    without = runs.begin(tmp_path, stores, "digits", *CNN[:-1], name="without")
    ranks(size, runs.work, without.to_plain())
    assert runs.distance(runs.parameters(one), runs.parameters(without)) > 1e-3


def test_synchronised_normalisation_needs_no_second_row_on_a_rank(tmp_path, stores, ranks):
    words = ("task.width=2", "data.limit=15", "data.batch_size=4", "train.steps=3", "precision.sync_norm=true")
    one = runs.begin(tmp_path, stores, "digits", *words)
    ranks(3, runs.work, one.to_plain())
    assert runs.summary(one)["steps"] == 3


def test_what_cannot_accumulate_is_refused(tmp_path, stores, ranks):
    one = runs.begin(tmp_path, stores, "digits", *MLP, "data.micro_batch_size=9", "parallel.static_graph=true")
    with pytest.raises(UserError, match=r"parallel\.static_graph: the gradients of micro-batches"):
        ranks(2, runs.work, one.to_plain())
