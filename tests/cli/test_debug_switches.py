"""The switches of `train` that help to find faults."""

import json

import pytest

from distributed import record, saved
from tests import shapes
from tests.cli.conftest import TINY

OWN = '''
import torch
from tasks.task import Label, Task, Vector

class Own(Task):
    """Sixty points of two classes."""

    fields = {"point": Vector(2), "label": Label(classes=2)}
    recipe = {"train.epochs": 1, "data.batch_size": 16, "data.split": "8:1:1"}

    def examples(self, source):
        return [{"point": [i % 7, i / 10], "label": i % 2} for i in range(60)]

    def build(self, facts, load):
        return torch.nn.Linear(2, 2)

    def loss(self, model, batch):
        scores = model(batch["point"])
        WRONG
        return {"loss": torch.nn.functional.cross_entropy(scores, batch["label"])}
'''


@pytest.fixture
def train(whipray, stores, tmp_path):
    def call(*words):
        return whipray("train", *words, "--runs", tmp_path / "runs", "--stores", stores)

    return call


@pytest.fixture
def own(tmp_path):
    def write(wrong):
        (tmp_path / "own.py").write_text(OWN.replace("WRONG", wrong))
        return f"{tmp_path / 'own.py'}:Own"

    return write


def test_a_rehearsal_sees_two_batches_of_everything_stops_and_goes_on(train, tmp_path):
    answer = train("digits", "task.model=mlp", "train.epochs=500", "log.tensorboard=false", "--fast", "--name", "try")
    assert answer.code == 0, answer
    assert "a rehearsal: data.limit=128, train.epochs=2" in answer.out
    directory = tmp_path / "runs" / "digits" / "fast-try"
    summary = saved.summary(directory)
    assert summary["steps"] == 4 and set(summary["metrics"]) == {"validation", "test"}
    assert "goes on from step 1" in (directory / "log.txt").read_text()
    assert (directory / "export" / "model.pt2").exists()
    assert [row["step"] for row in record.read(directory / "metrics.jsonl") if row["kind"] == "train"] == [1, 2, 3, 4]


def test_a_rehearsal_of_what_cannot_be_exported_says_so_and_is_none_the_worse(train):
    answer = train(f"{shapes.__file__}:Adversarial", "log.tensorboard=false", "--fast", "--json")
    assert answer.code == 0, answer
    assert answer.json["export"] is None
    assert "not exported: " in answer.err


def test_a_few_rows_are_learned_by_heart(train, tmp_path):
    told = json.loads(
        train("digits", "log.tensorboard=false", "train.steps=30", "--overfit", "8", "--name", "few", "--json").out
    )
    assert told["overfit"]["learned"] and told["overfit"]["last_loss"] < 0.05 * told["overfit"]["first_loss"]
    assert told["metrics"]["test"]["accuracy"] == told["metrics"]["validation"]["accuracy"] == 1


def test_rows_that_cannot_be_learned_by_heart_are_told_of(train, own):
    task = own("scores = scores * 0 + model.weight.sum() * 0")
    answer = train(task, "log.tensorboard=false", "train.steps=10", "--overfit", "8")
    assert answer.code == 0 and "it should come near 0" in answer.out


def test_switches_that_contradict_are_refused(refused):
    assert "--fast and --overfit" in refused("train", "digits", "--fast", "--overfit", "3")
    assert "too few steps" in refused("train", "digits", "--fast", "--profile")


def test_a_profile_is_a_trace_and_a_table(train, tmp_path):
    answer = train("digits", *TINY, "data.batch_size=10", "--profile", "--name", "slow")
    assert answer.code == 0
    folder = tmp_path / "runs" / "digits" / "slow" / "profile"
    events = json.loads((folder / "steps-5-10.json").read_bytes())["traceEvents"]
    assert any("aten::addmm" in event.get("name", "") for event in events)
    assert "aten::addmm" in answer.out and "Self CPU" in answer.out


def test_a_training_too_short_for_a_profile_says_so(train, caplog):
    train("digits", *TINY, "train.steps=2", "--profile")
    assert "too few steps for a profile" in caplog.text


@pytest.mark.filterwarnings("ignore:Error detected in")  # torch says there where the operation was called
def test_the_operation_whose_gradient_is_not_a_number_is_named(train, own):
    task = own("scores = scores + (scores * 0).sqrt() * 0")
    answer = train(task, "log.tensorboard=false", "train.detect_anomaly=true")
    assert answer.code == 1
    assert "SqrtBackward0" in answer.err and "whipray replay" in answer.err


def test_a_full_memory_leaves_what_took_it(train, own, tmp_path):
    answer = train(own("torch.empty(1 << 50)"), "log.tensorboard=false", "--name", "big")
    assert answer.code == 1
    told = (tmp_path / "runs" / "own.Own" / "big" / "memory.txt").read_text()
    assert "data.batch_size=16" in told and "this process" in told
    assert "memory.txt says what took it" in answer.err and "data.micro_batch_size" in answer.err
