"""What a sweep leaves behind can be read: by people, by --config, by a data frame."""

import math
from pathlib import Path

import pytest
import yaml
from pyarrow import parquet
from rich.console import Console

from distributed.tuning.settings import Trials
from distributed.tuning.sweep import Plan, Sweep
from distributed.tuning.table import column, ranked_table, titles, varied, write_best, write_parquet
from search_spaces.dimensions import Choice
from search_spaces.files import load
from search_spaces.space import Space


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    defaults = {"optimizer.lr": 1e-5, "data.batch_size": 64, "optimizer.name": "adam", "task.width": 32}
    its_plan = Plan(
        load("digits"), Trials(count=4, scheduler="none"), "accuracy", True, defaults, {"task.model": "mlp"}
    )
    sweep = Sweep(its_plan, tmp_path / "journal.jsonl")
    for value, outcome in [(0.97, "done"), (0.9, "done"), (math.nan, "failed")]:
        trial = sweep.ask()
        sweep.report(trial.id, 3, value, {"accuracy": value})
        metrics = {"validation": {"accuracy": value}, "test": {"accuracy": value}}
        sweep.finish(trial.id, outcome, metrics, seconds=1.25, error="boom" if outcome == "failed" else None)
    sweep.ask()
    sweep.close()
    return sweep


def text(sweep: Sweep, limit: int | None = None) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(ranked_table(sweep, limit))
    return console.export_text()


def test_the_table_is_ranked_and_marks_winner_and_defaults(sweep: Sweep) -> None:
    shown = text(sweep).splitlines()
    assert shown[0].startswith("4 of 4 trials: 1 running, 2 done, 1 failed")
    rows = [line.split() for line in shown if line[:1] == "0"]
    assert [row[0] for row in rows] == ["0000*", "0001", "0003", "0002"]
    assert rows[0][1:] == ["1e-05", "64", "adam", "32", "0.97", "3", "done", "1.2", "s"]
    assert "* the winner, the defaults: trial 0000" in "\n".join(shown)
    limited = text(sweep, 1)
    assert "2 more are not shown" in limited  # what is running is always shown
    assert "0003" in limited


def test_five_settings_fit_into_eighty_columns(sweep: Sweep) -> None:
    assert max(len(line.rstrip()) for line in text(sweep).splitlines()) <= 80


def test_a_summary_shows_mean_and_spread(tmp_path: Path) -> None:
    sweep = Sweep(Plan(load("folds"), Trials(), "rmse", False), tmp_path / "journal.jsonl")
    for value in (3, 4, 5, 4, 4):
        trial = sweep.ask()
        sweep.report(trial.id, 1, value, {})
        sweep.finish(trial.id, "done", {})
    shown = text(sweep)
    assert "rmse: 4 +- 0.7071 over 5 trials" in shown
    assert "winner" not in shown
    assert write_best(tmp_path / "best.yaml", sweep, "housing") is None
    assert not (tmp_path / "best.yaml").exists()
    sweep.close()


def test_best_yaml_holds_the_winner_nested_under_a_comment(sweep: Sweep, tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    assert write_best(path, sweep, "digits").trial == "0000"
    content = path.read_text()
    assert content.startswith("# trial 0000 (the defaults), best of 4: accuracy 0.97 on validation within 3 epochs\n")
    assert f"# whipray train digits --config {path}\n" in content
    assert yaml.safe_load(content) == {
        "task": {"model": "mlp", "width": 32},
        "optimizer": {"lr": 1e-5, "name": "adam"},
        "data": {"batch_size": 64},
    }


def test_trials_parquet_holds_settings_and_metrics_of_all_trials(sweep: Sweep, tmp_path: Path) -> None:
    write_parquet(tmp_path / "trials.parquet", sweep)
    rows = parquet.read_table(tmp_path / "trials.parquet").to_pylist()
    assert [row["trial"] for row in rows] == ["0000", "0001", "0003", "0002"]
    assert rows[0]["optimizer.lr"] == 1e-5
    assert rows[0]["test/accuracy"] == 0.97
    assert rows[3]["error"] == "boom"
    assert [row["directory"] for row in rows] == [None] * 4


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        ([1, 2.5, None], [1.0, 2.5, None]),
        ([1, 2], [1, 2]),
        ([True, "a"], ["true", '"a"']),
        ([[0.9, 0.99], None], ["[0.9, 0.99]", None]),
        ([{}, None], ["{}", None]),
    ],
)
def test_a_column_has_one_type(values: list, stored: list) -> None:
    assert column(values) == stored


def test_columns_are_the_settings_in_which_trials_differ(tmp_path: Path) -> None:
    space = Space({"a.x": Choice((1, True)), "b.x": Choice((5,))}, fixed={"c.z": 1})
    sweep = Sweep(Plan(space, Trials(search="grid"), "loss", False), tmp_path / "journal.jsonl")
    while sweep.ask():
        pass
    assert varied(list(sweep.rows.values())) == ["a.x"]
    assert titles(["a.x", "b.x", "c.z"]) == ["a.x", "b.x", "z"]
    sweep.close()
