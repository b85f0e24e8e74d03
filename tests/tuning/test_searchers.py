"""Searchers: deterministic from a seed, inside the space, and TPE is worth its while."""

import math
import random
from statistics import mean

import pytest

from distributed.tuning.searchers import SEARCHERS, Searcher, encoded
from search_spaces.dimensions import Choice, IntRange, LogUniform, Uniform
from search_spaces.files import load
from search_spaces.space import Space

SPACE = Space(
    {
        "optimizer.lr": LogUniform(1e-4, 1e-1),
        "optimizer.name": Choice(("adam", "sgd")),
        "optimizer.momentum": Uniform(0, 0.9, when={"optimizer.name": ("sgd",)}),
        "data.batch_size": IntRange(16, 64, 16),
        "task.width": IntRange(4, 64, log=True),
        "task.dropout": Uniform(0, 0.5, 0.1),
        "task.bias": Choice((True, 1, None, [1, 2])),
    },
    fixed={"train.epochs": 3},
)


def searcher(name: str, space: Space = SPACE, *, seed: int = 0, count: int = 40, higher: bool = True) -> Searcher:
    return SEARCHERS[name](space, seed=seed, count=count, higher_is_better=higher)


def loss(settings: dict) -> float:
    return (math.log10(settings["optimizer.lr"]) + 2.5) ** 2 + (settings["optimizer.name"] != "adam")


@pytest.mark.parametrize("name", SEARCHERS)
def test_equal_calls_give_equal_trials_inside_the_space(name: str) -> None:
    def trials(seed: int) -> list[dict]:
        asked, search = [], searcher(name, seed=seed, count=30)
        for number in range(30):
            trial_id = f"{number:04d}"
            asked.append(search.ask(trial_id))
            if number % 5 == 4:
                continue  # stays running
            outcome = number % 4
            value = None if outcome == 1 else math.nan if outcome == 2 else loss(asked[-1])
            search.tell(trial_id, value, stopped=number % 3 == 0, epoch=number)
        return asked

    once = trials(7)
    assert once == trials(7)
    assert once != trials(8)
    assert all(SPACE.holds(settings) for settings in once)
    assert all(settings["train.epochs"] == 3 for settings in once)


def test_a_random_trial_depends_on_seed_and_id_alone() -> None:
    early, late = searcher("random"), searcher("random")
    for number in range(5):
        late.ask(f"{number:04d}")
    assert early.ask("0005") == late.ask("0005")


def test_tpe_beats_random_on_a_quadratic() -> None:
    space = Space({"a.x": Uniform(-5, 5), "a.y": LogUniform(1e-5, 1), "a.z": Choice(("p", "q", "r"))})

    def best(name: str, seed: int) -> float:
        search, values = searcher(name, space, seed=seed, count=40, higher=False), []
        for number in range(40):
            point = search.ask(f"{number:04d}")
            values.append((point["a.x"] - 1) ** 2 + (math.log10(point["a.y"]) + 3) ** 2 + 2 * (point["a.z"] != "q"))
            search.tell(f"{number:04d}", values[-1])
        return min(values)

    assert mean(best("tpe", seed) for seed in range(10)) < 0.7 * mean(best("random", seed) for seed in range(10))


@pytest.mark.parametrize("higher", [True, False])
def test_tpe_climbs_where_higher_is_better_and_descends_where_it_is_not(higher: bool) -> None:
    space = Space({"a.x": Uniform(0, 1)})
    search, drawn = searcher("tpe", space, higher=higher), []
    for number in range(40):
        drawn.append(search.ask(f"{number:04d}")["a.x"])
        search.tell(f"{number:04d}", drawn[-1])
    assert (mean(drawn[20:]) > 0.7) if higher else (mean(drawn[20:]) < 0.3)


def test_tpe_avoids_what_was_stopped_or_was_no_number() -> None:
    space = Space({"a.x": Uniform(0, 1)})
    search, drawn = searcher("tpe", space), []
    for number in range(60):
        x = search.ask(f"{number:04d}")["a.x"]
        drawn.append(x)
        if x > 0.6:
            search.tell(f"{number:04d}", math.nan if number % 2 else 0.1, stopped=True, epoch=1)
        else:
            search.tell(f"{number:04d}", 0.5)
    assert mean(x > 0.6 for x in drawn[30:]) < 0.3  # by chance 0.4


def test_tpe_learns_from_an_adopted_trial_and_passes_over_a_foreign_one() -> None:
    space = Space({"a.x": Uniform(0, 1), "a.n": IntRange(0, 100, 10), "a.c": Choice((1, True))})
    search = searcher("tpe", space)
    search.adopt("0000", {"a.x": 0.25, "a.n": 30, "a.c": True})
    search.tell("0000", 1.0)
    search.adopt("0001", {"a.x": 7.0})  # no point of the space
    search.tell("0001", 1.0)
    (trial,) = search._study.trials
    assert trial.params == {"a.x": 0.25, "a.n": 3, "a.c": 1}
    assert trial.value == 1.0


def test_what_optuna_sees_maps_back() -> None:
    for seed in range(20):
        for name, value in SPACE.sample(random.Random(seed).random).items():
            if name in SPACE.dimensions:
                dimension = SPACE.dimensions[name]
                seen = encoded(dimension, value)
                mapped = isinstance(dimension, Choice) or name in ("data.batch_size", "task.dropout")
                assert (dimension.nth(seen) if mapped else seen) == value


def test_a_grid_is_as_fine_as_the_count_allows() -> None:
    space = Space({"a.x": Uniform(0, 1), "a.c": Choice((1, 2, 3))})
    search = searcher("grid", space, count=16)
    points = [search.ask(str(number)) for number in range(15)]
    assert search.ask("15") is None
    assert search.limit == 15
    assert not search.note
    assert len({point["a.x"] for point in points}) == 5
    assert [point["a.c"] for point in points[:4]] == [1, 2, 3, 1]


def test_a_grid_that_does_not_fit_is_thinned_and_says_so() -> None:
    search = searcher("grid", load("digits"), count=15)
    points = [search.ask(str(number)) for number in range(15)]
    assert search.ask("15") is None
    assert search.note == "15 of the grid's 72 points are tried, drawn at random"
    assert len({str(point) for point in points}) == 15
