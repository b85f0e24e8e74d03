import pytest
from tests import runs
from tests.core.test_zz_review2 import *
test_same = test_resume2 = test_norm = test_two_ranks_compiled = None
@pytest.mark.parametrize("words", [
 (), ("optimizer.discriminator.every=2",), ("optimizer.generator.every=2",), ("optimizer.every=2",), ])
def test_static(tmp_path, stores, ranks, words):
    words = (*ADV, *words, "parallel.static_graph=true")
    one = runs.train(tmp_path, stores, f"{SHAPES}:Adversarial", *words, name="one")
    two = runs.begin(tmp_path, stores, f"{SHAPES}:Adversarial", *words, name="two")
    ranks(2, runs.work, two.to_plain())
    assert runs.distance(runs.parameters(one), runs.parameters(two)) < 1e-9
@pytest.mark.parametrize("words", [("optimizer.every=2",), ("train.freeze=1.0", "train.unfreeze=1.0@1")])
def test_static1(tmp_path, stores, ranks, words):
    words = (*CNN, *words, "precision.sync_norm=true", "parallel.static_graph=true")
    one = runs.train(tmp_path, stores, "digits", *words, name="one")
    two = runs.begin(tmp_path, stores, "digits", *words, name="two")
    ranks(2, runs.work, two.to_plain())
    assert runs.distance(runs.parameters(one), runs.parameters(two)) < 1e-9
def test_plateau(tmp_path, stores, ranks):
    words=(*CNN, "precision.sync_norm=true", "averaging.name=swa", "averaging.start=0.3", "optimizer.name=torch.optim:NAdam", "parallel.shard_optimizer=true", "train.clip_norm=0.5", "optimizer.every=2", "schedule.name=plateau", "train.patience=2")
    one = runs.train(tmp_path, stores, "digits", *words, name="one")
    two = runs.begin(tmp_path, stores, "digits", *words, name="two")
    ranks(2, runs.work, two.to_plain())
    assert runs.distance(runs.parameters(one), runs.parameters(two)) < 1e-9
