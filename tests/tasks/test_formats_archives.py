"""Archives: what is inside comes out once, in its own folder, and nothing comes out anywhere else."""

import bz2
import gzip
import io
import lzma
import os
import random
import stat
import tarfile
import threading
import zipfile

import pytest

from tasks.errors import UserError
from tasks.formats import archives

FILES = {"set/cat/a.png": b"a" * 700, "set/dog/b.png": b"", "set/readme.txt": "é".encode()}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "whipray" / "unpacked"


def entry(name, content=b"", kind=tarfile.REGTYPE, **others):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for key, value in others.items():
        setattr(info, key, value)
    return info, content


def tar_bytes(*entries, **options):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **options) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zip_bytes(*entries, method=zipfile.ZIP_DEFLATED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content, *mode in entries:
            info = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = (mode[0] if mode else 0o644) << 16, method
            archive.writestr(info, content)
    return out.getvalue()


def written(tmp_path, content, name="set.tar"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def found_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


TAR = tar_bytes(entry("./", kind=tarfile.DIRTYPE), *(entry(f"./{name}", content) for name, content in FILES.items()))
ZIP = zip_bytes(("set/", b""), *FILES.items())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("set.tar", TAR),
        ("set.tar.gz", gzip.compress(TAR)),
        ("set.tgz", gzip.compress(TAR)),
        ("set.tar.bz2", bz2.compress(TAR)),
        ("set.tar.xz", lzma.compress(TAR)),
        ("set.zip", ZIP),
        ("SET.ZIP", ZIP),
        ("set.tar.gz", TAR),
    ],
    ids=["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "zip", "ZIP", "unpacked by the browser"],
)
def test_what_was_packed_comes_out(tmp_path, name, content):
    assert found_in(archives.unpacked(written(tmp_path, content, name))) == FILES


def test_a_folder_is_returned_as_it_is(tmp_path):
    assert archives.unpacked(tmp_path) == tmp_path


def test_an_archive_is_unpacked_once_and_again_when_it_has_changed(tmp_path, cache_folder):
    path = written(tmp_path, TAR)
    first = archives.unpacked(path)
    (first / "set" / "readme.txt").write_text("mine")
    assert archives.unpacked(path) == first and (first / "set" / "readme.txt").read_text() == "mine"
    os.utime(path, ns=(0, 0))
    second = archives.unpacked(path)
    assert second != first and found_in(second) == FILES
    assert {p for p in cache_folder.iterdir() if p.is_dir()} == {first, second}


def test_who_comes_second_waits_for_the_first(tmp_path, monkeypatch):
    path, calls, write = written(tmp_path, TAR), [], archives._write
    monkeypatch.setattr(archives, "_write", lambda *arguments: (calls.append(1), write(*arguments)))
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(archives.unpacked(path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1 and len(folders) == 4 and len(calls) == 1


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    path = written(tmp_path, TAR)
    folder = archives.unpacked(path)
    left = folder.rename(folder.with_name(f".{folder.name}"))
    (left / "rubbish").write_text("half a file")
    assert found_in(archives.unpacked(path)) == FILES


def test_an_archive_that_changes_meanwhile_is_refused(tmp_path, monkeypatch):
    path, write = written(tmp_path, TAR), archives._write
    monkeypatch.setattr(archives, "_write", lambda *arguments: (write(*arguments), os.utime(path, ns=(0, 0))))
    with pytest.raises(UserError, match="changed while it was unpacked"):
        archives.unpacked(path)


def test_what_macos_adds_is_left_out(tmp_path):
    extra = [("__MACOSX/set/._a.png", b"x"), ("set/.DS_Store", b"x")]
    assert found_in(archives.unpacked(written(tmp_path, zip_bytes(*FILES.items(), *extra), "a.zip"))) == FILES


def test_rights_are_not_taken_from_the_archive(tmp_path):
    path = written(tmp_path, tar_bytes(entry("a/b", b"x", mode=0o6777), entry("a", kind=tarfile.DIRTYPE, mode=0)))
    folder = archives.unpacked(path)
    assert stat.S_IMODE((folder / "a" / "b").stat().st_mode) & 0o7111 == 0
    assert (folder / "a" / "b").read_bytes() == b"x"


def test_a_link_to_a_file_of_the_archive_becomes_a_copy(tmp_path):
    tar = tar_bytes(
        entry("a/link", kind=tarfile.SYMTYPE, linkname="../b/file"),
        entry("b/file", b"content"),
        entry("c/hard", kind=tarfile.LNKTYPE, linkname="./b/file"),
    )
    packed = zip_bytes(("a/link", b"../b/file", stat.S_IFLNK | 0o777), ("b/file", b"content"))
    for name, content in (("a.tar", tar), ("a.zip", packed)):
        folder = archives.unpacked(written(tmp_path, content, name))
        assert set(found_in(folder).values()) == {b"content"}
        assert not any(path.is_symlink() for path in folder.rglob("*")) and (folder / "a" / "link").exists()


LEADING_OUT = ["/etc/passwd", "../out", "a/../../out", "C:/out", "c:out", "..\\out", "a\\b"]


@pytest.mark.parametrize("name", LEADING_OUT)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_name_that_could_lead_out_is_refused(tmp_path, cache_folder, kind, name):
    content = tar_bytes(entry("good", b"x"), entry(name, b"x")) if kind == "tar" else zip_bytes((name, b"x"))
    path = written(tmp_path, content, f"a.{kind}")
    with pytest.raises(UserError, match="could lead out") as caught:
        archives.unpacked(path)
    assert str(path) in caught.value.message and repr(name) in caught.value.message and caught.value.hint
    assert not any(path.is_dir() for path in cache_folder.iterdir())


def nul_in_a_name():
    return zip_bytes(("a0b", b"x")).replace(b"a0b", b"a\0b")


def encrypted():
    content = bytearray(zip_bytes(("secret", b"x")))
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(signature) + flags] |= 1
    return bytes(content)


LINK = stat.S_IFLNK | 0o777


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tar_bytes(entry("a", kind=tarfile.SYMTYPE, linkname="/etc/passwd")), "'a': is a link to '/etc/passwd'"),
        (tar_bytes(entry("a", kind=tarfile.SYMTYPE, linkname="../x")), r"'a': is a link to '\.\./x'"),
        (tar_bytes(entry("a", kind=tarfile.LNKTYPE, linkname="/etc/passwd")), "is a link to '/etc/passwd'"),
        (tar_bytes(entry("a", kind=tarfile.SYMTYPE, linkname="a")), "is a link to 'a'"),
        (tar_bytes(entry("d/x"), entry("a", kind=tarfile.SYMTYPE, linkname="d")), "is a link to 'd'"),
        (tar_bytes(entry("d", kind=tarfile.SYMTYPE, linkname="/tmp"), entry("d/x")), "'d/x': there is 'd' already"),
        (tar_bytes(entry("a", kind=tarfile.FIFOTYPE)), "'a': is a device, a pipe"),
        (tar_bytes(entry("a", kind=tarfile.CHRTYPE, devmajor=1, devminor=3)), "'a': is a device"),
        (tar_bytes(entry("a", kind=tarfile.BLKTYPE)), "'a': is a device"),
        (tar_bytes(entry("a", kind=b"V")), "of an unknown kind"),
        (tar_bytes(entry("a"), entry("a")), "'a': there is 'a' already"),
        (tar_bytes(entry("a/x"), entry("A/y")), "'A/y': there is 'a/' already"),
        (tar_bytes(entry("a"), entry("a/y")), "'a/y': there is 'a' already"),
        (tar_bytes(entry("a/y"), entry("a")), "'a': there is 'a/' already"),
        (tar_bytes(entry("e\u0301"), entry("\u00e9")), "there is 'e\u0301' already"),
        (tar_bytes(entry(".", b"x")), "without a name"),
        (tar_bytes(entry("n/" * 300_000 + "n", b"x")), "its name has over 4096 characters"),
        (tar_bytes(entry("n" * 300, b"x")), "cannot be unpacked: File name too long"),
        (tar_bytes(), "holds no files"),
        (tar_bytes(entry("a", kind=tarfile.DIRTYPE)), "holds no files"),
        (zip_bytes(("a", b"/etc/passwd", LINK)), "'a': is a link to '/etc/passwd'"),
        (zip_bytes(("a", b"b", LINK), ("b", b"a", LINK)), "'a': is a link to 'b'"),
        (zip_bytes(("a", b"\xff", LINK)), "'a': cannot be unpacked: 'utf-8'"),
        (zip_bytes(("a", b"x", stat.S_IFIFO | 0o644)), "'a': is a device, a pipe"),
        (zip_bytes(("a.png", b"x"), ("A.PNG", b"x")), "there is 'a.png' already"),
        (zip_bytes(("a", b"x"), method=zipfile.ZIP_BZIP2), "packed by method 12"),
        (nul_in_a_name(), r"'a\\x00b': its name could lead out"),
        (encrypted(), "'secret': is encrypted"),
        (zip_bytes(), "holds no files"),
        (b"", "cannot be unpacked"),
        (b"<!DOCTYPE html>", "cannot be unpacked"),
        (b"PK\3\4<!DOCTYPE html>", "cannot be unpacked"),
    ],
)  # fmt: skip
def test_an_archive_that_does_more_than_hold_files_is_refused(tmp_path, cache_folder, content, reason):
    path = written(tmp_path, content, "a.zip" if content.startswith(b"PK") else "a.tar")
    with pytest.raises(UserError, match=reason) as caught:
        archives.unpacked(path)
    assert str(path) in caught.value.message and caught.value.hint
    assert not any(path.is_dir() for path in cache_folder.iterdir())


BLOCKS = {"within a header": 100, "after a header": 512, "within a file": 900, "after a file": 1024 + 512}


@pytest.mark.parametrize("length", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "tar.gz"])
def test_a_truncated_tar_is_refused_wherever_it_ends(tmp_path, pack, length):
    content = tar_bytes(entry("a", b"x" * 700), entry("b", b"y" * 700))[:length]
    with pytest.raises(UserError, match="cannot be unpacked|does not end"):
        archives.unpacked(written(tmp_path, pack(content), "a.tar.gz"))


@pytest.mark.parametrize(
    "content",
    [gzip.compress(TAR)[:-9], gzip.compress(TAR)[:-8] + bytes(8), bz2.compress(TAR)[:-20], lzma.compress(TAR)[:-20],
     ZIP[:-30], ZIP[: len(ZIP) // 2], TAR + b"rubbish", TAR[:512] + b"\xff" * 512 + TAR[1024:]],
    ids=["gzip ends early", "wrong checksum", "bz2 ends early", "xz ends early", "zip ends early", "half a zip",
         "bytes after it", "a broken header"],
)  # fmt: skip
def test_a_broken_archive_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="cannot be unpacked|does not end"):
        archives.unpacked(written(tmp_path, content, "a.tar"))


def test_a_wrong_checksum_in_a_zip_names_the_entry(tmp_path):
    content = zip_bytes(("a.txt", b"plain text"), method=zipfile.ZIP_STORED).replace(b"plain", b"PLAIN")
    with pytest.raises(UserError, match=r"entry 'a.txt': cannot be unpacked: Bad CRC"):
        archives.unpacked(written(tmp_path, content, "a.zip"))


def zip_that_lies():
    """A zip whose header says 10 bytes for what unpacks to a million."""
    content = zip_bytes(("a", bytes(1_000_000)))
    return content.replace((1_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.zip", zip_bytes(("a", bytes(1_000_000))), "'a': the archive unpacks to far more"),
        ("a.zip", zip_that_lies(), "'a': cannot be unpacked: Bad CRC"),
        ("a.tar.gz", gzip.compress(tar_bytes(entry("a", bytes(1_000_000)))), "'a': the archive unpacks to far more"),
        ("a.tar.bz2", bz2.compress(tar_bytes(entry("a", bytes(1_000_000)))), "far more"),
        ("a.tar.xz", lzma.compress(tar_bytes(entry("a", bytes(1_000_000)))), "far more"),
        ("a.zip", zip_bytes(*((f"{i}", bytes(100_000)) for i in range(9))), "far more"),
        ("a.tgz", gzip.compress(tar_bytes(entry("a", bytes(90_000)), *(entry(f"{i}", b"", tarfile.LNKTYPE, linkname="a")
                                                                      for i in range(20)))), "far more"),
    ],
    ids=["zip", "zip with a false size", "tar.gz", "tar.bz2", "tar.xz", "many", "many links"],
)  # fmt: skip
def test_a_bomb_is_stopped_while_it_is_unpacked(tmp_path, monkeypatch, cache_folder, name, content, reason):
    monkeypatch.setattr(archives, "FREE_BYTES", 300_000)
    with pytest.raises(UserError, match=reason):
        archives.unpacked(written(tmp_path, content, name))
    assert not any(path.is_dir() for path in cache_folder.iterdir())


def test_too_many_entries_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_ENTRIES", 5)
    with pytest.raises(UserError, match="over 5 entries"):
        archives.unpacked(written(tmp_path, tar_bytes(*(entry(str(i)) for i in range(6)))))


def test_a_header_that_claims_gigabytes_is_not_read_into_memory(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**33
    with pytest.raises(UserError, match="a header claims 8589934592 bytes"):
        archives.unpacked(written(tmp_path, info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)))


def test_a_negative_size_does_not_go_round_in_circles(tmp_path):
    info = tarfile.TarInfo("a")
    info.size = -512
    with pytest.raises(UserError, match="'a': has -512 bytes"):
        archives.unpacked(written(tmp_path, info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)))


def test_thousands_of_headers_in_one_another_are_refused(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2
    with pytest.raises(UserError, match="cannot be unpacked"):
        archives.unpacked(written(tmp_path, (info.tobuf(tarfile.GNU_FORMAT) + b"a\0".ljust(512, b"\0")) * 3000))


@pytest.mark.parametrize("content", [TAR, gzip.compress(TAR), ZIP], ids=["tar", "tar.gz", "zip"])
def test_an_archive_with_any_byte_changed_is_a_user_error_or_files(tmp_path, cache_folder, content):
    random_numbers = random.Random(0)
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(random_numbers.randint(1, 3)):
            changed[random_numbers.randrange(len(content))] = random_numbers.randrange(256)
        try:
            folder = archives.unpacked(written(tmp_path, changed, "a.zip" if content is ZIP else "a.tar"))
        except UserError as error:
            assert "a.zip" in error.message or "a.tar" in error.message
        else:
            assert folder.parent == cache_folder
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "a.tar", "a.zip"}


@pytest.mark.parametrize(
    ("name", "reason"), [("none.zip", "no such file"), ("set.rar", "neither a folder nor an archive")]
)
def test_what_is_no_archive_is_refused(tmp_path, name, reason):
    written(tmp_path, b"Rar!", "set.rar")
    with pytest.raises(UserError, match=reason):
        archives.unpacked(tmp_path / name)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.zip")
    with pytest.raises(UserError, match="neither a folder nor an archive"):
        archives.unpacked(tmp_path / "a.zip")


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path, cache_folder):
    cache_folder.parent.mkdir(parents=True)
    cache_folder.write_text("a file where a folder should be")
    with pytest.raises(UserError, match="cannot be unpacked") as caught:
        archives.unpacked(written(tmp_path, TAR))
    assert str(cache_folder) in caught.value.hint
