"""Checkpoints: written whole, read with suspicion, kept as many as asked."""

import pytest
import torch
from torch import nn

from distributed import checkpoint, durable
from tasks.errors import UserError


def save(folder, step: int, value: float = 0.0, best: int | None = None, keep: int = 9):
    tensors = {"w": torch.full((2,), value)}, {"optimizer/w/m": torch.ones(2)}
    return checkpoint.save(folder, step, "x", best, keep, *tensors, {"step": step})


def test_what_was_saved_is_read(tmp_path):
    save(tmp_path, 3, 7.0)
    one = checkpoint.chosen(tmp_path, "last")
    assert one.step == 3
    assert one.model["w"].tolist() == [7, 7]
    assert one.optimizer["optimizer/w/m"].tolist() == [1, 1]
    assert one.state == {"step": 3}


def test_the_newest_and_the_best_stay(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, best=2 if step >= 2 else None, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == [
        "step-00000002", "step-00000004", "step-00000005",
    ]  # fmt: skip
    assert checkpoint.chosen(tmp_path, "best").step == 2
    assert checkpoint.chosen(tmp_path, "4").step == 4


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.chosen(tmp_path, "best")
    save(tmp_path, 3)
    with pytest.raises(UserError, match="no checkpoint 'step-00000009'") as raised:
        checkpoint.chosen(tmp_path, "9")
    assert "step-00000003" in raised.value.hint


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut off", "flipped", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, file, damage):
    save(tmp_path, 1, 1.0)
    path = save(tmp_path, 2, 2.0) / file
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    found, passed_over = checkpoint.newest(tmp_path)
    if file == "manifest.json" and damage == "flipped" and found.step == 2:
        pytest.skip("the flipped bit of the manifest says the same")
    assert found.step == 1
    assert len(passed_over) == 1
    with pytest.raises(UserError) as raised:
        checkpoint.chosen(tmp_path, "2")
    assert "step-00000002" in raised.value.message


class Tied(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(classes, 2), nn.Linear(2, classes, bias=False)
        self.out.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(2)


def test_tied_weights_are_stored_once_and_stay_tied():
    tensors = checkpoint.tensors_of(Tied())
    assert "embedding.weight" in tensors
    assert "out.weight" not in tensors
    other = Tied()
    checkpoint.restore(other, {n: t + 1 for n, t in tensors.items()}, (), "x")
    assert other.out.weight is other.embedding.weight
    assert torch.equal(other.embedding.weight, tensors["embedding.weight"] + 1)
    assert torch.equal(other.norm.running_mean, tensors["norm.running_mean"] + 1)


def test_a_checkpoint_of_another_class_count_or_model_is_refused_by_the_tensors_name():
    tensors = checkpoint.tensors_of(Tied(classes=9))
    with pytest.raises(UserError, match=r"'embedding.weight' has shape \(9, 2\), this model needs \(3, 2\)") as raised:
        checkpoint.restore(Tied(), tensors, (), "x")
    assert "number of classes" in raised.value.hint
    with pytest.raises(UserError, match="has no tensor 'weight'"):
        checkpoint.restore(nn.Linear(1, 1), tensors, (), "x")
    with pytest.raises(UserError, match="holds 'extra', which this model does not have"):
        checkpoint.restore(Tied(9), {**tensors, "extra": torch.ones(1)}, (), "x")


def test_borrowed_modules_are_left_out():
    pair = nn.ModuleDict({"student": nn.Linear(1, 1), "teacher": nn.Linear(1, 1)})
    assert set(checkpoint.tensors_of(pair, ("teacher.",))) == {"student.weight", "student.bias"}


def test_a_run_that_goes_on_sets_right_what_a_kill_left_behind(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, best=3 if step >= 3 else 1)
    folder = tmp_path / "checkpoints"
    (folder / "best").write_text("step-00000001\n")  # killed between publishing and pointing
    (folder / "last").write_text("step-00000002\n")
    (folder / ".last.12345678.part").write_text("x")
    (folder / ".step-00000004.12345678.part").mkdir()
    (folder / "step-00000004" / "model.safetensors").write_bytes(b"damaged")
    found, _ = checkpoint.newest(tmp_path)
    checkpoint.repair(tmp_path, found)
    assert sorted(path.name for path in folder.iterdir()) == [
        "best",
        "last",
        "step-00000001",
        "step-00000002",
        "step-00000003",
    ]
    assert checkpoint.chosen(tmp_path, "best").step == 3
    assert checkpoint.chosen(tmp_path, "last").step == 3


def test_the_checkpoint_just_written_is_never_pruned(tmp_path):
    save(tmp_path, 8)
    save(tmp_path, 7, keep=1)
    assert (tmp_path / "checkpoints" / "step-00000007").exists()


def test_garbage_under_a_valid_manifest_and_a_manifest_that_cannot_be_read_are_damage_too(tmp_path):
    save(tmp_path, 1)
    target = checkpoint.folder_of(tmp_path, 2)
    with durable.publish(target, {"format": 1, "step": 2, "task": "x", "best_step": None}) as folder:
        for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
            folder.add(name, b"garbage")
    third = save(tmp_path, 3) / "manifest.json"
    third.unlink()
    third.mkdir()
    found, passed_over = checkpoint.newest(tmp_path)
    assert found.step == 1
    assert len(passed_over) == 2
