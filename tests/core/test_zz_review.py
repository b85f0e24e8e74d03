"""Scratch of a review."""
import dataclasses, itertools
import pytest, torch
from torch import nn
from distributed import checkpoint
from distributed.averaging import Average, Ema
from distributed.data.store import Store
from distributed.evaluation import Evaluator
from distributed.hosts import job
from distributed.learning import begin
from distributed.loop import learn, train
from distributed.world import World
from tests import runs
from tests.core.test_zoo import SHAPES
from tasks import metrics

CNN = ("task.model=cnn", "task.width=4", "data.limit=300", "data.batch_size=50", "train.epochs=3", "checkpoint.keep=99")
SMALL=("data.limit=300", "data.batch_size=50", "train.epochs=2")

def _mean_buffers(world, plain):
    one = job.Job.from_plain(plain)
    store = Store(one.store, dict(one.run.task.fields))
    learning = begin(one.run, store, world, None)
    for _ in range(6):
        learn(learning); learning.state.step += 1
    return None

def _judged_buffers(world, plain):
    one = job.Job.from_plain(plain)
    store = Store(one.store, dict(one.run.task.fields))
    seen = []
    original = Evaluator.__call__
    def look(self, model):
        if self.loader.training if hasattr(self.loader,'training') else False: pass
        seen.append({n: b.clone() for n, b in model.named_buffers()})
        return original(self, model)
    Evaluator.__call__ = look
    try:
        list(train(one.run, store, one.directory, world, None))
    finally:
        Evaluator.__call__ = original
    return seen

def test_avg_buffers(tmp_path, stores, ranks):
    one = runs.begin(tmp_path, stores, "digits", *CNN, "averaging.name=ema")
    a, b = ranks(2, _judged_buffers, one.to_plain())
    for x, y in zip(a, b, strict=True):
        assert runs.distance(x, y) == 0

def test_parts_frozen(tmp_path, stores):
    runs.train(tmp_path, stores, "digits", *CNN, "train.freeze=1.0", "train.unfreeze=1.0@1", "optimizer.parts=1.0=0.1")

@pytest.mark.parametrize("stop", [None, 5])
def test_entry_frozen(tmp_path, stores, stop):
    words = ("train.epochs=3", "train.freeze=discriminator", "train.unfreeze=discriminator@1")
    runs.train(tmp_path, stores, f"{SHAPES}:Adversarial", *words)

def test_modes(tmp_path, stores):
    one = runs.begin(tmp_path, stores, f"{SHAPES}:Adversarial")
    learning = begin(one.run, Store(one.store, dict(one.run.task.fields)), World(), None)
    learning.model.plain.eval()
    learning.model.learning()
    assert learning.model.plain.training

ROOT = '''
from torch import nn
import torch
from tasks.digits import Digits
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 10))
    def forward(self, image):
        return self.body(image) * self.scale
class Rooted(Digits):
    def network(self, facts, load):
        return Net()
    def build(self, facts, load):
        return Net()
'''
def test_root_frozen(tmp_path, stores):
    (tmp_path/"rooted.py").write_text(ROOT)
    one = runs.begin(tmp_path, stores, f"{tmp_path}/rooted.py:Rooted", *SMALL, "train.freeze=scale")
    learning = begin(one.run, Store(one.store, dict(one.run.task.fields)), World(), None)
    assert learning.model.plain.training
    assert all(m.training for m in learning.model.plain.modules())

SKIPBN = '''
from tasks.digits import Digits
class Poisoned(Digits):
    def transform(self, batch, draw, training):
        batch = super().transform(batch, draw, training)
        if training and bool((batch["row"] == 7).any()):
            batch["image"] = batch["image"] * float("nan")
        return batch
'''
def test_skip_bn(tmp_path, stores):
    (tmp_path/"poison.py").write_text(SKIPBN)
    one = runs.train(tmp_path, stores, f"{tmp_path}/poison.py:Poisoned", *CNN, "train.max_skipped=1", "log.every=1")
    print([r for r in runs.rows(one) if r["kind"]=="train"])
    for n, t in runs.parameters(one).items():
        assert torch.isfinite(t).all(), n

def test_metrics():
    m = metrics.rmse()
    with pytest.raises(Exception):
        m.update(torch.zeros(4, 1), torch.arange(4.))
def test_acc():
    m = metrics.accuracy()
    with pytest.raises(Exception):
        m.update(torch.zeros(4, 1), torch.arange(4.))
def test_r2_big():
    g = torch.Generator().manual_seed(0)
    t = torch.randn(1000, generator=g, dtype=torch.float64)
    p = t + 0.1*torch.randn(1000, generator=g, dtype=torch.float64)
    a, b = metrics.r2(), metrics.r2()
    for i in range(0, 1000, 100):
        a.update(p[i:i+100], t[i:i+100]); b.update(p[i:i+100]+1e9, t[i:i+100]+1e9)
    assert a.compute() == pytest.approx(b.compute(), abs=1e-4)
def test_merge_overflow():
    a, b = metrics.rmse(), metrics.rmse()
    big = torch.full((1,), 1.2e154, dtype=torch.float64)
    for m in (a, b): m.update(big, -big*0)
    a.merge([a.state(), b.state()])
    a.compute()

def test_resume_not_mutated(tmp_path, stores):
    one = runs.train(tmp_path, stores, "digits", *CNN, "train.steps=6")
    chosen = checkpoint.chosen(one.directory, "last")
    before = {n: t.clone() for n, t in chosen.optimizer.items()}
    run = dataclasses.replace(one.run, train=dataclasses.replace(one.run.train, steps=None))
    learning = begin(run, Store(one.store, dict(one.run.task.fields)), World(), chosen)
    learn(learning)
    assert runs.distance(before, chosen.optimizer) == 0

@pytest.mark.parametrize("words", [
    ("averaging.name=ema", "train.freeze=1.0,1.1", "train.unfreeze=1.0@1,1.1@2", "precision.channels_last=true", "optimizer.name=sgd", "optimizer.momentum=0.9", "optimizer.decay_on=matrices", "optimizer.weight_decay=0.01", "precision.dtype=float16", "data.micro_batch_size=20"),
    ("averaging.name=swa", "averaging.start=0.2", "train.freeze=1.0,1.1", "train.unfreeze=1.0@1,1.1@2", "precision.channels_last=true", "optimizer.name=adamw", "optimizer.layer_decay=0.5", "train.patience=2", "schedule.name=plateau", "optimizer.every=2"),
    ("averaging.name=ema", "optimizer.name=torch.optim:NAdam", "precision.recompute=1.1", "train.clip_norm=0.1", "optimizer.l1=0.001", "train.steps=13"),
])
def test_resume(tmp_path, stores, words):
    words = (*CNN, *words, "checkpoint.every=2", "log.every=3")
    whole = runs.train(tmp_path, stores, "digits", *words, name="whole")
    for told in (4, 9, 14):
        parts = runs.begin(tmp_path, stores, "digits", *words, name=f"parts{told}")
        store = Store(parts.store, dict(parts.run.task.fields))
        list(itertools.islice(train(parts.run, store, parts.directory, World(), None), told))
        job.work(parts, World())
        assert runs.distance(runs.parameters(whole), runs.parameters(parts)) == 0
        assert runs.rows(whole)[-1] == runs.rows(parts)[-1]
