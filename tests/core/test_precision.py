"""What is traded for speed, memory or repeatability changes no more than it says."""

import pytest
import torch

from tasks.errors import UserError
from tests import runs

SMALL = ("task.width=4", "data.limit=300", "data.batch_size=50")
CNN = (*SMALL, "train.epochs=2")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, stores):
    return runs.train(tmp_path_factory.mktemp("plain"), stores, "digits", *CNN)


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (("precision.recompute=1.*",), 0.0),
        (("precision.deterministic=true",), 0.0),
        (("precision.channels_last=false",), 1e-3),
        (("precision.dtype=bfloat16",), 0.3),
        (("precision.dtype=float16",), 0.3),
        (("precision.channels_last=false", "precision.dtype=bfloat16", "precision.recompute=1.0,1.4"), 0.3),
    ],
)
def test_a_training_is_the_same_up_to_rounding(tmp_path, stores, plain, words, most):
    one = runs.train(tmp_path, stores, "digits", *CNN, *words)
    mine = {name: t for name, t in runs.parameters(one).items() if "running" not in name}
    its = {name: t for name, t in runs.parameters(plain).items() if "running" not in name}
    assert runs.distance(mine, its) <= most
    assert not torch.are_deterministic_algorithms_enabled() or "precision.deterministic=true" in words


def test_what_one_run_sets_for_the_process_is_not_the_next_ones(tmp_path, stores):
    runs.train(tmp_path, stores, "digits", *CNN, "precision.deterministic=true", "precision.tf32=all", name="a")
    assert torch.are_deterministic_algorithms_enabled()
    runs.train(tmp_path, stores, "digits", *CNN, name="b")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.allow_tf32
    runs.train(tmp_path, stores, "digits", *CNN, "precision.tf32=no", name="c")
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_resume_in_16_bits_and_channels_last_is_exact(tmp_path, stores, dtype):
    words = (*SMALL, f"precision.dtype={dtype}", "precision.channels_last=true", "schedule.name=constant")
    whole = runs.train(tmp_path, stores, "digits", *words, "train.epochs=4", name="whole")
    runs.train(tmp_path, stores, "digits", *words, "train.epochs=2", name="parts")
    parts = runs.train(tmp_path, stores, "digits", *words, "train.epochs=4", name="parts")
    assert runs.distance(runs.parameters(whole), runs.parameters(parts)) == 0


def test_parts_that_are_not_there_cannot_be_recomputed(tmp_path, stores):
    with pytest.raises(UserError, match=r"precision\.recompute=layer1: the network has no such part"):
        runs.train(tmp_path, stores, "digits", *CNN, "precision.recompute=layer1")


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(tmp_path, stores):
    words = ("task.model=mlp", "data.limit=200", "train.epochs=1", "precision.dtype=float64")
    one = runs.train(tmp_path, stores, "digits", *words, name="one")
    compiled = runs.train(tmp_path, stores, "digits", *words, "precision.compile=default", name="compiled")
    assert runs.distance(runs.parameters(one), runs.parameters(compiled)) < 1e-9
