"""`import whipray`: the same as the command, from Python."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import whipray
from distributed import catalogue, checkpoint, record
from distributed.cli.main import run as command
from tasks.digits import Digits
from tests import runs as short

HOME = Path(__file__).parents[2]
TINY: dict[str, Any] = {"task.model": "mlp", "data.limit": 200, "log.tensorboard": False, "resources.gpu": 0}
WORDS = [f"{name}={value}" for name, value in TINY.items()]


class Own(Digits):
    """A task of a module that can be imported."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("python") / "runs"


@pytest.fixture(scope="module")
def run(folder: Path, stores: Path) -> whipray.Trained:
    """One finished run that many tests look at."""
    return whipray.train("digits", TINY, epochs=2, name="one", runs=folder, stores=stores, show=False)


def test_python_learns_what_the_command_learns(run, tmp_path, stores):
    words = ["train", "digits", *WORDS, "--epochs", "2", "--name", "one"]
    assert command([*words, "--runs", str(tmp_path), "--stores", str(stores)]) == 0
    other = whipray.load("digits/one", runs=tmp_path, stores=stores)
    assert other.metrics == run.metrics
    assert [row["loss"] for row in other.history] == [row["loss"] for row in run.history]
    assert other.settings == run.settings
    weights, others = (checkpoint.chosen(one.path, "last").model for one in (run, other))
    assert short.distance(weights, others) == 0


def test_a_run_tells_what_it_recorded(run):
    assert run.path.name == "one" and run.path.parent.name == "digits"
    assert set(run.metrics) == {"validation", "test"} and 0.2 < (run.metrics["test"]["accuracy"] or 0) <= 1
    assert run.history == record.read(run.path / "metrics.jsonl")
    assert {row["kind"] for row in run.history} == {"train", "validation"}
    assert run.settings["train.epochs"] == 2 and run.settings["task.model"] == "mlp"
    assert "digits/one" in repr(run) and "accuracy" in repr(run)


def test_a_run_is_judged_as_at_its_end_and_by_any_checkpoint(run):
    assert run.evaluate() == run.metrics["test"]
    assert run.evaluate("validation", "last") == {name: run.history[-1][name] for name in run.metrics["validation"]}


def test_files_and_rows_are_predicted_alike_and_as_the_network_says(run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (1, 8, 8), np.uint8)
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    [of_file] = run.predict(tmp_path / "a.png")
    [of_row] = run.predict([{"image": pixels}])
    assert of_file == {"file": str(tmp_path / "a.png"), "row": 1, **of_row}
    network = run.model()
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    scores = network(torch.from_numpy(pixels)[None].float() / 255).softmax(1)[0]
    assert of_row["label"] == str(int(scores.argmax())) and of_row["score"] == pytest.approx(float(scores.max()))


def test_a_name_given_again_goes_on_or_says_that_it_is_finished(tmp_path, stores, capsys):
    given: dict[str, Any] = {"name": "again", "runs": tmp_path, "stores": stores}
    first = whipray.train("digits", TINY, epochs=1, **given)
    assert "epoch 1/1" in capsys.readouterr().out
    assert whipray.train("digits", TINY, epochs=1, **given) == first
    assert "finished already" in capsys.readouterr().out
    more = whipray.train("digits", TINY, epochs=2, **given)
    assert more == first and [row["epoch"] for row in more.history if row["kind"] == "validation"] == [1, 2]
    with pytest.raises(whipray.UserError, match=r"optimizer.lr: 0.003 before, 0.5 now"):
        whipray.train("digits", {**TINY, "optimizer.lr": 0.5}, epochs=2, **given)


def test_names_win_over_settings_and_settings_over_files(tmp_path, stores):
    (tmp_path / "mine.yaml").write_text("train: {epochs: 7, seed: 7}\noptimizer: {lr: 0.5}\n")
    run = whipray.train(
        "digits", {**TINY, "train.seed": 5, "optimizer.lr": 0.25}, seed=3, epochs=1, config=tmp_path / "mine.yaml",
        runs=tmp_path / "runs", stores=stores, show=False,
    )  # fmt: skip
    assert [run.settings[name] for name in ("train.epochs", "train.seed", "optimizer.lr")] == [1, 3, 0.25]
    assert "# train.seed: Python" in (run.path / "config.yaml").read_text()


def test_nothing_is_said_where_nothing_is_to_be_said(run, capsys):
    whipray.train("digits", TINY, epochs=2, name="one", runs=run.runs, stores=run.stores, show=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("task", "given", "said"),
    [
        ("diggits", {}, "did you mean 'digits'"),
        ("digits", {"settings": {"optimizer.rl": 1}}, r"'optimizer.rl' \(Python\)\ndid you mean 'optimizer.lr'"),
        ("digits", {"settings": {"optimizer.lr": "quick"}}, r"optimizer.lr=quick \(Python\): expected a number"),
        ("digits", {"settings": ["optimizer.lr=1"]}, "expected settings as a dict"),
        ("digits", {"epochs": 0}, r"train.epochs=0 \(Python\)"),
        ("digits", {"name": "../up"}, "cannot be a name"),
        (Digits(), {}, "expected a task, got"),
        (int, {}, "expected a task, got"),
        ("__main__:Gone", {}, "'Gone' was defined in a notebook, and is not defined here"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, task, given, said):
    with pytest.raises(whipray.UserError, match=said):
        whipray.train(task, runs=tmp_path, **given)
    assert not list(tmp_path.iterdir())


def test_what_a_run_cannot_do_is_refused(run, tmp_path):
    with pytest.raises(whipray.UserError, match="did you mean 'one'"):
        whipray.load("ona", runs=run.runs)
    with pytest.raises(whipray.UserError, match="did you mean 'test'"):
        run.evaluate("tset")
    with pytest.raises(whipray.UserError, match="no checkpoint 'step-00000099'"):
        run.model("99")
    with pytest.raises(whipray.UserError, match=r"row 2: .*image"):
        run.predict([{"image": np.zeros((1, 8, 8), np.uint8)}, {"image": None}])
    with pytest.raises(whipray.UserError, match="'picture', which the task does not declare"):
        run.predict([{"picture": 1}])
    with pytest.raises(whipray.UserError, match="no such file"):
        run.predict([tmp_path / "nowhere.png"])
    with pytest.raises(whipray.UserError, match="expected files, or rows"):
        run.predict([1, 2])


def test_a_class_is_found_again_by_its_reference(tmp_path):
    (tmp_path / "mine.py").write_text("from tasks.digits import Digits\nclass Mine(Digits):\n    pass\n")
    of_file = catalogue.find(f"{tmp_path / 'mine.py'}:Mine")
    references = {Digits: "digits", Own: f"{__name__}:Own", of_file: f"{tmp_path / 'mine.py'}:Mine"}
    for task, reference in references.items():
        assert catalogue.reference_of(task) == reference
        assert catalogue.find(reference) is task


def test_a_class_that_no_name_leads_to_is_refused(tmp_path):
    class Own(Digits):
        pass

    with pytest.raises(whipray.UserError, match="no name of the module leads to"):
        whipray.train(Own, runs=tmp_path)


def test_a_class_trains(tmp_path, stores):
    run = whipray.train(Own, TINY, epochs=1, name="a", runs=tmp_path, stores=stores, show=False)
    assert run.settings["task.name"] == f"{__name__}:Own"
    assert whipray.load("last", runs=tmp_path, stores=stores).evaluate() == run.metrics["test"]


# ---- sweeps


def test_a_sweep_gives_its_trials_and_its_winner(tmp_path, stores, capsys):
    given: dict[str, Any] = {
        "space": {"optimizer.lr": {"choice": [1e-5, 1e-2]}}, "settings": TINY, "search": "grid", "epochs": 2,
        "name": "s", "runs": tmp_path / "runs", "stores": stores,
    }  # fmt: skip
    sweep = whipray.tune("digits", trials=2, **given)
    assert "[2/2] trial 0001" in capsys.readouterr().out
    assert sweep.path == tmp_path / "sweeps" / "digits" / "s"
    values = [trial["value"] for trial in sweep.trials]
    assert len(values) == 2 and values == sorted(values, reverse=True)
    assert sweep.best is not None and sweep.best.metrics["validation"]["accuracy"] == values[0]
    assert sweep.settings == {**TINY, "train.epochs": 2, **sweep.trials[0]["settings"]}
    assert sweep.metrics["test"] == sweep.best.evaluate("test")
    assert whipray.tune("digits", trials=2, **given) == sweep
    assert "trial" not in capsys.readouterr().out.replace("2 trials", "")
    again = whipray.train("digits", sweep.settings, name="best", runs=tmp_path / "runs", stores=stores, show=False)
    assert again.metrics["validation"] == sweep.best.metrics["validation"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"space": {"optimizer.rl": {"choice": [1, 2]}}}, "did you mean 'optimizer.lr'"),
        ({"space": {"optimizer.lr": [1, 2]}}, r"'optimizer.lr' \(given\)"),
        ({"space": "nowhere"}, "no search space 'nowhere'"),
        ({"search": "tp"}, r"trials.search=tp \(Python\)"),
        ({"space": {"optimizer.lr": {"choice": [1, 2]}}, "settings": {"optimizer.lr": 1}}, "nothing is left to search"),
    ],
)
def test_a_sweep_that_cannot_be_meant_is_refused(tmp_path, given, said):
    with pytest.raises(whipray.UserError, match=said):
        whipray.tune("digits", runs=tmp_path / "runs", **given)
    assert not list(tmp_path.iterdir())


# ---- scripts, and processes of their own

SCRIPT = """
import os
import sys
import time
import torch
import whipray
from tasks.digits import Digits

class Mine(Digits):
    trouble: bool = False  # fail in the third step

    def step(self, model, batch, update):
        Mine.steps = getattr(Mine, "steps", 0) + 1
        if self.trouble and Mine.steps == 3:
            raise ZeroDivisionError("a mistake in the task")
        time.sleep(float(os.environ.get("PAUSE", "0")))
        return super().step(model, batch, update)

if __name__ == "__main__":
    settings = {"task.model": "mlp", "data.limit": 200, "log.tensorboard": False, "resources.gpu": 0}
    (torch.randn(300, 300) @ torch.randn(300, 300)).sum().item()  # processes that are forked now may hang
    workers, runs, stores, *words = sys.argv[1:]
    settings |= {word: True for word in words} | {"resources.host": "local"}
    run = whipray.train(Mine, settings, epochs=2, workers=int(workers), name="a", runs=runs, stores=stores)
    print(run)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def started(script: Path, stores: Path, *words: str, pause: float = 0) -> subprocess.Popen[str]:
    workers, *rest = words
    return subprocess.Popen(
        [sys.executable, str(script), workers, str(script.parent / "runs"), str(stores), *rest], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(HOME), "PAUSE": str(pause)},
    )  # fmt: skip


def test_a_script_trains_its_own_class_in_several_processes_and_the_command_finds_it(script, stores, tmp_path, capsys):
    process = started(script, stores, "2")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "epoch 2/2" in out and "<run script.Mine/a: metrics=" in out
    assert command(["evaluate", "script.Mine/a", "--runs", str(tmp_path / "runs"), "--stores", str(stores)]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_what_one_of_several_processes_raises_is_told(script, stores, tmp_path):
    process = started(script, stores, "2", "task.trouble")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out
    assert "ZeroDivisionError: a mistake in the task (script.py:" in err.splitlines()[-2]
    assert "failure.json holds the whole traceback" in err.splitlines()[-1]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupted_training_has_saved_and_goes_on(script, stores, tmp_path, workers):
    process = started(script, stores, workers, pause=0.7)  # the loop asks whether to stop every two seconds
    log = tmp_path / "runs" / "script.Mine" / "a" / "log.txt"
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "<run" not in out
    assert "KeyboardInterrupt: stopped after a checkpoint; the same call with name='a' goes on" in err
    before, _ = checkpoint.newest(log.parent)
    assert before is not None and before.step < 8
    process = started(script, stores, workers)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "<run script.Mine/a: metrics=" in out
    assert f"goes on from step {before.step}" in log.read_text()


def test_a_script_that_trains_while_it_is_imported_is_refused(tmp_path):
    path = tmp_path / "eager.py"
    path.write_text(SCRIPT.replace('if __name__ == "__main__":', "if True:"))
    with pytest.raises(whipray.UserError, match='trains while it is imported.*\n.*if __name__ == "__main__"'):
        saved_words, sys.argv = sys.argv, ["eager.py", "1", str(tmp_path / "runs"), str(tmp_path / "stores")]
        try:
            whipray.train(f"{path}:Mine", runs=tmp_path / "runs")
        finally:
            sys.argv = saved_words


# ---- the module


def test_importing_whipray_imports_nothing_heavy(tmp_path):
    code = "import sys, whipray; print(dir(whipray), sorted({'torch', 'ray', 'pyarrow', 'distributed'} & set(sys.modules)))"
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True,
        env={**os.environ, "PYTHONPATH": str(HOME)},
    )  # fmt: skip
    assert told.stdout.strip() == f"{sorted(whipray.__all__)} []"


def test_a_training_in_this_process_imports_no_ray(tmp_path, stores):
    code = (
        "import sys, whipray\n"
        f"whipray.train('digits', {TINY!r}, epochs=1, runs={str(tmp_path)!r}, stores={str(stores)!r}, show=False)\n"
        "print('ray' in sys.modules)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(HOME)},
    )  # fmt: skip
    assert told.stdout.strip() == "False"


def test_what_the_module_does_not_have_is_said():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        whipray.trian  # noqa: B018


def test_where_another_distributed_was_imported_first_the_module_says_so(tmp_path):
    (tmp_path / "distributed").mkdir()
    (tmp_path / "distributed" / "__init__.py").write_text("")
    code = "import distributed, whipray; whipray.train"
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(HOME)])},
    )  # fmt: skip
    assert told.stderr.splitlines()[-1].startswith("ImportError: whipray: the package 'distributed' is")
