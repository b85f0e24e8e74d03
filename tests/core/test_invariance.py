"""One process, several, and accumulation give the same training (docs/design.md, section 5)."""

import pytest

from tests import runs
from tests.core.test_zoo import SHAPES

MLP = ("task.model=mlp", "precision.dtype=float64", "train.steps=20", "data.batch_size=50")


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop", "torch.optim:NAdam"])
def test_several_ranks_learn_what_one_learns(tmp_path, stores, ranks, size, optimizer):
    words = (*MLP, f"optimizer.name={optimizer}")
    one = runs.train(tmp_path, stores, "digits", *words, name="one")
    several = runs.begin(tmp_path, stores, "digits", *words, name="several")
    ranks(size, runs.work, several.to_plain())
    assert runs.distance(runs.parameters(one), runs.parameters(several)) < 1e-9
    for here, there in zip(runs.rows(one), runs.rows(several), strict=True):
        assert here == pytest.approx(there, abs=1e-9)
    assert runs.summary(one)["metrics"]["test"] == pytest.approx(runs.summary(several)["metrics"]["test"], abs=1e-9)


def test_accumulated_micro_batches_equal_the_whole_batch(tmp_path, stores, ranks):
    whole = runs.train(tmp_path, stores, "digits", *MLP, name="whole")
    parts = runs.train(tmp_path, stores, "digits", *MLP, "data.micro_batch_size=7", name="parts")
    assert runs.distance(runs.parameters(whole), runs.parameters(parts)) < 1e-9
    both = runs.begin(tmp_path, stores, "digits", *MLP, "data.micro_batch_size=7", name="both")
    ranks(2, runs.work, both.to_plain())
    assert runs.distance(runs.parameters(whole), runs.parameters(both)) < 1e-9


@pytest.mark.parametrize(
    "words",
    [
        ("optimizer.name=adamw", "train.clip_norm=0.1", "averaging.name=ema"),
        ("optimizer.generator.name=sgd", "optimizer.discriminator.name=rmsprop", "optimizer.discriminator.every=2"),
    ],
)
def test_two_optimizers_learn_on_three_ranks_and_in_micro_batches_what_they_learn_on_one(
    tmp_path, stores, ranks, words
):
    words = (*words, "precision.dtype=float64", "train.epochs=4")
    one = runs.train(tmp_path, stores, f"{SHAPES}:Adversarial", *words, name="one")
    three = runs.begin(tmp_path, stores, f"{SHAPES}:Adversarial", *words, "data.micro_batch_size=4", name="three")
    ranks(3, runs.work, three.to_plain())
    assert runs.distance(runs.parameters(one), runs.parameters(three)) < 1e-9
    for here, there in zip(runs.rows(one), runs.rows(three), strict=True):
        assert here == pytest.approx(there, abs=1e-9)
