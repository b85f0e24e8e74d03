"""The shortest whole task: its rows are the published ones."""

import pytest
import torch

from tasks.digits import Digits, Source
from tasks.errors import BadRow, UserError
from tasks.fields import check_row


def test_the_bundled_digits_are_all_there():
    task = Digits()
    rows = [task.row(example.reference) for example in task.examples(task.source)]
    facts = task.facts(rows)
    checked = [check_row(task.encode(row, facts), task.fields, facts) for row in rows]
    assert len(checked) == 1797 and facts["label"]["counts"] == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert checked[0]["image"][0, 0].tolist() == [0, 0, 80, 208, 144, 16, 0, 0] and checked[0]["label"] == 0


@pytest.mark.parametrize("model", ["cnn", "mlp"])
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
