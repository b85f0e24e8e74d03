"""Shards: samples by their offsets, and every tar refused that is not just what it should be."""

import io
import json
import logging
import pickle
import struct
import subprocess
import sys
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import BadRow, UserError
from tasks.formats import webdataset

CATS = {"cat/1.jpg": b"a picture", "cat/1.cls": b"3", "cat/2.jpg": b"another", "cat/2.cls": b"5", "cat/2.seg.png": b""}


def shard(folder, content, name="train-000000.tar", layout=tarfile.PAX_FORMAT):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=layout) as tar:
        for member, data in content.items():
            info = tarfile.TarInfo(member)
            info.size, info.mtime = len(data), 1_700_000_000.25  # a fraction makes a pax header before every member
            tar.addfile(info, io.BytesIO(data))
    return path


def everything(path):
    return {sample.key: webdataset.read(sample) for sample in webdataset.samples(path)}


EXPECTED = {"cat/1": {"jpg": b"a picture", "cls": b"3"}, "cat/2": {"jpg": b"another", "cls": b"5", "seg.png": b""}}


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_what_members_have_in_common_up_to_the_first_dot(tmp_path, layout):
    assert everything(shard(tmp_path, CATS, layout=layout)) == EXPECTED


def test_shards_of_the_package_webdataset_are_read(tmp_path):
    package = pytest.importorskip("webdataset", reason="genuine shards are written with the package webdataset")
    with package.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "a/0", "jpg": b"a picture", "cls": 3, "json": {"a": [1]}, "seg.png": b"x", "txt": "é"})
        writer.write({"__key__": "long" * 60, "cls": 4})
    first, second = webdataset.samples(tmp_path / "a.tar")
    parts = {part: webdataset.decoded(part, content) for part, content in webdataset.read(first).items()}
    assert parts == {"jpg": b"a picture", "cls": 3, "json": {"a": [1]}, "seg.png": b"x", "txt": "é"}
    assert (second.key, webdataset.read(second)) == ("long" * 60, {"cls": b"4"})


def test_shards_of_gnu_tar_are_read(tmp_path):
    for member, data in CATS.items():
        path = tmp_path / ("long" * 40) / member
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    subprocess.check_call(["tar", "-cf", "a.tar", f"./{'long' * 40}"], cwd=tmp_path)
    assert everything(tmp_path / "a.tar") == {f"{'long' * 40}/{key}": parts for key, parts in EXPECTED.items()}


KEYS = st.tuples(st.sampled_from(["", "b/", "b.c/ü/"]), st.text("aé \n'", min_size=1, max_size=150)).map("".join)
PARTS = st.text("aé.", min_size=1, max_size=5)


@given(
    samples=st.dictionaries(KEYS, st.dictionaries(PARTS, st.binary(max_size=600), min_size=1), min_size=1, max_size=4),
    layout=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_every_sample_comes_back_byte_by_byte(tmp_path_factory, samples, layout):
    content = {f"{key}.{part}": data for key, parts in samples.items() for part, data in parts.items()}
    assert everything(shard(tmp_path_factory.mktemp("shards"), content, layout=layout)) == samples


def test_a_sample_can_be_read_in_another_process(tmp_path):
    sample = pickle.loads(pickle.dumps(next(webdataset.samples(shard(tmp_path, CATS)))))
    code = f"from tasks.formats import webdataset as w; print(w.read(w.Sample(*{tuple(sample)!r})))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == str(EXPECTED["cat/1"])


def test_order_does_not_matter_and_case_of_the_ending_neither(tmp_path):
    path = shard(tmp_path, {"1.JPG": b"a", "2.jpg": b"b", "./1.cls": b"0", "2.Cls": b"1"})
    assert everything(path) == {"1": {"jpg": b"a", "cls": b"0"}, "2": {"jpg": b"b", "cls": b"1"}}


def test_hidden_members_are_left_out_and_others_with_a_warning(tmp_path, caplog):
    odd = {".DS_Store": b"", "cat/._1.jpg": b"", "__MACOSX/1.jpg": b"", "__index__.json": b"{}", "README": b""}
    with caplog.at_level(logging.WARNING, "whipray"):
        assert everything(shard(tmp_path, odd | CATS)) == EXPECTED
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "1 members without an ending are left out, such as 'README'"
    ]


@pytest.mark.parametrize(
    ("name", "split"),
    [("train-000000.tar", "train"), ("val/000000.tar", "validation"), ("coco-test-01.tar", "test"), ("a/0.tar", None)],
)
def test_the_split_is_what_the_shard_s_name_says(tmp_path, name, split):
    assert {sample.split for sample in webdataset.samples(shard(tmp_path, CATS, name))} == {split}


def test_shards_are_a_list_a_folder_or_a_pattern(tmp_path):
    paths = [shard(tmp_path, CATS, f"a-{number:03d}.tar") for number in range(8, 12)]
    assert webdataset.shards(tmp_path) == paths
    assert webdataset.shards(f"{tmp_path}/a-{{008..011}}.tar") == paths
    assert webdataset.shards(tmp_path / "a-0{08..09}.tar") == paths[:2]
    assert webdataset.shards(f"{tmp_path}/a-{{0..0}}{{1..1}}{{0..1}}.tar") == paths[2:]
    assert webdataset.shards([paths[1], str(paths[0]), f"{tmp_path}/a-{{008..009}}.tar"]) == [paths[1], paths[0]]
    assert len(list(webdataset.samples(tmp_path))) == 8


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("none.tar", "none.tar: no such file"),
        ("a-{000000..000001}.tar", "a-000001.tar: no such file"),
        ("a-{000009..000001}.tar", "holds no .tar files"),
        ("a-{0..999999}{0..999999}.tar", "stands for over 100000 shards"),
        ("empty", "holds no .tar files"),
        ("packed", "b.tar.gz: is compressed as a whole"),
        ("packed/b.tar.gz", "b.tar.gz: is compressed as a whole"),
        ("pipe:cat a-000000.tar", "no such file"),
    ],
)
def test_shards_that_are_not_there_are_refused(tmp_path, pattern, reason):
    shard(tmp_path, CATS, "a-000000.tar")
    (tmp_path / "empty").mkdir()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/b.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match=reason) as caught:
        webdataset.shards(tmp_path / pattern)
    assert caught.value.hint


def changed(tmp_path, change):
    path = shard(tmp_path, CATS, layout=tarfile.USTAR_FORMAT)
    path.write_bytes(change(bytearray(path.read_bytes())))
    return path


def header(**fields):
    """Damage that puts one header in front, with a checksum that is right."""

    def change(content):
        info = tarfile.TarInfo("0.jpg")
        for name, value in fields.items():
            setattr(info, name, value)
        return info.tobuf(tarfile.GNU_FORMAT) + content

    return change


def negative(content):
    """A size below zero, which tar can write in base 256 (CVE-2025-8194)."""
    content[124:136] = b"\xff" * 4 + struct.pack(">q", -1024)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    return content


def pax(record, kind=tarfile.XHDTYPE):
    def change(content):
        info = tarfile.TarInfo("pax")
        info.type, info.size = kind, len(record)
        return info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + content

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: b"", "is truncated"),
        (lambda content: b"<!DOCTYPE html>".ljust(1024), "is no tar file"),
        (lambda content: content[:700], r"is truncated within 'cat/1\.jpg'"),
        (lambda content: content[:1024], "is truncated: it ends at byte 1024 without an end mark"),
        (lambda content: content[:1300], "is truncated"),
        (lambda content: content[:1024] + b"?" + content[1025:], "broken at byte 1024"),
        (lambda content: content + content, "has bytes after its end"),
        (lambda content: bytes(10240), "holds no samples"),
        (negative, "has -1024 bytes"),
        (header(size=(1 << 30) + 512), "is truncated within"),
        (header(size=1 << 60), "is truncated within"),
        (header(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "of type b'2'"),
        (header(type=tarfile.LNKTYPE, linkname="/etc/passwd"), "of type b'1'"),
        (header(type=tarfile.CHRTYPE), "of type b'3'"),
        (header(type=tarfile.FIFOTYPE), "of type b'6'"),
        (header(type=tarfile.GNUTYPE_SPARSE), "of type b'S'"),
        (header(name="cat/1.JPG"), r"holds 'cat/1\.jpg' twice"),
        (header(name="cat/1.pyd"), r"'cat/1\.pyd' is a pickle"),
        (header(name="cat/1.meta.PKL"), r"'cat/1\.meta\.PKL' is a pickle"),
        (pax(b"22 GNU.sparse.major=1\n"), "has a pax header 'GNU.sparse.major'"),
        (pax(b"12 size=-12\n"), "has -12 bytes"),
        (pax(b"14 size=1e400\n"), "has 1e400 bytes"),
        (pax(b"99 path=x\n"), "has a broken pax header"),
        (pax(b"0 path=x\n"), "has a broken pax header"),
        (pax(b"path=x\n"), "has a broken pax header"),
        (pax(b"9" * 400), "has a broken pax header"),
        (pax(b"12 path=x.a\n", tarfile.XGLTYPE), "has a pax header 'path'"),
        (header(type=tarfile.XHDTYPE, size=2 << 20), "is truncated within"),
    ],
    ids=["empty", "a web page", "within a member", "between members", "within a header", "a broken header",
         "put together with cat", "no members", "negative size", "large size", "huge size", "symbolic link", "hard link",
         "device", "fifo", "sparse", "twice", "pickle", "pickle in capitals", "pax sparse", "pax negative",
         "pax no number", "pax too long", "pax zero", "pax no length", "pax digits", "pax global", "long pax"],
)  # fmt: skip
def test_a_tar_that_is_not_just_files_is_refused(tmp_path, change, reason):
    path = changed(tmp_path, change)
    with pytest.raises(UserError, match=reason) as caught:
        list(webdataset.samples(path))
    assert str(path) in caught.value.message and caught.value.hint


def test_what_is_too_large_is_refused(tmp_path, monkeypatch):
    path = shard(tmp_path, {"1.jpg": bytes(3000)})
    monkeypatch.setattr(webdataset, "MAX_BYTES", 2000)
    with pytest.raises(UserError, match=r"'1\.jpg' has 3000 bytes, at most 2000"):
        list(webdataset.samples(path))
    monkeypatch.setattr(webdataset, "MAX_HEADER", 10)
    with pytest.raises(UserError, match="has a header of"):
        list(webdataset.samples(path))


def test_many_headers_of_one_member_are_followed_without_recursion(tmp_path):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 0
    assert everything(changed(tmp_path, lambda content: info.tobuf(tarfile.GNU_FORMAT) * 5000 + content)) == EXPECTED


@given(st.lists(st.tuples(st.integers(0, 7000), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_mutated_shard_is_refused_or_read(tmp_path_factory, flips):
    path = shard(tmp_path_factory.mktemp("shards"), CATS)
    content = bytearray(path.read_bytes())
    for position, value in flips:
        content[position] = value
    path.write_bytes(content)
    try:
        everything(path)
    except UserError as error:
        assert str(path) in error.message and error.hint


def test_a_shard_that_shrinks_is_noticed(tmp_path):
    path = shard(tmp_path, {"1.jpg": bytes(30_000)})
    [sample] = webdataset.samples(path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match="has become shorter"):
        webdataset.read(sample)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        webdataset.read(sample)


def test_only_what_is_needed_is_read_and_must_be_there(tmp_path):
    first, second = webdataset.samples(shard(tmp_path, {"1.png": b"a", "1.cls": b"3", "1.txt": b"x", "2.jpeg": b"b"}))
    assert webdataset.read(first, ["jpg;png", "cls"]) == {"jpg;png": b"a", "cls": b"3"}
    with pytest.raises(BadRow, match=r"sample '2' has no jpg or png, only jpeg"):
        webdataset.read(second, ["jpg;png"])
    with pytest.raises(BadRow, match=r"sample '2' has no cls, only jpeg"):
        webdataset.read(second, ["jpeg", "cls"])


@pytest.mark.parametrize(
    ("part", "content", "value"),
    [
        ("cls", b"3", 3), ("cls", b" -3\n", -3), ("index", b"007", 7), ("txt", "é\n".encode(), "é\n"),
        ("caption.txt", b"x", "x"), ("json", b'{"a": [1, null]}', {"a": [1, None]}), ("jpg", b"\xff", b"\xff"),
        ("npy", b"\x93", b"\x93"),
    ],
)  # fmt: skip
def test_a_part_is_decoded_as_its_name_says(part, content, value):
    assert webdataset.decoded(part, content) == value


@pytest.mark.parametrize(
    ("part", "content", "reason"),
    [
        ("cls", b"", "cls is no whole number"),
        ("cls", b"3.5", "cls is no whole number: '3.5'"),
        ("cls", b"1_000", "cls is no whole number"),
        ("cls", "３".encode(), "cls is no whole number"),
        ("cls", b"9" * 5000, "cls is no whole number"),
        ("cls", b"\xff", "cls is not UTF-8: byte 0xff"),
        ("txt", b"\xff", "txt is not UTF-8"),
        ("json", b"{", "json is no JSON"),
        ("json", b"NaN", "NaN is no JSON"),
        ("json", b'{"a": 1, "a": 2}', "a key stands twice"),
        ("json", b"[" * 100_000, "is no JSON that can be read"),
        ("json", b"9" * 5000, "is no JSON that can be read"),
        ("a.json", json.dumps("x").encode("utf-16"), "a.json is not UTF-8"),
    ],
    ids=["empty", "fraction", "underscore", "other digits", "many digits", "binary", "text", "truncated", "NaN",
         "a key twice", "deep", "5,000 digits", "UTF-16"],
)  # fmt: skip
def test_a_part_that_is_not_what_its_name_says_is_a_bad_row(part, content, reason):
    with pytest.raises(BadRow, match=reason):
        webdataset.decoded(part, content)
