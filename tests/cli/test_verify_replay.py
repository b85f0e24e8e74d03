"""`whipray verify` and `whipray replay`, as a person and as a program call them."""

import pytest

from distributed.hosts import verify as host
from tests.cli.conftest import TINY


def test_a_task_is_verified(whipray, stores):
    answer = whipray("verify", "housing", "--stores", stores, "--json")
    told = answer.json
    assert answer.code == 0 and told["ok"] and told["task"] == "housing"
    assert all(set(check) == {"name", "ok", "seen"} for check in told["checks"])
    assert not any(check["ok"] is False for check in told["checks"])


def test_a_check_that_fails_is_shown_and_gives_exit_code_1(whipray, stores, monkeypatch):
    monkeypatch.setattr(host, "verify", lambda run, stores: [host.Check("a step", "it stumbles", ok=False)])
    answer = whipray("verify", "digits", "--stores", stores)
    assert answer.code == 1
    assert "FAILED" in answer.out and "it stumbles" in answer.out and "failed: a step" in answer.out


def test_a_misspelt_setting_of_what_is_verified_is_refused(refused):
    assert "did you mean 'optimizer.lr'?" in refused("verify", "digits", "optimizer.rl=1")


def test_initial_weights_that_are_not_there_are_refused_at_once(refused, stores):
    assert "no run 'nowhere'" in refused("verify", "digits", "train.init_from=nowhere", "--stores", stores)


def test_a_step_is_executed_again(whipray, trained, stores):
    said = whipray("replay", "tiny", "--step", 2, "--runs", trained, "--stores", stores)
    assert said.code == 0
    assert "from the beginning: 2 steps before step 2" in said.out
    assert "all tensors are finite" in said.out and "gradient norm of model" in said.out
    told = whipray("replay", "tiny", "--step", 3, "--runs", trained, "--stores", stores, "--json").json
    assert told["difference"] == 0 and told["not_finite"] is None and told["workers"] == 1
    [part] = told["parts"]
    assert len(part["rows"]) == 50 and part["losses"] == pytest.approx(told["losses"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tiny", "--step", 4), "the run has the steps 0 to 3"),
        (("tiny", "--step", 1, "--rank", 1), "the run has 1 worker"),
        (("tinny", "--step", 1), "did you mean 'tiny'?"),
        (("tiny", "--step", 1, "--pdb"), "--pdb is for a person"),
    ],
)
def test_what_cannot_be_executed_again_is_refused(refused, trained, stores, words, said):
    assert said in refused("replay", *words, "--runs", trained, "--stores", stores)


def test_a_run_that_failed_says_how_to_look_at_its_step(whipray, stores, tmp_path):
    runs = tmp_path / "runs"
    words = (
        "train",
        "digits",
        *TINY,
        "optimizer.name=sgd",
        "optimizer.lr=1e30",
        "schedule.name=constant",
        "log.every=1",
    )
    answer = whipray(*words, "--name", "lost", "--runs", runs, "--stores", stores)
    assert answer.code == 1
    hint = next(line for line in answer.err.splitlines() if "whipray replay" in line)
    again = hint.partition("whipray replay ")[2].partition(" shows that step")[0].split()
    answer = whipray("replay", *again, "--runs", runs, "--stores", stores)
    assert answer.code == 1
    assert "first tensor that is not finite: the " in answer.out
