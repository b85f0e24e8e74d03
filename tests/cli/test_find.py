"""`whipray find`: a rate with its plot, a size with its reason, and what is refused."""

import json

import pytest
import torch
from PIL import Image

MLP = ("task.model=mlp", "data.limit=200")


def test_a_rate_is_found_shown_and_drawn(whipray, stores, tmp_path):
    answer = whipray("find", "lr", "digits", *MLP, "--steps", "60", "--stores", stores)
    told = json.loads((tmp_path / "find-lr-digits.json").read_bytes())
    assert answer.code == 0, answer
    assert f"optimizer.lr={told['suggestion']:.2g}" in answer.out and "<- falls most" in answer.out
    assert told["rates"][0] == 1e-7 and len(told["rates"]) == len(told["losses"]) == len(told["smoothed"])
    with Image.open(tmp_path / "find-lr-digits.png") as picture:
        assert picture.size == (880, 550)
    assert not (tmp_path / "runs").exists()


def test_programs_are_told_the_same_and_choose_the_place(whipray, stores, tmp_path):
    out = tmp_path / "here.png"
    told = whipray("find", "lr", "digits", *MLP, "--steps", "30", "--out", out, "--stores", stores, "--json").json
    assert told == json.loads(out.with_suffix(".json").read_bytes())
    assert told["plot"] == str(out) and told["entry"] == "model"


def test_where_nothing_falls_nothing_is_suggested(whipray, stores):
    words = ("--lowest", "1e-12", "--highest", "1e-10", "--steps", "20")
    answer = whipray("find", "lr", "digits", *MLP, *words, "--stores", stores)
    assert answer.code == 1 and "no suggestion" in answer.out


def test_a_size_is_found_and_the_batch_stays(whipray, stores, tmp_path):
    words = ("find", "batch", "digits", *MLP, "data.batch_size=16", "--stores", stores)
    answer = whipray(*words)
    assert "the whole batch of 16 rows a worker fits" in answer.out and "data.batch_size=16 stays" in answer.out
    assert not (tmp_path / "runs").exists()
    told = whipray(*words, "--workers", "2", "--json").json
    assert (told["batch_size"], told["share"], told["largest"], told["whole"]) == (16, 8, 8, True)
    assert [probe["rows"] for probe in told["probes"]] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("lr", "diggits"), "did you mean 'digits'?"),
        (("lr", "digits", "optimizer.lr=0.1"), "optimizer.lr (command line) is what is looked for"),
        (("lr", "digits", "schedule.name=cosine"), "does not act in a range test"),
        (("lr", "digits", "resources.workers=2"), "one process learns"),
        (("lr", "digits", "train.epochs=3"), "does not act in `whipray find lr`"),
        (("lr", "digits", "--entry", "critic"), "no optimizer 'critic'"),
        (("lr", "digits", "--lowest", "0"), "must be above 0"),
        (("lr", "digits", "--steps", "1"), "too few"),
        (("lr", "digits", "--out", "plot.pdf"), "--out plot.png"),
        (("lr", "digits", "--out", "nowhere/plot.png"), "there is no folder"),
        (("lr", "digits", "train.init_from=nowhere.pt"), "nowhere.pt: no such file of weights"),
        (("batch", "digits", "data.micro_batch_size=3"), "is what is looked for"),
        (("batch", "digits", "checkpoint.every=3"), "does not act in `whipray find batch`"),
        (("bach", "digits"), "Did you mean 'batch'?"),
    ],
)
def test_what_cannot_be_meant_is_refused(refused, stores, words, said):
    more = () if words[0] == "bach" else ("--stores", stores)
    assert said in refused("find", *words, *more)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a device")
def test_a_size_is_not_looked_for_on_another_device_than_was_asked_for(refused, stores):
    assert "this machine has no device" in refused("find", "batch", "digits", "resources.gpu=1", "--stores", stores)


def test_bounds_are_refused_before_data_are_prepared(refused, tmp_path):
    assert "too few" in refused("find", "lr", "housing", "--steps", "1", "--stores", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_file_of_settings_for_training_may_be_given(whipray, stores, tmp_path):
    (tmp_path / "settings.yaml").write_text("train: {epochs: 3}\noptimizer: {lr: 0.5}\nschedule: {name: cosine}\n")
    words = ("--config", tmp_path / "settings.yaml", "--steps", "12", "--stores", stores)
    assert whipray("find", "lr", "digits", *MLP, *words, "--json").json["rates"][0] == 1e-7
