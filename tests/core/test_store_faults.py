"""Stores under faults: a disk that is full or fails, kills, damage after the fact, two at once, workers that die."""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distributed import durable
from distributed.analysis import stores as analysis
from distributed.data import convert, parts, shards
from distributed.data.derive import Wanted, derived
from distributed.data.settings import Data
from distributed.data.store import Store
from distributed.data.write import write
from tasks.errors import UserError
from tasks.task import Example, Label, Picture, Source, Task, Text, Tokens, Vector

ROOT = Path(__file__).parents[2]


class Photos(Task):
    """Thirty-six tiny pictures with a label."""

    fields = {"photo": Picture(channels=1), "label": Label(classes=2)}

    def examples(self, source):
        return [Example(number, split) for split in ("train", "validation", "test") for number in range(12)]

    def row(self, reference):
        return {"photo": np.full((4, 4 + reference % 3), reference, np.uint8), "label": reference % 2}


ROWS = [{"vector": [n, -n], "label": n % 3} for n in range(40)]


# ---- the three ways in which a store comes into being


def prepared(folder: Path) -> Path:
    return convert.prepare(Photos(), "photos", Data(workers=1), folder)


def made_from_another(folder: Path) -> Path:
    return derived(folder / "parent", Wanted(decoded=True, short_side=None), workers=1)


def written(folder: Path) -> Path:
    return write(
        folder / "own", {"vector": Vector(2), "label": Label(classes=3)}, {"train": ROWS, "odd": ROWS[::2]}
    ).path


MAKERS = {"prepared": prepared, "derived": made_from_another, "written": written}
all_makers = pytest.mark.parametrize("maker", MAKERS)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Several parts and shards, although there are few rows."""
    monkeypatch.setattr(parts, "CHUNK", 24)
    monkeypatch.setattr(shards, "SHARD_BYTES", 500)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("parent"))


def room(folder: Path, maker: str, parent: Path) -> Path:
    """An empty folder for stores, or one that holds what a store is to be made from."""
    folder.mkdir(parents=True)
    if maker == "derived":
        shutil.copytree(parent, folder / "parent")
    return folder


def contents(store: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(store.iterdir())}


def published(folder: Path) -> list[Path]:
    found = [path.parent for path in folder.rglob("manifest.json")]
    return [one for one in found if one.name != "parent" and not one.name.startswith(".")]


def litter(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.suffix != ".lock"]


# ---- every operation on the disk fails once, or is the last one


class Faulty(durable.Operations):
    """Acts at the N-th operation, "before" it or when it is half done ("torn"); "ever after" too."""

    def __init__(self, at: int, mode: str) -> None:
        self.left, self.mode = at, mode

    @property
    def fired(self) -> bool:
        return self.left <= 0

    def _fires(self) -> bool:
        self.left -= 1
        return self.left == 0 or (self.left < 0 and self.mode == "ever after")

    def act(self, code: int) -> None:
        raise OSError(code, os.strerror(code))

    def write(self, descriptor, data):
        if self._fires():
            if self.mode == "torn":
                view = memoryview(data).cast("B")
                os.write(descriptor, view[: len(view) // 2])
            self.act(errno.ENOSPC)
        super().write(descriptor, data)

    def sync(self, descriptor):
        if self._fires():
            self.act(errno.EIO)
        super().sync(descriptor)

    def rename(self, source, target):
        if self._fires():
            self.act(errno.EROFS)
        super().rename(source, target)


class Deadly(Faulty):
    def act(self, code):
        os.kill(os.getpid(), signal.SIGKILL)


@all_makers
def test_a_disk_that_fails_anywhere_is_told_of_and_leaves_nothing_half_made(tmp_path, monkeypatch, parent, maker):
    make = MAKERS[maker]
    undisturbed = contents(make(room(tmp_path / "undisturbed", maker, parent)))
    for at, mode in zip(itertools.count(1), itertools.cycle(["before", "torn", "ever after"]), strict=False):
        folder = room(tmp_path / str(at), maker, parent)
        faulty = Faulty(at, mode)
        with monkeypatch.context() as patch:
            patch.setattr(durable, "OPERATIONS", faulty)
            try:
                make(folder)
            except UserError as error:
                assert str(folder) in error.message and "cannot be written: " in error.message
                assert any(os.strerror(code) in error.message for code in (errno.ENOSPC, errno.EIO, errno.EROFS))
                assert "make room" in error.hint
            else:
                assert not faulty.fired, "a failure that nobody was told of"
        assert not litter(folder)
        # The last operation makes the name durable: what is there then is whole.
        assert [contents(one) for one in published(folder)] in ([], [undisturbed])
        assert contents(make(folder)) == undisturbed
        if not faulty.fired:
            break
        shutil.rmtree(folder)
    assert at > 40, "few operations were tried"


@pytest.fixture(scope="module")
def forker():
    """A process without threads, which can be forked at will."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        yield pool


def forked(act) -> int:
    """Starts a process that does this alone; returns its number."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            parts.CHUNK, shards.SHARD_BYTES = 24, 500
            act()
            code = 0
        finally:
            os._exit(code)
    return pid


def killed_everywhere(folder: Path, maker: str, parent: Path) -> int:
    """Makes a store in a process that is killed at its N-th operation, N growing until it is not; returns N."""
    MAKERS[maker](room(folder / "first", maker, parent))  # what is imported here need not be in each process
    for at, mode in zip(itertools.count(1), itertools.cycle(["before", "torn"]), strict=False):
        one = room(folder / str(at), maker, parent)

        def act(at=at, mode=mode, one=one):
            durable.OPERATIONS = Deadly(at, mode)
            MAKERS[maker](one)

        _, status = os.waitpid(forked(act), 0)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    return at


@all_makers
def test_what_kill_9_interrupts_anywhere_is_made_by_the_next_to_the_very_same_bytes(tmp_path, parent, forker, maker):
    make = MAKERS[maker]
    undisturbed = contents(make(room(tmp_path / "undisturbed", maker, parent)))
    last = forker.submit(killed_everywhere, tmp_path, maker, parent).result()
    assert last > 40
    for at in range(1, last + 1):
        folder = tmp_path / str(at)
        assert [contents(one) for one in published(folder)] in ([], [undisturbed])
        visible = {
            path.suffix for path in folder.rglob("*") if path.is_file() and not set(litter(folder)) & {*path.parents}
        }
        assert visible <= {".lock", ".json", ".arrow"}, "only what is hidden is left half-made"
        assert contents(make(folder)) == undisturbed
        assert not litter(folder)


class Noting(durable.Operations):
    """Knows which files have been written and not synced since; looks at all of a folder that gets its name."""

    def __init__(self) -> None:
        self.unsynced: set[int] = set()
        self.synced: set[int] = set()
        self.named: list[Path] = []

    def write(self, descriptor, data):
        super().write(descriptor, data)
        self.unsynced.add(os.fstat(descriptor).st_ino)

    def sync(self, descriptor):
        super().sync(descriptor)
        self.unsynced.discard(os.fstat(descriptor).st_ino)
        self.synced.add(os.fstat(descriptor).st_ino)

    def rename(self, source, target):
        if source.is_dir():
            files = {path.stat().st_ino for path in source.iterdir()}
            assert not files & self.unsynced and files | {source.stat().st_ino} <= self.synced
            self.named.append(target)
        super().rename(source, target)


@all_makers
def test_every_file_of_a_store_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch, parent, maker):
    folder = room(tmp_path / "x", maker, parent)
    noting = Noting()
    monkeypatch.setattr(durable, "OPERATIONS", noting)
    store = MAKERS[maker](folder)
    assert noting.named == [store]
    assert store.parent.stat().st_ino in noting.synced


def test_a_store_that_is_written_again_stays_while_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    before = contents(written(tmp_path))
    for at in itertools.count(1):
        faulty = Faulty(at, "before")
        with monkeypatch.context() as patch:
            patch.setattr(durable, "OPERATIONS", faulty)
            with contextlib.suppress(UserError):
                written(tmp_path)
        assert contents(tmp_path / "own") == before
        assert not litter(tmp_path)
        if not faulty.fired:
            break


def test_what_a_kill_left_is_removed_whatever_the_name_of_the_store(tmp_path):
    left = tmp_path / ".own[1].0123.part"
    left.mkdir()
    write(tmp_path / "own[1]", {"vector": Vector(2)}, {"train": [{"vector": [1, 2]}]})
    assert not litter(tmp_path)


# ---- a disk that is full, as people see it


TASK = """
from tasks.task import Label, Task, Vector
class Own(Task):
    fields = {"vector": Vector(500), "label": Label(classes=2)}
    def examples(self, source): return [{"vector": [i] * 500, "label": i % 2} for i in range(300)]
"""


def test_the_command_says_in_one_message_where_there_is_no_room_and_what_to_do(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(TASK)
    words = ["data", "prepare", f"{file}:Own", "--stores", str(tmp_path / "stores")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "whipray.py"), *words], capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert str(tmp_path / "stores") in said and said.endswith("cannot be written: File too large")
    assert "make room" in done.stderr
    assert not litter(tmp_path) and not published(tmp_path)


@pytest.mark.parametrize("blocked", ["file", "file/below"])
def test_a_folder_for_stores_that_cannot_be_one_is_told_of(tmp_path, blocked):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made: (File exists|Not a directory)"):
        prepared(tmp_path / blocked)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@all_makers
def test_a_folder_that_may_not_be_written_is_told_of(tmp_path, parent, maker):
    folder = room(tmp_path / "locked", maker, parent)
    folder.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        MAKERS[maker](folder)


# ---- damage after the fact


class Words(Task):
    """Rows of all shapes, with several shards of equal size."""

    fields = {"vector": Vector(2), "tokens": Tokens(), "text": Text(), "label": Label(names=("a", "b"))}

    def examples(self, source):
        return [Example(n, split) for split in ("train", "validation", "test") for n in range(24 * 3)]

    def row(self, reference):
        return {"vector": [reference, 0.1], "tokens": [reference, 7], "text": "ab", "label": "ab"[reference % 2]}


@pytest.fixture
def store(tmp_path):
    return prepare_words(tmp_path)


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "CHUNK", 24)
        patch.setattr(shards, "SHARD_BYTES", 600)
        return prepare_words(tmp_path_factory.mktemp("shared"))


def prepare_words(folder: Path) -> Path:
    return convert.prepare(Words(), "words", Data(workers=1), folder)


def shards_of(store: Path) -> list[Path]:
    return sorted(store.glob("train-*.arrow"))


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flip_or_a_cut_anywhere_is_found_when_a_run_starts_and_by_verify(shared_store, data):
    path = data.draw(st.sampled_from(sorted(shared_store.iterdir())), "file")
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1), "place")
    bits = data.draw(st.integers(0, 255), "bits")  # 0: it is cut off there
    flipped = whole[:place] + (bytes([whole[place] ^ bits]) + whole[place + 1 :] if bits else b"")
    path.write_bytes(flipped)
    try:
        if path.suffix == ".json" and _says_the_same(whole, flipped):
            return
        with pytest.raises(UserError) as at_start:
            prepare_words(shared_store.parents[1])
        with pytest.raises(UserError) as by_verify:
            analysis.verify(shared_store)
        assert path.name in at_start.value.message and path.name in by_verify.value.message
        assert f"remove {shared_store}" in at_start.value.hint
        if path.suffix == ".arrow":
            assert f"(rows {24 * int(path.name.split('-')[1])}.." in by_verify.value.message
    finally:
        path.write_bytes(whole)


def _says_the_same(whole: bytes, flipped: bytes) -> bool:
    """Whether a flip fell on a blank, say."""
    try:
        return json.loads(flipped) == json.loads(whole)
    except ValueError:
        return False


def edit(store: Path, change, *, sealed: bool = True) -> None:
    """Edits a manifest; `sealed`, its checksum is made right again, as by somebody who knows how."""
    path = store / "manifest.json"
    manifest = json.loads(path.read_bytes())
    digest = manifest.pop("digest")
    change(manifest)
    path.write_text(json.dumps({**manifest, "digest": durable.digest_of(manifest) if sealed else digest}))


def swap(store: Path) -> None:
    first, second = shards_of(store)[1:]  # as their rows have numbers of as many digits
    first_bytes, second_bytes = first.read_bytes(), second.read_bytes()
    assert len(first_bytes) == len(second_bytes) and first_bytes != second_bytes
    first.write_bytes(second_bytes)
    second.write_bytes(first_bytes)


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def unsealed(change):
    return lambda store: edit(store, change, sealed=False)


DAMAGES = {
    "two shards swapped": (swap, "train-00001-of-00003.arrow: its checksum differs"),
    "a shard deleted": (lambda s: shards_of(s)[1].unlink(), "train-00001-of-00003.arrow: is missing"),
    "a shard that is empty": (lambda s: shards_of(s)[1].write_bytes(b""), "has 0 bytes instead of"),
    "a shard that is a folder": (lambda s: into_folder(shards_of(s)[1]), "train-00001-of-00003.arrow: "),
    "no manifest": (lambda s: (s / "manifest.json").unlink(), "has no manifest.json"),
    "a manifest that is a folder": (lambda s: into_folder(s / "manifest.json"), "manifest.json: cannot be read: Is a dir"),
    "a manifest nested without end": (
        lambda s: (s / "manifest.json").write_text("[" * 100_000), "manifest.json: is broken"),
    "a manifest that is not UTF-8": (lambda s: (s / "manifest.json").write_bytes(b"\xff\xfe{"), "manifest.json: is broken"),
    "other rows in the manifest": (unsealed(lambda m: m["splits"]["train"][0].update(rows=9)), "was changed after"),
    "another field in the manifest": (unsealed(lambda m: m["fields"].update(text="Text(target=True)")), "was changed"),
    "other facts in the manifest": (unsealed(lambda m: m["facts"]["vector"].update(mean=[0, 0])), "was changed after"),
    "another checksum in the manifest": (
        unsealed(lambda m: m["files"]["test-00000-of-00003.arrow"].update(crc32="00000000")), "was changed after"),
    "a newer format": (lambda s: edit(s, lambda m: m.update(format=99)), "is of format 99"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_store_is_found_when_a_run_starts_and_by_verify(store, tmp_path, name):
    damage, words = DAMAGES[name]
    damage(store)
    with pytest.raises(UserError) as at_start:
        prepare_words(tmp_path)
    assert words in at_start.value.message
    assert at_start.value.hint == f"remove {store} and it is prepared again from the raw data"
    with pytest.raises(UserError, match=r"manifest|train-0000[01]-of-00003\.arrow \(rows (0|24)\.\.\d+ of train\): "):
        analysis.verify(store)


def test_every_damaged_shard_is_named_with_its_rows(store):
    swap(store)
    shards_of(store)[0].unlink()
    with pytest.raises(UserError) as raised:
        analysis.verify(store)
    for index, problem in enumerate(["is missing", "its checksum differs", "its checksum differs"]):
        first, last = 24 * index, 24 * index + 23
        assert f"train-{index:05d}-of-00003.arrow (rows {first}..{last} of train): {problem}" in raised.value.message


def test_a_shard_that_nobody_named_is_refused_and_what_a_desktop_leaves_is_not(store, tmp_path):
    (store / ".DS_Store").write_bytes(b"x")
    assert prepare_words(tmp_path) == store
    shutil.copy(shards_of(store)[0], store / "train-00003-of-00004.arrow")
    with pytest.raises(UserError, match=r"train-00003-of-00004.arrow: is not named in the manifest"):
        prepare_words(tmp_path)


@all_makers
def test_a_store_that_is_a_file_is_told_of_or_replaced(tmp_path, parent, maker):
    folder = room(tmp_path / "x", maker, parent)
    store = MAKERS[maker](folder)
    shutil.rmtree(store)
    store.write_text("a file")
    if maker == "written":  # it replaces whatever stood there
        assert Store(MAKERS[maker](folder)).counts() == {"train": 40, "odd": 20}
        return
    with pytest.raises(UserError, match="manifest.json: cannot be read: Not a directory") as raised:
        MAKERS[maker](folder)
    assert f"remove {store}" in raised.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["manifest.json", "train-00001-of-00003.arrow"])
def test_a_file_that_may_not_be_read_is_named(store, tmp_path, name):
    (store / name).chmod(0)
    with pytest.raises(UserError, match=f"{name}: cannot be read: Permission denied"):
        prepare_words(tmp_path)


def test_a_damaged_derived_store_is_named_with_what_to_remove(tmp_path, parent):
    folder = room(tmp_path / "x", "derived", parent)
    store = made_from_another(folder)
    path = next(store.glob("train-*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="bytes instead of") as raised:
        made_from_another(folder)
    assert raised.value.hint == f"remove {store} and it is made again"


# ---- shards that are whole, but not what their manifest says


def arrow(batches: list[pa.RecordBatch]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def with_column(batch: pa.RecordBatch, name: str, values: pa.Array) -> bytes:
    return arrow([batch.set_column(batch.schema.get_field_index(name), pa.field(name, values.type, False), values)])


def tensors(batch: pa.RecordBatch) -> pa.Array:
    kind = pa.fixed_shape_tensor(pa.float32(), (1, 2))
    return pa.ExtensionArray.from_storage(kind, batch.column("vector").storage)


def bad_offsets(batch: pa.RecordBatch) -> bytes:
    offsets = np.arange(25, dtype=np.int64) * 2
    offsets[7] = 1 << 40
    data = pa.py_buffer(b"ab" * 24)
    return with_column(batch, "text", pa.Array.from_buffers(pa.large_string(), 24, [None, pa.py_buffer(offsets), data]))


FOREIGN = {
    "no footer": (lambda b: arrow([b])[:-40], "is damaged"),
    "another file": (lambda b: b"PAR1" * 100, "is damaged"),
    "no batch at all": (lambda b: arrow([b.slice(0, 0)])[:8], "is damaged"),
    "fewer rows": (lambda b: arrow([b.slice(0, 20)]), "holds 20 rows instead of 24"),
    "rows in two batches": (lambda b: arrow([b.slice(0, 20), b.slice(20)]), "holds 20 rows instead of 24"),
    "numbers of another type": (
        lambda b: with_column(b, "label", b.column("label").cast(pa.int32())), "other columns, or others"),
    "numbers of another type and the same size": (
        lambda b: with_column(b, "label", b.column("label").cast(pa.float64())), "other columns, or others"),
    "a dictionary": (lambda b: with_column(b, "text", b.column("text").dictionary_encode()), "other columns, or others"),
    "tensors of another shape": (lambda b: with_column(b, "vector", tensors(b)), "other columns, or others"),
    "another extension": (
        lambda b: with_column(b, "text", pa.array([bytes(16)] * 24, pa.uuid())), "other columns, or others"),
    "columns in another order": (lambda b: arrow([b.select(b.schema.names[::-1])]), "other columns, or others"),
    "a column less": (lambda b: arrow([b.select(b.schema.names[1:])]), "other columns, or others"),
}  # fmt: skip


def replace_sealed(store: Path, make) -> None:
    path = shards_of(store)[1]
    with pa.ipc.open_file(path.read_bytes()) as file:
        data = make(file.get_batch(0))
    path.write_bytes(data)
    entry = {"bytes": len(data), "crc32": durable.checksum(path)}
    edit(store, lambda manifest: manifest["files"].update({path.name: entry}))


@pytest.mark.parametrize("name", FOREIGN)
def test_a_shard_of_other_content_is_refused_even_where_all_checksums_are_right(store, tmp_path, name):
    make, words = FOREIGN[name]
    replace_sealed(store, make)
    with pytest.raises(UserError, match=words) as raised:
        prepare_words(tmp_path)
    assert shards_of(store)[1].name in raised.value.message


def test_verify_finds_offsets_that_point_outside_although_the_checksum_is_right(store):
    replace_sealed(store, bad_offsets)
    with pytest.raises(
        UserError, match=r"train-00001-of-00003\.arrow \(rows 24\.\.47 of train\): is no valid Arrow file"
    ):
        analysis.verify(store)


SEALED = {
    "other rows": (lambda m: m["splits"]["train"][0].update(rows=9), "holds 24 rows instead of 9"),
    "a file from elsewhere": (lambda m: m["splits"]["train"][0].update(file="../x.arrow"), "has no checksum for it"),
    "another field": (lambda m: m["fields"].update(vector="Vector(target=False, length=1)"), "holds 'vector' as"),
    "a field of no kind": (lambda m: m["fields"].update(vector="print(1)"), "a field that is not known"),
    "a field more": (lambda m: m["fields"].update(more="Text()"), "other columns, or others"),
    "a file outside": (lambda m: m["files"].update({"../x": {"bytes": 1, "crc32": ""}}), "outside its folder"),
}


@pytest.mark.parametrize("name", SEALED)
def test_a_manifest_that_was_edited_with_skill_is_refused_where_it_contradicts_its_shards(store, tmp_path, name):
    change, words = SEALED[name]
    edit(store, change)
    with pytest.raises(UserError, match=words):
        prepare_words(tmp_path)


# ---- two at once


def two_at_once(folder: Path, maker: str, parent: Path, kill: bool, at: int) -> None:
    """One process stops at its N-th operation until another one waits for it, and is killed there, or goes on."""
    room(folder, maker, parent)
    stopped, waits = folder.with_suffix(".stopped"), folder.with_suffix(".waits")

    class Stopping(Faulty):
        def act(self, code):
            stopped.touch()
            until(waits.exists)
            if kill:
                signal.pause()  # until it comes: what is left to do takes less time than a signal

        def write(self, descriptor, data):
            if self._fires():
                self.act(0)
            durable.Operations.write(self, descriptor, data)

    def first() -> None:
        durable.OPERATIONS = Stopping(at, "before")
        MAKERS[maker](folder)

    def second() -> None:
        telling = logging.Handler()
        telling.emit = lambda record: waits.touch()
        logging.getLogger("whipray").addHandler(telling)
        MAKERS[maker](folder)

    one = forked(first)
    until(stopped.exists)
    other = forked(second)
    if kill:
        until(waits.exists)
        os.kill(one, signal.SIGKILL)
    ends = [os.waitpid(pid, 0)[1] for pid in (one, other)]
    assert ends == [signal.SIGKILL if kill else 0, 0]


def until(true) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@all_makers
@pytest.mark.parametrize("kill", [False, True], ids=["both live", "one is killed"])
@pytest.mark.parametrize("at", [1, 30])
def test_of_two_at_once_one_waits_and_finishes_what_the_other_did_not(tmp_path, parent, forker, maker, kill, at):
    undisturbed = contents(MAKERS[maker](room(tmp_path / "undisturbed", maker, parent)))
    folder = tmp_path / "both"
    forker.submit(two_at_once, folder, maker, parent, kill, at).result()
    (store,) = published(folder)
    assert contents(store) == undisturbed
    assert not litter(folder)


# ---- processes of a conversion that come to grief


class Troubled(Task):
    """Does something that no reader should, at one of its rows."""

    trouble = staticmethod(lambda: None)
    method = "row"
    source: Source = Source()
    fields = {"text": Text(), "label": Label(classes=2)}

    def examples(self, source):
        return range(2000)

    def row(self, reference):
        if self.method == "row" and reference == 700:
            self.trouble()
        return {"text": "long words " * 300, "label": reference % 2, "number": reference}

    def encode(self, row, facts):
        if row.pop("number") == 700 and self.method == "encode":
            self.trouble()
        return row


def troubled(trouble, method="row") -> Task:
    cls = type("Troubled", (Troubled,), {"trouble": staticmethod(trouble), "method": method, "__module__": __name__})
    return cls()


@pytest.fixture
def eager(monkeypatch):
    """Other processes are asked at once, not only when the work takes long."""
    monkeypatch.setattr(convert, "IN_PROCESSES", 0)


def refused(task: Task, folder: Path, workers: int) -> BaseException:
    before = set(multiprocessing.active_children())
    with pytest.raises((UserError, RuntimeError)) as raised:
        convert.prepare(task, "troubled", Data(workers=workers, split="8:1:1"), folder)
    assert not litter(folder) and not published(folder)
    assert set(multiprocessing.active_children()) <= before
    return raised.value


@pytest.mark.timeout(60)
@pytest.mark.parametrize("method", ["row", "encode"])
def test_a_worker_that_is_killed_is_named_as_such_and_leaves_nothing(tmp_path, eager, method):
    error = refused(troubled(lambda: os.kill(os.getpid(), signal.SIGKILL), method), tmp_path, 2)
    assert isinstance(error, UserError)
    assert error.message == "a process that prepares rows was killed by SIGKILL"
    assert "memory" in error.hint and "data.workers=1" in error.hint


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "call", [lambda: os._exit(3), lambda: os.kill(os.getpid(), signal.SIGXCPU)], ids=["exit", "limit"]
)
def test_a_worker_that_ends_otherwise_is_named_as_such(tmp_path, eager, call):
    error = refused(troubled(call), tmp_path, 2)
    assert isinstance(error, UserError)
    assert error.message.endswith(("ended itself with exit code 3", "was killed by SIGXCPU"))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("code", [0, "no more"])
@pytest.mark.parametrize("method", ["row", "encode"])
def test_a_reader_that_calls_sys_exit_does_not_end_the_command_as_if_all_were_well(
    tmp_path, eager, workers, code, method
):
    error = refused(troubled(lambda: sys.exit(code), method), tmp_path, workers)
    assert isinstance(error, UserError)
    assert error.message == f"in Troubled.{method} of row 701 (700): sys.exit({code!r}) was called"


def test_an_error_that_cannot_be_pickled_keeps_its_words_and_its_row(tmp_path, eager):
    class OwnError(Exception):
        def __init__(self, what, where):
            super().__init__(f"{what} at {where}", lambda: None)

    def trouble():
        raise OwnError("lost", "sea")

    error = refused(troubled(trouble), tmp_path, workers=2)
    assert "OwnError: ('lost at sea'" in str(error)
    assert error.__notes__ == ["in Troubled.row of row 701 (700)"]


def test_a_machine_that_starts_no_more_processes_is_told_of_and_keeps_none(tmp_path, eager, monkeypatch):
    forks = itertools.count(1)

    def fork(real=os.fork):
        if next(forks) == 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return real()

    monkeypatch.setattr(os, "fork", fork)
    error = refused(troubled(lambda: None), tmp_path, workers=3)
    assert isinstance(error, UserError)
    assert error.message == "no more processes can be started: Resource temporarily unavailable"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_reader_may_print_and_start_threads_without_end(tmp_path, eager, workers, capfd):
    end = threading.Event()

    def trouble():
        print("here I am")  # noqa: T201
        threading.Thread(target=end.wait).start()

    before = set(multiprocessing.active_children())
    path = convert.prepare(troubled(trouble), "troubled", Data(workers=workers), tmp_path)
    end.set()
    assert sum(Store(path).counts().values()) == 2000
    assert capfd.readouterr().out.count("here I am") == 1
    assert set(multiprocessing.active_children()) <= before
