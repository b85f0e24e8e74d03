"""Schedulers: decisions of successive halving as tables."""

import math

import pytest

from distributed.tuning.schedulers import SCHEDULERS, Asha

GO, STOP = "continue", "stop"


@pytest.mark.parametrize(
    ("events", "decisions"),
    [
        # grace 1, factor 3: the first goes on, the second only if it is better, then the top third
        ([("a", 1, 0.5), ("b", 1, 0.4), ("c", 1, 0.6), ("d", 1, 0.55)], [GO, STOP, GO, STOP]),
        # six at a rung: two of them go on
        (
            [(name, 1, value) for name, value in zip("abcdef", [6, 5, 4, 3, 2, 5.5], strict=True)],
            [GO] + [STOP] * 4 + [GO],
        ),
        # between the rungs 1, 3, 9 nobody is judged
        ([("a", 1, 0.5), ("a", 2, 0.1), ("a", 3, 0.5), ("b", 1, 0.6), ("b", 2, 0.0), ("b", 3, 0.4)], [GO] * 5 + [STOP]),
        # each rung has its own ranks
        ([("a", 1, 1), ("b", 1, 2), ("b", 3, 2), ("a", 3, 3), ("b", 9, 1), ("a", 9, 0.5)], [GO] * 5 + [STOP]),
        # equals go on, a second report at a rung changes nothing
        ([("a", 1, 0.5), ("b", 1, 0.5), ("b", 1, 0.1)], [GO, GO, GO]),
        # who reports rarely is judged at the highest rung passed
        ([("a", 4, 0.5), ("b", 5, 0.4), ("c", 8, 0.6), ("d", 9, 0.1)], [GO, STOP, GO, GO]),
        # no number always stops, and is no rival
        ([("a", 1, math.nan), ("b", 1, None), ("c", 2, math.nan), ("d", 1, 0.1)], [STOP, STOP, STOP, GO]),
        # infinities are numbers
        ([("a", 1, -math.inf), ("b", 1, 0.1), ("c", 1, -math.inf)], [GO, GO, STOP]),
    ],
)
def test_asha_keeps_the_top_third_of_each_rung(events: list, decisions: list[str]) -> None:
    asha = Asha(grace=1, factor=3, higher_is_better=True)
    assert [asha.report(*event) for event in events] == decisions
    mirrored = Asha(grace=1, factor=3, higher_is_better=False)
    assert [mirrored.report(name, epoch, None if v is None else -v) for name, epoch, v in events] == decisions


def test_nobody_is_stopped_within_the_grace() -> None:
    asha = Asha(grace=4, factor=2, higher_is_better=True)
    assert asha.report("a", 4, 0.9) == GO
    assert [asha.report("b", epoch, 0.1) for epoch in (1, 2, 3, 4)] == [GO, GO, GO, STOP]
    assert [asha.report("c", epoch, 1.0) for epoch in (4, 8)] == [GO, GO]
    assert asha.report("a", 8, 0.9) == STOP


def test_a_third_survives_a_rung_that_is_reached_in_any_order() -> None:
    asha = Asha(grace=1, factor=3, higher_is_better=True)
    going = [asha.report(str(number), 1, number * 37 % 100) for number in range(100)].count(GO)
    assert 25 <= going <= 45  # who comes early has few rivals


def test_without_a_scheduler_everything_goes_on() -> None:
    never = SCHEDULERS["none"](grace=1, factor=3, higher_is_better=True)
    assert never.report("a", 1, math.nan) == GO
