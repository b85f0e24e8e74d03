"""A sweep on a small Ray: the same decisions as everywhere, and no trial lost with its process."""

import json
from pathlib import Path

import pytest

from distributed import record
from distributed.cli.main import run
from distributed.tuning import journal as journals
from distributed.tuning.sweep import Plan, Sweep
from tests.hosts.test_local_tune import MLP, TROUBLE

# Ray leaves sockets to the garbage collector and uses deprecated names of its own; neither is an error of a test.
pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def whipray(tmp_path: Path, stores: Path, *words: str) -> int:
    return run([*words, "--runs", str(tmp_path / "runs"), "--stores", str(stores), "--json"])


def test_a_sweep_on_ray_decides_as_its_journal_replayed_and_survives_a_killed_trial(tmp_path, stores, capfd, caplog):
    task, marker = tmp_path / "own.py", tmp_path / "happened"
    task.write_text(TROUBLE)
    words = [f"task.marker={marker}", "task.trouble=SIGKILL", "checkpoint.every=4", "trials.concurrent=2"]
    words += ["--space", "digits", "--trials", "6", "--epochs", "9", "--name", "s"]
    assert whipray(tmp_path, stores, "tune", f"{task}:Own", *MLP, *words) == 0
    out = capfd.readouterr()
    told = json.loads(out.out)
    assert marker.exists()
    assert "its process died" in caplog.text
    assert len(told["trials"]) == 6
    assert {row["state"] for row in told["trials"]} == {"done", "stopped"}
    assert told["best"]["metrics"]["test"]["accuracy"] > 0.5
    for row in told["trials"]:
        steps = [
            one["step"] for one in record.read(Path(row["directory"]) / "metrics.jsonl") if one["kind"] == "validation"
        ]
        assert steps == sorted(set(steps)), "a trial that is begun again goes on where it was"
    assert not list((tmp_path / "sweeps").rglob(".ray-*"))

    journal = Path(told["sweep"]) / "journal.jsonl"
    begun, *records = journals.read(journal)
    again = Sweep(Plan.of(begun, journal), tmp_path / "again.jsonl")
    running = most = 0
    for one in records:
        if one["event"] == "ask":
            trial = again.ask()
            assert (trial.id, trial.settings) == (one["trial"], one["settings"])
            running += 1
            most = max(most, running)
        elif one["event"] == "report":
            assert again.report(one["trial"], one["epoch"], one["value"], one["metrics"]) == one["decision"]
        else:
            again.finish(
                one["trial"], one["outcome"], one["metrics"], seconds=one["seconds"], directory=one["directory"]
            )
            running -= 1
    assert (running, most) == (0, 2)
    assert [row.plain() for row in again.ranked()] == told["trials"]
    again.close()


def test_a_users_mistake_in_a_trial_ends_the_sweep_at_once(tmp_path, stores, capfd):
    task = tmp_path / "own.py"
    task.write_text(TROUBLE.replace('raise ZeroDivisionError("a mistake in the task")', 'raise UserError("wrong", "mend it")')
                    + "\nfrom tasks.errors import UserError\n")  # fmt: skip
    words = [
        f"task.marker={tmp_path / 'happened'}",
        "task.trouble=raise",
        "--space",
        "digits",
        "--trials",
        "4",
        "--epochs",
        "3",
    ]
    assert whipray(tmp_path, stores, "tune", f"{task}:Own", *MLP, *words, "--name", "s") == 2
    assert json.loads(capfd.readouterr().out)["error"] == {"message": "wrong", "hint": "mend it"}
    assert whipray(tmp_path, stores, "tune", f"{task}:Own", *MLP, *words, "--name", "s") == 0
    assert {row["state"] for row in json.loads(capfd.readouterr().out)["trials"]} <= {"done", "stopped"}
