"""Learning-rate factors, as tables of numbers."""

import math

import pytest
import torch

from distributed.schedules import SCHEDULES, Cosine, Plateaus, factor


def factors(
    name: str, steps: int = 10, steps_per_epoch: int = 1, history: tuple[float, ...] = (), **settings
) -> list[float]:
    schedule = SCHEDULES[name](name=name, **settings)
    return [
        factor(schedule, s, steps_per_epoch, steps, Plateaus(list(history[: s // steps_per_epoch])))
        for s in range(steps)
    ]


TABLE = [
    ("constant", {}, [1, 1, 1, 1]),
    ("step", {"every": 2, "gamma": 0.1}, [1, 1, 0.1, 0.1]),
    ("multistep", {"milestones": (1, 3), "gamma": 0.5}, [1, 0.5, 0.5, 0.25]),
    ("multistep", {"milestones": (0.5,), "gamma": 0.1}, [1, 1, 0.1, 0.1]),
    ("exponential", {"gamma": 0.5}, [1, 0.5, 0.25, 0.125]),
    ("polynomial", {}, [1, 2 / 3, 1 / 3, 0]),
    ("polynomial", {"power": 2, "floor": 0.1}, [1, 0.5, 0.2, 0.1]),
    ("cosine", {}, [1, 0.75, 0.25, 0]),
    ("cosine", {"floor": 0.2}, [1, 0.8, 0.4, 0.2]),
    ("onecycle", {"rise": 0.5, "start": 0.2, "end": 0.1}, [0.2, None, None, 0.1]),
    ("constant", {"warmup": 2}, [1 / 3, 2 / 3, 1, 1]),
    ("polynomial", {"warmup": 1}, [0.5, 1, 0.5, 0]),
]


@pytest.mark.parametrize(("name", "settings", "expected"), TABLE)
def test_factors_of_four_steps(name, settings, expected):
    got = factors(name, 4, **settings)
    assert [g for g, e in zip(got, expected, strict=True) if e is not None] == pytest.approx(
        [e for e in expected if e is not None]
    )


def test_every_schedule_begins_and_stays_within_its_bounds():
    for name in SCHEDULES:
        assert all(0 <= value <= 1 for value in factors(name, 50, 5, warmup=1.5)), name


def test_cosine_with_restarts_begins_anew_and_stretches():
    got = factors("cosine", 700, 100, restart=1.0, stretch=2.0)
    peaks = [i for i in range(1, 700) if got[i] > got[i - 1]]
    assert [round(p, -1) for p in peaks if got[p] > 0.99] == [100, 300]


def test_plateau_falls_after_patience_evaluations_without_a_best():
    got = factors("plateau", 8, 1, history=(0.5, 0.6, 0.6, 0.6, 0.6, 0.7, 0.1, 0.1), patience=2, gamma=0.1)
    assert got == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1])


def test_exponential_and_step_agree_with_torch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    for mine in factors("step", 9, every=3, gamma=0.5):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(mine)
        optimizer.step()
        theirs.step()


def test_a_nan_is_never_the_best():
    plateaus = Plateaus([0.5, math.nan, 0.4])
    assert plateaus.since_best() == 2
    assert not Plateaus([math.nan]).is_best()
    assert Plateaus([math.nan, 0.1]).is_best()


def test_one_step_of_training_is_defined_for_every_schedule():
    for name in SCHEDULES:
        assert math.isfinite(factors(name, 1)[0])


@pytest.mark.parametrize(
    ("restart", "stretch", "begins"),
    [
        (0.1, 1, [i / 10 for i in range(10)]),
        (1, 2, [0, 1, 3, 7, 15]),
        (0.5, 3, [0, 0.5, 2, 6.5]),
        (1, 1 + 1e-12, [0, 1, 2, 3]),
    ],
)
def test_a_period_of_the_cosine_begins_at_the_top_and_ends_at_the_bottom(restart, stretch, begins):
    cosine = Cosine(restart=restart, stretch=stretch)
    for begin in begins:
        assert cosine.factor(begin, 100, Plateaus()) == pytest.approx(1, abs=1e-6)
        if begin:
            assert cosine.factor(begin - 1e-5, 100, Plateaus()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("stretch", [1.0, 1 + 1e-9, 1.5])
def test_the_shortest_period_is_found_at_once_however_far_the_training_is(stretch):
    cosine = Cosine(restart=1e-6, stretch=stretch)
    assert all(0 <= cosine.factor(1000 + step / 100, 2000, Plateaus()) <= 1 for step in range(100))
