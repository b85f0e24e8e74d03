"""Which rows make up which batch, as numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed.data.order import Balanced, Plan, Weighted, permuted, portions, smallest_portion, spread
from tasks.errors import UserError

ORDERS = st.sampled_from(["shuffle", "length", "sequential"])


def plan_of(rows: int, batch_size: int, order: str = "shuffle", seed: int = 0) -> Plan:
    return Plan(rows, batch_size, seed, order, np.random.default_rng(0).integers(1, 300, rows))


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 50))
def test_permuted_is_a_permutation(rows, seed, epoch):
    assert sorted(permuted(np.arange(rows), rows, seed, epoch)) == list(range(rows))


@given(st.integers(2, 10**9), st.lists(st.integers(0, 10**9), min_size=1, max_size=20))
def test_permuted_of_some_positions_is_the_same_as_of_one_at_a_time(rows, positions):
    positions = np.array(positions) % rows
    alone = [int(permuted(np.array([p]), rows, 7)[0]) for p in positions]
    assert permuted(positions, rows, 7).tolist() == alone


@given(st.integers(1, 500), st.integers(1, 600), ORDERS, st.integers(0, 3))
def test_an_epoch_holds_each_row_once_in_batches_that_differ_by_one_at_most(rows, batch_size, order, epoch):
    plan = plan_of(rows, batch_size, order)
    batches = [plan.batch(epoch, k) for k in range(plan.steps)]
    sizes = {len(batch) for batch in batches}
    assert sorted(np.concatenate(batches)) == list(range(rows))
    assert plan.steps == -(-rows // batch_size)
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= batch_size


@given(st.integers(1, 400), st.integers(1, 7), st.one_of(st.none(), st.integers(1, 50)))
def test_the_portions_of_all_ranks_are_the_batch(size, world_size, micro):
    batch = np.arange(size)
    parts = [portions(batch, rank, world_size, micro) for rank in range(world_size)]
    assert np.concatenate([part for rank in parts for part in rank]).tolist() == batch.tolist()
    assert micro is None or all(len(part) <= micro for rank in parts for part in rank)


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 50)))
def test_smallest_portion_is_a_lower_bound_that_is_met(rows, batch_size, world_size, micro):
    plan = plan_of(rows, batch_size)
    sizes = [
        len(part)
        for k in range(plan.steps)
        for rank in range(world_size)
        for part in portions(plan.batch(0, k), rank, world_size, micro)
    ]
    assert smallest_portion(plan, world_size, micro) == min(sizes)


def test_order_depends_on_seed_and_epoch_alone():
    plan = plan_of(1000, 10)
    assert plan.batch(0, 5).tolist() == plan_of(1000, 10).batch(0, 5).tolist()
    assert plan.batch(0, 5).tolist() != plan.batch(1, 5).tolist()
    assert plan.batch(0, 5).tolist() != plan_of(1000, 10, seed=1).batch(0, 5).tolist()


def test_batches_by_length_waste_little_padding_and_come_in_no_order_of_length():
    plan = plan_of(20_000, 64, "length")
    lengths = [plan.lengths[plan.batch(0, k)] for k in range(plan.steps)]
    assert sum(x.sum() for x in lengths) / sum(x.max() * len(x) for x in lengths) > 0.95
    means = [x.mean() for x in lengths[:100]]
    assert abs(np.corrcoef(means, range(100))[0, 1]) < 0.3


def test_order_by_length_needs_lengths():
    with pytest.raises(UserError, match="data.order=length"):
        Plan(10, 2, 0, "length").batch(0, 0)


def test_a_batch_of_a_billion_rows_costs_no_more_memory_than_a_small_one():
    plan = Plan(10**9, 128, 0)
    assert len(set(plan.batch(3, 7_000_000).tolist())) == 128


@pytest.mark.parametrize(
    ("total", "parts", "sizes"), [(10, 3, [3, 3, 4]), (2, 3, [0, 1, 1]), (0, 2, [0, 0]), (6, 2, [3, 3])]
)
def test_spread_shares_out_evenly(total, parts, sizes):
    assert [end - start for start, end in (spread(total, parts, i) for i in range(parts))] == sizes


# ---- sampling


@given(st.lists(st.integers(0, 5), min_size=1, max_size=300), st.integers(0, 2**62))
def test_balanced_sampling_draws_every_class_alike_and_its_rows_in_turn(labels, seed):
    labels = np.array(labels)
    plan = Plan(len(labels), 32, seed, sample=Balanced(labels))
    drawn = np.concatenate([plan.batch(0, k) for k in range(plan.steps)])
    counts = [int((labels[drawn] == one).sum()) for one in np.unique(labels)]
    assert len(drawn) == len(labels)
    assert max(counts) - min(counts) <= 1
    for one in np.unique(labels):
        times = np.bincount(drawn[labels[drawn] == one], minlength=len(labels))[labels == one]
        assert times.max() - times.min() <= 1


@given(st.lists(st.floats(0, 10, width=32), min_size=1, max_size=200).filter(any), st.integers(0, 2**62))
def test_weighted_sampling_draws_rows_in_proportion_to_their_weights(weights, seed):
    weights = np.array(weights, np.float32)
    plan = Plan(len(weights), 16, seed, sample=Weighted(weights))
    drawn = np.concatenate([plan.batch(1, k) for k in range(plan.steps)])
    expected = weights.astype(float) * len(weights) / weights.astype(float).sum()
    assert np.abs(np.bincount(drawn, minlength=len(weights)) - expected).max() < 1.01
    assert not (weights[drawn] == 0).any()


def test_sampling_by_length_keeps_the_sample():
    labels = np.array([0] * 90 + [1] * 10)
    plain = Plan(100, 10, 0, sample=Balanced(labels))
    sorted_ = Plan(100, 10, 0, "length", np.arange(100), Balanced(labels))
    everything = [np.sort(np.concatenate([plan.batch(0, k) for k in range(10)])) for plan in (plain, sorted_)]
    assert everything[0].tolist() == everything[1].tolist()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1, -1], "row 1 has the weight -1"),
        ([0, 0], "all rows have the weight 0"),
        ([1, np.nan], "row 1 has the weight nan"),
    ],
)
def test_impossible_weights_are_refused(weights, words):
    with pytest.raises(UserError, match=words):
        Weighted(np.array(weights, np.float32))


@given(st.integers(1, 50), st.integers(0, 3))
def test_a_smaller_domain_comes_again_in_another_order_each_time(distinct, epoch):
    plan = Plan(200, 10, 5, distinct=distinct)
    drawn = np.concatenate([plan.batch(epoch, k) for k in range(plan.steps)])
    for turn in range(200 // distinct):
        assert sorted(drawn[turn * distinct : (turn + 1) * distinct]) == list(range(distinct))


@pytest.mark.parametrize("order", ["shuffle", "sequential"])
def test_a_rank_plans_a_billion_rows_in_bounded_memory(order):
    import tracemalloc

    plan = Plan(10**9, 1024, 0, order)
    tracemalloc.start()
    for k in (0, 123_456, 976_562):
        portions(plan.batch(2, k), 3, 8, 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6, "a window of 100 batches, never an epoch"
