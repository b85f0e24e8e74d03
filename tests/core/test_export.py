"""An exported network says what the network says, on real rows, whatever their number and length."""

import io
import json
import os
from pathlib import Path

import pytest
import torch

from distributed import saved
from distributed.export import programs
from distributed.export.export import export
from tasks.errors import RunFailed, UserError
from tests import runs

SHAPES = "tests/shapes.py"
TASKS = {
    "digits mlp": ("digits", "task.model=mlp"),
    "digits cnn": ("digits",),
    "digits residual": ("digits", "task.model=residual"),
    "housing": ("housing",),
    "reviews": ("reviews", "task.source.rows=200"),
}


@pytest.fixture(scope="module", params=TASKS)
def trained(request, tmp_path_factory, stores):
    task, *words = TASKS[request.param]
    one = runs.train(tmp_path_factory.mktemp("runs"), stores, task, *words, "train.steps=3", "train.epochs=1")
    return saved.find(str(one.directory), one.directory.parent), one


@pytest.mark.parametrize("to", ["torch", "torchscript", "onnx"])
def test_an_exported_network_was_compared_on_real_rows(trained, to):
    found, one = trained
    if to == "torch" and one.run.name == "reviews":
        with pytest.raises(UserError, match="fixes the length of what recurrent layers read"):
            export(found, one.store, to)
        return
    made = export(found, one.store, to)
    assert made.path.read_bytes()
    assert made.difference < 1e-4
    assert made.rows > 10
    told = json.loads(made.path.with_suffix(".json").read_text())
    assert told["step"] == made.step == 3
    assert told["facts"] == found.facts
    assert all(described["shape"][0] == "rows" for described in told["inputs"].values())


def test_an_exported_network_is_loaded_without_our_code(tmp_path, stores):
    one = runs.train(tmp_path, stores, "digits", "task.model=mlp", "train.steps=3", "train.epochs=1")
    made = export(saved.find(str(one.directory), one.directory.parent), one.store, "torch", tmp_path / "out" / "m.pt2")
    network = torch.export.load(io.BytesIO(made.path.read_bytes())).module()
    assert network(torch.zeros(5, 1, 8, 8)).shape == (5, 10)


def test_a_network_that_says_something_else_is_not_written(tmp_path, stores, monkeypatch):
    one = runs.train(tmp_path, stores, "digits", "task.model=mlp", "train.steps=3", "train.epochs=1")
    found = saved.find(str(one.directory), one.directory.parent)
    before = export(found, one.store, "torch").path.read_bytes()
    honest = programs.TorchExport.run

    def run(self, written, names):
        network = honest(self, written, names)
        return lambda *inputs: network(*inputs) + 1e-2

    monkeypatch.setattr(programs.TorchExport, "run", run)
    with pytest.raises(RunFailed, match="differs from the one trained"):
        export(found, one.store, "torch")
    assert (one.directory / "export" / "model.pt2").read_bytes() == before


def test_a_network_that_cannot_be_exported_says_why(tmp_path, stores):
    one = runs.train(tmp_path, stores, f"{SHAPES}:Adversarial", "train.steps=2", "train.epochs=1")
    with pytest.raises(UserError, match="its network is 2 networks: generator, discriminator"):
        export(saved.find(str(one.directory), one.directory.parent), one.store, "torch")
    assert not (one.directory / "export").exists()


@pytest.mark.parametrize(
    ("out", "error", "said"),
    [
        ("", UserError, "is a folder"),
        ("model.json", UserError, "the description of the network is written there"),
        ("file/model.pt2", UserError, "is no folder that you may write to"),
        pytest.param("/proc/model.pt2", RunFailed, "cannot be written: No such file", marks=pytest.mark.skipif(
            not Path("/proc/self").exists() or os.geteuid() != 0, reason="a folder that looks as if it could be written to")),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_written_is_refused(tmp_path, stores, out, error, said):
    (tmp_path / "file").touch()
    one = runs.train(tmp_path, stores, "digits", "task.model=mlp", "train.steps=2", "train.epochs=1")
    with pytest.raises(error, match=said):
        export(saved.find(str(one.directory), one.directory.parent), one.store, "torch", tmp_path / out)


def test_onnx_without_its_packages_says_what_to_install(tmp_path, stores, monkeypatch):
    one = runs.train(tmp_path, stores, "digits", "task.model=mlp", "train.steps=2", "train.epochs=1")
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs onnx, onnxscript, onnxruntime") as told:
        export(saved.find(str(one.directory), one.directory.parent), one.store, "onnx")
    assert "[onnx]" in told.value.hint
