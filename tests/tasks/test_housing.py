"""Tables of numbers: the bundled one, the original one, and anybody's own."""

import numpy as np
import pytest
import torch

from tasks.errors import BadRow, UserError
from tasks.fields import check_row
from tasks.housing import BOSTON, BUNDLED, Housing, Table


def rows_of(task):
    return [task.row(example.reference) for example in task.examples(task.source)]


def table_at(path, text):
    path.write_text(text)
    return str(path)


def test_the_bundled_table_is_the_published_one():
    rows = rows_of(Housing())
    assert len(rows) == 506 and rows[0]["names"] == list(BOSTON[:-1])
    assert rows[0]["features"] == [0.00632, 18, 2.31, 0, 0.538, 6.575, 65.2, 4.09, 1, 296, 15.3, 396.9, 4.98]
    assert [row["price"] for row in rows[:3]] == [24.0, 21.6, 34.7]
    assert np.mean([row["price"] for row in rows]) == pytest.approx(22.5328, abs=1e-4)


def test_rows_pass_the_declared_fields_and_the_network_begins_at_the_mean():
    task = Housing()
    rows = rows_of(task)
    facts = task.facts(rows)
    checked = [check_row(task.encode(row, facts), task.fields, facts) for row in rows]
    model = task.build(facts, None)
    prices = model(torch.from_numpy(np.stack([row["features"] for row in checked])))
    assert prices.shape == (506, 1)
    assert abs(prices.mean().item() - facts["price"]["mean"]) < facts["price"]["std"]
    assert task.facts([]) == {}


def test_the_original_file_without_names_gives_the_same_rows(tmp_path):
    lines = BUNDLED.read_text().splitlines()[1:]
    path = table_at(tmp_path / "housing.data", "\n".join("  " + "   ".join(line.split(",")) for line in lines) + "\n\n")
    assert rows_of(Housing(source=Table(path=path))) == rows_of(Housing())


def test_a_column_can_be_left_out():
    task = Housing(source=Table(drop=("b",)))
    rows = rows_of(task)
    assert "b" not in rows[0]["names"] and len(rows[0]["features"]) == task.fields["features"].length == 12
    check_row(task.encode(rows[0], task.facts(rows)), task.fields, {})


OWN = "name,rooms,cost,area\nA,3,100,50.5\nB,4,200,70\n"


def test_any_table_with_a_target_goes_through_the_same_task(tmp_path):
    source = Table(path=table_at(tmp_path / "own.csv", OWN), target="cost", columns=3, drop=("name",))
    task = Housing(source=source)
    assert rows_of(task) == [
        {"names": ["rooms", "area"], "features": [3.0, 50.5], "price": 100.0},
        {"names": ["rooms", "area"], "features": [4.0, 70.0], "price": 200.0},
    ]
    assert task.fields["features"].length == 2


@pytest.mark.parametrize(
    ("settings", "reason", "hint"),
    [
        ({"target": "price"}, "no column 'price'", "task.source"),
        ({"target": "cost"}, "3 columns besides the target 'cost', expected 13", "task.source.columns=3"),
        ({"target": "cost", "columns": 3, "drop": ("colour",)}, "no column 'colour'", "task.source"),
        ({"target": "cost", "columns": 3}, r"own.csv, line 2, column 'name': expected a number, got 'A'", "numbers"),
        ({"target": "cost", "columns": 3, "drop": ("cost",)}, "leaves nothing to learn", "fewer"),
        ({"target": "cost", "columns": 1, "drop": ("name",)}, "leaves nothing to learn", "fewer"),
    ],
)
def test_a_table_that_does_not_fit_the_settings_is_refused(tmp_path, settings, reason, hint):
    with pytest.raises(UserError, match=reason) as caught:
        rows_of(Housing(source=Table(path=table_at(tmp_path / "own.csv", OWN), **settings)))
    assert hint in caught.value.hint


@pytest.mark.parametrize("cell", ["", "nan", "inf", "?"])
def test_a_row_with_a_missing_number_is_set_aside(tmp_path, cell):
    source = Table(path=table_at(tmp_path / "own.csv", f"x,medv\n1,2\n{cell},3\n4,{cell}\n"), columns=1)
    task = Housing(source=source)
    good, no_feature, no_target = [example.reference for example in task.examples(source)]
    assert task.row(good)["features"] == [1.0]
    with pytest.raises(BadRow, match="line 3, column 'x'"):
        task.row(no_feature)
    with pytest.raises(BadRow, match="line 4, column 'medv'"):
        task.row(no_target)


def test_a_ragged_line_of_the_original_file_is_refused(tmp_path):
    path = table_at(tmp_path / "housing.data", " 1" * 14 + "\n" + " 1" * 13 + "\n")
    with pytest.raises(UserError, match="line 2: expected 14 numbers, got 13"):
        rows_of(Housing(source=Table(path=path)))


@pytest.mark.parametrize("content", ["b,a\n2,1\n", "a,id,b\n1,77,2\n", "medv,b,a\n9,2,1\n", "a,b,medv\n1,2,\n"])
def test_a_table_to_predict_may_have_other_columns_in_another_order(tmp_path, content):
    task = Housing(source=Table(columns=2))
    facts = {"features": {"names": ["a", "b"]}}
    path = tmp_path / "new.csv"
    path.write_text(content)
    rows = [check_row(task.encode(row, facts), task.fields, facts, targets=False) for row in task.inputs(path)]
    assert [row["features"].tolist() for row in rows] == [[1, 2]] and "price" not in rows[0]


def test_a_table_to_predict_needs_the_columns_of_the_training(tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("a\n1\n")
    [row] = Housing().inputs(path)
    with pytest.raises(BadRow, match="no column 'b', which the training rows had"):
        Housing().encode(row, {"features": {"names": ["a", "b"]}})


def test_a_row_to_predict_must_be_complete(tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("a,b\n1,2\n1,\n")
    with pytest.raises(UserError, match="new.csv, line 3, column 'b': the number is missing"):
        list(Housing().inputs(path))
