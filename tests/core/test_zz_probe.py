import itertools, time
import pytest, torch
from distributed import durable
from distributed.hosts import job
from distributed.loop import train
from distributed.data.store import Store
from distributed.world import World
from tests import runs

TIED = '''
import torch
from torch import nn
from tasks.task import frozen
import importlib.util, sys
spec = importlib.util.spec_from_file_location("shapes_", "/work/main/tests/shapes.py"); m = importlib.util.module_from_spec(spec); sys.modules["shapes_"]=m; spec.loader.exec_module(m)
class Tied(m.Adversarial):
    def build(self, facts, load):
        made = super().build(facts, load)
        made["discriminator"][0].weight = made["generator"][0].weight
        return made
'''
@pytest.mark.parametrize("more", [(), ("averaging.name=ema", "optimizer.discriminator.name=sgd", "optimizer.discriminator.momentum=0.9"), ("train.freeze=generator.0.weight", "train.unfreeze=generator.0.weight@1")])
def test_tied(tmp_path, stores, ranks, more):
    (tmp_path / "tied.py").write_text(TIED)
    words = (*more, "precision.dtype=float64", "train.epochs=3", "checkpoint.every=2", "checkpoint.keep=99", "log.every=3")
    one = runs.train(tmp_path, stores, f"{tmp_path}/tied.py:Tied", *words, name="one")
    two = runs.begin(tmp_path, stores, f"{tmp_path}/tied.py:Tied", *words, name="two")
    ranks(2, runs.work, two.to_plain())
    assert runs.distance(runs.parameters(one), runs.parameters(two)) < 1e-9
    parts = runs.begin(tmp_path, stores, f"{tmp_path}/tied.py:Tied", *words, name="parts")
    for stop in (4, 9, None):
        ranks(1, runs.work_until, parts.to_plain(), stop)
    assert runs.distance(runs.parameters(one), runs.parameters(parts)) == 0

def _full(world, plain):
    if world.rank == 0:
        orig = durable.publish
        def publish(target, *a, **k):
            if "step-" in target.name: raise OSError(28, "No space left", str(target))
            return orig(target, *a, **k)
        durable.publish = publish
    began = time.time()
    try:
        runs.work(world, plain)
    except Exception as e:
        return type(e).__name__, str(e)[:100], time.time() - began
    finally:
        if world.rank == 0: durable.publish = orig
        from torch import distributed
        distributed.destroy_process_group() if False else None

def test_full(tmp_path, stores, ranks):
    one = runs.begin(tmp_path, stores, "digits", "task.model=mlp", "data.limit=300", "data.batch_size=50", "train.epochs=3")
    began = time.time()
    try:
        print(ranks(2, _full, one.to_plain()))
    except Exception as e: print(repr(e)[:300])
    print(time.time() - began)
