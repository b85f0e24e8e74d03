"""MNIST's files: IDX plain and gzipped, .npz, torchvision's folders; and what does not belong together."""

import gzip
import shutil

import numpy as np
import pytest
import torch
from torchvision import datasets

from tasks.errors import UserError
from tasks.fields import check_row
from tasks.mnist import CLOTHES, FILES, Fashion, Mnist, Source
from tests.tasks.written import idx_bytes

ARRAYS = {
    "x_train": np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8),
    "y_train": np.array([0, 9, 3, 3, 1], np.uint8),
    "x_test": np.random.default_rng(1).integers(0, 256, (2, 28, 28), np.uint8),
    "y_test": np.array([7, 0], np.uint8),
}


def write_idx(folder, arrays, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for name, key in FILES:
        content = idx_bytes(arrays[key])
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    return folder


def examples_of(path, task=Mnist):
    task = task(source=Source(path=str(path)))
    return [(example.split, task.row(example.reference)) for example in task.examples(task.source)]


def assert_is_what_was_written(examples):
    assert [split for split, _ in examples] == ["train"] * 5 + ["test"] * 2
    assert [row["label"] for _, row in examples] == [*ARRAYS["y_train"], *ARRAYS["y_test"]]
    pictures = np.concatenate([ARRAYS["x_train"], ARRAYS["x_test"]])[:, None]
    np.testing.assert_array_equal(np.stack([row["image"] for _, row in examples]), pictures)


@pytest.mark.parametrize("suffix", ["", ".gz"], ids=["plain", "gzip"])
@pytest.mark.parametrize("inside", [".", "raw", "MNIST/raw"])
def test_the_four_files_are_found_and_read(tmp_path, suffix, inside):
    write_idx(tmp_path / inside, ARRAYS, suffix)
    assert_is_what_was_written(examples_of(tmp_path))


def test_files_with_a_point_in_their_names_are_found(tmp_path):
    write_idx(tmp_path, ARRAYS)
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / path.name.replace("-idx", ".idx"))
    assert_is_what_was_written(examples_of(tmp_path))


@pytest.mark.parametrize("named", ["mnist.npz", ""], ids=["the file", "its folder"])
def test_an_npz_file_is_read(tmp_path, named):
    np.savez_compressed(tmp_path / "mnist.npz", **ARRAYS)
    assert_is_what_was_written(examples_of(tmp_path / named))


def test_torchvision_reads_the_same(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw", ARRAYS)
    theirs = datasets.MNIST(tmp_path, train=True, download=False)
    assert torch.equal(theirs.data, torch.from_numpy(ARRAYS["x_train"]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"y_train": ARRAYS["y_train"][:4]}, "train-labels-idx1-ubyte: 4 labels .* for 5 pictures"),
        ({"y_test": np.array([7, 10], np.uint8)}, r"t10k-labels-idx1-ubyte: holds the labels 7..10, expected 0..9"),
        ({"y_test": np.array([-1, 0], np.int8)}, r"holds the labels -1..0"),
        ({"y_test": np.array([0.5, 0], np.float32)}, "labels"),
        ({"x_test": ARRAYS["x_test"][:, :27]}, "t10k-images-idx3-ubyte: expected uint8 pictures"),
        ({"x_train": ARRAYS["y_train"]}, "train-images-idx3-ubyte: expected uint8 pictures"),
        ({"x_train": ARRAYS["x_train"].astype(np.float32)}, "train-images-idx3-ubyte: expected uint8 pictures"),
    ],
    ids=["counts differ", "class 10", "class -1", "half a class", "27 rows", "no pictures", "real numbers"],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, change, reason):
    write_idx(tmp_path, ARRAYS | change)
    with pytest.raises(UserError, match=reason):
        examples_of(tmp_path)


def test_an_absent_file_is_named(tmp_path):
    write_idx(tmp_path, ARRAYS)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="no t10k-labels-idx1-ubyte") as caught:
        examples_of(tmp_path)
    assert "mnist.npz" in caught.value.hint
    with pytest.raises(UserError, match="none: no such folder"):
        examples_of(tmp_path / "none")


def write_pickles(path):
    np.savez(path, **ARRAYS | {"y_test": np.array([{}, {}], object)})


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: path.write_bytes(b"<html>"), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: np.savez(path, x_train=ARRAYS["x_train"]), "no array 'y_train'"),
        (write_pickles, "cannot be read: Object arrays"),
        (lambda path: None, "no such file"),
    ],
    ids=["a web page", "empty", "an array is absent", "a pickle", "absent"],
)
def test_a_broken_npz_file_is_refused(tmp_path, write, reason):
    write(tmp_path / "mnist.npz")
    with pytest.raises(UserError, match=reason):
        examples_of(tmp_path / "mnist.npz")


def test_a_truncated_npz_file_is_refused(tmp_path):
    path = tmp_path / "mnist.npz"
    np.savez_compressed(path, **ARRAYS)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match="cannot be read"):
        examples_of(path)


def test_an_npz_bomb_is_left_packed(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "mnist.npz", **ARRAYS)
    monkeypatch.setattr("tasks.mnist.MAX_UNPACKED", 1000)
    with pytest.raises(UserError, match="unpacks to over 1000 bytes"):
        examples_of(tmp_path / "mnist.npz")


def test_without_a_network_it_is_said_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # where nobody listens
    with pytest.raises(UserError, match="MNIST cannot be downloaded here") as caught:
        Mnist().files()
    folder = tmp_path / "whipray" / "raw" / "mnist"
    assert str(folder) in caught.value.hint and "train-images-idx3-ubyte.gz" in caught.value.hint
    shutil.rmtree(folder)
    write_idx(folder, ARRAYS, ".gz")
    assert [path.parent for path in Mnist().files()] == [folder] * 4


def test_fashion_comes_with_1200_rows_and_named_classes():
    task = Fashion()
    examples = list(task.examples(task.source))
    assert [sum(e.split == split for e in examples) for split in ("train", "test")] == [1000, 200]
    rows = [task.row(example.reference) for example in examples]
    facts = task.facts(rows[:1000])
    assert facts["label"]["classes"] == list(CLOTHES) and min(facts["label"]["counts"]) > 80
    first = check_row(task.encode(rows[0], facts), task.fields, facts)
    assert CLOTHES[first["label"]] == "ankle boot" and first["image"].shape == (1, 28, 28)


@pytest.mark.parametrize(
    "task", [Mnist(model="mlp", width=2), Mnist(width=2), Mnist(model="residual", width=2), Fashion(width=2)]
)
def test_each_network_scores_ten_classes(task):
    facts = {"image": {"mean": [0.3], "std": [0.3]}}
    assert task.build(facts, None)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
