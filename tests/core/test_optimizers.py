"""Groups of parameters: rates of parts and layers, and what is decayed."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from distributed.optimizers import OPTIMIZERS, create, groups
from tasks.errors import UserError
from tests import runs

NET = nn.ModuleDict({
    "stem": nn.Linear(2, 2), "blocks": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2)),
    "head": nn.Linear(2, 1),
})  # fmt: skip
NAMED = dict(NET.named_parameters())
SGD, ADAMW = OPTIMIZERS["sgd"], OPTIMIZERS["adamw"]


def rates(**settings) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in NAMED.items()}
    made = groups(SGD(name="sgd", **settings), NAMED)
    return {names[id(p)]: group["rate"] for group in made for p in group["params"]}


def test_without_more_words_all_parameters_are_one_group():
    (group,) = groups(SGD(name="sgd"), NAMED)
    assert len(group["params"]) == len(NAMED)
    assert group["rate"] == 1
    assert "weight_decay" not in group


def test_the_first_part_that_matches_sets_the_rate():
    found = rates(parts=("blocks.0=0.5", "blocks=0.1", "*.bias=2"))
    assert found["blocks.0.weight"] == found["blocks.0.bias"] == 0.5
    assert found["blocks.1.weight"] == found["blocks.2.bias"] == 0.1
    assert found["head.bias"] == found["stem.bias"] == 2
    assert found["head.weight"] == 1


def test_each_layer_learns_slower_than_the_next_one():
    found = rates(layer_decay=0.5)
    order = ["stem.weight", "blocks.0.weight", "blocks.1.weight", "blocks.2.weight", "head.weight"]
    assert [found[name] for name in order] == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]


def test_biases_and_normalisation_can_be_spared_from_decay():
    plain, spared = sorted(
        groups(ADAMW(name="adamw", decay_on="matrices"), NAMED), key=lambda g: g.get("weight_decay", 1), reverse=True
    )
    assert {p.ndim for p in plain["params"]} == {2}
    assert {p.ndim for p in spared["params"]} == {1}
    optimizer = create(ADAMW(name="adamw", weight_decay=0.2, decay_on="matrices"), [plain, spared])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]


@pytest.mark.parametrize("parts", [("stem",), ("stem=x",), ("stem=-1",), ("stem=inf",), ("stom=1",)])
def test_a_part_that_means_nothing_is_refused(parts):
    with pytest.raises(UserError, match=r"optimizer\.parts="):
        rates(parts=parts)


def test_a_rate_of_a_part_scales_its_steps(tmp_path, stores):
    words = (
        "task.model=mlp",
        "train.steps=1",
        "optimizer.name=sgd",
        "schedule.name=constant",
        "precision.dtype=float64",
    )

    def moved(*more: str) -> dict[str, torch.Tensor]:
        still = runs.train(tmp_path, stores, "digits", *words, "optimizer.lr=1e-30", name="still" + str(len(more)))
        one = runs.train(tmp_path, stores, "digits", *words, "optimizer.lr=0.1", *more, name="moved" + str(len(more)))
        start, end = runs.parameters(still), runs.parameters(one)
        return {name: end[name] - start[name] for name in end}

    plain, scaled = moved(), moved("optimizer.parts=1.1=0.25")
    assert torch.allclose(scaled["1.1.weight"], 0.25 * plain["1.1.weight"], atol=1e-12)
    assert torch.allclose(scaled["1.3.weight"], plain["1.3.weight"], atol=1e-12)


def test_the_state_of_groups_is_resumed_whatever_their_order(tmp_path, stores):
    words = ("task.model=mlp", "data.limit=300", "optimizer.name=adamw", "optimizer.layer_decay=0.5",
             "optimizer.decay_on=matrices", "optimizer.l1=1e-4", "train.clip_value=0.1", "train.clip_norm=1")  # fmt: skip
    whole = runs.train(tmp_path, stores, "digits", *words, "train.epochs=4", "schedule.name=constant", name="whole")
    parts = runs.train(tmp_path, stores, "digits", *words, "train.epochs=2", "schedule.name=constant", name="parts")
    parts = runs.train(tmp_path, stores, "digits", *words, "train.epochs=4", "schedule.name=constant", name="parts")
    assert runs.distance(runs.parameters(whole), runs.parameters(parts)) == 0


def test_no_optimizer_of_torch_imports_the_compiler():
    program = """
import sys, torch
from distributed.optimizers import OPTIMIZERS, create
for name, cls in OPTIMIZERS.items():
    net = torch.nn.Linear(2, 2)
    optimizer = create(cls(name=name), net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules, "half of the time to the first step"
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
