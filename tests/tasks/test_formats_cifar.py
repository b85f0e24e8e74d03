"""CIFAR: both versions of both sets are read, by whomever they were pickled; no pickle is run."""

import io
import os
import pickle
import random
import tarfile

import numpy as np
import pytest

from tasks.errors import UserError
from tasks.formats import cifar

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
HUNDRED = [f"class {number}" for number in range(100)]
TRAIN = [f"data_batch_{number}" for number in range(1, 6)]


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 wrote its strings, as they are in the genuine files."""

    def save_string(self, value):
        raw = value.encode() if isinstance(value, str) else value
        short = len(raw) < 256
        head = pickle.SHORT_BINSTRING if short else pickle.BINSTRING
        self.write(head + len(raw).to_bytes(1 if short else 4, "little") + raw)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}


def by_python_2(value, module=b"numpy.core"):
    out = io.BytesIO()
    Python2Pickler(out, protocol=2).dump(value)
    return out.getvalue().replace(b"numpy._core", module)


def pixels(rows, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, 3072), np.uint8)


def batch(seed=0, labels=(6, 9, 9), key="labels"):
    return {
        "batch_label": "training batch 1 of 5", key: list(labels), "data": pixels(len(labels), seed),
        "filenames": [f"leptodactylus_pentadactylus_s_{number:06}.png" for number in range(len(labels))],
    }  # fmt: skip


def write_ten(folder, dump=by_python_2, changed=None, name="data_batch_3"):
    """Writes the genuine folder with three rows a batch; `changed` is the content of the file `name`."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, file in enumerate([*TRAIN, "test_batch"]):
        (folder / file).write_bytes(dump(batch(seed)))
    meta = {"num_cases_per_batch": 10000, "label_names": TEN, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(dump(meta))
    if changed is not None:
        (folder / name).write_bytes(changed)
    return folder


def write_hundred(folder, dump=by_python_2):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, file in enumerate(["train", "test"]):
        coarse = {"coarse_labels": [1, 2]}
        (folder / file).write_bytes(dump(batch(seed, (0, 99), "fine_labels") | coarse))
    (folder / "meta").write_bytes(dump({"fine_label_names": HUNDRED, "coarse_label_names": TEN + TEN}))
    return folder


def with_labels(labels, data):
    return np.concatenate([np.array(labels, np.uint8).reshape(len(data), -1), data], axis=1).tobytes()


def write_ten_binary(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, file in enumerate([*TRAIN, "test_batch"]):
        (folder / f"{file}.bin").write_bytes(with_labels([6, 9, 9], pixels(3, seed)))
    (folder / "batches.meta.txt").write_text("\n".join(TEN) + "\n\n")
    return folder


def write_hundred_binary(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, file in enumerate(["train", "test"]):
        (folder / f"{file}.bin").write_bytes(with_labels([[1, 0], [2, 99]], pixels(2, seed)))
    (folder / "fine_label_names.txt").write_text("\n".join(HUNDRED) + "\n")
    (folder / "coarse_label_names.txt").write_text("\n".join(TEN + TEN) + "\n")
    return folder


def assert_is_ten(found):
    expected = np.concatenate([pixels(3, seed) for seed in range(5)]).reshape(15, 3, 32, 32)
    assert found.train.images.dtype == np.uint8 and np.array_equal(found.train.images, expected)
    assert found.train.labels.dtype == np.int64 and found.train.labels.tolist() == [6, 9, 9] * 5
    assert np.array_equal(found.test.images, pixels(3, 5).reshape(3, 3, 32, 32)) and len(found.test.labels) == 3
    assert found.names == tuple(TEN)


DUMPS = {
    "Python 2": by_python_2,
    "Python 3, protocol 2": lambda value: pickle.dumps(value, 2),
    "Python 3, protocol 3": lambda value: pickle.dumps(value, 3),
    "Python 3, protocol 4": lambda value: pickle.dumps(value, 4),
    "keys in bytes": lambda value: pickle.dumps({key.encode(): entry for key, entry in value.items()}, 2),
}


@pytest.mark.parametrize("dump", DUMPS.values(), ids=DUMPS)
def test_cifar_10_is_read_whoever_pickled_it(tmp_path, dump):
    assert_is_ten(cifar.read(write_ten(tmp_path, dump), 10))


@pytest.mark.parametrize("dump", DUMPS.values(), ids=DUMPS)
def test_cifar_100_is_read_with_its_fine_classes(tmp_path, dump):
    found = cifar.read(write_hundred(tmp_path, dump), 100)
    assert found.names == tuple(HUNDRED) and found.train.labels.tolist() == found.test.labels.tolist() == [0, 99]
    assert np.array_equal(found.test.images, pixels(2, 1).reshape(2, 3, 32, 32))


def test_the_files_written_here_are_what_python_2_would_have_left():
    content = by_python_2(batch(), b"numpy._core")
    assert content.startswith(b"\x80\x02}q\x00(U\x0bbatch_labelq\x01U\x15training batch 1 of 5")
    found = pickle.loads(content, encoding="bytes")
    assert found[b"labels"] == [6, 9, 9] and np.array_equal(found[b"data"], pixels(3))


def test_the_binary_version_is_the_same(tmp_path):
    assert_is_ten(cifar.read(write_ten_binary(tmp_path), 10))
    found = cifar.read(write_hundred_binary(tmp_path / "hundred"), 100)
    assert found.names == tuple(HUNDRED) and found.train.labels.tolist() == [0, 99]
    assert np.array_equal(found.train.images, pixels(2, 0).reshape(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("name", "write", "classes"),
    [
        ("cifar-10-batches-py", write_ten, 10),
        ("cifar-10-batches-bin", write_ten_binary, 10),
        ("cifar-100-python", write_hundred, 100),
        ("cifar-100-binary", write_hundred_binary, 100),
    ],
)
def test_the_set_is_found_in_the_folder_above_and_in_its_archive(tmp_path, monkeypatch, name, write, classes):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "raw" / name)
    whole = cifar.read(tmp_path / "raw", classes)
    (tmp_path / "packed").mkdir()
    archive = tmp_path / "packed" / f"{name.replace('batches-py', 'python').replace('batches-bin', 'binary')}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "raw" / name, name)
    for path in (archive, archive.parent):
        found = cifar.read(path, classes)
        assert found.names == whole.names and np.array_equal(found.train.images, whole.train.images)


class Dangerous:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def without(name):
    return {key: value for key, value in batch().items() if key != name}


def levels(step):
    """An empty list or tuple, and sixty more that each hold several times the one before."""
    return b"".join(step(b"h" + bytes([number])) + b"q" + bytes([number + 1]) for number in range(60))


def key_of_tuples():
    """A key that takes 2^60 steps to hash."""
    return b"\x80\x02}()q\x00" + levels(lambda before: before * 2 + b"\x86") + b"K\x01u."


def lists_of_lists():
    """Data that take 10^60 steps to print."""
    return b"\x80\x02}U\x04data(]q\x00" + levels(lambda before: b"](" + before * 10 + b"e") + b"ts."


def memo_beyond(place):
    return by_python_2(batch())[:-1] + b"r" + place.to_bytes(4, "little") + b"."


def text_made_to_bytes_again_and_again():
    text = b"x" * 1_000_000
    first = b"\x80\x02c_codecs\nencode\nq\x00X" + len(text).to_bytes(4, "little") + text + b"q\x01"
    return first + b"h\x00h\x01X\x06\0\0\0latin1\x86R" * 500 + b"."


BROKEN = {
    "os.system": (by_python_2(batch() | {"filenames": Dangerous(os.system, "touch run")}), "call 'posix system'"),
    "eval in the array's place": (pickle.dumps(batch() | {"data": Dangerous(eval, "1")}, 4), "call 'builtins eval'"),
    "numpy's other functions": (by_python_2(batch() | {"data": Dangerous(np.fromfile, "x")}), "wants to call"),
    "a known name by protocol 0": (pickle.dumps(batch(), 0), "is no whole pickle: plain data need no"),
    "no data": (by_python_2(without("data")), "has no 'data'"),
    "no labels": (by_python_2(without("labels")), "has no 'labels'"),
    "no dict": (by_python_2([1, 2]), "holds a list, expected a dict"),
    "rows too short": (by_python_2(batch() | {"data": pixels(3)[:, :3071].copy()}), "rows of 3071 numbers"),
    "three dimensions": (by_python_2(batch() | {"data": pixels(3)[None]}), "no array of two dimensions"),
    "real numbers": (by_python_2(batch() | {"data": pixels(3).astype(np.float32)}), "type b'f4', expected 'u1'"),
    "signed numbers": (by_python_2(batch() | {"data": pixels(3).astype(np.int8)}), "type b'i1', expected 'u1'"),
    "objects": (pickle.dumps(batch() | {"data": pixels(3).astype(object)}, 2), "no array of two dimensions"),
    "a list of pixels": (by_python_2(batch() | {"data": [[1]]}), "'data' is no array"),
    "a label too few": (by_python_2(batch() | {"labels": [6, 9]}), "2 labels for 3 pictures"),
    "class 10": (by_python_2(batch() | {"labels": [6, 9, 10]}), r"labels 6\.\.10, expected 0\.\.9"),
    "class -1": (by_python_2(batch() | {"labels": [6, 9, -1]}), r"labels -1\.\.9"),
    "class 2^200": (by_python_2(batch() | {"labels": [6, 9, 2**200]}), "a label is a int"),
    "labels in words": (by_python_2(batch() | {"labels": ["cat"] * 3}), "a label is a bytes"),
    "labels in an array": (by_python_2(batch() | {"labels": pixels(3)}), "'labels' is no list"),
    "no rows": (by_python_2(batch(labels=())), "holds no pictures"),
    "fewer bytes than promised": (by_python_2(batch()).replace(b"K\x03M\x00\x0c", b"K\x04M\x00\x0c"), "has 9216 bytes"),
    "truncated": (by_python_2(batch())[:-2000], "is no whole pickle"),
    "without its end": (by_python_2(batch())[:-1], "is no whole pickle"),
    "empty": (b"", "is empty"),
    "a web page": (b"<!DOCTYPE html><html>404</html>", "begins with b'<!DOCTYPE html>"),
    "a memo of gigabytes": (memo_beyond(2**31), "remembers something in place 2147483648"),
    "lists of lists": (lists_of_lists(), "'data' is no array"),
    "a key of tuples of tuples": (key_of_tuples(), "a key is no text"),
    "gigabytes of text": (text_made_to_bytes_again_and_again(), "more text than it holds"),
    "another encoding": (by_python_2({}).replace(b"}", b"}c_codecs\nencode\n(X\x01\0\0\0xX\x03\0\0\0hextR0"), "unlike Python"),
    "an endless pickle": (b"\x80\x02" + b"N" * 1_000_010 + b".", "over 1000000 steps"),
    "nothing to take": (b"\x80\x02s.", "is no whole pickle"),
    "a long of megabytes": (b"\x80\x02\x8b\x00\x00\x10\x00" + bytes(1_048_576) + b".", "plain data need no LONG4"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_batch_is_refused_by_name_and_not_run(tmp_path, monkeypatch, content, reason):
    monkeypatch.chdir(tmp_path)
    write_ten(tmp_path, changed=content)
    with pytest.raises(UserError, match=reason) as caught:
        cifar.read(tmp_path, 10)
    assert str(tmp_path / "data_batch_3") in caught.value.message and caught.value.hint
    assert len(caught.value.message) < 500 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (by_python_2({"label_names": TEN[:9]}), "names 9 classes, expected 10"),
        (by_python_2({"label_names": [*TEN[:9], "cat"]}), "expected 10 different ones"),
        (by_python_2({"label_names": [*TEN[:9], 10]}), "expected 10 different ones"),
        (by_python_2({"fine_label_names": TEN}), "has no 'label_names'"),
    ],
    ids=["nine", "two cats", "a number", "of the other set"],
)
def test_names_that_do_not_fit_the_set_are_refused(tmp_path, content, reason):
    with pytest.raises(UserError, match=reason):
        cifar.read(write_ten(tmp_path, changed=content, name="batches.meta"), 10)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (bytes(3072), "no multiple of the 3073"),
        (b"<html>", "has 6 bytes, no multiple"),
        (with_labels([6, 10, 9], pixels(3)), r"labels 6\.\.10"),
    ],
    ids=["empty", "truncated", "a web page", "class 10"],
)
def test_a_broken_file_of_the_binary_version_is_refused_by_name(tmp_path, content, reason):
    write_ten_binary(tmp_path)
    (tmp_path / "data_batch_2.bin").write_bytes(content)
    with pytest.raises(UserError, match=f"data_batch_2.bin: .*{reason}"):
        cifar.read(tmp_path, 10)


def test_what_is_absent_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no CIFAR-10: neither batches.meta nor batches.meta.txt") as caught:
        cifar.read(tmp_path, 10)
    assert "cifar-10-python.tar.gz" in caught.value.hint
    write_ten(tmp_path)
    (tmp_path / "test_batch").unlink()
    with pytest.raises(UserError, match="test_batch: no such file"):
        cifar.read(tmp_path, 10)


def test_a_file_larger_than_any_genuine_one_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "MAX_BYTES", 5000)
    with pytest.raises(UserError, match="over 5000 bytes"):
        cifar.read(write_ten(tmp_path), 10)


def test_a_pickle_with_any_byte_changed_is_a_user_error_or_a_batch(tmp_path):
    write_ten(tmp_path)
    random_numbers, head = random.Random(0), by_python_2(batch(labels=[1]))
    data_begins, refused = head.index(b"T\x00\x0c\x00\x00"), 0
    where = [*range(data_begins + 5), *range(data_begins + 3077, len(head))]  # all but the pixels
    for _ in range(600):
        changed = bytearray(head)
        for _ in range(random_numbers.randint(1, 3)):
            changed[random_numbers.choice(where)] = random_numbers.randrange(256)
        (tmp_path / "test_batch").write_bytes(changed)
        try:
            found = cifar.read(tmp_path, 10)
        except UserError as error:
            refused += "test_batch" in error.message
        else:
            assert found.test.images.shape[1:] == (3, 32, 32) and len(found.test.images) == len(found.test.labels)
    assert refused > 100
