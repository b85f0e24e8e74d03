"""Checkpoints: copied at once, written whole, read with suspicion, kept as many as asked."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distributed import checkpoint, durable
from distributed.snapshot import TYPES, Snapshot
from tasks.errors import RunFailed, UserError

HOME = Path(__file__).parents[2]


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


def test_steps_are_ordered_by_their_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-notes").mkdir()
    found, passed_over = checkpoint.newest(tmp_path)
    assert (found.step, passed_over) == (100_000_000, [])


def test_a_checkpoint_under_another_ones_name_is_not_taken_for_it(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2).rename(checkpoint.folder_of(tmp_path, 9))
    found, passed_over = checkpoint.newest(tmp_path)
    assert found.step == 1
    assert passed_over == [f"{checkpoint.folder_of(tmp_path, 9)}: is of step 2"]


@pytest.mark.parametrize("trouble", ["a newer format", "a file of somebody else's"])
def test_a_newer_checkpoint_that_is_not_ours_to_replace_is_refused_and_not_passed_over(tmp_path, trouble):
    save(tmp_path, 1)
    newer = save(tmp_path, 2)
    if trouble == "a newer format":
        manifest = json.loads((newer / "manifest.json").read_bytes()) | {"format": checkpoint.FORMAT + 1}
        del manifest["digest"]
        (newer / "manifest.json").write_text(json.dumps({**manifest, "digest": durable.digest_of(manifest)}))
    else:
        (newer / "mine.onnx").write_bytes(b"x")
    with pytest.raises(durable.Foreign, match=r"of format 2, this whipray reads 1|mine.onnx: is not named") as raised:
        checkpoint.newest(tmp_path)
    assert str(newer) in raised.value.message
    assert newer.exists()


def test_older_checkpoints_stay_while_newer_ones_are_seen_to_be_damaged(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    for step in (2, 3):
        (checkpoint.folder_of(tmp_path, step) / "model.safetensors").write_bytes(b"cut off")
    save(tmp_path, 4, keep=2)
    (checkpoint.folder_of(tmp_path, 4) / "state.json").unlink()
    assert checkpoint.newest(tmp_path)[0].step == 1
    save(tmp_path, 5, keep=2)
    save(tmp_path, 6, keep=2)
    there = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert there == ["step-00000005", "step-00000006"]


# ---- a snapshot in memory


def test_a_snapshot_is_what_the_safetensors_library_reads_whatever_the_types(tmp_path):
    tensors = {f"a {kind}": torch.ones(3, 1).to(getattr(torch, kind)) for kind in TYPES}
    tensors |= {"scalar": torch.tensor(7.0), "empty": torch.zeros(0, 3), "schön": torch.arange(5, dtype=torch.int8)}
    snapshot = Snapshot()
    snapshot.take({"one": tensors, "none": {}})
    for file in ("one", "none"):
        (tmp_path / file).write_bytes(b"".join(snapshot.pieces(file)))
    assert snapshot.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    found = load_file(tmp_path / "one")
    assert found.keys() == tensors.keys()
    assert all(found[n].dtype == t.dtype and found[n].shape == t.shape for n, t in tensors.items())
    assert all(found[n].float().equal(t.float()) for n, t in tensors.items() if t.dtype != torch.complex64)
    assert load_file(tmp_path / "none") == {}


def test_a_type_that_no_checkpoint_can_hold_is_refused_by_the_tensors_name():
    with pytest.raises(UserError, match="'phase' of the model is complex128"):
        Snapshot().take({"one": {"phase": torch.zeros(1, dtype=torch.complex128)}})


def test_weights_in_another_order_of_memory_are_set_down_as_they_are(tmp_path):
    weights = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    checkpoint.save(tmp_path, 1, "x", None, 1, {"w": weights, "t": weights[0, :, 0].t()}, {}, {})
    found = checkpoint.chosen(tmp_path, "1").model
    assert found["w"].equal(weights)
    assert found["t"].equal(weights[0, :, 0].t())


def test_a_snapshot_uses_its_memory_again_and_gets_more_where_it_is_needed():
    snapshot, small = Snapshot(), {"one": {"w": torch.zeros(10)}}
    snapshot.prepare(small)
    place = snapshot._buffer.data_ptr()
    for value in (1.0, 2.0):
        snapshot.take({"one": {"w": torch.full((10,), value)}})
        assert snapshot._buffer.data_ptr() == place
        assert bytes(snapshot.pieces("one")[1]) == torch.full((10,), value).numpy().tobytes()
    snapshot.take({"one": {"w": torch.zeros(10), "m": torch.ones(1000, dtype=torch.float64)}})
    assert len(snapshot.pieces("one")[1]) == 8040
    snapshot.take(small)
    assert bytes(snapshot.pieces("one")[1]) == bytes(40)


# ---- the writer and its thread


class Held(durable.Operations):
    """A disk that takes nothing until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def write(self, descriptor, data):
        assert self.go.wait(20)
        super().write(descriptor, data)


def write(writer, step: int, weights) -> None:
    writer.save(step, None, {"w": weights}, {}, {"step": step})


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path, monkeypatch):
    held = Held()
    monkeypatch.setattr(durable, "OPERATIONS", held)
    weights = torch.ones(3)
    with checkpoint.Writer(tmp_path, "x", 9, background=True) as writer:
        write(writer, 1, weights)
        weights.fill_(5)
        assert writer.settled(wait=False) == []
        assert checkpoint.newest(tmp_path) == (None, [])
        threading.Timer(0.2, held.go.set).start()
        write(writer, 2, weights)  # waits for the first
        assert checkpoint.chosen(tmp_path, "1").model["w"].tolist() == [1, 1, 1]
        assert writer.settled(wait=True) == [1, 2]
        assert writer.settled(wait=True) == []
        write(writer, 3, weights)
    assert writer.settled(wait=False) == [3]
    assert checkpoint.newest(tmp_path)[0].model["w"].tolist() == [5, 5, 5]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_without_a_thread_a_checkpoint_stands_when_save_returns(tmp_path):
    with checkpoint.Writer(tmp_path, "x", 9, background=False) as writer:
        write(writer, 1, torch.ones(3))
        assert checkpoint.newest(tmp_path)[0].step == 1
        assert writer.settled(wait=False) == [1]
    assert writer._thread._thread is None


class Full(durable.Operations):
    def write(self, descriptor, data):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("asked", ["save", "settled", "close"])
def test_what_the_thread_meets_is_raised_once_by_the_next_call_of_training(tmp_path, monkeypatch, asked):
    writer = checkpoint.Writer(tmp_path, "x", 9, background=True)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "OPERATIONS", Full())
        write(writer, 1, torch.ones(3))
        while writer._thread._pending.running():
            time.sleep(0.001)
    with pytest.raises(RunFailed, match="model.safetensors cannot be written: No space left on device; there is no"):
        {"save": lambda: write(writer, 2, torch.ones(3)), "settled": writer.settled, "close": writer.close}[asked]()
    assert writer.settled(wait=True) == []
    write(writer, 3, torch.ones(3))  # there is room again
    writer.close()
    assert writer.settled(wait=False) == [3]


def test_an_error_of_training_itself_is_not_hidden_by_one_of_the_thread(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(durable, "OPERATIONS", Full())
    with pytest.raises(ZeroDivisionError), checkpoint.Writer(tmp_path, "x", 9, background=True) as writer:
        write(writer, 1, torch.ones(3))
        raise ZeroDivisionError
    assert "cannot be written" in caplog.text


SCRIPT = """
import sys, threading, time
import torch
from pathlib import Path
from distributed import checkpoint, durable

class Slow(durable.Operations):
    def write(self, descriptor, data):
        time.sleep(float(sys.argv[2]))
        super().write(descriptor, data)

durable.OPERATIONS = Slow()
writer = checkpoint.Writer(Path(sys.argv[1]), "x", 9, background=True)
writer.save(1, None, {"w": torch.ones(3)}, {}, {})
print("saved", flush=True)
if sys.argv[3] == "wait":
    with writer:
        writer.settled(wait=True)
raise SystemExit("failed elsewhere")
"""


def script(folder: Path, slow: float, then: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(slow), then], cwd=HOME, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_process_that_ends_finishes_the_checkpoint_under_way_and_no_more(tmp_path):
    process = script(tmp_path, 0.1, "fail")
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said.strip()) == (1, "failed elsewhere")
    assert checkpoint.newest(tmp_path)[0].step == 1


def test_ctrl_c_ends_a_process_whose_disk_does_not_answer(tmp_path):
    process = script(tmp_path, 600, "wait")
    assert process.stdout.readline() == "saved\n"
    for _ in range(2):  # the first ends the wait of training, the second that of Python for its threads
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode not in (0, None)
