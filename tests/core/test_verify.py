"""`verify` finds what a task promises and does not keep, and passes those that keep it."""

from pathlib import Path

import pytest

from distributed import config
from distributed.analysis import verify as looks
from distributed.data.store import Store
from distributed.hosts import job
from distributed.hosts import verify as host
from tests.core.test_zoo import ZOO, words

QUICK = ("two optimizers", "units")
OWN = '''
import torch
from tasks.task import Label, Task, Vector

class Own(Task):
    """Forty points of two classes."""

    fields = {"point": Vector(2), "label": Label(classes=2)}
    recipe = {"train.epochs": 3, "data.split": "8:1:1"}

    def examples(self, source):
        return [{"point": [i % 7, i / 10], "label": i % 2} for i in range(60)]

    def build(self, facts, load):
        return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
'''
UNUSED = """
    def build(self, facts, load):
        net = torch.nn.Sequential(torch.nn.Linear(2, 2))
        net.spare = torch.nn.Linear(2, 2)
        net.forward = net[0].forward
        return net
"""
CHANCE = """
    def transform(self, batch, draw, training):
        return {**batch, "point": batch["point"] + torch.randn(len(batch["row"]), 1)}
"""
SUM = """
    def loss(self, model, batch):
        scores = model(batch["point"])
        return {"sum": torch.nn.functional.cross_entropy(scores, batch["label"], reduction="sum")}
"""
PLACE = """
    def loss(self, model, batch):
        scores = model(batch["point"])[: len(batch["row"]) // 2]
        return {"half": torch.nn.functional.cross_entropy(scores, batch["label"][: len(scores)])}
"""
PEEKING = """
    def predict(self, model, batch):
        return {"right": model(batch["point"]).argmax(-1) == batch["label"]}

    def measure(self, metrics, prediction, batch):
        metrics["accuracy"].update(prediction["right"].long(), torch.ones(len(batch["row"]), dtype=torch.long))
"""
LOGARITHM = """
    def loss(self, model, batch):
        return {"logarithm": (model(batch["point"]) * 0 - 1).log().mean()}
"""
COUNTING = """
    calls = [0]

    def loss(self, model, batch):
        self.calls[0] += 1
        return {"drifts": super().loss(model, batch)["cross_entropy"] * self.calls[0]}
"""


def own(tmp_path: Path, more: str) -> str:
    path = tmp_path / "own.py"
    path.write_text(OWN + more)
    return f"{path}:Own"


def failed(checks: list[looks.Check]) -> dict[str, str]:
    return {check.name: check.seen for check in checks if check.ok is False}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]
)
def test_every_task_of_the_zoo_keeps_what_the_engine_relies_on(tmp_path, stores, name):
    task = ZOO[name][0]
    given = config.from_words([word for word in words(name) if not word.startswith("data.limit")])
    checks = list(host.verify(host.small(task, given, tmp_path), stores))
    assert failed(checks) == {}
    assert {check.name for check in checks} >= {
        "a training step",
        "the network can be exported",
        "2 ranks learn what one learns",
        "also where a rank has no rows",
    }


@pytest.mark.parametrize(
    ("task", "given", "ok", "said"),
    [
        ("digits", ["task.model=mlp"], True, "differs by 0.0e+00"),
        ("tests/shapes.py:Adversarial", [], None, "is 2 networks"),
    ],
)
def test_a_network_that_can_be_exported_says_the_same_and_another_is_told_of(tmp_path, stores, task, given, ok, said):
    run = host.small(task, config.from_words(given), tmp_path)
    [check] = host._Life(run, job.prepare(run, stores), tmp_path).exported()
    assert check.ok is ok
    assert said in check.seen


@pytest.mark.parametrize("given", [[], ["task.model=mlp"], ["task.model=mlp", "data.limit=20"]])
def test_the_settings_that_a_user_gave_are_counted(tmp_path, stores, given):
    checks = host.verify(host.small("digits", config.from_words(given), tmp_path), stores)
    assert next(checks).seen.endswith(f" settings, {len(given)} given")
    checks.close()


@pytest.mark.parametrize(
    ("more", "look", "check", "said"),
    [
        (UNUSED, looks.one_step, "every parameter gets a gradient", "spare.weight, spare.bias"),
        (LOGARITHM, looks.one_step, "all is finite in it", "the loss 'logarithm': nan"),
        (COUNTING, looks.one_step, "the same step twice gives the same bits", "differ"),
        (CHANCE, looks.keyed_draws, "a row is augmented the same in any batch", "take all random numbers from `draw`"),
        (PLACE, looks.order_of_rows, "the order of the rows in a batch does not matter", "gradients differ by"),
    ],
)
def test_what_a_step_shows_to_be_wrong_is_named(tmp_path, stores, more, look, check, said):
    run = host.small(own(tmp_path, more), config.from_words(["precision.dtype=float64"]), tmp_path)
    store = Store(job.prepare(run, stores), dict(run.task.fields))
    assert said in failed(look(run, store))[check]
    sound = host.small(own(_other(tmp_path), ""), config.from_words(["precision.dtype=float64"]), tmp_path)
    assert failed(look(sound, Store(job.prepare(sound, stores), dict(sound.task.fields)))) == {}


def test_a_gradient_that_is_too_large_for_the_first_scale_of_float16_is_no_fault(tmp_path, stores):
    large = """
    def loss(self, model, batch):
        scores = model(batch["point"])
        return {"ce": 1e4 * torch.nn.functional.cross_entropy(scores, batch["label"])}
"""
    run = host.small(own(tmp_path, large), config.from_words(["precision.dtype=float16"]), tmp_path)
    checks = {
        check.name: check for check in looks.one_step(run, Store(job.prepare(run, stores), dict(run.task.fields)))
    }
    assert checks["all is finite in it"].ok is None
    assert "the loss scaler leaves such a step out" in checks["all is finite in it"].seen
    assert failed(list(checks.values())) == {}


def _other(tmp_path: Path) -> Path:
    (tmp_path / "sound").mkdir()
    return tmp_path / "sound"


def test_a_loss_that_is_no_mean_and_a_prediction_that_needs_the_target_are_found(tmp_path, stores):
    checks = list(host.verify(host.small(own(tmp_path, SUM + PEEKING), {}, tmp_path), stores))
    wrong = failed(checks)
    assert set(wrong) == {
        "rows without targets are predicted", "micro-batches of 5 rows are the whole batch",
        "2 ranks learn what one learns", "3 ranks learn what one learns",
        "an evaluation is the same on 1, 2 and 3 ranks", "also where a rank has no rows",
    }  # fmt: skip
    assert "KeyError: 'label' (own.py:" in wrong["rows without targets are predicted"]


def test_a_task_that_cannot_do_a_step_is_told_so_once(tmp_path, stores):
    task = own(tmp_path, "    def loss(self, model, batch):\n        raise RuntimeError('no loss')\n")
    wrong = failed(list(host.verify(host.small(task, {}, tmp_path), stores)))
    assert list(wrong) == ["a step"]
    assert "no loss" in wrong["a step"]


def test_data_that_cannot_be_prepared_end_it(tmp_path, stores):
    task = own(tmp_path, "    def row(self, reference):\n        raise RuntimeError('no rows')\n")
    checks = list(host.verify(host.small(task, {}, tmp_path), stores))
    assert [check.ok for check in checks] == [True, False]
    assert "no rows" in checks[-1].seen


def test_a_difference_is_refused_of_an_exact_task_and_left_open_where_the_task_says_why(tmp_path):
    run = host.small("digits", {}, tmp_path)
    assert looks.exact("x", "weights", 1e-12, run).ok is True
    left = looks.exact("x", "weights", 1e-3, run)
    assert left.ok is None and "batch normalisation" in left.seen
    exact = host.small("housing", {}, tmp_path)
    assert looks.exact("x", "weights", 1e-3, exact).ok is False


@pytest.mark.parametrize(
    ("pairs", "agree"),
    [
        ([(1.0, 1.02), (1.1, 1.08), (0.9, 0.91)], True),  # within a tenth
        ([(1.0, 1.5), (1.1, 0.7), (0.9, 1.4)], True),  # within what the seeds differ
        ([(1.0, 1.5), (1.1, 1.6), (0.9, 1.41)], False),
        ([(1.0, 0.5), (1.1, 0.6), (0.9, 0.41)], False),
    ],
)
def test_trainings_agree_within_their_spread_or_a_tenth(pairs, agree):
    assert looks.agreement(pairs)[0] is agree
