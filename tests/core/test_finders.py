"""The learning rate by a range test, and the size of a micro-batch by what fits the memory."""

import math
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distributed import config
from distributed.analysis import finders, room
from distributed.analysis.room import Probe, Room
from distributed.hosts import job
from distributed.run import Run, resolve
from tasks.errors import RunFailed, UserError

SHAPES = Path(__file__).parents[1] / "shapes.py"
MLP = ("task.model=mlp", "data.limit=300")
MIB = 1 << 20
GREEDY = '''
import os, signal

import torch
from torch import nn

from tasks.task import Number, Task, Vector

MIB = 1 << 20


class Greedy(Task):
    """Each row takes {each} MiB until its backward pass is done."""

    fields = {{"x": Vector(4), "y": Number(target=True)}}
    recipe = {{"data.batch_size": 48, "resources.gpu": 0}}

    def examples(self, source):
        return [{{"x": [i / 100] * 4, "y": float(i)}} for i in range(100)]

    def build(self, facts, load):
        return Net()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x):
        {extra}
        much = self.layer(x).expand(len(x), {each} * MIB // 4).exp()
        return much.mean(1)
'''


def prepared(tmp_path: Path, stores: Path, task: str, *words: str) -> tuple[Run, Path]:
    run = resolve(task, config.from_words(words), tmp_path / "runs")
    return run, job.prepare(run, stores)


def greedy(tmp_path: Path, each: int = 1, extra: str = "pass") -> str:
    path = tmp_path / "greedy.py"
    path.write_text(GREEDY.format(each=each, extra=extra))
    return f"{path}:Greedy"


# ---- the learning rate


def test_a_range_test_raises_the_rate_and_ends_when_the_loss_explodes(tmp_path, stores):
    found = finders.learning_rate(*prepared(tmp_path, stores, "digits", *MLP, "optimizer.name=sgd"), highest=1e6)
    assert found.rates[0] == 1e-7 and found.diverged and len(found.rates) < 100
    ratios = np.diff(np.log(found.rates))
    np.testing.assert_allclose(ratios, math.log(1e13) / 99, rtol=1e-9)
    assert found.suggestion is not None and found.lowest is not None
    assert 1e-4 < found.suggestion < found.lowest < 100


def test_the_suggested_rate_trains_better_than_one_a_hundred_times_smaller_or_larger(tmp_path, stores):
    run, store = prepared(tmp_path, stores, "digits", *MLP, "optimizer.name=sgd")
    best = finders.learning_rate(run, store, highest=1e3).suggestion

    def after(rate: float) -> float:
        """The mean loss of 30 steps at one rate."""
        return float(np.mean(finders.learning_rate(run, store, steps=30, lowest=rate, highest=rate * 1.001).losses))

    assert after(best) < min(after(best / 100), after(best * 100))


def test_the_same_seed_finds_the_same_to_the_bit(tmp_path, stores):
    given_run = prepared(tmp_path, stores, "digits", "task.width=4", "data.limit=200")
    one, two = (finders.learning_rate(*given_run, steps=12) for _ in range(2))
    assert one == two
    other = prepared(tmp_path, stores, "digits", "task.width=4", "data.limit=200", "train.seed=1")
    assert finders.learning_rate(*other, steps=12).losses != one.losses


def test_no_run_is_touched(tmp_path, stores):
    finders.learning_rate(*prepared(tmp_path, stores, "digits", *MLP), steps=10)
    assert not (tmp_path / "runs").exists()


def test_one_of_several_optimizers_is_searched_while_the_others_keep_their_rate(tmp_path, stores):
    run, store = prepared(tmp_path, stores, f"{SHAPES}:Adversarial", "optimizer.generator.lr=0.01")
    with pytest.raises(UserError, match="several optimizers: generator, discriminator"):
        finders.learning_rate(run, store)
    with pytest.raises(UserError, match="did you mean 'discriminator'"):
        finders.learning_rate(run, store, entry="diskriminator")
    of_both = [finders.learning_rate(run, store, entry=entry, steps=20) for entry in run.optimizers]
    assert of_both[0].losses[0] == of_both[1].losses[0] and of_both[0].losses != of_both[1].losses
    assert run.optimizers["generator"].lr == 0.01


def test_a_schedule_does_not_bend_the_rates(tmp_path, stores):
    plain, bent = (
        finders.learning_rate(*prepared(tmp_path, stores, "digits", *MLP, f"schedule.name={name}"), steps=15)
        for name in ("constant", "onecycle")
    )
    assert plain == bent


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"lowest": 0.0}, "must be above 0"),
        ({"lowest": 1.0, "highest": 0.1}, "must be above 0 and below the second"),
        ({"highest": math.inf}, "must be above 0"),
        ({"highest": math.nan}, "must be above 0"),
        ({"steps": 3}, "too few"),
        ({"entry": "generator"}, "no optimizer 'generator'"),
    ],
)
def test_bounds_that_are_none_are_refused(tmp_path, stores, words, said):
    with pytest.raises(UserError, match=said):
        finders.learning_rate(*prepared(tmp_path, stores, "digits", *MLP), **words)


RATES = np.geomspace(1e-6, 1, 100).tolist()


def test_the_steepest_fall_of_a_known_curve_is_found():
    for centre in (1e-4, 1e-3, 1e-2):
        fall = [1 / (1 + (rate / centre) ** 2) for rate in RATES]  # steepest in log(rate) at the centre
        found = finders.steepest(RATES, fall)
        assert found == pytest.approx(centre, rel=0.15)


def test_an_explosion_does_not_hide_what_came_before_it():
    fall = [1 / (1 + (rate / 1e-3) ** 2) for rate in RATES]
    exploded = [*fall[:58], *[1e6] * 5]
    assert finders.steepest(RATES[:63], exploded) == pytest.approx(finders.steepest(RATES, fall), rel=0.15)


def test_nothing_is_suggested_where_the_loss_does_not_fall():
    noise = np.random.default_rng(0).normal(1, 0.1, 100)
    assert finders.steepest(RATES, noise.tolist()) is None
    assert finders.steepest(RATES, np.linspace(1, 3, 100).tolist()) is None
    assert finders.steepest([], []) is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=120))
def test_a_smoothed_curve_has_each_step_and_stays_between_the_losses(losses):
    smooth = finders.smoothed(losses)
    assert len(smooth) == len(losses)
    assert min(losses) - 1e-6 <= min(smooth) and max(smooth) <= max(losses) + 1e-6
    suggestion = finders.steepest(np.geomspace(1e-6, 1, len(losses)).tolist(), losses)
    assert suggestion is None or 0 < suggestion <= 1


@pytest.mark.parametrize("losses", [[], [1.0], [2.0] * 20, np.linspace(3, 1, 50).tolist()])
def test_every_curve_can_be_drawn(losses):
    found = finders.RangeTest("model", np.geomspace(1e-6, 1, len(losses)).tolist(), losses, diverged=False)
    assert finders.plot(found, "a task").startswith(b"\x89PNG")


# ---- the size of a micro-batch


def test_the_largest_micro_batch_that_fits_is_found(tmp_path, stores):
    # Forward keeps two copies of what a row takes, and backward makes one or two more.
    run, store = prepared(tmp_path, stores, greedy(tmp_path, each=8))
    found = room.micro_batch(run, store, budget=600 * MIB)
    sizes = {probe.rows: probe for probe in found.probes}
    assert found.share == 48 and 8 <= found.largest <= 24
    assert [size for size in sizes if size <= 8] == [1, 2, 4, 8]
    assert all(probe.fits == (rows <= found.largest) for rows, probe in sizes.items())
    next_one = min(size for size in (room.even(size, 48) for size in range(1, 49)) if size > found.largest)
    assert next_one in sizes and not sizes[next_one].fits
    assert sizes[4].memory < sizes[8].memory and 2 * 8 * 8 * MIB < sizes[8].memory < 650 * MIB
    assert all(probe.speed > 0 for probe in found.fitting)


def test_a_batch_that_fits_as_a_whole_says_how_much_more_would(tmp_path, stores):
    run, store = prepared(tmp_path, stores, greedy(tmp_path, each=2), "data.batch_size=32")
    found = room.micro_batch(run, store, budget=1000 * MIB)
    assert found.largest == found.share == 32
    assert found.would_fit is not None and 32 < found.would_fit < 500  # a row takes one copy of its 2 MiB at least


def test_several_workers_share_the_batch_and_rows_bound_it(tmp_path, stores):
    run, store = prepared(tmp_path, stores, greedy(tmp_path), "resources.workers=4")
    assert room.micro_batch(run, store).share == 12
    run, store = prepared(tmp_path, stores, greedy(tmp_path), "data.batch_size=512", "data.limit=5")
    assert room.micro_batch(run, store).share == 5


def test_sizes_that_normalisation_cannot_have_are_passed_over(tmp_path, stores):
    run, store = prepared(tmp_path, stores, "digits", "task.width=4", "data.batch_size=16", "data.limit=160")
    found = room.micro_batch(run, store)
    assert "batch normalisation" in found.probes[0].why and not found.probes[0].fits
    assert found.largest == 16
    run, store = prepared(tmp_path, stores, "digits", "task.width=4", "data.batch_size=1", "data.limit=10")
    with pytest.raises(UserError, match="batch normalisation"):
        room.micro_batch(run, store)


def test_a_size_whose_process_is_killed_does_not_fit(tmp_path, stores):
    extra = "os.kill(os.getpid(), signal.SIGKILL) if len(x) > 5 else None"
    run, store = prepared(tmp_path, stores, greedy(tmp_path, extra=extra))
    found = room.micro_batch(run, store)
    assert found.largest == 5 and "killed by SIGKILL" in {probe.why for probe in found.probes}


@pytest.mark.parametrize(
    ("size", "share", "rows"),
    [(1, 48, 1), (8, 48, 8), (32, 48, 24), (47, 48, 24), (48, 48, 48), (60, 100, 50), (3, 4, 2)],
)
def test_micro_batches_of_a_batch_are_alike_in_size(size, share, rows):
    assert room.even(size, share) == rows


@pytest.mark.parametrize(
    ("extra", "error", "said"),
    [("raise KeyError('weight')", KeyError, "weight"), ("os._exit(3)", RunFailed, "ended with exit code 3")],
)
def test_what_is_wrong_with_the_task_is_told_and_is_no_lack_of_memory(tmp_path, stores, extra, error, said):
    run, store = prepared(tmp_path, stores, greedy(tmp_path, extra=extra))
    with pytest.raises(error, match=said):
        room.micro_batch(run, store)


def test_where_not_even_one_row_fits_it_is_said(tmp_path, stores):
    run, store = prepared(tmp_path, stores, greedy(tmp_path, each=400))
    with pytest.raises(UserError, match="not even micro-batches of 1 rows fit: out of memory"):
        room.micro_batch(run, store, budget=300 * MIB)


def test_this_process_is_left_as_it_was(tmp_path, stores):
    import resource

    before, children = resource.getrlimit(resource.RLIMIT_DATA), multiprocessing.active_children()
    state = torch.random.get_rng_state()
    run, store = prepared(tmp_path, stores, greedy(tmp_path))
    room.micro_batch(run, store, budget=600 * MIB)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert multiprocessing.active_children() == children


@pytest.mark.parametrize(
    ("probes", "would_fit"),
    [
        ([Probe(4, True, 400, 1.0), Probe(8, True, 800, 2.0)], 100),
        ([Probe(4, True, 400, 1.0), Probe(8, True, 401, 2.0)], None),  # too little of it is the rows'
        ([Probe(8, True, 800, 2.0)], None),
        ([Probe(4, True, None, 1.0), Probe(8, True, None, 2.0)], None),
    ],
)
def test_what_would_fit_follows_from_the_growth(probes, would_fit):
    found = Room(probes, 8, 10_000)
    assert (found.would_fit, found.largest, found.quickest) == (would_fit, 8, 8)
