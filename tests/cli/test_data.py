"""`whipray data`: prepared, looked at, and found out when damaged."""

import base64
import io
import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from distributed import durable
from distributed.data import write
from tasks.fields import Label, Text

ROWS = 1797  # of the bundled digits


@pytest.fixture
def store(whipray, tmp_path) -> Path:
    """A store of its own, to be damaged."""
    return Path(whipray("data", "prepare", "digits", "--stores", tmp_path / "stores", "--json").json["store"])


def _seal(store: Path, manifest: dict) -> None:
    """Writes a manifest as if the store had been published so."""
    manifest.pop("digest")
    durable.write_json(store / "manifest.json", {**manifest, "digest": durable.digest_of(manifest)})


def test_data_are_prepared_once(whipray, tmp_path):
    first = whipray("data", "prepare", "digits", "--stores", "stores", "--json").json
    assert sum(first["rows"].values()) == ROWS and first["skipped"] == 0 and first["bytes"] > 100_000
    before = (Path(first["store"]) / "manifest.json").stat().st_mtime_ns
    assert whipray("data", "prepare", "digits", "--stores", "stores", "--json").json["store"] == first["store"]
    assert (Path(first["store"]) / "manifest.json").stat().st_mtime_ns == before
    assert "next: whipray data show" in whipray("data", "prepare", "digits", "--stores", "stores").out


def test_a_store_is_shown_by_path_and_by_task(whipray, store):
    told = whipray("data", "show", store, "--json").json
    assert told == whipray("data", "show", "digits", "--stores", store.parents[1], "--json").json
    assert set(told["fields"]) == {"image", "label"}
    assert {name: split["rows"] for name, split in told["splits"].items()} == {
        "train": sum(told["facts"]["label"]["counts"]), "validation": 185, "test": 159
    }  # fmt: skip
    balance = told["splits"]["train"]["classes"]["label"]
    assert list(balance.values()) == told["facts"]["label"]["counts"]
    assert told["skipped"]["rows"] == 0 and len(told["samples"]) == 3
    assert told["samples"][0]["image"].startswith("uint8 1x8x8: 0..")


def test_words_and_long_facts_are_shown_in_short(whipray, tmp_path):
    words = ("reviews", "task.source.rows=200", "--stores", tmp_path / "stores")
    assert whipray("data", "prepare", *words).code == 0
    told = whipray("data", "show", *words, "--json").json
    assert "entries, such as" in told["facts"]["tokens"]["vocabulary"]
    assert "values: " in told["samples"][0]["tokens"] and told["samples"][0]["label"] in ("negative", "positive")


def test_skipped_rows_are_shown_with_their_reasons(whipray, tmp_path):
    header = "a,b,y\n"
    lines = [f"{number},{number % 7},{number % 5}\n" for number in range(200)]
    lines[100] = "1,nan,2\n"
    (tmp_path / "table.csv").write_text(header + "".join(lines))
    words = ("housing", "task.source.path=table.csv", "task.source.target=y", "task.source.columns=2", "--stores", "s")
    assert whipray("data", "prepare", *words, "--json").json["skipped"] == 1
    out = whipray("data", "show", *words).out
    assert "1 rows set aside" in out and "line 102" in out


def test_a_whole_store_is_verified(whipray, store):
    told = whipray("data", "verify", store, "--json").json
    assert (told["store"], told["shards"], told["rows"]) == (str(store), 3, ROWS)
    assert "whole" in whipray("data", "verify", "digits", "--stores", store.parents[1]).out


def _shard(store: Path, split: str) -> Path:
    return next(store.glob(f"{split}-*.arrow"))


def test_a_truncated_shard_is_named_with_its_rows(refused, store):
    shard = _shard(store, "validation")
    shard.write_bytes(shard.read_bytes()[:-100])
    said = refused("data", "verify", store)
    assert f"{shard.name} (rows 0..184 of validation)" in said and "bytes instead of" in said
    assert "1 of 3 shards" in said and f"remove {store}" in said


def test_every_damaged_shard_is_named(refused, store):
    flipped = bytearray(_shard(store, "train").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    _shard(store, "train").write_bytes(flipped)
    gone = _shard(store, "test")
    gone.unlink()
    said = refused("data", "verify", store)
    assert "train-00000-of-00001.arrow (rows 0..1452 of train): its checksum differs" in said
    assert f"{gone.name} (rows 0..158 of test): is missing" in said


def test_a_shard_that_is_no_arrow_is_found_though_its_checksum_is_right(refused, store):
    shard, manifest = _shard(store, "test"), json.loads((store / "manifest.json").read_bytes())
    shard.write_bytes(b"not arrow")
    manifest["files"][shard.name] = {"bytes": 9, "crc32": durable.checksum(shard)}
    _seal(store, manifest)
    assert "is no valid Arrow file" in refused("data", "verify", store)


def test_text_that_is_not_utf8_is_found_though_its_checksum_is_right(refused, store):
    shard, manifest = _shard(store, "test"), json.loads((store / "manifest.json").read_bytes())
    broken = pa.LargeStringArray.from_buffers(1, pa.py_buffer(b"\0" * 8 + b"\1" + b"\0" * 7), pa.py_buffer(b"\xff"))
    batch = pa.record_batch([broken], names=["text"])
    with pa.OSFile(str(shard), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    manifest["files"][shard.name] = {"bytes": shard.stat().st_size, "crc32": durable.checksum(shard)}
    _seal(store, manifest)
    assert "UTF8" in refused("data", "verify", store)


def test_training_names_a_truncated_shard_and_what_to_do(refused, store):
    shard = _shard(store, "train")
    shard.write_bytes(shard.read_bytes()[:-100])
    said = refused("train", "digits", "--stores", store.parents[1])
    assert shard.name in said and f"remove {store}" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("verify", "digits"), "whipray data prepare digits"),
        (("show", "housing", "data.split_seed=1"), "whipray data prepare housing data.split_seed=1"),
        (("verify", "hosing"), "did you mean 'housing'?"),
        (("show", "."), "is no store"),
        (("show", "digits", "data.splt=8:2"), "did you mean 'data.split'?"),
        (("prepare", "digits", "--on-error", "skp"), "'skp' is not one of"),
        (("prepare", "digits", "task.source.path=nowhere"), "nowhere: no such file or folder"),
        (("prepare", "digits", "data.split=8"), "two or three shares"),
        (("prepare", "mnist", "task.source.path=nowhere"), "nowhere: no such folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(refused, words, said):
    assert said in refused("data", *words, "--stores", "stores")


def test_settings_beside_the_folder_of_a_store_are_refused(refused, store):
    assert "settings do not change it" in refused("data", "show", store, "data.limit=3")


# ---- doubts and the contact sheet


OBJECTS = """
import numpy as np
from torch import nn
from tasks.task import Boxes, Example, Label, Labels, ObjectMasks, Picture, Task, Text

NASTY = '<script src="https://example.com/x.js">alert(1)</script>'


class Objects(Task):
    fields = {
        "picture": Picture(), "note": Text(), "kind": Label(names=(NASTY, "b")), "boxes": Boxes(), "objects": Labels(),
        "masks": ObjectMasks(),
    }

    def examples(self, source):
        splits = ["train"] * 60 + ["validation"] * 40 + ["test"] * 40
        return [Example(number, split) for number, split in enumerate(splits)]

    def row(self, number):
        pixels = np.random.default_rng(number).integers(0, 256, (40 if number % 2 else 300, 50, 3), np.uint8)
        mask = np.zeros((1, *pixels.shape[:2]), np.uint8)
        mask[:, 10:20, 10:20] = 1
        box = (5, 5, 90, 20) if number == 7 else (5, 5, 40, 20)
        note = f"{NASTY} & number {number} " + "x" * number
        return {"picture": pixels, "note": note, "kind": number % 2, "boxes": [box], "objects": [0], "masks": mask}

    def facts(self, rows):
        return {**super().facts(rows), "objects": {"classes": [NASTY]}}

    def build(self, facts, load):
        return nn.Identity()
"""


class _Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.policy = self.text = ""
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        told = dict(attrs)
        self.addresses += [told[name] for name in ("src", "href", "xlink:href", "action", "data") if name in told]
        self.anchors.add(told.get("id", ""))
        if told.get("http-equiv") == "Content-Security-Policy":
            self.policy = told["content"]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def sheet(whipray, tmp_path, stores) -> _Page:
    (tmp_path / "objects.py").write_text(OBJECTS)
    words = ("objects.py:Objects", "--stores", stores)
    assert whipray("data", "prepare", *words).code == 0
    answer = whipray("data", "show", *words, "--html", "sheet.html")
    assert answer.code == 0 and "sheet.html: a contact sheet of " in answer.out
    return _Page((tmp_path / "sheet.html").read_text())


def test_a_contact_sheet_loads_nothing_and_runs_nothing(sheet):
    assert sheet.policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(sheet.tags)
    assert not [name for name, _ in sheet.attributes if name.startswith("on")]
    assert all(
        address.startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#")) for address in sheet.addresses
    )
    assert "url(" not in sheet.text and "@import" not in sheet.text


def test_names_from_the_data_are_shown_as_they_are_and_never_obeyed(sheet):
    assert '<script src="https://example.com/x.js">alert(1)</script> & number 7' in sheet.text


def test_a_contact_sheet_shows_a_few_rows_of_every_class_and_the_doubtful_ones(sheet):
    assert sheet.tags["figure"] == sheet.tags["img"] and 20 < sheet.tags["img"] <= 120
    assert sheet.tags["rect"] == sheet.tags["figure"]  # one box each
    assert (
        "1 of 60 boxes reach outside their pictures; the first: row 7, 5 5 90 20 in a picture of 50 x 40" in sheet.text
    )
    assert "train-7" in sheet.anchors and "#train-7" in sheet.addresses
    assert {address[1:] for address in sheet.addresses if address.startswith("#")} <= sheet.anchors
    assert "bar" in [value for name, value in sheet.attributes if name == "class"]


def test_pictures_on_a_contact_sheet_are_small_and_masks_tint_them(sheet):
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(one.partition(",")[2]))))
        for one in sheet.addresses if one.startswith("data:")
    ]  # fmt: skip
    assert all(max(pixels.shape) <= 208 for pixels in pictures)
    stored = np.random.default_rng(7).integers(0, 256, (40, 50, 3), np.uint8)  # the doubtful row stands first
    shown = pictures[0][::2, ::2].astype(int)  # enlarged twofold
    assert np.array_equal(shown[20:], stored[20:])
    assert (
        np.abs(shown[10:20, 10:20] - (0.55 * stored[10:20, 10:20] + 0.45 * np.array([0xE6, 0x19, 0x4B]))).max() < 0.51
    )


def test_doubts_are_told_in_words_and_as_json(whipray, stores, sheet):
    words = ("data", "show", "objects.py:Objects", "--stores", stores)
    told = whipray(*words, "--json").json
    doubt = next(one for one in told["doubts"] if one["kind"] == "boxes")
    assert (doubt["split"], doubt["rows"], doubt["sources"]) == ("train", [7], ["row 8 (7)"])
    assert told["looked_at"] == {"train": 60, "validation": 40, "test": 40}
    assert told["splits"]["train"]["sizes"]["picture"] == {
        "of": "pixels", "smallest": "50x40", "median": "50x300", "largest": "50x300"
    }  # fmt: skip
    said = whipray(*words).out
    assert f"WARNING: boxes (train): {doubt['message']}" in said and "smallest 50x40" in said


@pytest.mark.parametrize("task", ["digits", "housing", "fashion", "reviews"])
def test_nothing_silly_is_said_of_the_bundled_data(whipray, stores, task):
    assert whipray("data", "prepare", task, "--stores", stores).code == 0
    kinds = {one["kind"] for one in whipray("data", "show", task, "--stores", stores, "--json").json["doubts"]}
    # One 8 among the digits is written like a 1.
    assert kinds == ({"suspicious labels"} if task == "digits" else set())


def test_a_contact_sheet_needs_no_picture(whipray, stores, tmp_path):
    for task in ("housing", "reviews"):
        assert whipray("data", "prepare", task, "--stores", stores).code == 0
        assert whipray("data", "show", task, "--stores", stores, "--html", f"{task}.html").code == 0
    housing, reviews = (_Page((tmp_path / f"{task}.html").read_text()) for task in ("housing", "reviews"))
    assert not housing.tags["img"] and housing.tags["figure"] == 60
    assert "tokens" in reviews.text and reviews.tags["figure"] == 24


def test_a_contact_sheet_that_cannot_be_written_is_refused(refused, store):
    assert "no file can be written there" in refused("data", "show", store, "--html", "nowhere/sheet.html")
    assert "no file can be written there" in refused("data", "show", store, "--html", store)


def test_text_from_the_data_does_not_steer_the_terminal(whipray, tmp_path):
    rows = [{"text": "\x1b]0;owned\x07", "label": number % 2} for number in range(20)]
    write.write(tmp_path / "own", {"text": Text(), "label": Label(names=("a\x1b[31m", "b"))}, {"train": rows})
    answer = whipray("data", "show", "own")
    assert "owned" in answer.out and "contradictions" in answer.out and "\x1b" not in answer.out
