"""A metric merged from parts is the metric of the whole."""

import math
import pickle

import pytest
import torch

from tasks import metrics

TARGET = torch.tensor([0, 1, 1, 0, 1, 1, 0])
PREDICTED = torch.tensor([0, 1, 0, 1, 1, 1, 0])
METRICS = {"accuracy": metrics.accuracy, "f1": lambda: metrics.f1(2), "f1 of 3": lambda: metrics.f1(3),
           "rmse": metrics.rmse, "r2": metrics.r2}  # fmt: skip


def pair(name, rows):
    kind = torch.float32 if name in ("rmse", "r2") else torch.int64
    return PREDICTED[rows].to(kind), TARGET[rows].to(kind)


def fed(name, *parts):
    metric = METRICS[name]()
    for rows in parts:
        metric.update(*pair(name, rows))
    return metric


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    "parts",
    [
        [slice(0, 7)],
        [slice(0, 3), slice(3, 7)],
        [slice(0, 1), slice(1, 6), slice(6, 7)],
        [slice(0, 7), None],
        [None, slice(0, 4), None, slice(4, 7)],
    ],
    ids=["one", "two", "three", "an empty last", "empty ones between"],
)
def test_merged_parts_equal_the_whole(name, parts):
    states = [fed(name, *([] if rows is None else [rows])).state() for rows in parts]
    merged = METRICS[name]()
    merged.merge(pickle.loads(pickle.dumps(states)))
    whole = fed(name, slice(0, 7))
    assert merged.compute() == pytest.approx(whole.compute(), abs=1e-12)
    assert merged.state()["count"] == sum(state["count"] for state in states)


@pytest.mark.parametrize("name", METRICS)
def test_merging_replaces_what_the_metric_had_seen(name):
    metric = fed(name, slice(0, 7), slice(2, 4))
    metric.merge([fed(name, slice(0, 7)).state()])
    assert metric.compute() == pytest.approx(fed(name, slice(0, 7)).compute(), abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_a_merged_metric_can_be_merged_again(name):
    first, second, both = METRICS[name](), METRICS[name](), METRICS[name]()
    first.merge([fed(name, slice(0, 2)).state(), fed(name, slice(2, 4)).state()])
    second.merge([fed(name, slice(4, 7)).state()])
    both.merge([first.state(), second.state()])
    assert both.compute() == pytest.approx(fed(name, slice(0, 7)).compute(), abs=1e-12)


@pytest.mark.parametrize(
    ("name", "value"), [("accuracy", 5 / 7), ("f1", 0.75), ("rmse", (2 / 7) ** 0.5), ("r2", 1 - 2 / (12 / 7))]
)
def test_metrics_have_the_values_of_their_formulas(name, value):
    assert fed(name, slice(0, 7)).compute() == pytest.approx(value)


def test_each_metric_says_which_way_is_better():
    assert {name: make().higher_is_better for name, make in METRICS.items()} == {
        "accuracy": True, "f1": True, "f1 of 3": True, "rmse": False, "r2": True,
    }  # fmt: skip


def test_a_metric_that_does_not_say_which_way_is_better_is_refused():
    import torchmetrics

    with pytest.raises(TypeError, match="higher_is_better"):
        metrics.FromTorchmetrics(torchmetrics.MeanMetric())


def test_sums_do_not_depend_on_batches():
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 1e4
    one, many = metrics.rmse(), metrics.rmse()
    one.update(values, torch.zeros(1000))
    for value in values.split(7):
        many.update(value, torch.zeros(len(value)))
    assert many.compute() == pytest.approx(one.compute(), rel=1e-14)


@pytest.mark.parametrize("name", ["accuracy", "rmse", "r2"])
def test_predictions_of_another_shape_are_refused_and_not_compared_each_with_each(name):
    with pytest.raises(ValueError, match=r"\(4, 1\) and targets \(4,\)"):
        METRICS[name]().update(torch.zeros(4, 1), torch.zeros(4))


def test_r2_of_targets_far_from_0_is_as_exact(rows=1000):
    draws = torch.Generator().manual_seed(0)
    target = torch.randn(rows, generator=draws, dtype=torch.float64)
    predicted = target + torch.randn(rows, generator=draws, dtype=torch.float64) / 10
    figures = []
    for offset in (0.0, 1e9):
        parts = [metrics.r2() for _ in range(3)]
        for at in range(0, rows, 100):
            parts[at % 3].update(predicted[at : at + 100] + offset, target[at : at + 100] + offset)
        whole = metrics.r2()
        whole.merge([part.state() for part in parts])
        figures.append(whole.compute())
    assert figures[0] == pytest.approx(figures[1], abs=1e-6)
    assert figures[0] == pytest.approx(
        1 - float((predicted - target).square().sum() / (target - target.mean()).square().sum())
    )


def test_r2_of_targets_that_are_all_alike_is_not_defined():
    metric = metrics.r2()
    metric.update(torch.ones(3), torch.full((3,), 0.5))
    assert math.isnan(metric.compute())


def test_squares_that_are_too_large_are_infinite_and_no_error():
    parts = [metrics.rmse(), metrics.rmse()]
    for part in parts:
        part.update(torch.full((1,), 1.2e154, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    parts[0].merge([part.state() for part in parts])
    assert parts[0].compute() == math.inf
