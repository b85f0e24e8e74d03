"""Which parts of a network learn, and from when."""

import itertools

import pytest
import torch

from distributed.data.store import Store
from distributed.freezing import frozen
from distributed.hosts import job
from distributed.learning import begin
from distributed.loop import train
from distributed.world import World
from tasks.errors import UserError
from tests import runs
from tests.core.test_zoo import SHAPES

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
MOMENTUM = ("optimizer.name=sgd", "optimizer.momentum=0.9", "averaging.name=ema", "precision.channels_last=true")


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


@pytest.mark.parametrize("more", [(), (*MOMENTUM, "precision.dtype=float16")], ids=["adamw", "momentum"])
def test_a_gradual_unfreezing_is_resumed_to_the_bit(tmp_path, stores, more):
    words = (*GRADUAL, *more, "checkpoint.every=2", "log.every=3")
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


def test_parts_that_are_frozen_at_first_have_their_own_rate_later(tmp_path, stores):
    words = ("train.freeze=1.0", "train.unfreeze=1.0@1", "optimizer.layer_decay=0.5", "optimizer.parts=1.0=0.1")
    one = runs.begin(tmp_path, stores, "digits", *CNN, *words)
    learning = begin(one.run, Store(one.store, dict(one.run.task.fields)), World(), None)

    def rates() -> dict[str, float]:
        [entry] = learning.updater.entries.values()
        names = {id(parameter): name for name, parameter in learning.model.plain.named_parameters()}
        return {names[id(p)]: group["rate"] for group in entry.optimizer.param_groups for p in group["params"]}

    before = rates()
    learning.set_free(1)
    assert rates() == {**before, "1.0.weight": 0.1}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("size", [1, 2])
def test_an_entry_may_be_frozen_as_a_whole_until_its_epoch(tmp_path, stores, ranks, optimizer, size):
    words = ("train.freeze=discriminator,generator.0", "train.unfreeze=discriminator@1,generator.0@2", "log.every=3",
             "checkpoint.every=2", "checkpoint.keep=99", "train.epochs=3", "precision.dtype=float64",
             f"optimizer.name={optimizer}", *(["optimizer.momentum=0.9"] if optimizer == "sgd" else []))  # fmt: skip
    one = runs.train(tmp_path, stores, f"{SHAPES}:Adversarial", *words, name="one")
    steps = one.steps_per_epoch
    assert changed(one, 2, steps) == {"generator.2.weight", "generator.2.bias"}
    assert len(changed(one, steps, 2 * steps)) == 6
    assert len(changed(one, 2 * steps, 3 * steps)) == 8
    other = runs.begin(tmp_path, stores, f"{SHAPES}:Adversarial", *words, name="other")
    for stop in (4, steps, 2 * steps + 1, None):
        ranks(size, runs.work_until, other.to_plain(), stop)
    assert runs.distance(runs.parameters(one), runs.parameters(other)) <= (0 if size == 1 else 1e-9)


@pytest.mark.parametrize(
    ("words", "learned"),
    # Two convolutions of 100 and 800 weights, 8 and 16 numbers that normalise, 330 of the last layer.
    [((*CNN, "train.freeze=1.0,1.4"), 8 + 16 + 330), (GRADUAL, 100 + 800 + 16 + 330)],
    ids=["frozen", "set free on the way"],
)
def test_a_summary_counts_the_parameters_that_have_learned(tmp_path, stores, words, learned):
    assert runs.summary(runs.train(tmp_path, stores, "digits", *words))["parameters"] == learned


ROOTED = """
import torch
from torch import nn
from tasks.digits import Digits


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 10))

    def forward(self, image):
        return self.body(image) * self.scale


class Rooted(Digits):
    def build(self, facts, load):
        return Net()
"""


def test_a_frozen_parameter_of_the_root_leaves_the_layers_below_it_learning(tmp_path, stores):
    (tmp_path / "rooted.py").write_text(ROOTED)
    one = runs.begin(tmp_path, stores, f"{tmp_path}/rooted.py:Rooted", "train.freeze=scale,body.2")
    learning = begin(one.run, Store(one.store, dict(one.run.task.fields)), World(), None)
    for _ in range(2):
        network = learning.model.learning()
        assert [name for name, layer in network.named_modules() if not layer.training] == ["body.2"]
        network.eval()
