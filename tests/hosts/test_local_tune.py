"""Sweeps in this process, through the command: what wins, what goes on, what is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from distributed import checkpoint, config, saved
from distributed.cli.main import run
from distributed.data import convert
from distributed.hosts import trial
from distributed.hosts.trial import Setup
from distributed.tuning.sweep import Sweep
from distributed.world import World

MLP = ("task.model=mlp", "data.limit=300", "log.tensorboard=false")
# Of digits, with something that happens once in its life, at the given step of any trial.
TROUBLE = """
import os, signal
from pathlib import Path
from tasks.digits import Digits

steps = 0

class Own(Digits):
    trouble: str = ""  # what happens
    at: int = 30  # the step at which it happens
    marker: str = ""  # file that says that it has happened

    def step(self, model, batch, update):
        global steps
        steps += 1
        if self.trouble and steps >= self.at and not Path(self.marker).exists():
            Path(self.marker).touch()
            if self.trouble == "raise":
                raise ZeroDivisionError("a mistake in the task")
            os.kill(os.getpid(), getattr(signal, self.trouble))
        return super().step(model, batch, update)
"""


def whipray(tmp_path: Path, stores: Path, *words: str) -> int:
    return run([*words, "--runs", str(tmp_path / "runs"), "--stores", str(stores), "--no-ray", "--json"])


def space(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "space.yaml"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def rows(told: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(row["trial"], row["settings"], row["state"], row["value"], row["epoch"]) for row in told["trials"]]


def test_a_sweep_ranks_its_trials_and_its_best_trains(tmp_path, stores, capfd, monkeypatch):
    prepared = []
    convert_all = convert._convert
    monkeypatch.setattr(convert, "_convert", lambda *given: (prepared.append(given[1]), convert_all(*given)))
    fresh = tmp_path / "stores"
    assert whipray(tmp_path, fresh, "tune", "digits", *MLP, "--trials", "5", "--epochs", "3", "--name", "s") == 0
    out = capfd.readouterr()
    told = json.loads(out.out)
    assert len(prepared) == 1, "trials that read the same rows share one store"
    assert "[5/5] trial" in out.err
    sweep = tmp_path / "sweeps" / "digits" / "s"
    assert told["sweep"] == str(sweep)
    values = [row["value"] for row in told["trials"] if row["value"] is not None]
    assert len(told["trials"]) == 5
    assert values == sorted(values, reverse=True)
    best = told["best"]
    assert best["trial"] == told["trials"][0]["trial"]
    assert set(best["metrics"]) == {"validation", "test"}
    assert best["metrics"]["validation"]["accuracy"] == values[0]
    table = pyarrow.parquet.read_table(sweep / "trials.parquet")
    assert table.num_rows == 5
    assert {"optimizer.lr", "accuracy", "state"} <= set(table.column_names)
    for row in told["trials"]:
        folder = sweep / "trials" / row["trial"]
        assert (folder / saved.CONFIG).exists()
        assert len(list((folder / "checkpoints").glob("step-*"))) <= 2, "the newest and the best"
        assert (saved.summary(folder) is not None) == (row["state"] == "done")
        assert "test" not in (saved.summary(folder) or {"metrics": {}})["metrics"], (
            "only the winner sees the test split"
        )

    assert whipray(tmp_path, fresh, "train", "digits", "--config", str(sweep / "best.yaml"), "--name", "won") == 0
    trained = json.loads(capfd.readouterr().out)
    # The same training as the trial's: as its defaults for checkpoints do not touch it, nor does the best's file lack a thing.
    assert trained["metrics"]["validation"]["accuracy"] >= values[0] - 1e-9

    assert whipray(tmp_path, fresh, "tune", "digits", *MLP, "--trials", "5", "--epochs", "3", "--name", "s") == 0
    again = capfd.readouterr()
    assert "is finished already" in again.err
    assert rows(json.loads(again.out)) == rows(told)
    assert whipray(tmp_path, fresh, "tune", "digits", *MLP, "--trials", "9", "--epochs", "3", "--name", "s") == 2
    assert "trials.count: 5 -> 9" in json.loads(capfd.readouterr().out)["error"]["message"]


@pytest.mark.parametrize(("trouble", "code"), [("raise", 1), ("SIGINT", 130)])
def test_a_sweep_that_was_cut_off_goes_on_as_if_nothing_had_happened(tmp_path, stores, capfd, trouble, code):
    task = tmp_path / "own.py"
    task.write_text(TROUBLE)
    marker = tmp_path / "happened"
    words = ["tune", f"{task}:Own", *MLP, "--space", "digits", "--trials", "4", "--epochs", "3"]
    words += [f"task.marker={marker}", f"task.trouble={trouble}"]
    assert whipray(tmp_path, stores, *words, "--name", "cut") == code
    out = capfd.readouterr()
    journal = tmp_path / "sweeps" / "own.Own" / "cut" / "journal.jsonl"
    left = Sweep.look(journal).rows
    assert marker.exists()
    assert [row.state for row in left.values()].count("running") == 1, "the trial that was cut off is not lost"
    assert ("ZeroDivisionError" if trouble == "raise" else "goes on") in out.err
    if trouble == "SIGINT":
        folder = journal.parent / "trials" / list(left)[-1]
        assert checkpoint.newest(folder)[0] is not None, "a wish to stop saves what was learned"

    assert whipray(tmp_path, stores, *words, "--name", "cut") == 0
    resumed = json.loads(capfd.readouterr().out)
    assert whipray(tmp_path, stores, *words, "--name", "whole") == 0
    whole = json.loads(capfd.readouterr().out)
    assert rows(resumed) == rows(whole)
    assert resumed["best"] == whole["best"]


def test_a_trial_that_diverges_does_not_end_the_sweep(tmp_path, stores, capfd):
    lines = ["optimizer.name: sgd", "optimizer.lr: {choice: [0.1, 1.0e+30, 0.05]}"]
    words = ["--space", space(tmp_path, *lines), "--search", "grid", "--epochs", "1"]
    assert whipray(tmp_path, stores, "tune", "digits", *MLP, *words) == 0
    told = json.loads(capfd.readouterr().out)
    failed = [row for row in told["trials"] if row["state"] == "failed"]
    assert [row["settings"]["optimizer.lr"] for row in failed] == [1e30]
    assert "is nan" in failed[0]["error"] or "is inf" in failed[0]["error"]
    assert (Path(failed[0]["directory"]) / saved.FAILURE).exists()
    assert told["best"]["settings"]["optimizer.lr"] in (0.1, 0.05)


def test_folds_are_all_run_and_their_mean_and_spread_reported(tmp_path, stores, capfd):
    assert (
        whipray(tmp_path, stores, "tune", "housing", "--space", "folds", "--epochs", "2", "log.tensorboard=false") == 0
    )
    out = capfd.readouterr()
    told = json.loads(out.out)
    assert told["best"] is None
    assert sorted(row["settings"]["data.fold"] for row in told["trials"]) == [0, 1, 2, 3, 4]
    assert all(row["state"] == "done" for row in told["trials"])
    figures = [row["metrics"]["test"]["rmse"] for row in told["trials"]]
    assert told["summary"]["test/rmse"]["mean"] == pytest.approx(sum(figures) / 5)
    assert "test/rmse" in out.err
    assert "+-" in out.err
    assert not (Path(told["sweep"]) / "best.yaml").exists()


@pytest.mark.parametrize(
    ("lines", "message", "hint"),
    [
        (["optimizer.lr: {choice: [0.1]}", "optimizer.momentun: {choice: [0.9]}"],
         "unknown setting 'optimizer.momentun' (search space {}:2)", "did you mean 'optimizer.momentum'?"),
        (["optimizer.lr: {choice: [0.1]}", "", "task.widht: {choice: [8]}"],
         "unknown setting 'task.widht' of this task (search space {}:3)", "did you mean 'task.width'?"),
        (["optimizer.name: {choice: [sgd, adam]}", "optimizer.momentum: {uniform: [0, 0.9]}"],
         "'optimizer.momentum' (search space {}:2) is not used: optimizer.name is adam", "optimizer.name=sgd"),
        (["task.model: {choice: [mlp, cnm]}"], "task.model=cnm (search space {}:1): expected", "did you mean 'cnn'?"),
        (["data.batch_size: {int: [0, 64]}"], "data.batch_size=0 (search space {}:1): expected", ""),
        (["resources.workers: {choice: [1, 2]}"], "'resources.workers' (search space {}:1) cannot be searched", ""),
        (["optimizer.lr: {log_uniform: [1, 0.1]}"], "({}:1)", "lower bound first"),
        (["optimizer.lr: 0.1"], "varies nothing", ""),
    ],
)  # fmt: skip
def test_a_space_that_some_trial_would_stumble_over_is_refused(tmp_path, stores, capfd, lines, message, hint):
    path = space(tmp_path, *lines)
    assert whipray(tmp_path, stores, "tune", "digits", "--space", path) == 2
    error = json.loads(capfd.readouterr().out)["error"]
    assert message.format(path) in error["message"]
    assert hint in error["hint"]
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["trials.cuont=3"], "unknown setting 'trials.cuont' (command line)", "did you mean 'trials.count'?"),
        (["trails.count=3"], "unknown setting 'trails.count' (command line)", "did you mean 'trials.count'?"),
        (["epochs=3"], "unknown setting 'epochs' (command line)", "train.epochs"),
        (["--search", "tpee"], "trials.search=tpee", "did you mean 'tpe'?"),
        (["--trials", "0"], "trials.count=0 (command line): expected a whole number, at least 1", ""),
        (["--space", "digitz"], "there is no search space 'digitz'", "did you mean 'digits'?"),
        (["--workers", "2"], "resources.workers=2", "resources.workers=1"),
        (["--name", "../x"], "cannot be a name", ""),
        (["train.init_from=nowhere"], "initial weights: no run 'nowhere'", "or give a file"),
    ],
)
def test_a_misspelt_word_is_refused(tmp_path, stores, capfd, words, message, hint):
    assert whipray(tmp_path, stores, "tune", "digits", *words) == 2
    error = json.loads(capfd.readouterr().out)["error"]
    assert message in error["message"]
    assert hint in error["hint"]
    assert not (tmp_path / "sweeps").exists()


def test_what_the_command_line_says_is_not_varied(tmp_path, stores, capfd):
    assert whipray(tmp_path, stores, "tune", "digits", "--show", "optimizer.name=adam", "data.batch_size=64") == 0
    told = json.loads(capfd.readouterr().out)
    assert len(told["samples"]) == 10
    assert {name for sample in told["samples"] for name in sample} == {
        "optimizer.name", "data.batch_size", "optimizer.lr", "task.width",
    }  # fmt: skip
    assert {(sample["optimizer.name"], sample["data.batch_size"]) for sample in told["samples"]} == {("adam", 64)}
    # One that depends on another keeps its condition.
    assert whipray(tmp_path, stores, "tune", "digits", "--show", "optimizer.momentum=0.5") == 0
    samples = json.loads(capfd.readouterr().out)["samples"]
    assert {(s["optimizer.name"], s.get("optimizer.momentum")) for s in samples} <= {
        ("adam", None),
        ("adamw", None),
        ("sgd", 0.5),
    }


def test_trials_are_a_part_of_no_run(tmp_path, stores, capfd):
    assert whipray(tmp_path, stores, "train", "digits", "trials.count=3") == 2
    assert "unknown setting 'trials.count'" in json.loads(capfd.readouterr().out)["error"]["message"]


def test_a_trial_tells_each_evaluation_after_its_checkpoint_also_where_a_thread_writes_it(tmp_path, stores):
    words = [*MLP, "train.epochs=4", "data.batch_size=50", "checkpoint.background=true", "checkpoint.every=1"]
    setup = Setup("digits", config.from_words(words), {}, tmp_path / "runs", stores, tmp_path / "sweep")
    told = []

    def report(epoch, value, shown, last):
        newest, _ = checkpoint.newest(setup.folder("0000"))
        told.append((epoch, newest is not None and newest.step >= 6 * epoch, last))
        return "continue"

    trial.work(setup, "0000", {}, World(), report)
    assert told == [(1, True, False), (2, True, False), (3, True, False), (4, True, True)]
