"""Which split a row falls into: equal content on one side, the source's word kept, impossible wishes refused."""

import collections
import datetime
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from distributed.data import convert, split
from distributed.data.settings import Data
from distributed.data.store import Store
from tasks.errors import UserError
from tasks.formats import pictures as formats
from tasks.task import Example, Label, Picture, Task
from tests.counted import Counted

ROOT = Path(__file__).parents[2]


def assign(data: Data, given_splits: list, contents: list[bytes]) -> list[str]:
    units = np.array([split.units(content, data.split_seed) for content in contents])
    return [split.SPLITS[code] for code in split.assign(data, given_splits, units)]


def test_equal_content_is_never_on_two_sides_of_a_split_of_ours():
    rng = np.random.default_rng(0)
    contents = [split.digest([int(i)]) for i in rng.integers(0, 300, 2000)]
    splits = assign(Data(split="6:2:2"), [None] * 2000, contents)
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


def test_a_row_keeps_its_split_when_others_come():
    contents = [split.digest([i]) for i in range(100)]
    few = assign(Data(split="8:1:1"), [None] * 50, contents[:50])
    assert assign(Data(split="8:1:1"), [None] * 100, contents)[:50] == few


def test_the_folds_cover_every_row_once():
    contents = [split.digest([i]) for i in range(500)]
    tests = [
        {i for i, name in enumerate(assign(Data(folds=5, fold=f), [None] * 500, contents)) if name == "test"}
        for f in range(5)
    ]
    assert sorted(i for fold in tests for i in fold) == list(range(500))
    assert len({assign(Data(folds=5, fold=0), [None] * 500, contents).count("validation")}) == 1


def test_the_sources_own_split_is_kept_and_validation_is_cut_from_train():
    contents = [split.digest([i]) for i in range(300)]
    given_splits = ["train"] * 200 + ["test"] * 100
    splits = assign(Data(), given_splits, contents)
    assert splits[200:] == ["test"] * 100
    assert 5 < splits[:200].count("validation") < 45


def test_duplicates_across_the_sources_own_split_are_reported(tmp_path, caplog):
    class Doubled(Counted):
        def examples(self, source):
            return [Example({"vector": [i % 25], "label": 0}, "train" if i < 40 else "test") for i in range(60)]

    path = convert.prepare(Doubled(), "x", Data(), tmp_path)
    assert Store(path, dict(Doubled.fields)).manifest["duplicates"]["test_in_train"] > 0
    assert "also in its train split" in caplog.text


def test_groups_that_have_a_content_in_common_share_a_split(tmp_path):
    class Doubled(Counted):
        def examples(self, source):
            for i in range(400):
                yield Example({"vector": [i // 2], "label": 0}, group=f"{i % 2}-{i // 20}")

    store = Store(convert.prepare(Doubled(), "x", Data(), tmp_path))
    sides = {name: set(store.rows(name).dense("vector")[:, 0].tolist()) for name in split.SPLITS}
    assert not sides["train"] & sides["test"] and not sides["train"] & sides["validation"]
    assert store.manifest["duplicates"] == {"test_in_train": 0, "rows": 200}
    groups = {(source_vector // 10) for source_vector in sides["test"]}
    assert all(value // 10 in groups for value in sides["test"])
    assert len(sides["test"]) == 10 * len(groups), "a group is never torn"


def test_a_picture_is_what_it_shows_and_not_where_its_file_lies(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [formats.png(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))["bytes"] for _ in range(60)]

    class Copies(Task):
        fields = {"photo": Picture(), "label": Label(classes=2)}

        def examples(self, source):
            return sorted((tmp_path / "raw").iterdir())

        def row(self, reference):
            return {"photo": reference, "label": 0}

    (tmp_path / "raw").mkdir()
    for i, picture in enumerate(pictures):
        (tmp_path / "raw" / f"{i}.png").write_bytes(picture)
        (tmp_path / "raw" / f"copy_{i}.png").write_bytes(picture)
    store = Store(convert.prepare(Copies(), "x", Data(), tmp_path))
    assert store.manifest["duplicates"] == {"test_in_train": 0, "rows": 60}
    assert all(count % 2 == 0 for count in store.counts().values()), "copies are on one side"


DOMAINS = [
    (["a", None], "row 2 has no domain, others have: a"),
    (["a/b"], "a domain is called 'a/b'"),
    ([".."], "a domain is called '..'"),
    (["row"], "a domain is called 'row'"),
]


@pytest.mark.parametrize(("names", "words"), DOMAINS)
def test_impossible_domains_are_refused(tmp_path, names, words):
    class Odd(Counted):
        def examples(self, source):
            return [Example({"vector": [i], "label": 0}, domain=names[i % len(names)]) for i in range(60)]

    with pytest.raises(UserError, match=words):
        convert.prepare(Odd(), "x", Data(), tmp_path)


def test_a_domain_without_rows_in_a_split_is_refused(tmp_path):
    class Lacking(Counted):
        def examples(self, source):
            for i in range(60):
                name = ("train", "validation", "test")[i % 3]
                yield Example({"vector": [i], "label": 0}, name, domain="a" if name == "test" or i % 2 else "b")

    with pytest.raises(UserError, match="no row of the domain 'b' falls into the test split"):
        convert.prepare(Lacking(), "x", Data(), tmp_path)


def test_a_source_without_a_test_split_says_what_to_set(tmp_path):
    class Lacking(Counted):
        def examples(self, source):
            return [Example({"vector": [i], "label": 0}, ("train", "validation")[i % 2]) for i in range(60)]

    with pytest.raises(UserError) as raised:
        convert.prepare(Lacking(), "x", Data(), tmp_path)
    assert "none of them is test: data.split=8:1:1" in raised.value.hint


def test_the_largest_seed_of_a_split_is_as_good_as_any():
    assert assign(Data(split_seed=2**63 - 1), [None], [split.digest(1)])[0] in split.SPLITS


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
