"""Averages of the weights: what is judged, saved and used, and what a training goes on from."""

import itertools

import pytest
import torch

from distributed.averaging import AVERAGES, Average, Ema, Swa
from distributed.data.store import Store
from distributed.evaluation import Evaluator
from distributed.hosts import job
from distributed.hosts.job import Job
from distributed.loop import train
from distributed.world import World
from tasks.errors import UserError
from tests import runs

DIGITS = ("task.width=4", "train.epochs=3", "data.limit=400", "data.batch_size=64", "log.every=3", "checkpoint.every=2")


def test_an_exponential_average_forgets_the_first_weights_sooner():
    settings = Ema(name="ema", decay=0.9)
    assert [round(1 - settings.share(taken), 3) for taken in (0, 1, 8, 80, 10_000)] == [0.1, 0.182, 0.5, 0.9, 0.9]


def test_stochastic_weight_averaging_is_the_plain_mean_of_the_last_part():
    live = {"w": torch.zeros(1)}
    average = Average(Swa(name="swa", start=0.5), live)
    for step in range(8):
        live["w"].fill_(float(step))
        average.take(step, 8)
    assert average.taken == 4
    with average.applied():
        assert live["w"].item() == pytest.approx((4 + 5 + 6 + 7) / 4)
    assert live["w"].item() == 7


def test_a_buffer_that_is_replaced_instead_of_changed_is_refused():
    average = Average(Ema(name="ema"), {"centre": torch.zeros(1)})
    average.take(0, 8)
    with pytest.raises(UserError, match="the network replaces its buffer 'centre'"):
        average.state({"centre": torch.ones(1)})


def test_more_epochs_begin_the_average_of_the_last_part_anew():
    live = {"w": torch.zeros(1)}
    average = Average(Swa(name="swa", start=0.5), live)
    for step in range(8):
        average.take(step, 8)
    live["w"].fill_(3.0)
    average.take(8, 24)
    with average.applied():
        assert live["w"].item() == 3
    assert average.taken == 0


def test_before_it_begins_the_weights_themselves_are_used():
    live = {"w": torch.ones(1), "count": torch.ones(1, dtype=torch.int64)}
    average = Average(Swa(name="swa", start=0.5), live)
    average.take(0, 8)
    told, kept = average.state(live)
    assert told == live
    assert kept == {}


def test_an_average_is_saved_in_the_place_of_the_weights_and_goes_on_to_the_bit():
    live = {"w": torch.tensor([1.0])}
    average = Average(Ema(name="ema", decay=0.5), live)
    for step in range(3):
        live["w"].mul_(2)
        average.take(step, 9)
    told, kept = average.state(live)
    assert told["w"].item() != live["w"].item() == kept["live/w"].item()
    again = {"w": told["w"].clone()}  # as a checkpoint gives it back
    other = Average(Ema(name="ema", decay=0.5), again)
    other.restore(kept, average.taken)
    for one, tensors in ((average, live), (other, again)):
        tensors["w"].mul_(2)
        one.take(3, 9)
    assert torch.equal(live["w"], again["w"])
    assert torch.equal(average.mean["w"], other.mean["w"])


@pytest.mark.parametrize("name", [name for name in AVERAGES if name != "none"])
def test_a_resumed_training_with_an_average_equals_the_uninterrupted_one(tmp_path, stores, name):
    words = (*DIGITS, f"averaging.name={name}", *(["averaging.start=0.3"] if name == "swa" else []))
    whole = runs.train(tmp_path, stores, "digits", *words, name="whole")
    parts = runs.begin(tmp_path, stores, "digits", *words, name="parts")
    store = Store(parts.store, dict(parts.run.task.fields))
    list(itertools.islice(train(parts.run, store, parts.directory, World(), None), 7))  # ends as a kill would
    job.work(parts, World())
    assert runs.distance(runs.parameters(whole), runs.parameters(parts)) == 0
    assert runs.rows(whole)[-1] == runs.rows(parts)[-1]
    plain = runs.train(tmp_path, stores, "digits", *DIGITS, name="plain")
    assert runs.distance(runs.parameters(whole), runs.parameters(plain)) > 0


def test_an_average_does_not_disturb_what_is_learned(tmp_path, stores):
    losses = []
    for name in ("none", "ema"):
        one = runs.train(tmp_path, stores, "digits", *DIGITS, f"averaging.name={name}", name=name)
        losses.append([row["loss"] for row in runs.rows(one) if row["kind"] == "train"])
    assert losses[0] == losses[1]


def judged_buffers(world, plain):
    """What one rank judges, at each evaluation of a training."""
    one, seen = Job.from_plain(plain), []
    judge = Evaluator.__call__

    def look(self, model):
        seen.append({name: buffer.clone() for name, buffer in model.named_buffers()})
        return judge(self, model)

    Evaluator.__call__ = look  # a pool of ranks has no monkeypatch
    try:
        list(train(one.run, Store(one.store, dict(one.run.task.fields)), one.directory, world, None))
    finally:
        Evaluator.__call__ = judge
    return seen


def test_all_ranks_judge_the_same_average_also_of_statistics(tmp_path, stores, ranks):
    one = runs.begin(tmp_path, stores, "digits", *DIGITS, "averaging.name=ema")
    first, second = ranks(2, judged_buffers, one.to_plain())
    assert len(first) == 3
    assert [runs.distance(*both) for both in zip(first, second, strict=True)] == [0, 0, 0]
