"""The contract's own code: ragged columns, random numbers by row, frozen judges, and what follows from the fields."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tasks.task import Draw, Image, Label, Number, Ragged, Source, Task, Tokens, UserError, Vector, frozen, mix


@given(st.lists(st.lists(st.integers(1, 99), max_size=5), max_size=5))
def test_padded_and_split_hold_the_same_rows(rows):
    ragged = Ragged(
        torch.tensor(sum(rows, []), dtype=torch.int32), torch.tensor([len(r) for r in rows], dtype=torch.int64)
    )
    padded = ragged.padded(-1)
    assert padded.shape == (len(rows), max([1, *map(len, rows)]))
    assert [[n for n in row if n != -1] for row in padded.tolist()] == rows
    assert [row.tolist() for row in ragged.split()] == rows


def test_ragged_rows_keep_their_inner_shape():
    boxes = Ragged(torch.arange(12.0).reshape(3, 4), torch.tensor([1, 0, 2]))
    assert boxes.padded().shape == (3, 2, 4)
    assert boxes.to(torch.float64).values.dtype == torch.float64


KINDS = {
    "uniform": lambda draw: draw.uniform(-1, 1),
    "integers": lambda draw: draw.integers(0, 10),
    "chance": lambda draw: draw.chance(0.5),
    "normal": lambda draw: draw.normal(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_draws_the_same_numbers_in_any_batch(kind):
    whole = KINDS[kind](Draw(3, 1, np.arange(10)))
    for rows in ([7], [2, 9, 4], [9, 8, 7, 6]):
        assert torch.equal(KINDS[kind](Draw(3, 1, np.array(rows))), whole[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_epoch_or_call_draws_other_numbers(kind):
    rows = np.arange(100)
    first = Draw(0, 0, rows)
    draws = [KINDS[kind](d) for d in (first, first, Draw(1, 0, rows), Draw(0, 1, rows), Draw(2**64 - 1, 0, rows))]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_draws_have_their_distribution():
    rows = np.arange(20_000)
    draw = Draw(0, 0, rows)
    uniform, whole, chance, normal = draw.uniform(2, 4), draw.integers(5, 8), draw.chance(0.25), draw.normal()
    assert uniform.dtype == normal.dtype == torch.float32 and whole.dtype == torch.int64 and chance.dtype == torch.bool
    assert uniform.min() >= 2 and uniform.max() <= 4 and abs(uniform.mean() - 3) < 0.02
    assert whole.unique().tolist() == [5, 6, 7] and abs(whole.float().mean() - 6) < 0.03
    assert abs(chance.float().mean() - 0.25) < 0.015
    assert normal.isfinite().all() and abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03


def test_mix_is_splitmix64():
    # The first outputs of the reference implementation (Vigna, splitmix64.c) for the state 0.
    states = np.array([0, 0x9E3779B97F4A7C15], np.uint64)
    assert [hex(v) for v in mix(states).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


def test_frozen_lets_gradients_through_and_restores_what_learned():
    judge, player = nn.Linear(2, 1), nn.Linear(2, 2)
    judge.bias.requires_grad_(False)
    with frozen(judge):
        assert not any(p.requires_grad for p in judge.parameters())
        judge(player(torch.ones(1, 2))).sum().backward()
    assert judge.weight.grad is None and player.weight.grad is not None
    assert judge.weight.requires_grad and not judge.bias.requires_grad


def test_frozen_restores_after_an_error():
    judge = nn.Linear(2, 1)
    with pytest.raises(ZeroDivisionError), frozen(judge):
        raise ZeroDivisionError
    assert judge.weight.requires_grad


class Lines(Task):
    fields = {"x": Vector(2), "y": Number(target=True)}
    slope: float = 2.0  # of the line

    def examples(self, source):
        return [{"x": [1.0, 2.0], "y": 3.0}, {"x": [3.0, 2.0], "y": 5.0}]


def test_a_task_is_frozen_and_its_settings_are_typed():
    task = Lines(slope=3.0)
    assert task == Lines(slope=3.0) != Lines()
    with pytest.raises(AttributeError):
        task.slope = 1.0
    with pytest.raises(TypeError):
        Lines(slop=1.0)
    assert pickle.loads(pickle.dumps(task)) == task


def test_a_reference_may_be_the_row_itself():
    task = Lines()
    rows = [task.row(reference) for reference in task.examples(task.source)]
    assert task.facts(rows)["x"] == {"mean": [2.0, 2.0], "std": [1.0, 1.0]}
    assert task.encode(rows[0], {}) == rows[0]
    assert task.files() == []


def test_regression_defaults_follow_from_the_fields():
    batch = {"row": torch.arange(2), "x": torch.ones(2, 2), "y": torch.tensor([1.0, 3.0])}

    def model(x):
        return x[:, :1]

    assert Lines().loss(model, batch)["squared_error"] == 2.0
    assert Lines().predict(model, batch)["y"].shape == (2,)
    assert Lines().units(batch) == 2
    metrics = Lines().metrics({})
    Lines().measure(metrics, {"y": torch.tensor([1.0, 1.0])}, batch)
    assert list(metrics) == ["rmse", "r2"] and metrics["rmse"].compute() == pytest.approx(math.sqrt(2))


class Words(Task):
    fields = {"picture": Image(1, 1, 1), "words": Tokens(), "label": Label(classes=2)}


def test_classification_defaults_follow_from_the_fields():
    batch = {
        "row": torch.arange(2),
        "picture": torch.tensor([[[[0]]], [[[255]]]], dtype=torch.uint8),
        "words": Ragged(torch.tensor([4, 5, 6], dtype=torch.int32), torch.tensor([1, 2])),
        "label": torch.tensor([0, 1]),
    }
    out = Words().transform(batch, Draw(0, 0, np.arange(2)), training=True)
    assert out["picture"].flatten().tolist() == [0.0, 1.0]
    assert out["words"].tolist() == [[4, 0], [5, 6]] and out["words_length"].tolist() == [1, 2]
    assert batch["picture"].dtype == torch.uint8

    def model(picture, words, words_length):
        return torch.stack([1 - picture.flatten(), picture.flatten()], 1) * 10

    assert Words().predict(model, out)["label"].tolist() == [0, 1]
    assert Words().loss(model, out)["cross_entropy"] < 1e-4


def test_a_step_hands_the_sum_of_the_losses_to_update():
    class Two(Lines):
        def loss(self, model, batch):
            return {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}

    seen = []
    assert list(Two().step(nn.Identity(), {}, lambda loss, name="model": seen.append((loss.item(), name)))) == [
        "a",
        "b",
    ]
    assert seen == [(3.0, "model")]


@pytest.mark.parametrize("call", [lambda t: t.examples(Source()), lambda t: t.build({}, None), lambda t: t.metrics({})])
def test_what_a_task_must_define_is_said(call):
    class Empty(Task):
        pass

    with pytest.raises(TypeError, match=r"Empty.*defin"):
        call(Empty())


def test_user_errors_survive_pickling_with_their_hint():
    error = pickle.loads(pickle.dumps(UserError("what", "do that")))
    assert (error.message, error.hint, str(error)) == ("what", "do that", "what\ndo that")
