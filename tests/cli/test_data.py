"""`whipray data`: prepared, looked at, and found out when damaged."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from distributed import durable

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
