"""Data prepared by the tasks of a Ray cluster: the same store as this machine makes by itself."""

import hashlib
import os

import pytest

from distributed.config import Given
from distributed.data import convert
from distributed.hosts import ray_tasks
from distributed.run import resolve
from tasks.errors import UserError

# Ray leaves sockets to the garbage collector and uses deprecated names of its own; neither is an error of a test.
pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TASK = """
import os
from pathlib import Path
from tasks.task import BadRow, Label, Task, Vector
class Own(Task):
    fields = {"vector": Vector(1), "label": Label()}
    def examples(self, source): return range(1500)
    def row(self, reference):
        if reference == 700:
            raise BadRow("is torn")
        Path(self.source.path, str(os.getpid())).touch()
        return {"vector": [reference], "label": "ab"[reference % 2]}
    def files(self): return []
    def build(self, facts, load): ...
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "own.py").write_text(TASK)
    (tmp_path / "readers").mkdir()
    path = Given(str(tmp_path / "readers"), "command line")
    return resolve(f"{tmp_path / 'own.py'}:Own", {"task.source.path": path}, tmp_path / "runs")


def shards(store):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in store.iterdir()}


def test_the_tasks_of_a_cluster_make_the_same_store(run, tmp_path):
    mapper = ray_tasks.mapper(run, None)
    far = convert.prepare(run.task, "own", run.data, tmp_path / "far", mapper=mapper)
    readers = {path.name for path in (tmp_path / "readers").iterdir()}
    assert readers
    assert str(os.getpid()) not in readers, "the rows are read elsewhere"
    near = convert.prepare(run.task, "own", run.data, tmp_path / "near")
    assert shards(far) == shards(near)
    with pytest.raises(UserError, match=r"row 701 \(700\): is torn"):
        convert.prepare(run.task, "own", run.data, tmp_path / "strict", on_error="stop", mapper=mapper)
