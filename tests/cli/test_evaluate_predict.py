"""`whipray evaluate` and `whipray predict`: a trained run judged, used, and refused where it does not fit."""

import csv
import gzip
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from distributed import checkpoint, saved
from tasks.digits import BUNDLED


def test_a_split_is_judged_as_it_was_at_the_end_of_training(whipray, trained, stores):
    told = whipray("evaluate", "tiny", "--runs", trained, "--stores", stores, "--json").json
    run = trained / "digits" / "tiny"
    assert told == {"run": str(run), "split": "test", "metrics": saved.summary(run)["metrics"]["test"]}
    other = whipray("evaluate", run, "--split", "train", "--checkpoint", "last", "--stores", stores, "--json").json
    assert other["split"] == "train" and set(other["metrics"]) == {"accuracy", "loss"}
    assert "200 rows" in whipray("evaluate", "last", "--split", "train", "--runs", trained, "--stores", stores).out


def test_data_that_are_not_there_are_prepared(whipray, trained, tmp_path, stores):
    told = whipray("evaluate", "tiny", "--runs", trained, "--stores", tmp_path / "fresh", "--json").json
    assert told == whipray("evaluate", "tiny", "--runs", trained, "--stores", stores, "--json").json


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tiny", "--split", "tset"), "did you mean 'test'?"),
        (("tinny",), "did you mean 'tiny'?"),
        (("tiny", "--checkpoint", "77"), "no checkpoint 'step-00000077'"),
    ],
)
def test_what_cannot_be_meant_is_refused(refused, trained, stores, words, said):
    assert said in refused("evaluate", *words, "--runs", trained, "--stores", stores)


def test_a_run_of_other_data_is_refused(refused, runs, stores):
    facts = runs / "digits" / "tiny" / "facts.json"
    facts.write_text(facts.read_text().replace('"0", "1", ', '"1", '))
    said = refused("evaluate", "tiny", "--runs", runs, "--stores", stores)
    assert "'label'" in said and "9 classes then, 10 now" in said


def test_a_checkpoint_of_another_class_count_is_refused(refused, runs, stores, picture):
    run = runs / "digits" / "tiny"
    [folder] = (run / "checkpoints").glob("step-*")
    tensors = load((folder / "model.safetensors").read_bytes())
    name = max(name for name in tensors if name.endswith("bias"))  # of the last layer
    shutil.rmtree(folder)
    checkpoint.save(run, int(folder.name[5:]), "digits", None, 2, tensors | {name: torch.zeros(7)}, {}, {})
    for words in (("evaluate", "tiny", "--stores", stores), ("predict", "tiny", picture)):
        said = refused(*words, "--runs", runs)
        assert "shape (7,), this model needs (10,)" in said and "another number of classes" in said


def test_a_checkpoint_of_another_task_is_refused(refused, runs, stores):
    run = runs / "digits" / "tiny"
    [folder] = (run / "checkpoints").glob("step-*")
    shutil.rmtree(folder)
    checkpoint.save(run, int(folder.name[5:]), "housing", None, 2, {"other.weight": torch.zeros(3)}, {}, {})
    assert "another task" in refused("evaluate", "tiny", "--runs", runs, "--stores", stores)


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_a_truncated_checkpoint_is_refused(refused, runs, stores, picture, file):
    [path] = (runs / "digits" / "tiny" / "checkpoints").glob(f"step-*/{file}")
    path.write_bytes(path.read_bytes()[:-10])
    for words in (("evaluate", "tiny", "--stores", stores), ("predict", "tiny", picture)):
        assert file in refused(*words, "--runs", runs)


# ---- predict


@pytest.fixture
def digits(tmp_path):
    """Ten bundled digits as picture files, in a folder; returns it and their classes in the order of the names."""
    folder, classes = tmp_path / "pictures", []
    folder.mkdir()
    (folder / ".DS_Store").write_bytes(b"\0")
    with gzip.open(BUNDLED, "rt") as lines:
        for number, (cells, _) in enumerate(zip(csv.reader(lines), range(10), strict=False)):
            pixels = np.array([min(float(cell) * 16, 255) for cell in cells[:64]]).reshape(8, 8)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
            classes.append(cells[64])
    return folder, classes


def test_pictures_are_predicted_by_name_of_class(whipray, trained, digits):
    folder, classes = digits
    told = whipray("predict", "tiny", folder, "--runs", trained, "--json").json
    assert told["run"] == str(trained / "digits" / "tiny")
    assert [one["file"] for one in told["predictions"]] == [str(folder / f"{number}.png") for number in range(10)]
    assert all(set(one) == {"file", "row", "label", "score"} for one in told["predictions"])
    right = sum(one["label"] == wanted for one, wanted in zip(told["predictions"], classes, strict=True))
    assert right >= 4  # after one short epoch; a tenth would be chance
    assert "score" in whipray("predict", "tiny", folder / "0.png", "--runs", trained).out


def test_a_prediction_does_not_depend_on_what_is_predicted_with_it(whipray, trained, digits):
    folder, _ = digits
    together = whipray("predict", "tiny", folder, "--runs", trained, "--json").json["predictions"]
    files = [folder / "7.png", folder / "2.png"]
    alone = whipray("predict", "tiny", *files, "--runs", trained, "--json").json["predictions"]
    assert [one["label"] for one in alone] == [together[7]["label"], together[2]["label"]]
    assert [one["score"] for one in alone] == pytest.approx([together[7]["score"], together[2]["score"]], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("notes.png", b"these are words", "notes.png: is no picture"),
        ("empty.png", b"", "empty.png: is no picture"),
        ("missing.png", None, "missing.png: no such file"),
    ],
)
def test_one_bad_file_among_good_ones_is_named(refused, trained, picture, tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert said in refused("predict", "tiny", picture, tmp_path / name, "--runs", trained)


def test_an_empty_folder_holds_nothing_to_predict(refused, trained, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty: holds no pictures" in refused("predict", "tiny", tmp_path / "empty", "--runs", trained)


def test_a_table_and_lines_of_text_are_predicted_row_by_row(whipray, refused, tmp_path, stores):
    quick = ("train.epochs=1", "log.tensorboard=false", "--runs", "runs", "--stores", stores)
    (tmp_path / "houses.csv").write_text(
        "".join(f"{n},{n % 7},{n % 5}\n" for n in range(200)).replace("0,0,0\n", "a,b,y\n", 1)
    )
    table = ("task.source.path=houses.csv", "task.source.target=y", "task.source.columns=2")
    assert whipray("train", "housing", *table, *quick, "--name", "h").code == 0
    (tmp_path / "new.csv").write_text("b,a\n1,2\n3,4\n5,6\n")
    told = whipray("predict", "h", "new.csv", "--json").json["predictions"]
    assert [(one["file"], one["row"]) for one in told] == [("new.csv", 1), ("new.csv", 2), ("new.csv", 3)]
    assert all(isinstance(one["price"], float) for one in told)
    (tmp_path / "new.csv").write_text("b,a\n1,2\n,4\n")
    assert "new.csv, line 3, column 'b'" in refused("predict", "h", "new.csv")
    (tmp_path / "new.csv").write_text("b,c\n1,2\n")
    assert "new.csv, row 1: no column 'a'" in refused("predict", "h", "new.csv")
