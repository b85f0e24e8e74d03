"""Scratch of a review."""
import itertools
import pytest, torch
from torch import nn
from distributed.data.store import Store
from distributed.hosts import job
from distributed.loop import begin, learn, train
from distributed.sync_norm import SyncNorm
from distributed.world import World
from tests import runs
from tests.core.test_zoo import SHAPES

CNN = ("task.model=cnn", "task.width=4", "data.limit=300", "data.batch_size=50", "train.epochs=3", "precision.dtype=float64")
ADV = ("precision.dtype=float64", "train.epochs=4")

@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("task", "words"), [
    ("digits", (*CNN, "precision.sync_norm=true", "averaging.name=ema", "train.freeze=1.0,1.1", "train.unfreeze=1.0@1,1.1@2", "precision.channels_last=true", "optimizer.name=sgd", "optimizer.momentum=0.9", "optimizer.decay_on=matrices", "optimizer.weight_decay=0.01", "optimizer.l1=0.001", "train.clip_norm=0.5", "optimizer.parts=1.0=0.1")),
    ("digits", (*CNN, "precision.sync_norm=true", "averaging.name=swa", "averaging.start=0.3", "optimizer.name=torch.optim:NAdam", "parallel.shard_optimizer=true", "train.clip_norm=0.5", "optimizer.every=2", "schedule.name=plateau", "train.patience=2", "data.micro_batch_size=7")),
    (f"{SHAPES}:Adversarial", (*ADV, "optimizer.discriminator.every=2", "parallel.static_graph=true", "averaging.name=ema")),
    (f"{SHAPES}:Adversarial", (*ADV, "optimizer.discriminator.every=2", "parallel.find_unused=true", "averaging.name=ema", "train.max_skipped=2")),
    (f"{SHAPES}:Adversarial", (*ADV, "optimizer.discriminator.every=3", "parallel.shard_optimizer=true", "train.clip_norm=0.1", "optimizer.name=torch.optim:RAdam")),
    (f"{SHAPES}:Adversarial", (*ADV, "train.freeze=discriminator,generator.0", "train.unfreeze=discriminator@1,generator.0@2", "optimizer.name=sgd", "optimizer.momentum=0.9", "data.micro_batch_size=3")),
])
def test_same(tmp_path, stores, ranks, task, words, size):
    one = runs.train(tmp_path, stores, task, *words, name="one")
    two = runs.begin(tmp_path, stores, task, *words, name="two")
    ranks(size, runs.work, two.to_plain())
    assert runs.distance(runs.parameters(one), runs.parameters(two)) < 1e-9
    for here, there in zip(runs.rows(one), runs.rows(two), strict=True):
        assert here == pytest.approx(there, abs=1e-8)

def _until(world, plain, n):
    one = job.Job.from_plain(plain)
    store = Store(one.store, dict(one.run.task.fields))
    a = list(itertools.islice(train(one.run, store, one.directory, world, None), n))

@pytest.mark.parametrize(("task", "words"), [
    ("digits", (*CNN[:-1], "averaging.name=ema", "train.freeze=1.0,1.1", "train.unfreeze=1.0@1,1.1@2", "optimizer.name=sgd", "optimizer.momentum=0.9")),
    ("digits", (*CNN[:-1], "averaging.name=ema", "parallel.shard_optimizer=true", "optimizer.name=torch.optim:NAdam", "precision.dtype=float16")),
    (f"{SHAPES}:Adversarial", (*ADV, "train.freeze=discriminator", "train.unfreeze=discriminator@1", "averaging.name=ema", "optimizer.name=sgd", "optimizer.momentum=0.9")),
    (f"{SHAPES}:Adversarial", ("train.epochs=4", "precision.dtype=float16", "optimizer.discriminator.every=2", "averaging.name=ema", "optimizer.generator.name=sgd", "optimizer.generator.momentum=0.9")),
])
def test_resume2(tmp_path, stores, ranks, task, words):
    words = (*words, "checkpoint.every=2", "log.every=3", "checkpoint.keep=99")
    whole = runs.begin(tmp_path, stores, task, *words, name="whole")
    ranks(2, runs.work, whole.to_plain())
    for told in (4, 9):
        parts = runs.begin(tmp_path, stores, task, *words, name=f"parts{told}")
        ranks(2, _until, parts.to_plain(), told)
        ranks(2, runs.work, parts.to_plain())
        assert runs.distance(runs.parameters(whole), runs.parameters(parts)) == 0
        assert runs.rows(whole)[-1] == runs.rows(parts)[-1]

def _norm(world, x):
    norm = SyncNorm(4, dtype=x.dtype).train()
    mine = x.chunk(world.size)[world.rank].clone().requires_grad_()
    out = norm(mine)
    out.square().mul(torch.arange(4.0)).sum().backward()
    return out.detach(), mine.grad, norm.running_var

@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_norm(ranks, mean):
    torch.manual_seed(0)
    x = torch.randn(64, 4) + mean
    alone = nn.BatchNorm1d(4).train()
    want = alone(x)
    got = torch.cat([one[0] for one in ranks(2, _norm, x)])
    print((got - want).abs().max())
    assert (got - want).abs().max() < 1e-2

def test_two_ranks_compiled(tmp_path, stores, ranks):
    words = ("task.model=mlp", "data.limit=200", "data.batch_size=50", "train.steps=6", "train.epochs=2")
    one = runs.train(tmp_path, stores, "digits", *words, name="one")
    two = runs.begin(tmp_path, stores, "digits", *words, "precision.compile=default", name="two")
    ranks(2, runs.work, two.to_plain())
    assert runs.distance(runs.parameters(one), runs.parameters(two)) < 1e-4
