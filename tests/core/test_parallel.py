"""Every way in which ranks exchange gradients and state is the same training."""

import pytest
import torch
from torch import nn

from distributed.sync_norm import SyncNorm
from distributed.world import World
from tasks.errors import UserError
from tests import runs
from tests.core.test_zoo import SHAPES

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


def test_a_static_graph_of_several_optimizers_is_refused(tmp_path, stores, ranks):
    one = runs.begin(tmp_path, stores, f"{SHAPES}:Adversarial", "parallel.static_graph=true")
    with pytest.raises(UserError, match="losses of generator, discriminator are learned one by one"):
        ranks(2, runs.work, one.to_plain())


def normalised(world: World, rows: torch.Tensor) -> torch.Tensor:
    return SyncNorm(rows.shape[1]).train()(rows.chunk(world.size)[world.rank]).detach()


def test_synchronised_normalisation_of_features_far_from_0_is_that_of_torch(ranks):
    rows = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + 1000
    together = torch.cat(ranks(2, normalised, rows))
    assert torch.allclose(together, nn.BatchNorm1d(4).train()(rows), atol=1e-3)


@pytest.mark.parametrize(
    "words",
    [
        ("averaging.name=ema", "train.freeze=1.0,1.1", "train.unfreeze=1.0@1,1.1@2", "precision.channels_last=true",
         "optimizer.name=sgd", "optimizer.momentum=0.9", "optimizer.decay_on=matrices", "optimizer.weight_decay=0.01",
         "optimizer.l1=0.001", "train.clip_norm=0.5", "optimizer.parts=1.0=0.1"),
        ("averaging.name=swa", "averaging.start=0.3", "optimizer.name=torch.optim:NAdam", "optimizer.every=2",
         "parallel.shard_optimizer=true", "train.clip_norm=0.5", "schedule.name=plateau", "train.patience=2"),
    ],
    ids=["freezing", "sharded"],
)  # fmt: skip
def test_settings_together_are_the_same_on_three_ranks(tmp_path, stores, ranks, words):
    words = ("task.width=4", "precision.dtype=float64", "precision.sync_norm=true", "data.limit=300",
             "data.batch_size=50", "train.epochs=3", *words)  # fmt: skip
    one = runs.train(tmp_path, stores, "digits", *words, name="one")
    three = runs.begin(tmp_path, stores, "digits", *words, name="three")
    ranks(3, runs.work, three.to_plain())
    assert runs.distance(runs.parameters(one), runs.parameters(three)) < 1e-9
    for here, there in zip(runs.rows(one), runs.rows(three), strict=True):
        assert here == pytest.approx(there, abs=1e-8)
