"""From raw rows to a store and back to batches: what is written is read, what is broken is named."""

import collections
import datetime
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from distributed import catalogue, durable
from distributed.data import convert, schema, split
from distributed.data.settings import Data
from distributed.data.store import Store
from tasks.errors import UserError
from tasks.task import BadRow, Boxes, Example, Image, Label, Labels, Number, Source, Task, Text, Tokens, Vector

ROOT = Path(__file__).parents[2]
FIELDS = {
    "image": Image(2, 3, 4), "vector": Vector(3), "number": Number(), "label": Label(classes=5), "text": Text(),
    "tokens": Tokens(), "boxes": Boxes(), "labels": Labels(),
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
        patch.setattr(convert, "SHARD_BYTES", shard_bytes)
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


class Counted(Task):
    """Twenty rows; says how often it was read."""

    width: int = 1
    source: Source = Source()
    fields = {"vector": Vector(1), "label": Label(classes=2)}
    reads = collections.Counter()

    def examples(self, source):
        self.reads["examples"] += 1
        return [{"vector": [i], "label": i % 2} for i in range(60)]


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
        prints.append(convert.fingerprint(catalogue.find(f"{path}:Own")(), Data()))
    assert (prints[0] == prints[1]) == same


def test_a_changed_raw_file_makes_its_stores_stale(tmp_path):
    raw = tmp_path / "raw"
    raw.write_text("a")
    before = convert.fingerprint(Counted(source=Source(path=str(raw))), Data())
    raw.write_text("b")
    assert convert.fingerprint(Counted(source=Source(path=str(raw))), Data()) != before
    moved = tmp_path / "moved"
    raw.rename(moved)
    moved.write_text("a")
    assert convert.fingerprint(Counted(source=Source(path=str(moved))), Data()) == before
    with pytest.raises(UserError, match="no such file or folder"):
        convert.fingerprint(Counted(source=Source(path=str(raw))), Data())


def test_a_file_that_is_named_by_a_readers_setting_is_read_through_the_fingerprint_of_its_content(tmp_path):
    store = convert.prepare(Counted(), "x", Data(), tmp_path)
    assert store.name == convert.fingerprint(Counted(), Data())[:16]


# ---- broken rows


class Broken(Task):
    fields = {"vector": Vector(1), "label": Label(classes=2)}

    def examples(self, source):
        return range(60)

    def row(self, reference):
        if reference in (3, 30):
            raise BadRow("is torn")
        return {"vector": [reference], "label": reference % 2}


def test_broken_rows_are_counted_and_refused_above_the_threshold(tmp_path, caplog):
    with pytest.raises(UserError, match=r"2 of 60 rows are broken; the first: row 4 \(3\): is torn"):
        convert.prepare(Broken(), "x", Data(), tmp_path)
    assert not list(tmp_path.glob("x/*[!k]")), "nothing may be published"
    path = convert.prepare(Broken(), "x", Data(max_bad=0.1), tmp_path)
    assert Store(path, dict(Broken.fields)).manifest["skipped"]["rows"] == 2
    assert "2 of 60 rows set aside" in caplog.text


def test_what_was_set_aside_before_is_held_to_what_is_allowed_now(tmp_path):
    convert.prepare(Broken(), "x", Data(max_bad=0.1), tmp_path)
    with pytest.raises(UserError, match="2 of 60 rows are broken"):
        convert.prepare(Broken(), "x", Data(max_bad=0), tmp_path)
    with pytest.raises(UserError, match=r"row 4 \(3\): is torn"):
        convert.prepare(Broken(), "x", Data(max_bad=0.1), tmp_path, on_error="stop")


def test_the_first_broken_row_stops_where_that_is_asked(tmp_path):
    with pytest.raises(UserError, match=r"row 4 \(3\): is torn"):
        convert.prepare(Broken(), "x", Data(max_bad=1), tmp_path, on_error="stop")


VALUES = [
    (Image(1, 2, 2), [[1, 2]], "expected shape"),
    (Image(1, 1, 1), [[[300]]], "expected values of 0..255"),
    (Image(1, 1, 1), [[[0.7]]], "expected whole numbers, got 0.7"),
    (Label(classes=2), 0.5, "expected whole numbers"),
    (Vector(2), [1, float("nan")], "NaN"),
    (Vector(2), "ab", "expected numbers"),
    (Number(), None, "is missing"),
    (Label(classes=2), 2, "outside 0..1"),
    (Label(classes=2), -1, "outside 0..1"),
    (Label(names=("cat", "dog")), "dgo", "did you mean 'dog'"),
    (Boxes(), [[5, 5, 1, 9]], "has no area"),
    (Tokens(), [[1, 2]], "expected shape"),
    (Tokens(), [[1], [1, 2]], "no array of numbers"),
    (Text(), 5, "expected text"),
    (Text(), "\ud800", "no text that UTF-8 can hold"),
    (Vector(2), [1, 2, 3], "expected shape"),
    (Vector(1), [1e39], "holds a number that float32 cannot"),
    (Image(1, 1, 1), None, "is missing"),
    (Label(), None, "is missing"),
    (Label(), float("nan"), "NaN"),
    (Label(), -1, "below 0"),
    (Label(), [1], "expected shape"),
    (Label(classes=2), "2", "unknown class '2'"),
    (Boxes(), 7, "expected shape"),
]


@pytest.mark.parametrize(("field", "value", "words"), VALUES, ids=lambda v: str(v)[:30])
def test_a_value_that_its_field_cannot_hold_is_a_bad_row(tmp_path, field, value, words):
    class One(Task):
        fields = {"x": field}

        def examples(self, source):
            return [{"x": value}] * 30

    with pytest.raises(UserError) as raised:
        convert.prepare(One(), "x", Data(), tmp_path)
    assert words in raised.value.message
    assert "'x'" in raised.value.message


GOOD = [
    (Vector(1), [1.0], {"mean": [1.0], "std": [1.0]}),
    (Number(), 1.0, {"mean": 1.0, "std": 1.0}),
    (Image(1, 1, 1), [[[255]]], {"mean": [1.0], "std": [1.0]}),
    (Label(), "cat", {"classes": ["cat"], "counts": 1}),
    (Label(), 0, {"classes": ["0"], "counts": 1}),
]


@pytest.mark.parametrize("own_encode", [False, True])
@pytest.mark.parametrize("bad", [None, float("nan"), [[1.0, 2.0], [3.0]], {}, "missing"], ids=str)
@pytest.mark.parametrize(("field", "good", "facts"), GOOD, ids=lambda v: str(v)[:30])
def test_nothing_is_learned_from_a_row_that_is_set_aside(tmp_path, field, good, facts, bad, own_encode):
    class Torn(Task):
        fields = {"x": field, "n": Number()}

        def examples(self, source):
            names = ("train", "validation", "test")
            yield from (Example({"x": good, "n": 0, **more}, names[i % 3]) for i in range(60))
            row = {"x": bad, "n": 9, **more}  # its n is whole, and must not be learned from either
            if bad == "missing":
                row = {"x": good, "n": None, **more} if own_encode else {"n": 9}
            yield Example(row, "train")

    more = {"more": {}} if own_encode else {}
    if own_encode:
        Torn.encode = lambda self, row, facts: {"x": row["x"], "n": row["n"]}
    with pytest.raises(UserError, match="row 61: '[xn]'"):
        convert.prepare(Torn(), "x", Data(max_bad=0), tmp_path)
    store = Store(convert.prepare(Torn(), "x", Data(max_bad=0.1), tmp_path), dict(Torn.fields))
    learned = dict(store.facts)
    assert store.manifest["skipped"]["rows"] == 1
    assert learned["n"] == {"mean": 0.0, "std": 1.0}
    assert learned["x"] == {**facts, **({"counts": [20]} if isinstance(field, Label) else {})}


@pytest.mark.parametrize("method", ["row", "facts", "encode"])
def test_an_error_of_a_tasks_own_says_in_which_method_it_arose(tmp_path, method):
    def fail(self, *values):
        return {}["x"]

    failing = type("Failing", (Counted,), {method: fail})
    with pytest.raises(KeyError) as raised:
        convert.prepare(failing(), "x", Data(), tmp_path)
    assert raised.value.__notes__[0].startswith(f"in Failing.{method}")


def test_facts_that_are_no_json_are_said_to_be_the_tasks(tmp_path):
    class Odd(Counted):
        def facts(self, rows):
            return {"vector": {"mean": float("nan")}}

    with pytest.raises(ValueError, match="JSON") as raised:
        convert.prepare(Odd(), "x", Data(), tmp_path)
    assert raised.value.__notes__ == ["in Odd.facts"]


def test_a_row_that_encode_refuses_is_named_by_its_number_in_the_source(tmp_path):
    class Refusing(Counted):
        def encode(self, row, facts):
            if row["vector"] == [41]:
                raise BadRow("is torn")
            return row

    with pytest.raises(UserError, match="row 42: is torn"):
        convert.prepare(Refusing(), "x", Data(), tmp_path)


def test_a_source_without_rows_is_refused(tmp_path):
    class Empty(Counted):
        def examples(self, source):
            return []

    with pytest.raises(UserError, match="holds no rows"):
        convert.prepare(Empty(), "x", Data(), tmp_path)


def test_a_column_that_is_not_declared_is_refused_with_the_nearest_name(tmp_path):
    class Stray(Counted):
        def encode(self, row, facts):
            return {"vectr": row["vector"], "label": 0}

    with pytest.raises(UserError, match="holds 'vectr', which the task does not declare"):
        convert.prepare(Stray(), "x", Data(), tmp_path)


# ---- splits


def test_equal_content_is_never_on_two_sides_of_a_split_of_ours():
    rng = np.random.default_rng(0)
    contents = [split.digest([int(i)]) for i in rng.integers(0, 300, 2000)]
    splits = split.assign(Data(split="6:2:2"), [None] * 2000, contents)
    sides = collections.defaultdict(set)
    for content, name in zip(contents, splits, strict=True):
        sides[content].add(name)
    assert all(len(names) == 1 for names in sides.values())
    assert 0.5 < splits.count("train") / 2000 < 0.7


ALIKE = [
    [[1], (1,), [1.0], [True], np.array([1], np.uint8), np.array([1], np.float16), np.array([1], object), [np.int8(1)]],
    [[[1, 2], [3, 4]], np.array([[1, 3], [2, 4]]).T, [np.array([1, 2]), (3.0, 4)], torch.tensor([[1, 2], [3, 4]])],
    [[0.5, 0.0], [0.5, -0.0], np.array([0.5, 0], np.float32)],
    [1, 1.0, np.int64(1), True, np.array(1)],
    ["a/b", Path("a/b"), np.str_("a/b"), np.array("a/b")],
    [b"a", bytearray(b"a"), np.bytes_(b"a")],
    [["a", "b"], ("a", "b"), np.array(["a", "b"])],
    [{"a": 1, "b": None}, {"b": None, "a": np.float32(1)}],
    [{"a", "b", 1}, {1, "b", "a"}, frozenset(["b", 1, "a"])],
    [[1, None, [2, 3]], (1.0, None, np.array([2, 3]))],
    [[[1], [2, 3]], [np.array([1]), [2, 3]]],
    [None], [[None]], [[]], [[[]]], [{}], [set()], [""], [b""], ["1"], [b"1"], [["ab"]], [["a", ["b"]]], [[[1, 2, 3, 4]]],
    [[1, 2, 3, 4]], [[1, "1"]], [["1", 1]], [0.1], [np.float32(0.1)], [2**53], [2**53 + 1], [2**63], [2**70], [2.0**70],
    [[2**63, 1]], [[2**70, 1]], [float("inf")], [float("nan")], [{"a": {"b": 1}}], [[{"a": 1}, {"b": Path("c")}]],
    [{"a": [1, 2]}], [{1: "a"}], [{"1": "a"}],
]  # fmt: skip


def test_equal_content_has_one_digest_and_other_content_another():
    digests = [{split.digest(value) for value in alike} for alike in ALIKE]
    assert [len(some) for some in digests] == [1] * len(ALIKE)
    assert len(set.union(*digests)) == len(ALIKE)


def test_another_process_finds_the_same_digests():
    row = "{'a': Path('x'), 'b': {'c': None, 'd': [{'e': 1}]}, 'f': {'g', 'h', 'i'}, 'j': [[1], [2, 3]], 'k': True}"
    code = f"from pathlib import Path; from distributed.data import split; print(split.digest([{row}]).hex())"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, env=environment
    )
    assert told.stdout.strip() == split.digest([eval(row)]).hex()


@pytest.mark.parametrize(
    "value",
    [object(), datetime.date(2026, 1, 1), 1j, np.array([1j]), np.datetime64(1, "s")],
    ids=lambda v: type(v).__name__,
)
@pytest.mark.parametrize("inside", [lambda v: v, lambda v: [{"a": v}], lambda v: {v} if v.__hash__ else [v]])
def test_what_cannot_be_compared_is_refused_with_its_column(value, inside):
    with pytest.raises(UserError, match=f"column 'when' holds a {type(value).__name__}"):
        split.digest({"when": inside(value)})


def test_a_large_array_is_digested_as_fast_as_it_is_hashed():
    large = np.arange(4_000_000, dtype=np.float32).reshape(2, 1000, 2000)
    began = time.perf_counter()
    split.digest({"x": large})
    assert time.perf_counter() - began < 1


def test_a_row_keeps_its_split_when_others_come():
    contents = [split.digest([i]) for i in range(100)]
    few = split.assign(Data(split="8:1:1"), [None] * 50, contents[:50])
    assert split.assign(Data(split="8:1:1"), [None] * 100, contents)[:50] == few


def test_the_folds_cover_every_row_once():
    contents = [split.digest([i]) for i in range(500)]
    tests = [
        {i for i, name in enumerate(split.assign(Data(folds=5, fold=f), [None] * 500, contents)) if name == "test"}
        for f in range(5)
    ]
    assert sorted(i for fold in tests for i in fold) == list(range(500))
    assert len({split.assign(Data(folds=5, fold=0), [None] * 500, contents).count("validation")}) == 1


def test_the_sources_own_split_is_kept_and_validation_is_cut_from_train():
    contents = [split.digest([i]) for i in range(300)]
    given_splits = ["train"] * 200 + ["test"] * 100
    splits = split.assign(Data(), given_splits, contents)
    assert splits[200:] == ["test"] * 100
    assert 5 < splits[:200].count("validation") < 45


def test_duplicates_across_the_sources_own_split_are_reported(tmp_path, caplog):
    class Doubled(Counted):
        def examples(self, source):
            return [Example({"vector": [i % 25], "label": 0}, "train" if i < 40 else "test") for i in range(60)]

    path = convert.prepare(Doubled(), "x", Data(), tmp_path)
    assert Store(path, dict(Doubled.fields)).manifest["duplicates"]["test_in_train"] > 0
    assert "also in its train split" in caplog.text


def test_the_largest_seed_of_a_split_is_as_good_as_any():
    assert split.assign(Data(split_seed=2**63 - 1), [None], [split.digest(1)])[0] in split.SPLITS


def test_a_split_without_rows_is_refused_before_anything_is_learned(tmp_path):
    class Lone(Counted):
        def examples(self, source):
            return [Example({"vector": [i], "label": 0}, "test") for i in range(9)]

        def facts(self, rows):
            return {"vector": {"most": max(row["vector"] for row in rows)}}

    with pytest.raises(UserError, match="no row falls into the train split"):
        convert.prepare(Lone(), "x", Data(), tmp_path)


@pytest.mark.parametrize("rule", ["8", "a:b", "0:1", "1:-1", "1:2:3:4"])
def test_an_impossible_split_is_refused(rule):
    with pytest.raises(UserError, match="data.split"):
        split.check(Data(split=rule))


@pytest.mark.parametrize("data", [Data(folds=5), Data(fold=1), Data(folds=5, fold=5)])
def test_contradicting_folds_are_refused(data):
    with pytest.raises(UserError, match="data.fold"):
        split.check(data)


def test_too_few_rows_for_the_shares_are_refused(tmp_path):
    class Few(Counted):
        def examples(self, source):
            return [{"vector": [i], "label": 0} for i in range(3)]

    with pytest.raises(UserError, match="no row falls into the"):
        convert.prepare(Few(), "x", Data(), tmp_path)


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
    assert schema.schema(FIELDS).names == list(FIELDS)
