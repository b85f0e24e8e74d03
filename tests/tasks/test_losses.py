"""Losses of classifiers: torch's own where torch has them, a formula written out where it has not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from tasks.losses import cross_entropy, shares

B, K = 6, 4
SCORES = torch.randn(B, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
CLASSES = torch.tensor([0, 3, 1, 1, 2, 0])
SHARES = torch.rand(B, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)
WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.25], dtype=torch.float64)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("target", [CLASSES, SHARES], ids=["classes", "shares"])
def test_smoothed_and_weighted_cross_entropy_is_torchs(target, smoothing, weights):
    expected = functional.cross_entropy(SCORES, target, weights, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(cross_entropy(SCORES, target, smoothing, weights=weights), expected)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_term_is_the_formula_written_out(data):
    numbers = st.floats(-8, 8)
    scores = data.draw(st.lists(numbers, min_size=3, max_size=3))
    smoothing, focal = data.draw(st.sampled_from([0.0, 0.2])), data.draw(st.sampled_from([0.0, 0.5, 2.0]))
    weights, which = data.draw(st.lists(st.floats(0, 3), min_size=3, max_size=3)), data.draw(st.integers(0, 2))
    total = sum(math.exp(s) for s in scores)
    shown = [math.exp(s) / total for s in scores]
    wanted = [(1 - smoothing) * (c == which) + smoothing / 3 for c in range(3)]
    entropy = -sum(y * w * math.log(p) for y, w, p in zip(wanted, weights, shown, strict=True))
    off = sum(abs(y - p) for y, p in zip(wanted, shown, strict=True)) / 2
    [loss] = cross_entropy(
        torch.tensor([scores], dtype=torch.float64), torch.tensor([which]), smoothing, focal,
        torch.tensor(weights, dtype=torch.float64),
    )  # fmt: skip
    assert loss.item() == pytest.approx(entropy * off**focal, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("focal", [0.5, 1.0, 2.0, 5.0])
def test_focal_loss_of_classes_is_that_of_the_paper(focal):
    share = SCORES.softmax(1)[torch.arange(B), CLASSES]
    torch.testing.assert_close(cross_entropy(SCORES, CLASSES, focal=focal), -((1 - share) ** focal) * share.log())


@pytest.mark.parametrize("focal", [0.5, 2.0])
def test_focal_loss_of_two_classes_is_torchvisions_of_their_difference(focal):
    score, truth = SCORES[:, 0], (CLASSES > 0).long()
    ours = cross_entropy(torch.stack([torch.zeros_like(score), score], 1), truth, focal=focal)
    torch.testing.assert_close(ours, sigmoid_focal_loss(score, truth.double(), alpha=-1, gamma=focal))


@pytest.mark.parametrize("focal", [0.5, 2.0])
def test_a_focal_loss_asks_for_no_other_shares_than_the_target_has(focal):
    """Where it is smallest the network is as sure as the mixed target: (1 - p)^focal of each class would move it."""
    wanted = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    steps = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    shown = torch.stack([steps, (1 - steps) * 2 / 3, (1 - steps) / 3], 1)
    losses = cross_entropy(shown.log(), wanted.expand(97, 3), focal=focal)
    assert steps[losses.argmin()].item() == pytest.approx(0.7, abs=0.011)


def test_without_settings_a_class_and_its_share_of_1_lose_the_same():
    for focal in (0.0, 2.0):
        by_class, by_share = (cross_entropy(SCORES, t, 0.1, focal, WEIGHTS) for t in (CLASSES, shares(CLASSES, K)))
        torch.testing.assert_close(by_class, by_share)


def test_a_row_loses_what_it_loses_alone():
    whole = cross_entropy(SCORES, CLASSES, 0.1, 2.0, WEIGHTS)
    alone = [cross_entropy(SCORES[i : i + 1], CLASSES[i : i + 1], 0.1, 2.0, WEIGHTS) for i in range(B)]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=0, atol=1e-15)


@pytest.mark.parametrize("focal", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("target", [CLASSES, SHARES], ids=["classes", "shares"])
def test_gradients_are_those_of_the_function(target, focal):
    scores = SCORES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: cross_entropy(s, target, 0.1, focal, WEIGHTS), scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("focal", [0.0, 0.3, 2.0])
def test_sure_networks_lose_finite_numbers_with_finite_gradients(dtype, focal):
    scores = torch.tensor([[90.0, -90.0, 0.0], [0.0, 30.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    for target in (torch.tensor([0, 1, 2]), torch.tensor([1, 0, 2]), torch.full((3, 3), 1 / 3, dtype=dtype)):
        loss = cross_entropy(scores, target, 0.0, focal)
        (gradient,) = torch.autograd.grad(loss.sum(), scores)
        assert loss.dtype == torch.float32 and loss.isfinite().all() and gradient.isfinite().all()
        assert (loss >= 0).all()


def test_sixteen_bits_are_summed_in_thirty_two():
    scores = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(scores, torch.arange(4), 0.1, 2.0)
    exact = cross_entropy(scores.double(), torch.arange(4), 0.1, 2.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_targets_become_shares_of_the_classes():
    assert shares(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert shares(SHARES, K) is SHARES
