"""Conversion by several processes: the same shards, in bounded memory, and a kill loses no row that was read."""

import hashlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from distributed.data import convert, packed, parts, shards
from distributed.data.settings import Data
from distributed.data.store import Store
from tasks.errors import UserError
from tasks.task import BadRow, Example, Label, Source, Task, Text, Tokens, Vector


class Words(Task):
    """Two thousand rows with an encode of its own; each row that is read leaves a line in a file."""

    fields = {"vector": Vector(2), "tokens": Tokens(), "text": Text(), "label": Label()}
    rows = 2000

    def examples(self, source: Source):
        return (Example(i, group=str(i % 37)) for i in range(self.rows))

    def row(self, reference):
        if self.source.path:
            with Path(self.source.path).open("a") as file:
                file.write(f"{reference} {os.getpid()}\n")
        if reference % 500 == 7:
            raise BadRow("is torn")
        words = [f"w{reference % m}" for m in range(2, 2 + reference % 9)]
        return {
            "vector": [reference, -reference],
            "words": words,
            "text": "é" * (reference % 5),
            "label": f"c{reference % 3}",
        }

    def files(self):
        return []

    def facts(self, rows):
        known = sorted({word for row in rows for word in row["words"]})
        return {"tokens": {"words": known}, "label": self.fields["label"].facts(row["label"] for row in rows)}

    def encode(self, row, facts):
        known = facts["tokens"]["words"]
        numbers = [known.index(word) + 1 if word in known else 0 for word in row.pop("words")]
        return {**row, "tokens": numbers}


@pytest.fixture
def eager(monkeypatch):
    """Other processes are asked at once, not only when the work takes long."""
    monkeypatch.setattr(convert, "IN_PROCESSES", 0)


def digests(store: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(store.iterdir())}


def test_the_shards_are_the_same_however_many_processes_make_them(tmp_path, eager, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    stores = {n: convert.prepare(Words(), "x", Data(workers=n), tmp_path / str(n)) for n in (1, 2, 3)}
    assert len(list(stores[1].glob("train-*"))) > 1
    assert digests(stores[1]) == digests(stores[2]) == digests(stores[3])


def test_several_processes_read_each_row_once(tmp_path, eager):
    log = tmp_path / "log"
    store = convert.prepare(Words(source=Source(path=str(log))), "x", Data(workers=2), tmp_path)
    lines = [line.split() for line in log.read_text().splitlines()]
    assert sorted(int(row) for row, _ in lines) == list(range(Words.rows))
    assert len({process for _, process in lines} - {str(os.getpid())}) == 2
    assert Store(store).manifest["skipped"]["rows"] == 4
    assert not list(tmp_path.glob("x/.*.work")), "what was set down on the way is gone"


def test_a_row_says_where_it_came_from(tmp_path):
    store = Store(convert.prepare(Words(), "x", Data(), tmp_path))
    seen = {
        source: vector[0]
        for split in ("train", "validation", "test")
        for source, vector in zip(store.sources(split), store.rows(split).dense("vector").tolist(), strict=True)
    }
    assert len(seen) == Words.rows - 4
    assert seen["row 12 (11)"] == 11


def test_a_broken_row_or_an_error_in_another_process_is_named_as_if_it_were_here(tmp_path, eager):
    with pytest.raises(UserError, match=r"row 8 \(7\): is torn"):
        convert.prepare(Words(), "x", Data(workers=2), tmp_path, on_error="stop")

    class Failing(Words):
        def row(self, reference):
            return super().row(reference) if 1 / (reference - 600) else {}

    with pytest.raises(ZeroDivisionError) as raised:
        convert.prepare(Failing(), "x", Data(workers=2), tmp_path)
    assert raised.value.__notes__ == ["in Failing.row of row 601 (600)"]
    assert not list(tmp_path.glob("x/.*")), "nothing is left of a failed preparation"


class Slow(Words):
    def row(self, reference):
        if reference >= 1000:
            time.sleep(0.003)
        return super().row(reference)


def _prepare(log: Path, folder: Path, workers: int) -> None:
    convert.IN_PROCESSES = 0
    os.setpgrp()
    convert.prepare(Slow(source=Source(path=str(log))), "x", Data(workers=workers), folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_kill_9_interrupts_goes_on_where_it_was(tmp_path, workers):
    log = tmp_path / "log"
    process = multiprocessing.get_context("forkserver").Process(target=_prepare, args=(log, tmp_path, workers))
    process.start()
    while len(list(tmp_path.glob("x/.*.work/*.part"))) < 3:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    process.close()
    assert not list(tmp_path.glob("x/*/manifest.json")), "nothing partial is visible"
    before = len(list(tmp_path.glob("x/.*.work/*.part")))
    torn = next(tmp_path.glob("x/.*.work/*.part"))
    torn.write_bytes(torn.read_bytes()[:-1])  # and one part is damaged, which is read again
    time.sleep(0.1)
    log.write_text("")
    store = convert.prepare(Words(source=Source(path=str(log))), "x", Data(), tmp_path / "other")
    log.write_text("")
    again = convert.prepare(Slow(source=Source(path=str(log))), "x", Data(), tmp_path)
    read = len(log.read_text().splitlines())
    assert read == Words.rows - (before - 1) * parts.CHUNK
    assert {k: v for k, v in digests(again).items() if k != "manifest.json"} == {
        k: v for k, v in digests(store).items() if k != "manifest.json"
    }


def test_the_processes_of_a_killed_preparation_go_with_it(tmp_path):
    log = tmp_path / "log"
    process = multiprocessing.get_context("forkserver").Process(target=_prepare, args=(log, tmp_path, 2))
    process.start()
    while not log.exists() or len({line.split()[1] for line in log.read_text().splitlines()}) < 2:
        time.sleep(0.01)
    others = {int(line.split()[1]) for line in log.read_text().splitlines()} - {process.pid}
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    process.close()
    deadline = time.monotonic() + 10
    while any(
        Path(f"/proc/{one}/stat").exists() and " Z " not in Path(f"/proc/{one}/stat").read_text() for one in others
    ):
        assert time.monotonic() < deadline, "an orphan goes on reading"
        time.sleep(0.02)


def test_an_open_file_of_a_reader_is_never_shared_by_processes(tmp_path, eager):
    """The processes are forked before any row is read: an open file would be shared, with its place in it."""
    raw = tmp_path / "raw"
    raw.write_bytes(b"".join(f"{i:07d}\n".encode() for i in range(4000)))
    handles = {}

    class Seeking(Task):
        fields = {"vector": Vector(1), "label": Label(classes=2)}

        def examples(self, source: Source):
            return range(4000)

        def row(self, reference):
            file = handles.setdefault("file", None) or handles.setdefault(os.getpid(), raw.open("rb", buffering=0))
            handles["file"] = file
            file.seek(8 * reference)
            time.sleep(0.00005)
            return {"vector": [int(file.read(7))], "label": 0}

    store = Store(convert.prepare(Seeking(), "x", Data(workers=2), tmp_path))
    for name in ("train", "validation", "test"):
        numbers = [int(source.split("(")[1][:-1]) for source in store.sources(name)]
        assert store.rows(name).dense("vector")[:, 0].tolist() == numbers
    assert not handles, "no row was read in this process"


class Far:
    """A mapper whose work is done where our disk is not."""

    same_disk = False

    def over(self, function, fixed, items):
        return (function(*fixed, item) for item in items)


def test_what_a_cluster_has_read_is_not_read_again_either(tmp_path):
    def stop(stage: str, done: int, total: int) -> None:
        if done >= 3 * parts.CHUNK:
            raise KeyboardInterrupt

    log = tmp_path / "log"
    task = Words(source=Source(path=str(log)))
    with pytest.raises(KeyboardInterrupt):
        convert.prepare(task, "x", Data(), tmp_path, mapper=Far(), progress=stop)
    log.write_text("")
    store = convert.prepare(task, "x", Data(), tmp_path, mapper=Far())
    assert len(log.read_text().splitlines()) == Words.rows - 3 * parts.CHUNK
    assert digests(store) == digests(convert.prepare(task, "x", Data(workers=1), tmp_path / "near"))


def test_what_is_listed_in_another_order_after_a_kill_is_read_again(tmp_path, monkeypatch):
    class Listed(Words):
        order = 1

        def examples(self, source: Source):
            return list(range(self.rows))[:: self.order]

    # As if it had been killed when all was read: the scratch folder is there, the store is not.
    monkeypatch.setattr(convert.shutil, "rmtree", lambda *given, **more: None)
    monkeypatch.setattr(convert, "_plain", lambda facts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert.prepare(Listed(), "x", Data(), tmp_path)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("x/.*.work/*.part"))) == 8
    monkeypatch.setattr(Listed, "order", -1)
    store = Store(convert.prepare(Listed(), "x", Data(), tmp_path))
    sources = [source for name in ("train", "validation", "test") for source in store.sources(name)]
    assert len(sources) == len({source.split("(")[1] for source in sources}) == Words.rows - 4


class Lengthy(Words):
    def row(self, reference):
        if reference > 600:
            time.sleep(0.2)  # a portion takes most of a minute
        return super().row(reference)


def test_a_preparation_that_is_given_up_does_not_wait_for_the_portions_under_way(tmp_path, eager):
    def enough(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    log = tmp_path / "log"
    with pytest.raises(KeyboardInterrupt):
        convert.prepare(Lengthy(source=Source(path=str(log))), "x", Data(workers=2), tmp_path, progress=enough)
    assert len(log.read_text().splitlines()) < 900, "four portions were asked for"
    assert list(tmp_path.glob("x/.*.work/*.part")), "what was read is there when it goes on"


def test_large_rows_are_never_held_together(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "BATCH_BYTES", 100_000)
    seen = []
    encode = convert.encode_chunk
    monkeypatch.setattr(convert, "encode_chunk", lambda *given: seen.append(len(given[-1][2])) or encode(*given))

    class Large(Words):
        rows = 300
        fields = {"vector": Vector(5000), "label": Label(classes=2)}

        def row(self, reference):
            return {"vector": np.full(5000, reference, np.float32), "label": 0}

        def encode(self, row, facts):
            return row

        def facts(self, rows):
            return {}

    store = Store(convert.prepare(Large(), "x", Data(workers=1), tmp_path))
    assert max(seen) <= 6 and sum(seen) == 300
    assert store.rows("train").dense("vector").shape == (store.counts()["train"], 5000)


def test_a_source_that_is_mostly_broken_is_refused_before_all_of_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "HOPELESS_ROWS", 500)
    read = []

    class Hopeless(Words):
        rows = 100_000

        def row(self, reference):
            read.append(reference)
            raise BadRow("is torn")

    with pytest.raises(UserError, match=r"512 of 512 rows are broken; the first: row 1 \(0\)"):
        convert.prepare(Hopeless(), "x", Data(workers=1), tmp_path)
    assert len(read) == 512


# ---- rows on their way


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
    | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES))
def test_a_parsed_row_is_unpacked_as_it_was_packed(row):
    assert packed.unpack(packed.pack(row)) == row


@given(arrays.arrays(st.sampled_from(["u1", "i4", "f4", "f8", "?"]), arrays.array_shapes(min_dims=0, min_side=0)))
def test_arrays_keep_shape_and_type(array):
    back = packed.unpack(packed.pack({"a": [array, {"b": array}]}))["a"]
    for one in (back[0], back[1]["b"]):
        assert np.asarray(one).dtype == array.dtype
        assert np.array_equal(one, array, equal_nan=array.dtype.kind == "f")


def test_what_is_no_data_is_not_packed():
    with pytest.raises(UserError, match="column 'when' holds a object"):
        packed.pack({"when": [object()]})
