"""From raw rows to a store and back to batches: what is written is read, what is broken is named."""

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from distributed import catalogue, durable
from distributed.data import convert, fingerprint, parts, schema, shards
from distributed.data.settings import Data
from distributed.data.store import Store
from tasks.errors import UserError
from tasks.task import (
    Boxes,
    ClassMap,
    Example,
    FilePath,
    Image,
    Label,
    Labels,
    Number,
    ObjectMasks,
    Picture,
    Source,
    Task,
    Text,
    Tokens,
    Vector,
)
from tests.counted import Counted

ROOT = Path(__file__).parents[2]
FIELDS = {
    "image": Image(2, 3, 4), "vector": Vector(3), "number": Number(), "label": Label(classes=5), "text": Text(),
    "tokens": Tokens(), "boxes": Boxes(), "labels": Labels(), "picture": Picture(), "classes": ClassMap(),
    "masks": ObjectMasks(),
}  # fmt: skip
FLOATS = st.floats(-1e6, 1e6, width=32)
ROWS = st.fixed_dictionaries(
    {
        "image": arrays.arrays(np.uint8, (2, 3, 4)),
        "vector": st.lists(FLOATS, min_size=3, max_size=3),
        "number": FLOATS,
        "label": st.integers(0, 4),
        "text": st.text(st.characters(codec="utf-8"), max_size=20),
        "tokens": st.lists(st.integers(0, 2**31 - 1), max_size=8),
        "boxes": st.lists(
            st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(10, 20), st.integers(10, 20)), max_size=3
        ),
        "labels": st.lists(st.integers(0, 4), max_size=3),
        "picture": arrays.arrays(np.uint8, st.tuples(st.integers(2, 5), st.integers(2, 5), st.just(3))),
        "classes": arrays.arrays(np.uint8, (2, 3)),
        "masks": arrays.arrays(
            np.uint8, st.tuples(st.integers(0, 2), st.just(3), st.just(4)), elements=st.integers(0, 1)
        ),
    }
)


def everything(given_rows: list[dict], **attributes) -> Task:
    """A task whose rows are these, each in the split that its position says."""

    class Everything(Task):
        fields = FIELDS

        def examples(self, source):
            names = ("train", "validation", "test")
            return [Example(row, names[i % 3]) for i, row in enumerate(given_rows)]

    return Everything(**attributes)


def bits(value) -> bytes:
    return value.encode() if isinstance(value, str) else np.asarray(value).tobytes()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ROWS, min_size=3, max_size=9), st.sampled_from([1, 10**9]), st.randoms())
def test_rows_of_every_kind_are_read_back_as_they_were_written(tmp_path_factory, rows, shard_bytes, random):
    task = everything(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", shard_bytes)
        patch.setattr(parts, "CHUNK", 2)
        path = convert.prepare(task, "x", Data(), tmp_path_factory.mktemp("stores"))
    store = Store(path, FIELDS)
    for offset, name in enumerate(("train", "validation", "test")):
        expected = rows[offset::3]
        picked = [random.randrange(len(expected)) for _ in range(5)]
        columns = store.rows(name).take(np.array(picked))
        for column in ("image", "vector", "number", "label"):
            want = np.stack([np.asarray(expected[i][column]) for i in picked]).astype(columns[column].dtype)
            assert np.array_equal(columns[column], want), column
        assert columns["text"] == [expected[i]["text"] for i in picked]
        for column in ("tokens", "boxes", "labels"):
            values, lengths = columns[column]
            assert lengths.tolist() == [len(expected[i][column]) for i in picked]
            want = [np.asarray(expected[i][column], values.dtype).reshape(-1, *values.shape[1:]) for i in picked]
            assert np.array_equal(values, np.concatenate(want)), column
        for column, channels in (("picture", 3), ("classes", 1)):
            pixels = columns[column].decoded()
            for i, seen in zip(picked, pixels, strict=True):
                want = expected[i][column].reshape(*expected[i][column].shape[:2], channels)
                assert np.array_equal(seen.permute(1, 2, 0).numpy(), want), column
        for i, seen in zip(picked, columns["masks"].decoded(), strict=True):
            assert np.array_equal(seen.numpy(), expected[i]["masks"])


def test_a_store_is_prepared_once_whatever_other_settings_say(tmp_path):
    Counted.reads.clear()
    first = convert.prepare(Counted(width=1), "x", Data(), tmp_path)
    assert convert.prepare(Counted(width=2), "x", Data(batch_size=7, limit=3), tmp_path) == first
    assert Counted.reads["examples"] == 1
    assert convert.prepare(Counted(), "x", Data(split_seed=1), tmp_path) != first


def test_readers_may_look_at_the_source_settings_only(tmp_path):
    class Cheat(Counted):
        def row(self, reference):
            return {**reference, "vector": [self.width]}

    with pytest.raises(UserError, match=r"reads 'task.width' while preparing data"):
        convert.prepare(Cheat(), "x", Data(), tmp_path)


TASK = """
from torch import nn
from tasks.task import Label, Task, Vector
class Net(nn.Module):
    def forward(self, x): return x
def helper(i): return [i]
class Own(Task):
    fields = {"vector": Vector(1), "label": Label(classes=2)}
    def examples(self, source): return [{"vector": helper(i), "label": 0} for i in range(60)]
    def build(self, facts, load): return Net()
"""
EDITS = {
    "nothing": ("", "", True),
    "a comment": ("def helper", "# why\ndef helper", True),
    "the network": ("return x", "return x + 1", True),
    "how it is built": ("return Net()", "return Net().eval()", True),
    "a function that reading uses": ("return [i]", "return [-i]", False),
    "the examples": ("range(60)", "range(61)", False),
    "the fields": ("Vector(1)", "Vector(2)", False),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_reader_makes_its_stores_stale_and_an_edited_network_does_not(tmp_path, name):
    before, after, same = EDITS[name]
    prints = []
    for file, text in (("one", TASK), ("two", TASK.replace(before, after))):
        path = tmp_path / f"{file}.py"
        path.write_text(text)
        prints.append(fingerprint.fingerprint(catalogue.find(f"{path}:Own")(), Data()))
    assert (prints[0] == prints[1]) == same


def test_a_module_that_the_task_imports_counts_and_an_installed_one_does_not(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    prints = []
    for number, change in enumerate(("", "# a comment", "x = 2", "class Net:\n    def forward(self): pass")):
        helper = f"helper_{number}"
        (tmp_path / f"{helper}.py").write_text(f"def helper(i): return [i]\n{change}\n")
        path = tmp_path / f"task_{number}.py"
        path.write_text(TASK.replace("def helper(i): return [i]", f"import numpy\nfrom {helper} import helper"))
        prints.append(fingerprint._reading_code(catalogue.find(f"{path}:Own")))
    same = [len(codes) == 2 and codes[1 if "range" in codes[0] else 0] for codes in prints]
    assert same[0] == same[1] == same[3] != same[2]


@dataclass(frozen=True, kw_only=True)
class Two(Source):
    labels: FilePath = ""  # a second file


def test_every_file_that_the_source_names_counts(tmp_path):
    class Both(Counted):
        source: Two = Two()

    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1")
    other.write_text("2")
    prints = {
        fingerprint.fingerprint(Both(source=Two(path=str(one), labels=str(labels))), Data()) for labels in (one, other)
    }
    assert len(prints) == 2
    other.write_text("3")
    assert fingerprint.fingerprint(Both(source=Two(path=str(one), labels=str(other))), Data()) not in prints


def test_a_changed_raw_file_makes_its_stores_stale(tmp_path):
    raw = tmp_path / "raw"
    raw.write_text("a")
    before = fingerprint.fingerprint(Counted(source=Source(path=str(raw))), Data())
    raw.write_text("b")
    assert fingerprint.fingerprint(Counted(source=Source(path=str(raw))), Data()) != before
    moved = tmp_path / "moved"
    raw.rename(moved)
    moved.write_text("a")
    assert fingerprint.fingerprint(Counted(source=Source(path=str(moved))), Data()) == before
    with pytest.raises(UserError, match="no such file or folder"):
        fingerprint.fingerprint(Counted(source=Source(path=str(raw))), Data())


def test_a_file_that_is_named_by_a_readers_setting_is_read_through_the_fingerprint_of_its_content(tmp_path):
    store = convert.prepare(Counted(), "x", Data(), tmp_path)
    assert store.name == fingerprint.fingerprint(Counted(), Data())[:16]


# ---- damage, and two at once


def test_a_damaged_store_is_named_and_can_be_prepared_again(tmp_path):
    path = convert.prepare(Counted(), "x", Data(), tmp_path)
    shard = next(path.glob("train-*.arrow"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(UserError, match=f"{shard.name}: has"):
        Store(path, dict(Counted.fields))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(UserError, match="checksum differs") as raised:
        convert.prepare(Counted(), "x", Data(), tmp_path)
    assert f"remove {path}" in raised.value.hint


def test_a_store_of_other_fields_is_refused(tmp_path):
    path = convert.prepare(Counted(), "x", Data(), tmp_path)
    with pytest.raises(UserError, match=r"holds 'vector' as .*Vector\(target=False, length=1\), the task declares"):
        Store(path, {"vector": Vector(2)})


class Slow(Counted):
    def row(self, reference):
        time.sleep(0.02)
        return reference


def _prepare(folder, results):
    results.put((os.getpid(), str(convert.prepare(Slow(), "x", Data(), folder)), dict(Slow.reads)))


def test_two_preparations_of_one_store_wait_for_one_another(tmp_path):
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    processes = [context.Process(target=_prepare, args=(tmp_path, results)) for _ in range(2)]
    for process in processes:
        process.start()
    told = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
        process.close()
    results.close()
    assert told[0][1] == told[1][1]
    assert sorted(reads.get("examples", 0) for _, _, reads in told) == [0, 1]


def test_a_preparation_killed_by_kill_9_leaves_nothing_visible(tmp_path):
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    process = context.Process(target=_prepare, args=(tmp_path, results))
    process.start()
    while not list(tmp_path.glob("x/*.lock")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    process.close()
    results.close()
    assert not list(tmp_path.glob("x/*/manifest.json"))
    path = convert.prepare(Slow(), "x", Data(), tmp_path)
    durable.verify(path, Store(path, dict(Slow.fields)).manifest)
    assert not [p for p in tmp_path.glob("x/.*") if p.is_dir()]


def test_every_kind_of_field_has_its_place_in_arrow():
    assert schema.schema(FIELDS).names == [*FIELDS, schema.SOURCE]
    for field in FIELDS.values():
        assert schema.field_of_json(schema.field_to_json(field)) == field


@pytest.mark.parametrize("text", ["", "1", "Image", "exec('x')", "Image(channels=__import__('os'))", "Image(colour=1)"])
def test_a_manifest_that_describes_no_field_is_refused(text):
    with pytest.raises(UserError, match="a field that is not known"):
        schema.field_of_json(text)
