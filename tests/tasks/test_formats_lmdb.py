"""LMDB sets of words: read without a trace, and broken ones refused without a crash."""

import os
import pickle
import random
import struct
import subprocess
import sys

import pytest

from tasks.errors import BadRow, UserError
from tasks.formats import lmdb as reader

PAGE = 4096
META = 16  # bytes of a page's header, after which the two first pages describe the file


def values(count=3):
    """What CRNN's create_dataset.py writes; the second picture is longer than a page."""
    out = {b"num-samples": str(count).encode()}
    for number in range(1, count + 1):
        out[b"image-%09d" % number] = b"\x89PNG" + bytes([number]) * (9000 if number == 2 else 50)
        out[b"label-%09d" % number] = f"wörd {number}".encode()
    return out


def written(folder, content, **options):
    lmdb = pytest.importorskip("lmdb", reason="LMDB files are written with the package lmdb")
    path = folder / "words"
    with lmdb.open(str(path), map_size=1 << 40, **options) as environment, environment.begin(write=True) as transaction:
        for key, value in content.items():
            transaction.put(key, value)
    return path


@pytest.mark.parametrize("subdir", [True, False], ids=["a folder", "a file"])
def test_every_sample_comes_back_as_it_was_written(tmp_path, subdir):
    path = written(tmp_path, values(), subdir=subdir)
    samples = [reader.read(pickle.loads(pickle.dumps(reference))) for reference in reader.references(path)]
    assert samples == [(values()[b"image-%09d" % n], f"wörd {n}") for n in (1, 2, 3)]


def test_a_sample_can_be_read_in_another_process_and_in_those_that_it_forks(tmp_path):
    first, *_ = reader.references(written(tmp_path, values()))
    code = (
        "import os; from tasks.formats import lmdb\n"
        f"print(ascii(lmdb.read({first!r})[1]), flush=True)\n"
        f"if os.fork(): os.wait()\nelse: print(ascii(lmdb.read({first!r})[1]))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split("\n")[:2] == [ascii("wörd 1")] * 2


def test_reading_leaves_no_trace(tmp_path):
    path = written(tmp_path, values())
    (path / "lock.mdb").unlink()
    before = (path / "data.mdb").read_bytes()
    path.chmod(0o555)
    assert len([reader.read(reference) for reference in reader.references(path)]) == 3
    path.chmod(0o755)
    assert [file.name for file in path.iterdir()] == ["data.mdb"] and (path / "data.mdb").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({b"image-000000002": None}, "image-000000002 is missing"),
        ({b"label-000000002": None}, "label-000000002 is missing"),
        ({b"image-000000002": b""}, "image-000000002 is empty"),
        ({b"label-000000002": b""}, "label-000000002 is empty"),
        ({b"label-000000002": b"w\xf6rd"}, "label-000000002 is not UTF-8"),
    ],
    ids=["no picture", "no label", "empty picture", "empty label", "latin-1"],
)
def test_a_broken_sample_is_a_bad_row(tmp_path, change, reason):
    content = {key: value for key, value in (values() | change).items() if value is not None}
    good, bad, also_good = reader.references(written(tmp_path, content))
    assert reader.read(good)[1] == "wörd 1" and reader.read(also_good)[1] == "wörd 3"
    with pytest.raises(BadRow, match=reason):
        reader.read(bad)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({b"num-samples": None}, "has no entry 'num-samples'"),
        ({b"num-samples": b"0"}, "num-samples is b'0'"),
        ({b"num-samples": b"-3"}, "num-samples is b'-3'"),
        ({b"num-samples": b"three"}, "num-samples is b'three'"),
        ({b"num-samples": b"9" * 5000}, "num-samples is b'999"),
        ({b"num-samples": b"1000000000000"}, "of 7 entries"),
        ({b"num-samples": pickle.dumps(3)}, "holds pickled values.*num-samples"),
        ({b"image-000000003": pickle.dumps([1, 2], 2)}, "holds pickled values.*image-000000003"),
    ],
    ids=["absent", "zero", "negative", "a word", "5,000 digits", "far too many", "pickled", "a pickled picture"],
)
def test_a_file_of_another_layout_is_refused(tmp_path, change, reason):
    content = {key: value for key, value in (values() | change).items() if value is not None}
    path = written(tmp_path, content)
    with pytest.raises(UserError, match=reason) as caught:
        reader.references(path)
    assert str(path) in caught.value.message and caught.value.hint


def damaged(path, damage):
    data = path / "data.mdb"
    data.write_bytes(damage(bytearray(data.read_bytes())))


def put(offset, layout, *numbers):
    """Damage that writes numbers at an offset within both descriptions of the file."""

    def damage(content):
        for page in (0, PAGE):
            struct.pack_into(layout, content, page + META + offset, *numbers)
        return content

    return damage


def flagged(content):
    """Gives every page that holds data flags of no kind of page (struct MDB_page: number, pad, flags)."""
    for page in range(2 * PAGE, len(content), PAGE):
        struct.pack_into("<H", content, page + 10, 0xFFFF)
    return content


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: b"", "is no LMDB|no such file"),
        (lambda content: b"<!DOCTYPE html>" + bytes(9000), "is no LMDB"),
        (lambda content: content[:100], "is no LMDB"),
        (lambda content: content[: 2 * PAGE], "is truncated"),
        (lambda content: content[:-PAGE], "is truncated"),
        (put(0, "<I", 0), "is no LMDB"),
        (put(4, "<I", 999), "is no LMDB"),
        (put(24, "<I", 0), "is corrupt|is no LMDB|is truncated"),  # bytes of a page
        (put(120, "<Q", 1 << 45), "is truncated|is no LMDB"),  # the last page
        (put(112, "<Q", 5_000), "is corrupt|is no LMDB"),  # the root of the tree
        (flagged, "is corrupt|is no LMDB"),
    ],
    ids=["empty", "a web page", "half a page", "no data", "a page too few", "magic", "version", "page size",
         "last page", "root", "flags"],
)  # fmt: skip
def test_a_broken_file_is_refused_without_a_crash(tmp_path, damage, reason):
    path = written(tmp_path, values())
    damaged(path, damage)
    with pytest.raises(UserError, match=reason) as caught:
        reader.references(path)
    assert str(path) in caught.value.message and caught.value.hint


def test_flipped_bytes_are_refused_or_read(tmp_path):
    path = written(tmp_path, values())
    good, draw = (path / "data.mdb").read_bytes(), random.Random(0)
    for _ in range(8):

        def damage(_):
            content = bytearray(good)
            for _ in range(20):
                content[draw.randrange(len(content))] = draw.randrange(256)
            return content

        damaged(path, damage)
        try:
            listed = list(reader.references(path))
        except UserError as error:
            assert str(path) in error.message and error.hint
        else:
            assert listed


def test_a_huge_map_of_holes_is_refused(tmp_path):
    (tmp_path / "data.mdb").write_bytes(bytes(8192))
    os.truncate(tmp_path / "data.mdb", 1 << 40)
    with pytest.raises(UserError, match="the rest are holes"):
        reader.references(tmp_path)


def test_what_holds_no_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file") as caught:
        reader.references(tmp_path)
    assert "name the folder that holds data.mdb" in caught.value.hint
    (tmp_path / "lock.mdb").write_bytes(bytes(8192))
    with pytest.raises(UserError, match=r"data\.mdb: no such file") as caught:
        reader.references(tmp_path)
    assert "lock.mdb alone holds nothing" in caught.value.hint


def test_an_absent_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    (tmp_path / "data.mdb").write_bytes(bytes(8192))
    with pytest.raises(UserError, match="package lmdb.* is not installed") as caught:
        reader.references(tmp_path)
    assert "pip install -e '.[lmdb]'" in caught.value.hint
