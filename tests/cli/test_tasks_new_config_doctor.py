"""The verbs that need no run: what they list, write and find."""

import json

import pytest

from distributed import catalogue
from distributed.analysis import machine


def test_tasks_are_listed_with_name_and_title(whipray):
    told = whipray("tasks", "--json").json
    assert [one["name"] for one in told["tasks"]] == list(catalogue.listed())
    assert all(one["title"] for one in told["tasks"])
    assert "1,797 handwritten digits" in whipray("tasks").out


def test_json_goes_to_stdout_and_words_for_people_to_stderr(whipray):
    answer = whipray("tasks", "--json")
    assert answer.out.count("\n") == 1 and json.loads(answer.out)
    assert "whipray train" in answer.err
    assert whipray("tasks").err == ""


def test_every_setting_is_shown_with_value_type_meaning_and_origin(whipray):
    settings = whipray("config", "digits", "optimizer.lr=0.1", "--json").json["settings"]
    assert all(set(one) == {"name", "value", "type", "meaning", "origin"} for one in settings)
    assert [one["name"] for one in settings if not one["type"] or not one["meaning"]] == []
    by_name = {one["name"]: one for one in settings}
    assert by_name["optimizer.lr"] == {
        "name": "optimizer.lr", "value": 0.1, "type": "a number, above 0",
        "meaning": "learning rate that the schedule scales", "origin": "command line",
    }  # fmt: skip
    assert by_name["task.model"]["type"] == "cnn or mlp or residual"
    assert by_name["optimizer.name"]["origin"] == "recipe"
    assert by_name["train.seed"]["origin"] == "default"
    assert {name.partition(".")[0] for name in by_name} == {
        "task", "data", "optimizer", "schedule", "averaging", "precision", "train", "parallel", "checkpoint", "log",
        "resources",
    }  # fmt: skip


def test_only_what_was_changed_is_shown_on_request_with_its_file_and_line(whipray, tmp_path):
    (tmp_path / "mine.yaml").write_text("train:\n  epochs: 3\noptimizer: {name: sgd, momentum: 0.9}\n")
    answer = whipray("config", "digits", "--config", "mine.yaml", "--changed", "--json")
    origins = {one["name"]: one["origin"] for one in answer.json["settings"]}
    assert origins["train.epochs"] == "mine.yaml:2"
    assert origins["optimizer.momentum"] == "mine.yaml:3"
    assert "train.seed" not in origins and "default" not in origins.values()


def test_a_table_is_never_cut_off_where_there_is_no_terminal(whipray, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out = whipray("config", "digits").out
    assert "train:validation:test or train:test, such as 8:1:1; none: the source's own, else 8:1:1" in out


def test_what_new_writes_trains_as_it_is_written(whipray, tmp_path, stores):
    file = tmp_path / "my_task.py"
    told = whipray("new", file, "--json").json
    assert told == {"file": str(file), "task": f"{file}:MyTask"}
    answer = whipray("train", told["task"], "log.tensorboard=false", "--stores", stores, "--json")
    assert answer.code == 0
    assert answer.json["metrics"]["test"]["accuracy"] > 0.8
    assert len(file.read_text().splitlines()) < 45


def test_the_class_is_called_as_the_user_says_or_as_the_file(whipray):
    assert whipray("new", "street_signs.py", "--json").json["task"] == "street_signs.py:StreetSigns"
    assert whipray("new", "b.py", "--class", "Signs", "--json").json["task"] == "b.py:Signs"
    assert whipray("config", "b.py:Signs", "task.width=4", "--changed").code == 0


@pytest.mark.parametrize(
    "words", [("label.py",), ("9.py",), ("a.py", "--class", "class"), ("a.txt",), ("no/such/a.py",)]
)
def test_new_refuses_what_python_would_not_take(refused, tmp_path, words):
    assert refused("new", *words)
    assert list(tmp_path.iterdir()) == []


def test_new_refuses_to_overwrite(refused, tmp_path):
    (tmp_path / "mine.py").write_text("precious")
    assert "is there already" in refused("new", "mine.py")
    assert (tmp_path / "mine.py").read_text() == "precious"


def test_doctor_says_what_is_here(whipray, stores):
    answer = whipray("doctor", "--stores", stores, "--json")
    told = answer.json
    assert answer.code == 0 and told["ok"]
    assert told["versions"]["torch"] and told["cores"] >= 1 and told["memory"]["total"] > 0
    assert "all that is needed is here" in answer.err


def test_doctor_finds_no_cluster_where_nothing_answers(whipray, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    answer = whipray("doctor", "--json")
    assert answer.code == 1 and not answer.json["ok"]
    assert any("RAY_ADDRESS=http://127.0.0.1:1" in problem["message"] for problem in answer.json["problems"])


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_an_address_of_any_kind_is_asked_without_ray(address):
    said, problem = machine.cluster(address)
    assert problem and problem.essential and address in problem.message and said


def test_doctor_names_a_missing_package_and_how_to_get_it(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["numpy>=1", "torch>=999", "no-such-package-x"]\n'
        '[project.optional-dependencies]\ntest = ["no-such-package-y"]\n'
    )
    old, missing, optional = machine.packages(tmp_path)
    assert old.essential and "999" in old.message
    assert missing.essential and missing.hint == "pip install 'no-such-package-x'"
    assert not optional.essential and "[test]" in optional.hint
