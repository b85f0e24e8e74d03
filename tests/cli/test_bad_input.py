"""What a user may get wrong: one message that says what, where, and what to do; exit code 2; nothing written."""

import json

import pytest

from distributed.cli.output import OUT


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tran", "digits"), "Did you mean 'train'?"),
        (("train",), "Missing argument 'TASK'"),
        (("data",), "Missing command"),
        (("train", "digits", "--epoch", "3"), "--epochs"),
        (("train", "diggits"), "did you mean 'digits'?"),
        (("train", "no_such.py:Task"), "no_such.py: no such file"),
        (("train", "no_such_module:Task"), "no module 'no_such_module'"),
        (("train", "tasks.digits:Digit"), "did you mean 'Digits'?"),
        (("train", "digits", "optimizer.rl=0.1"), "did you mean 'optimizer.lr'?"),
        (("train", "digits", "train.epo=3"), "unknown setting 'train.epo' (command line)"),
        (("train", "digits", "lr=0.1"), "did you mean 'optimizer.lr'?"),
        (("train", "digits", "task.widht=3"), "did you mean 'task.width'?"),
        (("train", "digits", "task.model=ccn"), "did you mean 'cnn'?"),
        (("train", "digits", "optimizer.lr=abc"), "expected a number, above 0, got 'abc'"),
        (("train", "digits", "optimizer.lr=-1"), "expected a number, above 0"),
        (("train", "digits", "optimizer.lr=nan"), "expected a number"),
        (("train", "digits", "train.epochs=0"), "at least 1"),
        (("train", "digits", "--epochs", "x"), "train.epochs=x"),
        (("train", "digits", "optimizer.momentum=0.9"), "is not used: optimizer.name is adam"),
        (("train", "digits", "optimizer.name=adm"), "did you mean 'adam'?"),
        (("train", "digits", "train.seed"), "settings are written name=value"),
        (("train", "digits", "train.seed=1", "train.seed=2"), "given twice"),
        (("train", "digits", "--config", "none.yaml"), "none.yaml: cannot be read"),
        (("train", "digits", "--name", "../../x"), "cannot be a name"),
        (("train", "digits", "task.source.path=nowhere"), "nowhere: no such file or folder"),
        (("config", "digits", "train.objective"), "name=value"),
    ],
)
def test_a_mistake_is_answered_with_what_where_and_what_to_do(refused, tmp_path, words, said):
    assert said in refused(*words)
    assert list(tmp_path.rglob("checkpoints")) == [] and list(tmp_path.rglob("summary.json")) == []


def test_people_and_programs_are_told_the_same(whipray):
    for_people = whipray("config", "diggits")
    assert (for_people.code, for_people.out) == (2, "")
    assert for_people.err == "error: unknown task 'diggits'\n  did you mean 'digits'?\n"
    for_programs = whipray("config", "diggits", "--json")
    assert json.loads(for_programs.out) == {
        "error": {"message": "unknown task 'diggits'", "hint": "did you mean 'digits'?"}
    }


def test_no_words_show_the_help(whipray):
    answer = whipray()
    assert answer.code == 0 and "Commands:" in answer.out
    assert "runs" in whipray("--help").out


def test_what_one_command_was_told_does_not_stay_for_the_next(whipray):
    whipray("tasks", "--json", "--debug")
    assert OUT.json and OUT.debug
    whipray("tasks")
    assert not OUT.json and not OUT.debug
