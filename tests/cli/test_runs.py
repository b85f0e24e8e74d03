"""`whipray runs`: states, conditions, order and tags."""

import json
import shutil

import pytest

from distributed import config, durable
from distributed.hosts import job


@pytest.fixture
def several(runs):
    """Beside digits/tiny a worse and slower run with another rate, and one that was killed in its second epoch."""
    other, killed = runs / "digits" / "other", runs / "digits" / "killed"
    shutil.copytree(runs / "digits" / "tiny", other)
    summary = json.loads((other / "summary.json").read_bytes())
    summary["metrics"] = {split: {"accuracy": 0.01, "loss": 9.0} for split in ("validation", "test")}
    durable.write_json(other / "summary.json", summary | {"seconds": 1e6})
    values = {name: given.value for name, given in config.from_yaml(other / "config.yaml").items()}
    (other / "config.yaml").write_text(config.to_yaml(values | {"optimizer.lr": 0.5}))
    shutil.copytree(runs / "digits" / "tiny", killed)
    (killed / "summary.json").unlink()
    with (killed / "metrics.jsonl").open("a") as rows:
        rows.write('{"kind": "train", "epoch": 1, "step": 5, "time": 1, "loss": 1}\n{"kind": "val')
    return runs


def names(answer) -> list[str]:
    return [one["name"] for one in answer.json["runs"]]


def test_a_finished_run_is_listed_with_its_figures(whipray, trained):
    [told] = whipray("runs", "--runs", trained, "--json").json["runs"]
    assert (told["name"], told["task"], told["state"], told["epochs"]) == ("digits/tiny", "digits", "finished", 1)
    assert set(told["metrics"]) == {"validation", "test"} and 0 <= told["metrics"]["test"]["accuracy"] <= 1
    assert told["run"] == str(trained / "digits" / "tiny") and told["seconds"] > 0 and told["tags"] == []
    assert "digits/tiny" in whipray("runs", "--runs", trained).out


def test_no_runs_is_no_error(whipray):
    answer = whipray("runs", "--json")
    assert answer.code == 0 and answer.json == {"runs": []} and "no runs in" in answer.err


def test_a_killed_run_is_unfinished_and_shows_what_it_reached(whipray, several, trained):
    [killed] = whipray("runs", "killed", "--runs", several, "--json").json["runs"]
    [tiny] = whipray("runs", "tiny", "--runs", several, "--json").json["runs"]
    assert (killed["state"], killed["epochs"], killed["steps"]) == ("unfinished", 1, 5)
    assert killed["metrics"]["validation"]["accuracy"] == pytest.approx(tiny["metrics"]["validation"]["accuracy"])


def test_failures_of_workers_are_shown_beside_the_state(whipray, several):
    lines = [json.dumps({"time": 1.0, "kind": "lost", "step": step, "message": "rank 1 was killed"}) for step in (3, 4)]
    (several / "digits" / "killed" / "attempts.jsonl").write_text("\n".join(lines) + "\n")
    assert "unfinished, 2 failures" in whipray("runs", "killed", "--runs", several).out
    assert whipray("runs", "killed", "--runs", several, "--json").json["runs"][0]["failures"] == 2
    assert names(whipray("runs", "--filter", "failures>1", "--runs", several, "--json")) == ["digits/killed"]


@pytest.mark.parametrize("name", ["summary.json", "environment.json", "failure.json", "attempts.jsonl"])
@pytest.mark.parametrize("content", ["", "[]", "nul"])
def test_a_damaged_file_of_one_run_hides_no_other(whipray, several, name, content):
    (several / "digits" / "killed" / name).write_text(content)
    assert len(names(whipray("runs", "--runs", several, "--json"))) == 3


def test_a_run_is_training_now_while_its_lock_is_held(whipray, several):
    def state():
        return whipray("runs", "killed", "--runs", several, "--json").json["runs"][0]["state"]

    with job.owned(several / "digits" / "killed"):
        assert state() == "training now"
    assert state() == "unfinished"


@pytest.mark.parametrize(
    ("conditions", "found"),
    [
        (["optimizer.lr=0.5"], {"other"}),
        (["optimizer.lr!=0.5"], {"tiny", "killed"}),
        (["accuracy>0.02"], {"tiny", "killed"}),
        (["test/loss >= 9"], {"other"}),
        (["seconds<1000", "state=finished"], {"tiny"}),
        (["task.model=mlp"], {"tiny", "other", "killed"}),
        (["task.model=cnn"], set()),
        (["train.clip_norm=none"], {"tiny", "other", "killed"}),
        (["log.tensorboard=true"], set()),
    ],
)
def test_runs_are_filtered_by_settings_metrics_and_columns(whipray, several, conditions, found):
    words = [word for one in conditions for word in ("--filter", one)]
    assert {
        name.removeprefix("digits/") for name in names(whipray("runs", "--runs", several, "--json", *words))
    } == found


def test_runs_are_sorted_best_first_whichever_way_is_better(whipray, several):
    def order(*words):
        return [name.removeprefix("digits/") for name in names(whipray("runs", "--runs", several, "--json", *words))]

    assert order("--sort", "test/accuracy") == ["tiny", "other", "killed"]  # the last one has no such figure
    assert order("--sort", "loss")[-1] == "other"
    assert order("--sort", "loss", "--reverse")[0] == "other"
    assert order("--sort", "optimizer.lr")[-1] == "other"
    assert order("--sort", "name", "--limit", "1") == ["killed"]


def test_tags_stay_with_the_run_and_select_it(whipray, several):
    tagged = whipray("runs", "--add-tag", "good", "--add-tag", "v1", "tiny", "other", "--runs", several, "--json")
    assert names(tagged) == ["digits/tiny", "digits/other"]
    whipray("runs", "--remove-tag", "good", "other", "--runs", several)
    assert names(whipray("runs", "--tag", "good", "--runs", several, "--json")) == ["digits/tiny"]
    assert json.loads((several / "digits" / "other" / "tags.json").read_text()) == ["v1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--sort", "acuracy"), "did you mean 'accuracy'?"),
        (("--filter", "optimizer.rl=1"), "did you mean 'optimizer.lr'?"),
        (("--filter", "nonsense"), "is no condition"),
        (("--task", "diggits"), "did you mean 'digits'?"),
        (("tinny",), "did you mean 'tiny'?"),
        (("--add-tag", "good"), "whipray runs --add-tag TAG RUN..."),
        (("--add-tag", "../x", "tiny"), "cannot be a name"),
        (("--limit", "0"), "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(refused, trained, words, said):
    assert said in refused("runs", *words, "--runs", trained)
