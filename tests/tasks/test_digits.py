"""The shortest whole task: its rows are the published ones."""

import pytest
import torch
from torchvision.ops import stochastic_depth

from tasks.digits import Digits, Source
from tasks.errors import BadRow, UserError
from tasks.fields import check_row
from tasks.networks import small
from tasks.networks.depth import StochasticDepth, linear_shares


def test_the_bundled_digits_are_all_there():
    task = Digits()
    rows = [task.row(example.reference) for example in task.examples(task.source)]
    facts = task.facts(rows)
    checked = [check_row(task.encode(row, facts), task.fields, facts) for row in rows]
    assert len(checked) == 1797 and facts["label"]["counts"] == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert checked[0]["image"][0, 0].tolist() == [0, 0, 80, 208, 144, 16, 0, 0] and checked[0]["label"] == 0


@pytest.mark.parametrize("model", ["cnn", "mlp", "residual"])
def test_each_network_scores_ten_classes(model):
    network = Digits(model=model, width=2).build({"image": {"mean": [0.3], "std": [0.3]}}, None)
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("line", "error", "reason"),
    [
        (",".join(["1"] * 64), UserError, "expected 65 cells, got 64"),
        (",".join(["1"] * 64 + ["two"]), UserError, "line 1, column 65: expected a number, got 'two'"),
        (",".join(["nan"] + ["1"] * 64), BadRow, "line 1, column 1: the number is missing"),
    ],
    ids=["cells", "text", "NaN"],
)
def test_a_broken_line_is_named(tmp_path, line, error, reason):
    (tmp_path / "d.csv").write_text(line + "\n")
    task = Digits(source=Source(path=str(tmp_path / "d.csv")))
    with pytest.raises(error, match=reason):
        [task.row(example.reference) for example in task.examples(task.source)]


# ---- residual blocks and stochastic depth


def depths(network):
    return [module for module in network.modules() if isinstance(module, StochasticDepth)]


@pytest.mark.parametrize(("channels", "width", "blocks", "classes"), [(1, 32, 2, 10), (3, 4, 1, 2), (2, 5, 3, 7)])
def test_a_residual_network_has_as_many_parameters_as_it_says(channels, width, blocks, classes):
    network = small.residual((channels, 8, 8), width, blocks, classes)
    said = (90 * blocks + 18) * width**2 + (9 * channels + 12 * blocks + 6 + 2 * classes) * width + classes
    assert sum(parameter.numel() for parameter in network.parameters()) == said
    assert (said == 204_650) == (width == 32)
    assert network(torch.zeros(2, channels, 7, 2)).shape == (2, classes)


def test_depth_is_given_up_more_the_deeper_a_block_lies():
    assert linear_shares(0.4, 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    network = Digits(model="residual", width=2, stochastic_depth=0.4).build({"image": {"mean": [0], "std": [1]}}, None)
    assert [depth.share for depth in depths(network)] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_stochastic_depth_is_torchvisions():
    branch = torch.randn(64, 3, 4, 4)
    torch.manual_seed(0)
    expected = stochastic_depth(branch, 0.3, "row")
    torch.manual_seed(0)
    assert torch.equal(StochasticDepth(0.3)(branch), expected)


def test_a_row_skips_a_whole_branch_or_nothing_of_it_and_none_in_evaluation():
    branch = torch.ones(2000, 2, 3)
    depth = StochasticDepth(0.25)
    out = depth(branch)
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(out.flatten(1).amax(1), out.flatten(1).amin(1))
    assert (out[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.04)  # four standard deviations
    assert depth.eval()(branch) is branch


def test_a_network_that_skips_nothing_draws_nothing():
    network = small.residual((1, 8, 8), 2, 1, 10)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    network(torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_skipped_blocks_are_refused_where_there_are_none():
    with pytest.raises(UserError, match=r"task.stochastic_depth is not used: task.model is mlp"):
        Digits(model="mlp", stochastic_depth=0.1)
