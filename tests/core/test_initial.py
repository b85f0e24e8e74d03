"""Weights to begin with: what fits is taken, and every tensor is told of."""

import itertools
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from distributed import config, initial, weights
from distributed.data.store import Store
from distributed.hosts import job
from distributed.loop import begin, train
from distributed.model import read
from distributed.run import resolve
from distributed.world import World
from tasks.errors import UserError
from tasks.networks.small import Standardise
from tests import runs

NOWHERE = Path("no_such_folder")
PARITY = '''
from tasks.digits import BUNDLED
from tasks.formats import table
from tasks.networks import small
from tasks.task import Example, Image, Label, Task


class Parity(Task):
    fields = {"image": Image(1, 8, 8), "label": Label(classes=2)}
    recipe = {"data.batch_size": 50, "data.limit": 200, "train.epochs": 1}

    def examples(self, source):
        return map(Example, table.rows(BUNDLED, columns=65))

    def row(self, reference):
        *pixels, label = table.numbers(reference[1], "digits")
        return {"image": [[[int(p * 15) for p in pixels[i : i + 8]] for i in range(0, 64, 8)]], "label": label % 2}

    def build(self, facts, load):
        return small.nn.Sequential(small.Standardise([0.25], [0.5]), small.cnn((1, 8, 8), 4, 2))


class Within(Parity):
    """The same network as a part of another."""

    def build(self, facts, load):
        return small.nn.Sequential(small.nn.Identity(), super().build(facts, load))
'''


@pytest.fixture
def parity(tmp_path: Path) -> str:
    path = tmp_path / "parity.py"
    path.write_text(PARITY)
    return str(path)


def cnn(classes: int = 2, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes))


def write(path: Path, network: nn.Module | dict) -> str:
    torch.save(network if isinstance(network, dict) else network.state_dict(), path)
    return str(path)


# ---- whole runs


def test_a_run_with_another_head_gives_its_backbone(tmp_path, stores, parity):
    old = runs.train(tmp_path, stores, "digits", "task.width=4", "data.limit=200", "train.epochs=1", name="old")
    new = runs.begin(tmp_path, stores, f"{parity}:Parity", "train.init_from=old", name="new")
    learning = begin(new.run, Store(new.store, dict(new.run.task.fields)), World(), None)
    there, here = runs.parameters(old, "best"), learning.model.plain.state_dict()
    backbone = [name for name in here if name.startswith(("1.0.", "1.1.", "1.4.", "1.5."))]
    assert len(backbone) == 12
    assert all(torch.equal(here[name], there[name]) for name in backbone)
    assert (here["0.mean"].item(), here["0.std"].item()) == (0.25, 0.5), "facts of the new data stay"

    job.work(new, World())
    told = json.loads((new.directory / initial.REPORT).read_bytes())
    assert sorted(told["loaded"].values()) == sorted(backbone)
    assert told["new"] == {"1.9.weight": [2, 32], "1.9.bias": [2]}
    assert told["skipped"]["1.9.weight"] == "(10, 32) there, (2, 32) here"
    assert sorted(told["kept"]) == ["0.mean", "0.std"]
    assert told["line"] == (
        "initial weights: 12 of 14 tensors from old; new: 1.9.weight (2, 32), 1.9.bias (2,); "
        "not taken: 1.9.bias ((10,) there, (2,) here), 1.9.weight ((10, 32) there, (2, 32) here)"
    )
    assert told["line"] in (new.directory / "log.txt").read_text()


def test_a_run_that_goes_on_does_not_begin_anew_from_them(tmp_path, stores, parity):
    words = ("task.width=4", "data.limit=200", "train.epochs=2", "log.every=1")
    old = runs.train(tmp_path, stores, "digits", *words, name="old")
    from_old = f"train.init_from={old.directory}"
    whole = runs.train(tmp_path, stores, "digits", *words, from_old, name="whole")
    part = runs.begin(tmp_path, stores, "digits", *words, from_old, name="part")
    store = Store(part.store, dict(part.run.task.fields))
    for progress in train(part.run, store, part.directory, World(), None):
        if progress.kind == "checkpoint":
            break
    (old.directory / "config.yaml").unlink()  # it is needed no more
    job.work(part, World())
    assert runs.distance(runs.parameters(whole), runs.parameters(part)) == 0


def test_a_network_within_another_is_found_and_the_other_way_round(tmp_path, stores, parity):
    runs.train(tmp_path, stores, f"{parity}:Parity", name="plain")
    runs.train(tmp_path, stores, f"{parity}:Within", name="within")
    for task, reference in (("Within", "plain"), ("Parity", "within")):
        one = runs.begin(tmp_path, stores, f"{parity}:{task}", f"train.init_from={reference}", name="next")
        learning = begin(one.run, Store(one.store, dict(one.run.task.fields)), World(), None)
        assert learning.began_from.new == learning.began_from.skipped == {}
        assert len(learning.began_from.loaded) == 14


def _on_a_rank(world: World, path: str) -> dict:
    network = cnn(seed=world.rank)  # another one on each rank
    if world.rank:  # its file is on the machine of rank 0 only
        path = "elsewhere.pt"
    told = initial.begin(path, network, NOWHERE, world)
    return {"weights": {n: t.numpy() for n, t in network.state_dict().items()}, "line": str(told)}


def test_all_ranks_begin_alike_from_a_file_that_rank_0_alone_has(tmp_path, ranks):
    path = write(tmp_path / "weights.pt", cnn(classes=9, seed=5))
    one, two = ranks(2, _on_a_rank, path)
    assert one["line"] == two["line"] and "new: 3.weight (2, 16)" in one["line"]
    for name, value in one["weights"].items():
        np.testing.assert_array_equal(value, two["weights"][name])


def test_a_file_that_rank_0_cannot_read_is_refused_on_all_ranks(ranks):
    with pytest.raises(UserError, match="no such file"):
        ranks(2, _on_a_rank, "nowhere.pt")


# ---- files


@pytest.mark.parametrize("form", ["plain", "state_dict", "model", "model_state_dict", "safetensors"])
def test_files_of_every_form_are_read(tmp_path, form):
    source, network = cnn(seed=1), cnn(seed=2)
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        save_file(source.state_dict(), path)
    else:
        write(path, source if form == "plain" else {"epoch": 3, form: source.state_dict(), "optimizer": {}})
    told = initial.load(str(path), network, NOWHERE)
    assert runs.distance(network.state_dict(), source.state_dict()) == 0
    assert (told.new, told.skipped, len(told.loaded)) == ({}, {}, 9)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "net.encoder."])
def test_what_wrappers_add_to_names_is_taken_off(tmp_path, prefix):
    source, network = cnn(seed=1), cnn(seed=2)
    path = write(tmp_path / "weights.pt", {f"{prefix}{name}": t for name, t in source.state_dict().items()})
    assert initial.load(path, network, NOWHERE).new == {}
    assert runs.distance(network.state_dict(), source.state_dict()) == 0


def test_weights_are_cast_to_the_networks_type(tmp_path):
    source, network = cnn(seed=1), cnn(seed=2).double()
    path = write(tmp_path / "weights.pt", source.half())
    initial.load(path, network, NOWHERE)
    assert network[0].weight.dtype == torch.float64
    assert torch.equal(network[0].weight, source[0].weight.double())


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "evil.pth", {"0.weight": torch.zeros(3), "more": Malicious()})
    with pytest.raises(UserError, match=r"evil.pth: cannot be read as tensors alone"):
        initial.load(path, cnn(), NOWHERE)
    assert not (tmp_path / "owned").exists()


def test_a_damaged_file_is_named(tmp_path):
    for name, content in (("a.pth", b"PK\3\4 nothing"), ("b.safetensors", b"\xff" * 40), ("c.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            weights.read(str(tmp_path / name), NOWHERE)
    with zipfile.ZipFile(tmp_path / "d.pt", "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(UserError, match=r"d.pt: cannot be read"):
        weights.read(str(tmp_path / "d.pt"), NOWHERE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused_and_nothing_is_changed(tmp_path, value):
    source, network = cnn(seed=1).double(), cnn(seed=2)
    source[3].weight.data[0, 0] = value
    path = write(tmp_path / "weights.pt", source)
    with pytest.raises(UserError, match="'3.weight' holds values that are not finite"):
        initial.load(path, network, NOWHERE)
    assert runs.distance(network.state_dict(), cnn(seed=2).state_dict()) == 0


def test_that_counters_of_batches_fit_is_not_enough(tmp_path):
    path = write(tmp_path / "weights.pt", nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    with pytest.raises(UserError, match="no tensor fits"):
        initial.load(path, cnn(), NOWHERE)


def test_what_fits_nowhere_is_refused_with_what_there_is(tmp_path):
    path = write(tmp_path / "weights.pt", {"3.weigth": torch.zeros(2, 16)})
    with pytest.raises(UserError, match=r"no tensor fits .*'3.weigth' \(2, 16\)") as refusal:
        initial.load(path, cnn(), NOWHERE)
    assert "did you mean '3.weight'?" in refusal.value.hint


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("nowhere.pth", "nowhere.pth: no such file of weights"),
        ("nothing", "initial weights: no run 'nothing'"),
        ("torchvision/resnet81", "did you mean 'resnet18'?"),
        ("torchvision/resnet18:IMAGENET1K_V9", "did you mean 'IMAGENET1K_V1'?"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_prepared(reference, said):
    with pytest.raises(UserError) as refusal:
        weights.check(reference, NOWHERE)
    assert said in str(refusal.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "weights.npz").touch()
    with pytest.raises(UserError, match=r"end with .safetensors, .pth, .pt"):
        weights.check(str(tmp_path / "weights.npz"), NOWHERE)


def test_a_file_is_made_absolute_where_it_is_given_and_last_or_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "weights.pt", cnn())
    given = config.from_words(["train.init_from=weights.pt"])
    assert resolve("digits", given, tmp_path).train.init_from == str(tmp_path / "weights.pt")
    given = config.from_words(["train.init_from=digits/old"])
    assert resolve("digits", given, tmp_path).values["train.init_from"] == "digits/old"
    with pytest.raises(UserError, match="the last run is itself"):
        resolve("digits", config.from_words(["train.init_from=last"]), tmp_path)
    with pytest.raises(UserError, match="names no weights"):
        resolve("digits", config.from_words(["train.init_from="]), tmp_path)


# ---- what fits


class Tied(nn.Module):
    def __init__(self, width: int = 3, tied: bool = True) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(5, width), nn.Linear(width, 5, bias=False)
        if tied:
            self.out.weight = self.embedding.weight


@pytest.mark.parametrize("left_out", [None, "embedding.weight", "out.weight"])
def test_tied_weights_are_loaded_under_either_name(tmp_path, left_out):
    source, network = Tied(), Tied()
    named = {name: tensor for name, tensor in source.state_dict().items() if name != left_out}
    told = initial.load(write(tmp_path / "weights.pt", named), network, NOWHERE)
    assert torch.equal(network.out.weight, source.out.weight)
    assert set(told.loaded.values()) == {"embedding.weight"} and told.skipped == told.new == {}
    assert "1 of 1 tensors" in str(told)


def test_two_tensors_for_one_that_is_tied_are_told_of(tmp_path):
    source, network = Tied(tied=False), Tied()
    told = initial.load(write(tmp_path / "weights.pt", source), network, NOWHERE)
    assert torch.equal(network.out.weight, source.embedding.weight)
    assert "one tensor here" in told.skipped["out.weight"]


def test_what_is_borrowed_is_left_alone(tmp_path):
    network = nn.ModuleDict({"student": cnn(seed=1), "teacher": cnn(seed=2)})
    source = {f"{part}.{name}": t for part in network for name, t in cnn(seed=3).state_dict().items()}
    initial.load(write(tmp_path / "weights.pt", source), network, NOWHERE, ("teacher.",))
    assert torch.equal(network["student"][0].weight, cnn(seed=3)[0].weight)
    assert torch.equal(network["teacher"][0].weight, cnn(seed=2)[0].weight)


def test_a_part_that_fits_in_two_places_is_refused(tmp_path):
    network = nn.ModuleDict({"generator_a": cnn(), "generator_b": cnn()})
    with pytest.raises(UserError, match=r"several places alike: '\*' into 'generator_a.\*'"):
        initial.load(write(tmp_path / "weights.pt", cnn()), network, NOWHERE)


def test_running_statistics_are_weights_and_other_buffers_are_facts(tmp_path):
    def network() -> nn.Module:
        frozen = torchvision.ops.FrozenBatchNorm2d(4)
        return nn.Sequential(Standardise([1.0], [2.0]), nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), frozen)

    source, target = network(), network()
    for tensor in source.state_dict().values():
        tensor.copy_(torch.full_like(tensor, 7))
    told = initial.load(write(tmp_path / "weights.pt", source), target, NOWHERE)
    assert target[0].mean.item() == 1.0 and told.kept == ("0.mean", "0.std")
    assert target[2].running_var.tolist() == target[3].running_mean.tolist() == [7.0] * 4
    assert target[2].num_batches_tracked.item() == 7


widths = st.lists(st.integers(1, 4), min_size=2, max_size=5)


@settings(max_examples=40, deadline=None)
@given(there=widths, here=widths, prefix=st.sampled_from(["", "body.", "a.b."]))
def test_every_tensor_is_either_loaded_or_told_of(tmp_path_factory, there, here, prefix):
    def chain(sizes: list[int]) -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))

    source, network = chain(there), chain(here)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    named = {f"{prefix}{name}": tensor for name, tensor in source.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    try:
        told = initial.load(write(path, named), network, NOWHERE)
    except UserError as error:
        assert "no tensor fits" in str(error) or "several places" in str(error)
        assert runs.distance(network.state_dict(), before) == 0
        return
    now = network.state_dict()
    assert set(told.loaded) | set(told.skipped) == set(named)
    assert set(told.loaded.values()) | set(told.new) == set(now)
    assert not set(told.loaded) & set(told.skipped) and not set(told.loaded.values()) & set(told.new)
    for name, target in told.loaded.items():
        assert torch.equal(now[target], named[name])
    for name in told.new:
        assert torch.equal(now[name], before[name])
    same = {n for n, t in source.state_dict().items() if n in now and now[n].shape == t.shape}
    assert len(told.loaded) >= len(same), "no fewer than what fits under its own name"


# ---- torchvision


@pytest.fixture
def resnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A network of torchvision whose "pretrained" weights lie where torch keeps what it has fetched."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    network = torchvision.models.resnet18()
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    write(folder / url.rpartition("/")[2], network)
    return network


def test_a_network_of_torchvision_gives_all_but_its_head(resnet):
    class Ours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torchvision.models.resnet18(num_classes=2)

    network = Ours()
    told = initial.load("torchvision/resnet18", network, NOWHERE)
    assert torch.equal(network.backbone.layer4[1].conv2.weight, resnet.layer4[1].conv2.weight)
    assert told.new == {"backbone.fc.weight": (2, 512), "backbone.fc.bias": (2,)}
    assert set(told.skipped) == {"fc.weight", "fc.bias"}
    assert str(told).startswith("initial weights: 120 of 122 tensors from torchvision/resnet18; new: backbone.fc")


@pytest.mark.parametrize("reference", ["torchvision/resnet18", "torchvision/resnet18:IMAGENET1K_V1"])
def test_a_task_may_borrow_a_network_of_torchvision(resnet, tmp_path, reference):
    network, facts = read(reference, tmp_path, World())
    assert facts == {} and not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert runs.distance(network.state_dict(), resnet.state_dict()) == 0
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_file_is_no_network_to_borrow(tmp_path):
    with pytest.raises(UserError, match="a file of weights is no network") as refusal:
        read(write(tmp_path / "weights.pt", cnn()), tmp_path, World())
    assert "train.init_from=" in refusal.value.hint


def test_without_a_network_it_is_said_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(UserError, match="torchvision/resnet18: cannot be fetched") as refusal:
        weights.read("torchvision/resnet18", NOWHERE)
    assert "resnet18-f37072fd.pth into " + str(tmp_path / "hub" / "checkpoints") in refusal.value.hint
