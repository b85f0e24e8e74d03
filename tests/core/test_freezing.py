"""Which parts of a network learn, and from when."""

import itertools

import pytest
import torch

from distributed.data.store import Store
from distributed.freezing import frozen
from distributed.hosts import job
from distributed.loop import train
from distributed.world import World
from tasks.errors import UserError
from tests import runs

NAMES = ["conv.weight", "layer1.0.weight", "layer1.1.weight", "layer2.0.weight", "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("freeze", "unfreeze", "epoch", "still"),
    [
        ((), (), 0, set()),
        (("conv",), (), 0, {"conv.weight"}),
        (("layer*",), (), 0, {"layer1.0.weight", "layer1.1.weight", "layer2.0.weight"}),
        (("head.bias",), (), 5, {"head.bias"}),
        (("layer*", "conv"), ("layer2@1", "layer1@2"), 0, set(NAMES[:4])),
        (("layer*", "conv"), ("layer2@1", "layer1@2"), 1, {"conv.weight", "layer1.0.weight", "layer1.1.weight"}),
        (("layer*", "conv"), ("layer2@1", "layer1@2"), 2, {"conv.weight"}),
    ],
)
def test_patterns_name_what_is_frozen_and_until_when(freeze, unfreeze, epoch, still):
    assert frozen(NAMES, freeze, unfreeze, epoch) == still


@pytest.mark.parametrize(
    ("freeze", "unfreeze", "words"),
    [
        (("layr1",), (), "did you mean 'layer1'"),
        (("layer1",), ("layer1",), "expected PATTERN@EPOCH"),
        (("layer1",), ("layer1@x",), "expected PATTERN@EPOCH"),
        (("layer1",), ("layr1@2",), "did you mean 'layer1'"),
        ((), ("layer1@2",), "nothing is frozen"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused(freeze, unfreeze, words):
    with pytest.raises(UserError, match=words):
        frozen(NAMES, freeze, unfreeze, 0)


# digits' CNN: 1.0 convolution, 1.1 normalisation, 1.4 convolution, 1.5 normalisation, 1.9 linear.
CNN = ("task.width=4", "data.limit=300", "data.batch_size=50", "train.epochs=3", "checkpoint.keep=99")
GRADUAL = (*CNN, "train.freeze=1.0,1.1,1.4", "train.unfreeze=1.4@1,1.0@2")


def changed(one, first: int, last: int) -> set[str]:
    before, after = (runs.parameters(one, f"step-{step:08d}") for step in (first, last))
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_what_is_frozen_stays_as_it_was_and_its_normalisation_too(tmp_path, stores):
    one = runs.train(tmp_path, stores, "digits", *CNN, "train.freeze=1.0,1.1", "checkpoint.every=1")
    assert changed(one, 1, 15) == {
        "1.4.weight", "1.5.weight", "1.5.bias", "1.5.running_mean", "1.5.running_var", "1.5.num_batches_tracked",
        "1.9.weight", "1.9.bias",
    }  # fmt: skip


def test_parts_are_set_free_at_their_epoch(tmp_path, stores):
    one = runs.train(tmp_path, stores, "digits", *GRADUAL)
    steps = [row["step"] for row in runs.rows(one) if row["kind"] == "validation"]
    assert {"1.0.weight", "1.4.weight"} & changed(one, steps[0], steps[1]) == {"1.4.weight"}
    assert {"1.0.weight", "1.4.weight"} <= changed(one, steps[1], steps[2])
    assert not {"1.1.weight", "1.1.running_mean"} & changed(one, steps[0], steps[2])


def test_a_gradual_unfreezing_is_resumed_to_the_bit(tmp_path, stores):
    words = (*GRADUAL, "checkpoint.every=2", "log.every=3")
    whole = runs.train(tmp_path, stores, "digits", *words, name="whole")
    for told in (4, 8, 13):
        parts = runs.begin(tmp_path, stores, "digits", *words, name=f"parts{told}")
        store = Store(parts.store, dict(parts.run.task.fields))
        list(itertools.islice(train(parts.run, store, parts.directory, World(), None), told))  # ends as a kill would
        job.work(parts, World())
        assert runs.distance(runs.parameters(whole), runs.parameters(parts)) == 0
        assert runs.rows(whole)[-1] == runs.rows(parts)[-1]


def test_a_gradual_unfreezing_is_the_same_on_several_ranks(tmp_path, stores, ranks):
    words = ("task.model=mlp", "data.limit=300", "data.batch_size=50", "train.epochs=2", "precision.dtype=float64")
    words = (*words, "train.freeze=1.1", "train.unfreeze=1.1@1")
    one = runs.train(tmp_path, stores, "digits", *words, name="one")
    two = runs.begin(tmp_path, stores, "digits", *words, name="two")
    ranks(2, runs.work, two.to_plain())
    assert runs.distance(runs.parameters(one), runs.parameters(two)) < 1e-9


def test_a_network_of_which_nothing_learns_is_refused(tmp_path, stores):
    with pytest.raises(UserError, match="no parameters to train"):
        runs.train(tmp_path, stores, "digits", *CNN, "train.freeze=*")
