"""Where figures go beside metrics.jsonl, and what is shown of the network: TensorBoard, MLflow, Weights & Biases."""

import contextlib
import json
import threading
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from distributed import config, record, writers
from distributed.analysis.samples import Samples
from distributed.data.store import Store
from distributed.hosts import job
from distributed.model import Model
from distributed.run import directory_of, resolve
from distributed.world import World
from tasks.errors import UserError
from tests import runs

SHAPES = Path(__file__).parents[1] / "shapes.py"
CPU = torch.device("cpu")
GRID = [np.full((4, 6, 3), 200, np.uint8)]


@contextlib.contextmanager
def recording(directory, resumed_at=None, values=None, **settings):
    directory.mkdir(parents=True, exist_ok=True)
    recorder = record.Recorder(directory, record.Log(**{"tensorboard": False, **settings}), resumed_at, values)
    yield recorder
    recorder.close()


def _tell_all(recorder, step=5, loss=1.5):
    recorder.add("train", 0, step, {"loss": loss}, {"samples_per_second": 10.0})
    recorder.images("validation/samples", step, GRID)
    recorder.text("validation/table", step, "| a |\n| --- |\n| <b> |")
    recorder.histogram("weights/w", step, np.array([1.0, 3.0]), np.array([0.0, 0.5, 1.0]))


def _values(folder):
    """Every value of TensorBoard's events: (tag, step) -> value."""
    events = [e for path in sorted(folder.glob("events.out.*")) for e in EventFileLoader(str(path)).Load()]
    return {(v.tag, e.step): v for e in events if e.HasField("summary") for v in e.summary.value}, events


# ---- which writers there are


def test_a_writer_that_is_not_there_is_refused_with_the_nearest_name():
    with pytest.raises(UserError) as told:
        writers.check(["mlflo"])
    assert "log.writers=mlflo" in told.value.message and "mlflow" in told.value.hint


def test_a_writer_whose_package_is_missing_is_refused_before_data_are_prepared(tmp_path, stores, monkeypatch):
    real = writers.importlib.util.find_spec
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    run = resolve("housing", config.from_words(["log.writers=wandb"]), tmp_path / "runs")
    with pytest.raises(UserError) as told:
        job.prepare(run, tmp_path / "nothing here")
    assert "'wandb' is not installed" in told.value.message and "pip install" in told.value.hint
    assert not (tmp_path / "nothing here").exists()


@pytest.mark.parametrize(("settings", "words"), [
    ({"writers": ("tensorboard",)}, "setting of its own"),
    ({"tensorboard": False, "graph": True}, "only TensorBoard"),
    ({"tensorboard": False, "histograms": True}, "nobody to be told"),
    ({"peak_tflops": 100.0}, "operations are not counted"),
])  # fmt: skip
def test_what_nobody_would_get_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        record.check(record.Log(**settings))


class Kept:
    """A writer that a package brings: it keeps what it is told in a file."""

    def __init__(self, directory, resumed_at):
        self.path, self.lines = directory / "kept.json", [f"begin {resumed_at}"]

    def settings(self, values):
        self.lines.append(f"settings {sorted(values)}")

    def scalars(self, kind, step, values):
        if values.get("loss") == 99:
            raise ConnectionError("the server went away")
        self.lines.append(f"scalars {kind} {step} {sorted(values)}")

    def close(self):
        self.path.write_text(json.dumps(self.lines))


@pytest.fixture
def package(monkeypatch):
    """A package that brings the writers `kept`, and `broken` which is not there."""
    points = [EntryPoint("kept", f"{__name__}:Kept", "whipray.writers"),
              EntryPoint("broken", "os:nothing_of_that_name", "whipray.writers")]  # fmt: skip
    real = writers.entry_points
    monkeypatch.setattr(
        writers, "entry_points", lambda group: points if group == "whipray.writers" else real(group=group)
    )


def test_a_package_brings_a_writer_by_an_entry_point(tmp_path, package):
    writers.check(["kept"])
    with recording(tmp_path, 3, {"optimizer.lr": 0.1}, writers=("kept",)) as recorder:
        recorder.add("train", 0, 4, {"loss": 1.0}, {})
        recorder.add("checkpoint", 0, 4, {}, {})
    assert json.loads((tmp_path / "kept.json").read_text()) == [
        "begin 3", "settings ['optimizer.lr']", "scalars train 4 ['loss']"
    ]  # fmt: skip


def test_a_writer_that_fails_is_given_up_with_a_warning_and_the_others_and_the_run_go_on(tmp_path, package, caplog):
    with recording(tmp_path, None, {}, tensorboard=True, writers=("kept", "broken")) as recorder:
        for step, loss in enumerate([1.0, 99.0, 2.0]):
            recorder.add("train", 0, step, {"loss": loss}, {})
    assert "kept gets nothing from here on: ConnectionError: the server went away" in caplog.text
    assert "broken gets nothing from here on: AttributeError" in caplog.text
    assert [row["loss"] for row in record.read(tmp_path / "metrics.jsonl")] == [1, 99, 2]
    assert {step for tag, step in _values(tmp_path)[0] if tag == "train/loss"} == {0, 1, 2}


def test_a_writer_that_hangs_holds_up_no_step_and_the_end_for_a_moment_only(monkeypatch, caplog):
    stuck = threading.Event()

    class Stuck:
        def scalars(self, *told):
            stuck.wait()

        def close(self):
            pass

    monkeypatch.setattr(writers, "PATIENCE", 0.05)
    monkeypatch.setattr(writers, "MOST_WAITING", 10)
    behind = writers.Behind("stuck", Stuck)
    for step in range(20):
        behind.do("scalars", "train", step, {})
    behind.close()
    stuck.set()
    behind.thread.join()
    assert caplog.text.count("stuck gets nothing from here on") == 1


# ---- TensorBoard


def test_tensorboard_is_shown_scalars_pictures_texts_and_histograms(tmp_path):
    with recording(tmp_path, tensorboard=True) as recorder:
        _tell_all(recorder)
    values, _ = _values(tmp_path)
    assert {("train/loss", 5), ("train/samples_per_second", 5)} <= values.keys()
    image = values["validation/samples", 5]
    assert b"\x89PNG" in image.SerializeToString()
    assert values["validation/table", 5].metadata.plugin_data.plugin_name == "text"
    assert values["weights/w", 5].metadata.plugin_data.plugin_name == "histograms"


# ---- MLflow, the real one


@pytest.mark.filterwarnings("ignore")  # of its own dependencies
def test_mlflow_gets_settings_figures_and_pictures_and_a_resumed_run_goes_on_in_the_same_one(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    directory = tmp_path / "digits" / "one"
    with recording(directory, None, {"optimizer.lr": 0.1, "train.epochs": 2}, writers=("mlflow",)) as recorder:
        _tell_all(recorder)
    with recording(directory, 3, {"optimizer.lr": 0.1, "train.epochs": 4}, writers=("mlflow",)) as recorder:
        recorder.add("validation", 1, 9, {"accuracy": 0.5}, {})
        recorder.conclude({"test/accuracy": 0.75}, 9)
    client = MlflowClient(f"sqlite:///{directory}/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("one", "FINISHED")
    assert run.data.params == {"optimizer.lr": "0.1", "train.epochs": "2"}
    assert run.data.tags["changed.train.epochs"] == "4"
    assert run.data.metrics == {
        "train/loss": 1.5, "train/samples_per_second": 10, "validation/accuracy": 0.5, "best/test/accuracy": 0.75
    }  # fmt: skip
    kept = sorted(path.name for path in (directory / "mlflow").rglob("*") if path.is_file())
    assert kept == ["00000005-0.png", "00000005.json", "00000005.md"]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_goes_where_the_environment_says(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/all.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for name in ("one", "two"):
        with recording(tmp_path / "digits" / name, writers=("mlflow",)) as recorder:
            recorder.add("train", 0, 1, {"loss": 1.0}, {})
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert {run.info.run_name for run in found} == {"one", "two"}


# ---- Weights & Biases, the real one, offline


def _records(data: bytes, block: int = 32768):
    """The records of W&B's file: a header of 7 bytes, then LevelDB's log format in blocks."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_offline_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.delenv("WANDB_MODE", raising=False)
    directory = tmp_path / "digits" / "one"
    with recording(directory, None, {"optimizer.lr": 0.1}, writers=("wandb",)) as recorder:
        _tell_all(recorder)
    with recording(directory, 3, {"optimizer.lr": 0.1}, writers=("wandb",)) as recorder:
        recorder.add("validation", 1, 9, {"accuracy": 0.5}, {})
    told, ids = {}, set()
    for path in sorted((directory / "wandb").glob("offline-run-*/*.wandb")):
        for data in _records(path.read_bytes()):
            one = wandb_internal_pb2.Record()
            one.ParseFromString(data)
            if one.HasField("run"):
                ids.add(one.run.run_id)
            for item in one.history.item if one.HasField("history") else ():
                told.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    assert ids == {json.loads((directory / "wandb.json").read_text())["id"]}
    assert told["train/loss"] == [1.5] and told["validation/accuracy"] == [0.5]
    assert told["step"] == [5, 5, 5, 5, 9]
    assert told["_step"] == sorted(set(told["_step"])), "W&B's own counter may only grow"
    assert told["weights/w/values"] == [[1, 3]]
    assert list(directory.rglob("*.png"))


# ---- what is shown of the network


def _looked(tmp_path, stores, task, *words):
    one = runs.begin(tmp_path, stores, task, *words)
    store = Store(one.store, dict(one.run.task.fields))
    return one, store, Model.build(one.run, store.facts, World()).plain


def test_pictures_are_shown_in_a_grid_with_truth_and_prediction(tmp_path, stores):
    one, store, network = _looked(tmp_path, stores, "digits", "data.limit=100")
    drawn = Samples(one.run, store, CPU, 6).drawn(network)
    assert isinstance(drawn, np.ndarray) and drawn.dtype == np.uint8
    assert drawn.ndim == 3 and drawn.shape[2] == 3 and drawn.shape[1] >= 4 * 160 > drawn.shape[0] >= 2 * 160
    red = (drawn[..., 0].astype(int) - drawn[..., 1] > 100).sum()
    assert red, "an untrained network is wrong about some of them, which is written in red"


def test_words_and_numbers_are_shown_in_a_table(tmp_path, stores):
    one, store, network = _looked(tmp_path, stores, "reviews", "data.limit=100")
    head, _, *rows = Samples(one.run, store, CPU, 5).drawn(network).splitlines()
    assert head == "| tokens | label | predicted label | predicted score |" and len(rows) == 5
    assert all(row.split(" | ")[1] in ("positive", "negative") for row in rows)
    one, store, network = _looked(tmp_path, stores, "housing")
    head, _, *rows = Samples(one.run, store, CPU, 2).drawn(network).splitlines()
    assert "predicted" in head and len(rows) == 2


@pytest.mark.parametrize("name", ["Adversarial", "Detector", "Photos", "Unpaired", "Words"])
def test_every_shape_of_task_can_be_shown(tmp_path, stores, name, caplog):
    one, store, network = _looked(tmp_path, stores, f"{SHAPES}:{name}", "data.limit=64")
    samples = Samples(one.run, store, CPU, 8)
    assert len(samples.drawn(network))
    assert all(counts.sum() > 0 and len(edges) == len(counts) + 1 for _, counts, edges in samples.histograms(network))
    assert samples.graph(network) or "cannot be drawn" in caplog.text


def test_looking_moves_no_generator_and_leaves_no_gradient(tmp_path, stores):
    one, store, network = _looked(tmp_path, stores, "digits", "data.limit=100")
    before, weights = torch.get_rng_state(), {n: t.clone() for n, t in network.state_dict().items()}
    samples = Samples(one.run, store, CPU, 8)
    samples.drawn(network)
    assert {tag.partition("/")[0] for tag, _, _ in samples.histograms(network)} == {"weights", "gradients"}
    assert samples.graph(network)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert runs.distance(weights, dict(network.state_dict())) == 0
    assert len(samples.predicted(network)["label"]) == 8


def _trained(tmp_path, stores, *words):
    """A run with TensorBoard, which the others do without."""
    run = resolve("digits", config.from_words(["data.limit=100", "train.epochs=2", *words]), tmp_path / "runs")
    one = job.Job(run, job.prepare(run, stores), directory_of(tmp_path / "runs", run, "run"))
    job.begin(one)
    job.work(one, World())
    return one


def test_after_each_validation_the_writers_are_shown_samples_histograms_and_one_graph(tmp_path, stores):
    one = _trained(tmp_path, stores, "log.histograms=true", "log.graph=true")
    plain = runs.train(tmp_path, stores, "digits", "data.limit=100", "train.epochs=2", name="plain")
    assert runs.distance(runs.parameters(one), runs.parameters(plain)) == 0, "looking changes nothing"
    values, events = _values(one.directory)
    assert len([tag for tag, _ in values if tag == "validation/samples"]) == 2
    assert any(tag.startswith("gradients/") for tag, _ in values)
    assert sum(event.HasField("graph_def") for event in events) == 1


def test_a_look_that_fails_ends_no_training(tmp_path, stores, caplog, monkeypatch):
    def refused(self, network):
        raise ValueError("out of paint")

    monkeypatch.setattr(Samples, "drawn", refused)
    assert runs.summary(_trained(tmp_path, stores))["epochs"] == 2
    assert caplog.text.count("samples of validation are shown no more: ValueError: out of paint") == 1
