"""Parquet, Arrow and data sets of `datasets`: every layout gives the same rows, and broken ones are refused."""

import datetime
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import PurePath

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import feather, parquet

from tasks.errors import UserError
from tasks.formats import columnar

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    "text": {"dtype": "string", "_type": "Value"},
    "tags": {"feature": {"names": ["wild", "tame"], "_type": "ClassLabel"}, "_type": "List"},
}
METADATA = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
TABLE = pa.table(
    {
        "image": pa.array([{"bytes": b"a", "path": "a.png"}, None, {"bytes": None, "path": "/etc/passwd"}], PICTURE),
        "label": pa.array([0, 1, None], pa.int64()),
        "text": ["好", None, ""],
        "tags": pa.array([[0, 1], [], None], pa.list_(pa.int64())),
    }
).replace_schema_metadata(METADATA)
ROWS = [
    {"image": b"a", "label": 0, "text": "好", "tags": [0, 1]},
    {"image": None, "label": 1, "text": None, "tags": []},
    {"image": None, "label": None, "text": "", "tags": None},
]


def stream(table, path, batch=2):
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)


def file(table, path):
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = {
    "parquet": lambda table, path: parquet.write_table(table, path, row_group_size=2),
    "arrow file": file,
    "arrow stream": stream,
    "feather": feather.write_feather,
    "feather uncompressed": lambda table, path: feather.write_feather(table, path, compression="uncompressed"),
}


def saved(folder, table, shards=1, **state):
    """What `Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    for number, name in enumerate(names):
        stream(table.slice(number * len(table) // shards, len(table) // shards), folder / name)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None} | state
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    return folder


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("rows", [1, 256], ids=["row by row", "at once"])
def test_every_format_gives_the_same_rows(tmp_path, monkeypatch, kind, rows):
    monkeypatch.setattr(columnar, "ROWS", rows)
    WRITERS[kind](TABLE, tmp_path / "train.dat")
    assert list(columnar.rows(tmp_path / "train.dat")) == [("train", row) for row in ROWS]


@pytest.mark.parametrize("kind", WRITERS)
def test_only_the_columns_that_are_asked_for_are_read(tmp_path, kind):
    WRITERS[kind](TABLE, tmp_path / "a.dat")
    found = [row for _, row in columnar.rows(tmp_path / "a.dat", ["text", "label"])]
    assert found == [{"text": row["text"], "label": row["label"]} for row in ROWS]
    assert list(found[0]) == ["text", "label"]
    with pytest.raises(UserError, match=r"a\.dat: no column 'lable'") as caught:
        list(columnar.rows(tmp_path / "a.dat", ["lable"]))
    assert caught.value.hint == "did you mean 'label'?"


@pytest.mark.parametrize("kind", WRITERS)
def test_classes_have_the_names_that_datasets_gave_them(tmp_path, kind):
    WRITERS[kind](TABLE, tmp_path / "a.dat")
    assert columnar.class_names(tmp_path / "a.dat", "label") == ["cat", "dog"]
    assert columnar.class_names(tmp_path / "a.dat", "tags") == ["wild", "tame"]
    assert columnar.class_names(tmp_path / "a.dat", "text") == []
    WRITERS[kind](TABLE.replace_schema_metadata(None), tmp_path / "b.dat")
    assert columnar.class_names(tmp_path / "b.dat", "label") == []
    with pytest.raises(UserError, match="no column 'labels'"):
        columnar.class_names(tmp_path / "b.dat", "labels")


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ("{", "metadata of `datasets` are broken"),
        ("[]", "metadata of `datasets` are broken"),
        ('{"info": {"features": {"label": 3}}}', "metadata of `datasets` are broken"),
        ("[" * 100_000, "metadata of `datasets` are broken"),
        ('{"info": {"features": {"label": {"names": "ab"}}}}', "no list of different names"),
        ('{"info": {"features": {"label": {"names": [1, 2]}}}}', "no list of different names"),
        ('{"info": {"features": {"label": {"names": ["a", "a"]}}}}', "no list of different names"),
    ],
    ids=["truncated", "a list", "a number", "deep", "text", "numbers", "a name twice"],
)
def test_broken_names_of_classes_are_refused(tmp_path, metadata, reason):
    stream(TABLE.replace_schema_metadata({"huggingface": metadata}), tmp_path / "a.arrow")
    with pytest.raises(UserError, match=reason):
        columnar.class_names(tmp_path / "a.arrow", "label")


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "a": st.none() | st.integers(-(2**63), 2**63 - 1),
                "b": st.none() | st.text(st.characters(codec="utf-8")),
                "c": st.none() | st.binary(),
                "d": st.none() | st.lists(st.none() | st.floats(allow_nan=False)),
                "e": st.none() | st.dates(),
            }
        ),
        min_size=1,
    ),
    st.sampled_from(list(WRITERS)),
)
def test_every_value_comes_back_as_it_was_written(tmp_path_factory, rows, kind):
    kinds = {"a": pa.int64(), "b": pa.string(), "c": pa.binary(), "d": pa.list_(pa.float64()), "e": pa.date32()}
    path = tmp_path_factory.mktemp("values") / "a"
    WRITERS[kind](pa.Table.from_pylist(rows, pa.schema(kinds)), path)
    assert [row for _, row in columnar.rows(path)] == rows


# ---- folders


def test_a_saved_dataset_is_what_its_state_says(tmp_path):
    folder = saved(tmp_path / "mine", TABLE, shards=3)
    stream(TABLE, folder / "cache-0123456789abcdef.arrow")
    assert list(columnar.rows(folder)) == [(None, row) for row in ROWS]
    assert columnar.class_names(folder, "label") == ["cat", "dog"]


def test_a_saved_dict_of_datasets_has_the_splits_of_its_folders(tmp_path):
    for split in ("train", "validation", "test"):
        saved(tmp_path / split, TABLE)
    saved(tmp_path / "left_over", TABLE)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation", "test"]}))
    assert [split for split, _ in columnar.rows(tmp_path, ["label"])] == [
        split for split in ("train", "validation", "test") for _ in ROWS
    ]


def test_the_layout_of_the_hub_is_read_shard_by_shard(tmp_path):
    (tmp_path / "data").mkdir()
    for number in (1, 0):
        parquet.write_table(TABLE.slice(number, 1), tmp_path / f"data/train-{number:05d}-of-00002.parquet")
    parquet.write_table(TABLE.slice(2), tmp_path / "data/test-00000-of-00001.parquet")
    for leftover in ("README.md", ".cache.parquet", "_metadata.parquet", "data/.hidden.parquet"):
        (tmp_path / leftover).write_text("no data")
    assert list(columnar.rows(tmp_path)) == list(zip(("test", "train", "train"), (ROWS[2], *ROWS[:2]), strict=True))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00001.parquet", "train"),
        ("imdb-train.arrow", "train"),
        ("default/validation/0000.parquet", "validation"),
        ("dev.parquet", "validation"),
        ("valid/x.parquet", "validation"),
        ("val2017.parquet", "validation"),
        ("Test.parquet", "test"),
        ("test-suite-train-00000-of-00002.parquet", "train"),
        ("test/train.parquet", "train"),
        ("evaluation.parquet", "test"),
        ("training.parquet", "train"),
        ("latest.parquet", None),
        ("constrained/value.parquet", None),
        ("data-00000-of-00001.arrow", None),
    ],
)
def test_a_split_is_a_word_in_the_name_of_a_file_or_folder(name, split):
    assert columnar.split_of(PurePath(name)) == split


def test_a_link_to_a_file_is_followed_as_caches_of_the_hub_need_it(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    parquet.write_table(TABLE, tmp_path / "blobs/0123")
    (tmp_path / "snapshot/train.parquet").symlink_to("../blobs/0123")
    assert list(columnar.rows(tmp_path / "snapshot")) == [("train", row) for row in ROWS]


def break_folder(folder, what):
    state = folder / "state.json"
    data = folder / "data-00000-of-00002.arrow"
    if what == "a shard less":
        data.unlink()
    elif what == "a shard less that nobody misses":
        state.write_text(json.dumps({"_data_files": [{"filename": "data-00001-of-00002.arrow"}]}))
    elif what == "a shard of other columns":
        data.unlink()
        stream(TABLE.drop(["text"]), data)
    elif what == "a pipe":
        data.unlink()
        os.mkfifo(data)
    else:
        state.write_text(what)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("a shard less", r"data-00000-of-00002\.arrow: no such file"),
        ("a shard less that nobody misses", r"of 2 shards 1 are missing, such as data-00000-of-00002\.arrow"),
        ("a shard of other columns", "has no column 'text'"),
        ("a pipe", "no such file"),
        ("{", "is not what `datasets` writes"),
        ("[]", "is not what `datasets` writes"),
        ("{}", "is not what `datasets` writes"),
        ("[" * 100_000, "is not what `datasets` writes"),
        ('{"_data_files": []}', "'_data_files' is no list, or empty"),
        ('{"_data_files": [3]}', "names None, which is no file"),
        ('{"_data_files": [{"filename": "../secret.arrow"}]}', "names '../secret.arrow', which is no file"),
        ('{"_data_files": [{"filename": "/etc/passwd"}]}', "names '/etc/passwd', which is no file"),
        ('{"_data_files": [{"filename": ".."}]}', r"names '\.\.', which is no file"),
    ],
)
def test_a_broken_folder_is_refused(tmp_path, what, reason):
    folder = saved(tmp_path / "mine", TABLE, shards=2)
    break_folder(folder, what)
    with pytest.raises(UserError, match=reason) as caught:
        list(columnar.rows(folder))
    assert str(folder) in caught.value.message and caught.value.hint


def test_a_folder_that_cannot_be_understood_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no .*parquet.* files"):
        list(columnar.rows(tmp_path))
    with pytest.raises(UserError, match=r"none\.parquet: no such file"):
        list(columnar.rows(tmp_path / "none.parquet"))
    (tmp_path / "year=2007").mkdir()
    parquet.write_table(TABLE, tmp_path / "year=2007/a.parquet")
    with pytest.raises(UserError, match="a folder is named like a column and its value"):
        list(columnar.rows(tmp_path))


# ---- broken files


def bad_offset():
    """Text whose second offset lies far beyond its bytes."""
    offsets = pa.py_buffer(np.array([0, 1 << 30, 2], np.int32))
    return pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"ab"))


def bad_index():
    return pa.DictionaryArray.from_arrays(pa.array([0, 7], pa.int8()), ["a", "b"], safe=False)


def bad_utf8():
    return pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff"))


@pytest.mark.parametrize("kind", ["arrow file", "arrow stream", "feather uncompressed"])
@pytest.mark.parametrize("column", [bad_offset, bad_index, bad_utf8])
def test_offsets_and_indices_are_checked_before_they_are_followed(tmp_path, kind, column):
    WRITERS[kind](pa.table({"x": column()}), tmp_path / "a.arrow")
    with pytest.raises(UserError, match=r"a\.arrow: cannot be read"):
        list(columnar.rows(tmp_path / "a.arrow"))


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"<!DOCTYPE html>",
        lambda content: b"FEA1" + bytes(100),
        lambda content: content[:6],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content[:-8],
    ],
    ids=["empty", "a web page", "feather 1", "six bytes", "half", "a byte less", "no end"],
)
def test_a_broken_file_is_refused_by_name(tmp_path, kind, damage):
    path = tmp_path / "a.dat"
    WRITERS[kind](TABLE, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        list(columnar.rows(path))
    assert str(path) in caught.value.message and caught.value.hint


def test_a_stream_without_its_last_batch_is_refused(tmp_path):
    path = tmp_path / "a.arrow"
    stream(TABLE.slice(0, 2), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="is truncated: it has no end mark"):
        list(columnar.rows(path))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_damaged_file_is_refused_or_read(tmp_path, kind):
    path, draw = tmp_path / "a.dat", random.Random(0)
    WRITERS[kind](TABLE, path)
    good = path.read_bytes()
    for _ in range(60):
        content = bytearray(good)
        for _ in range(draw.choice([1, 5])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            list(columnar.rows(path))
        except UserError as error:
            assert str(path) in error.message and error.hint


class Secret(pa.ExtensionType):
    def __init__(self):
        super().__init__(pa.int64(), "somebody.secret")

    def __arrow_ext_serialize__(self):
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage, serialized):
        raise AssertionError("nobody has registered this type")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("nested", [False, True], ids=["a column", "in a list"])
def test_a_type_that_is_not_known_is_refused(tmp_path, kind, nested):
    secret = pa.ExtensionArray.from_storage(Secret(), pa.array([1, 2]))
    column = pa.ListArray.from_arrays([0, 2], secret) if nested else secret
    WRITERS[kind](pa.table({"x": column}), tmp_path / "a.dat")
    with pytest.raises(UserError, match=r"has the unknown type 'somebody\.secret'"):
        list(columnar.rows(tmp_path / "a.dat"))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_tensor_of_fixed_shape_is_an_array(tmp_path, kind):
    numbers = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(numbers)
    WRITERS[kind](pa.table({"x": tensors}), tmp_path / "a.dat")
    np.testing.assert_array_equal([row["x"] for _, row in columnar.rows(tmp_path / "a.dat")], numbers)


def test_pictures_in_lists_are_bytes_too(tmp_path):
    column = pa.array([[{"bytes": b"a", "path": None}, None], None, []], pa.list_(PICTURE))
    parquet.write_table(pa.table({"x": column}), tmp_path / "a.parquet")
    assert [row["x"] for _, row in columnar.rows(tmp_path / "a.parquet")] == [[b"a", None], None, []]


def test_a_time_of_no_calendar_and_a_doubled_column_are_refused(tmp_path):
    stream(pa.table({"x": pa.array([2**60], pa.timestamp("s"))}), tmp_path / "a.arrow")
    with pytest.raises(UserError, match=r"a\.arrow: cannot be read"):
        list(columnar.rows(tmp_path / "a.arrow"))
    stream(pa.table([[1], [2]], ["x", "x"]), tmp_path / "b.arrow")
    with pytest.raises(UserError, match="two columns are called 'x'"):
        list(columnar.rows(tmp_path / "b.arrow"))


def test_times_are_python_s_own(tmp_path):
    moment = datetime.datetime(2026, 11, 5, 12, tzinfo=datetime.UTC)
    stream(pa.table({"x": pa.array([moment])}), tmp_path / "a.arrow")
    assert [row["x"] for _, row in columnar.rows(tmp_path / "a.arrow")] == [moment]


# ---- written by `datasets` itself

WRITE = """
import numpy, sys
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Pillow

features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"]), "text": Value("string"),
                     "tags": List(ClassLabel(names=["wild", "tame"])), "grid": Array2D((2, 3), "float32")})
rows = {"image": [Pillow.fromarray(numpy.full((4, 5, 3), shade, numpy.uint8)) for shade in (1, 2, 3)],
        "label": [0, 1, None], "text": ["a", None, "c"], "tags": [[0], [], [1, 0]],
        "grid": numpy.arange(18).reshape(3, 2, 3).tolist()}
made = Dataset.from_dict(rows, features)
made.save_to_disk(sys.argv[1] + "/saved", num_shards=2)
DatasetDict(train=made, test=made).save_to_disk(sys.argv[1] + "/dict")
made.to_parquet(sys.argv[1] + "/hub-train-00000-of-00001.parquet")
"""


@pytest.fixture(scope="module")
def genuine(tmp_path_factory):
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("genuine data sets are written with the package datasets")
    folder = tmp_path_factory.mktemp("genuine")
    offline = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    subprocess.run([sys.executable, "-P", "-c", WRITE, str(folder)], env=os.environ | offline, check=True, timeout=120)
    return folder


@pytest.mark.parametrize(
    ("name", "splits"),
    [("saved", [None]), ("dict", ["train", "test"]), ("hub-train-00000-of-00001.parquet", ["train"])],
)
def test_what_datasets_writes_is_read(genuine, name, splits):
    found = list(columnar.rows(genuine / name))
    assert [split for split, _ in found] == [split for split in splits for _ in range(3)]
    for number, (_, row) in enumerate(found):
        number %= 3
        assert row["image"].startswith(b"\x89PNG")
        assert (row["label"], row["text"]) == [(0, "a"), (1, None), (None, "c")][number]
        assert row["tags"] == [[0], [], [1, 0]][number]
        np.testing.assert_array_equal(row["grid"], np.arange(18).reshape(3, 2, 3)[number])
    assert columnar.class_names(genuine / name, "label") == ["cat", "dog"]
    assert columnar.class_names(genuine / name, "tags") == ["wild", "tame"]
