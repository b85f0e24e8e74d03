"""The sweep: equal events give equal decisions, and nothing that its journal holds is lost."""

import errno
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed import durable
from distributed.tuning import journal as journals
from distributed.tuning.settings import Trials
from distributed.tuning.sweep import Plan, Sweep, Trial
from search_spaces.dimensions import Choice, Uniform
from search_spaces.files import load
from search_spaces.space import Space
from tasks.errors import UserError

DEFAULTS = {"optimizer.lr": 3e-3, "data.batch_size": 64, "optimizer.name": "adam"}
EPOCHS = 9


def plan(**changes: object) -> Plan:
    return Plan(load("default"), Trials(**{"grace": 1, **changes}), "accuracy", True, DEFAULTS, {"task.model": "cnn"})


def accuracy(trial: Trial, epoch: int) -> float:
    if trial.id == "0003":
        return math.nan
    return 1 - 0.1 * abs(math.log10(trial.settings["optimizer.lr"]) + 2) - 0.3 / epoch


def run(sweep: Sweep, *, until: Callable[[], bool] = lambda: False, at_once: int = 3) -> list[tuple]:
    """Drives a sweep with several trials at once, one epoch of each in turn; returns what was decided."""
    running: dict[str, tuple[Trial, int]] = {}
    decided: list[tuple] = []
    while not until():
        while len(running) < at_once and (trial := sweep.ask()):
            running[trial.id] = (trial, 0)
            decided.append((trial.id, trial.settings))
        if not running:
            break
        for trial, epoch in list(running.values()):
            value = accuracy(trial, epoch + 1)
            decision = sweep.report(trial.id, epoch + 1, value, {"accuracy": value})
            decided.append((trial.id, epoch + 1, decision))
            running[trial.id] = (trial, epoch + 1)
            if epoch + 1 == EPOCHS:
                sweep.finish(
                    trial.id, "done", {"validation": {"accuracy": value}}, seconds=2, directory=f"t/{trial.id}"
                )
            elif decision == "stop":
                sweep.finish(trial.id, "stopped", {"validation": {"accuracy": value}}, seconds=1)
            elif trial.id in ("0001", "0002"):
                sweep.finish(trial.id, "failed", {}, error="out of memory", seconds=1)
            else:
                continue
            del running[trial.id]
    sweep.close()
    return decided


def lines(path: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("search", ["tpe", "random", "grid"])
def test_equal_events_give_equal_decisions(tmp_path: Path, search: str) -> None:
    first = run(Sweep(plan(search=search), tmp_path / "a.jsonl"))
    second = run(Sweep(plan(search=search), tmp_path / "b.jsonl"))
    assert first == second
    assert lines(tmp_path / "a.jsonl") == lines(tmp_path / "b.jsonl")


@pytest.mark.parametrize("search", ["tpe", "random", "grid"])
def test_a_sweep_cut_off_after_any_line_goes_on_as_if_nothing_had_happened(tmp_path: Path, search: str) -> None:
    whole = tmp_path / "whole.jsonl"
    reference = Sweep(plan(search=search, count=8), whole)
    run(reference, at_once=1)
    content = whole.read_bytes().splitlines(keepends=True)
    for kept in range(1, len(content), 4):
        path = tmp_path / f"cut{kept}.jsonl"
        path.write_bytes(b"".join(content[:kept]) + content[kept][: len(content[kept]) // 2])  # torn
        sweep = Sweep.resume(path, plan(search=search, count=8))
        run(sweep, at_once=1)
        assert [r for r in lines(path) if r["event"] != "again"][:kept] == lines(whole)[:kept]
        assert outline(sweep) == outline(reference)


def outline(sweep: Sweep) -> str:  # as text: a NaN equals a NaN there
    return str([(row.trial, row.settings, row.state, row.value, row.epoch) for row in sweep.ranked()])


def test_unfinished_trials_are_handed_out_again_first_with_their_settings(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    sweep = Sweep(plan(), path)
    one, two, three = sweep.ask(), sweep.ask(), sweep.ask()
    sweep.report(one.id, 1, 0.5, {"accuracy": 0.5})
    sweep.finish(two.id, "done", {"accuracy": 0.6}, seconds=3.0, directory="trials/0001")
    sweep.close()

    sweep = Sweep.resume(path)
    again = [sweep.ask(), sweep.ask()]
    assert [(trial.id, trial.settings, trial.again) for trial in again] == [
        (one.id, one.settings, True),
        (three.id, three.settings, True),
    ]
    assert sweep.ask() == replace(sweep_of(plan(), tmp_path / "other.jsonl", asked=4), again=False)
    assert sweep.rows[two.id].state == "done"
    assert sweep.rows[two.id].directory == "trials/0001"
    assert sweep.rows[one.id].value == 0.5
    assert sweep.report(one.id, 1, 0.1, {}) == "continue"  # known already: the value stays
    assert sweep.rows[one.id].value == 0.5
    sweep.close()


def sweep_of(its_plan: Plan, path: Path, asked: int) -> Trial:
    sweep = Sweep(its_plan, path)
    trials = [sweep.ask() for _ in range(asked)]
    sweep.close()
    return trials[-1]


def test_a_decision_to_stop_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    sweep = Sweep(plan(), path)
    base, trial = sweep.ask(), sweep.ask()
    sweep.report(base.id, 1, 0.9, {})
    assert sweep.report(trial.id, 1, 0.1, {"accuracy": 0.1}) == "stop"
    assert sweep.report(trial.id, 2, 0.99, {}) == "stop"
    sweep.close()
    sweep = Sweep.resume(path)
    assert sweep.rows[trial.id].state == "stopped"
    assert sweep.rows[trial.id].metrics == {"accuracy": 0.1}
    assert [sweep.ask().id, sweep.ask().id] == [base.id, "0002"]
    sweep.close()


def test_the_defaults_are_the_first_trial_and_are_never_stopped(tmp_path: Path) -> None:
    sweep = Sweep(plan(), tmp_path / "journal.jsonl")
    base, other, third = sweep.ask(), sweep.ask(), sweep.ask()
    assert (base.id, base.settings, base.baseline) == ("0000", DEFAULTS, True)
    assert not other.baseline
    sweep.report(other.id, 1, 0.9, {})
    assert sweep.report(base.id, 1, 0.1, {}) == "continue"
    assert sweep.report(third.id, 1, 0.1, {}) == "stop"
    sweep.finish(other.id, "stopped", {})
    sweep.finish(third.id, "stopped", {})
    assert sweep.report(base.id, 2, 0.95, {}) == "continue"
    sweep.finish(base.id, "done", {})
    assert sweep.best().trial == base.id
    sweep.close()


def test_the_count_is_kept_and_the_last_trials_come_to_an_end(tmp_path: Path) -> None:
    sweep = Sweep(plan(count=5), tmp_path / "journal.jsonl")
    run(sweep)
    assert list(sweep.rows) == ["0000", "0001", "0002", "0003", "0004"]
    assert sweep.total == 5
    assert not any(row.state == "running" for row in sweep.rows.values())


def test_ranks_put_failures_and_what_is_no_number_last(tmp_path: Path) -> None:
    its_plan = Plan(Space({"a.x": Uniform(0, 1)}), Trials(scheduler="none"), "loss", False)
    sweep = Sweep(its_plan, tmp_path / "journal.jsonl")
    for value, outcome in [
        (0.5, "done"),
        (math.nan, "done"),
        (0.2, "failed"),
        (None, "done"),
        (0.3, "stopped"),
        (0.3, "done"),
    ]:
        trial = sweep.ask()
        assert not trial.baseline
        if value is not None:
            sweep.report(trial.id, 1, value, {"loss": value})
        sweep.finish(trial.id, outcome, {})
    assert [row.trial for row in sweep.ranked()] == ["0005", "0004", "0000", "0001", "0003", "0002"]
    assert sweep.best().trial == "0005"
    assert [row.plain()["value"] for row in sweep.ranked()] == [0.3, 0.3, 0.5, None, None, 0.2]
    sweep.close()
    again = Sweep.look(tmp_path / "journal.jsonl")
    assert [row.plain() for row in again.ranked()] == [row.plain() for row in sweep.ranked()]


def test_a_value_is_the_best_that_was_shown_with_its_metrics(tmp_path: Path) -> None:
    sweep = Sweep(plan(scheduler="none"), tmp_path / "journal.jsonl")
    trial = sweep.ask()
    for epoch, value in enumerate([0.5, 0.8, math.nan, 0.7], 1):
        sweep.report(trial.id, epoch, value, {"accuracy": value, "epoch": epoch})
    row = sweep.rows[trial.id]
    assert (row.value, row.last, row.epoch, row.metrics["epoch"]) == (0.8, 0.7, 4, 2)
    sweep.close()


def test_folds_run_all_of_them_and_nothing_wins(tmp_path: Path) -> None:
    its_plan = Plan(load("folds"), Trials(), "rmse", False, {"data.fold": 0})
    sweep = Sweep(its_plan, tmp_path / "journal.jsonl")
    assert sweep.total == 5
    values = [3.0, 4.0, 5.0, 4.0, 4.0]
    for value in values:
        trial = sweep.ask()
        assert trial.settings["data.folds"] == 5
        assert sweep.report(trial.id, 1, value, {}) == "continue"
        sweep.finish(trial.id, "done", {"test": {"rmse": value + 1, "note": "text"}})
    assert sweep.ask() is None
    assert sorted(row.settings["data.fold"] for row in sweep.rows.values()) == [0, 1, 2, 3, 4]
    assert sweep.best() is None
    assert sweep.summary() == {
        "rmse": {"mean": 4.0, "spread": pytest.approx(0.5**0.5), "trials": 5},
        "test/rmse": {"mean": 5.0, "spread": pytest.approx(0.5**0.5), "trials": 5},
    }
    sweep.close()


def test_a_part_of_the_folds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 5 points, and trials\.count is 3") as caught:
        Sweep(Plan(load("folds"), Trials(count=3), "rmse", False), tmp_path / "journal.jsonl")
    assert "trials.count=5" in caught.value.hint
    assert not (tmp_path / "journal.jsonl").exists()


def test_a_grid_beyond_measure_is_refused_as_the_users_mistake(tmp_path: Path) -> None:
    space = Space({f"a.x{index}": Choice(tuple(range(100))) for index in range(4)})
    with pytest.raises(UserError, match="100,000,000 points"):
        Sweep(Plan(space, Trials(search="grid"), "loss", False), tmp_path / "journal.jsonl")


def test_another_plan_is_refused_with_its_differences(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Sweep(plan(), path).close()
    other = replace(plan(seed=1, concurrent=4), objective="loss", base={"task.model": "mlp"}, space=load("mnist"))
    with pytest.raises(UserError) as caught:
        Sweep.resume(path, other)
    said = caught.value.message
    for difference in ["trials.seed: 0 -> 1", "objective: accuracy -> loss", "base.task.model: cnn -> mlp"]:
        assert difference in said
    assert "space.optimizer.momentum.uniform: not set -> [0.0, 0.95]" in said
    assert "concurrent" not in said
    Sweep.resume(path, plan(concurrent=4)).close()  # how many at once changes nothing


def test_tuples_in_a_plan_are_the_lists_of_its_journal(tmp_path: Path) -> None:
    space = Space({"optimizer.betas": Choice(((0.9, 0.99), (0.9, 0.999)))})
    its_plan = Plan(space, Trials(), "loss", False, {"optimizer.betas": (0.9, 0.999)})
    Sweep(its_plan, tmp_path / "journal.jsonl").close()
    before = (tmp_path / "journal.jsonl").read_text()
    Sweep.resume(tmp_path / "journal.jsonl", its_plan).close()
    assert (tmp_path / "journal.jsonl").read_text() == before, "the plan is taken for the one that was written"


# ---- the journal


def test_two_processes_never_drive_one_sweep(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    sweep = Sweep(plan(), path)
    with pytest.raises(UserError, match="another process is running the sweep"):
        Sweep.resume(path)
    with pytest.raises(UserError, match="there is a sweep already"):
        Sweep(plan(), path)
    assert len(Sweep.look(path).rows) == 0
    sweep.close()
    Sweep.resume(path).close()


@pytest.mark.parametrize(
    "tail", [b"", b'{"event":"ask","tri', b'{"event":"again","trial":"0000"}', b"\0\0\0", b"\xff{}\n", b"NaN\n"]
)
def test_a_torn_last_line_is_dropped_and_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    sweep = Sweep(plan(), path)
    trial = sweep.ask()
    sweep.close()
    good = path.read_bytes()
    path.write_bytes(good + tail)
    sweep = Sweep.resume(path)
    assert path.read_bytes() == good
    assert sweep.ask().id == trial.id
    sweep.close()


def test_a_journal_cut_off_before_its_first_line_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"event":"swe')
    with pytest.raises(UserError, match="before it began"):
        Sweep.resume(path)
    sweep = Sweep.resume(path, plan())
    assert sweep.ask().baseline
    sweep.close()
    Sweep.resume(path, plan()).close()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (1, b'{"event":"sweep","format":99}\n'),
        (1, b"[]\n"),
        (2, b"{torn\n"),
        (2, b"{}\n"),
        (2, b'{"event":"ask","trial":"0007","settings":{}}\n'),
        (2, b'{"event":"report","trial":"0001"}\n'),
        (2, b'{"event":"dance","trial":"0000"}\n'),
        (3, b'{"event":"report","trial":"0000","epoch":"x"}\n'),
    ],
)
def test_a_damaged_journal_is_refused_with_its_line(tmp_path: Path, line: int, text: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    sweep = Sweep(plan(), path)
    for _ in range(3):
        sweep.ask()
    sweep.close()
    content = path.read_bytes().splitlines(keepends=True)
    content[line - 1] = text
    path.write_bytes(b"".join(content))
    with pytest.raises(UserError, match=r"journal\.jsonl") as caught:
        Sweep.resume(path)
    assert f":{line}:" in caught.value.message or "not a journal" in caught.value.message


def test_a_journal_is_strict_json_with_every_number_that_there_is(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    record = {"event": "x", "values": [math.nan, math.inf, -math.inf, 0.1, {"deep": math.nan}], "text": "nan\n"}
    opened = journals.Journal.create(path, record)
    opened.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(path.read_text(), parse_constant=refuse)
    assert str(journals.read(path)) == str([record])


def test_a_line_that_does_not_fit_on_the_disk_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    sweep = Sweep(plan(), path)
    sweep.ask()
    good = path.read_bytes()

    class Full(durable.Operations):
        def write(self, descriptor: int, data: bytes | memoryview) -> None:
            os.write(descriptor, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable, "OPERATIONS", Full())
    with pytest.raises(OSError, match="No space left"):
        sweep.ask()
    monkeypatch.undo()
    assert path.read_bytes() == good
    sweep.close()
    sweep = Sweep.resume(path)
    assert [sweep.ask().id, sweep.ask().id] == ["0000", "0001"]
    sweep.close()


@given(st.integers(0, 2**32), st.sampled_from(["tpe", "random"]))
def test_replay_of_any_history_decides_alike(tmp_path_factory: pytest.TempPathFactory, seed: int, search: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    draw = random.Random(seed)
    sweep = Sweep(plan(search=search, count=10, factor=2), folder / "journal.jsonl")
    epochs: dict[str, int] = {}
    for _ in range(40):
        action = draw.random()
        if action < 0.3 and (trial := sweep.ask()):
            epochs.setdefault(trial.id, 0)
        elif epochs and action < 0.9:
            trial_id = draw.choice(sorted(epochs))
            epochs[trial_id] += draw.randint(1, 2)
            value = draw.choice([None, math.nan, draw.random(), draw.random()])
            sweep.report(trial_id, epochs[trial_id], value, {})
        elif epochs:
            trial_id = draw.choice(sorted(epochs))
            del epochs[trial_id]
            sweep.finish(trial_id, draw.choice(["done", "stopped", "failed"]), {})
    sweep.close()
    seen = Sweep.look(folder / "journal.jsonl")
    assert [str(row) for row in seen.rows.values()] == [str(row) for row in sweep.rows.values()]
    resumed = Sweep.resume(folder / "journal.jsonl")
    known = set(sweep.rows)
    while (trial := resumed.ask()) and trial.id in known:
        assert trial.again
    sweep._journal = None
    if trial:
        untouched = [row for row in sweep.rows.values() if row.state == "running" and row.stopping]
        if not untouched:  # else the resumed searcher has heard more than this one
            assert trial.settings == sweep._searcher.ask(trial.id)
    resumed.close()


def test_a_sweep_is_resumed_by_another_process_and_imports_nothing_heavy(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    run(Sweep(plan(count=12), path), at_once=2)
    content = path.read_bytes().splitlines(keepends=True)
    asked = [index for index, line in enumerate(content) if b'"event":"ask"' in line]
    path.write_bytes(b"".join(content[: asked[-1]]))
    script = (
        "import sys, json\nfrom pathlib import Path\nfrom distributed.tuning.sweep import Sweep\n"
        "heavy = {'ray', 'torch', 'optuna', 'pydantic', 'rich', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        f"sweep = Sweep.resume(Path({str(path)!r}))\n"
        "trials = iter(sweep.ask, None)\n"
        "print(json.dumps([sorted(heavy), [[t.id, t.settings] for t in trials if not t.again]]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    heavy, trials = json.loads(done.stdout)
    last = json.loads(content[asked[-1]])
    assert heavy == []
    assert trials == [[last["trial"], last["settings"]]]
