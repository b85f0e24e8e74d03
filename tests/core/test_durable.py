"""What is published is whole or not there, whichever operation fails or is cut off."""

import json
import os

import pytest

from distributed import durable
from tasks.errors import UserError


class Faulty(durable.Operations):
    """Fails at the N-th operation: before it, or after half of what it should write."""

    def __init__(self, at: int, mode: str) -> None:
        self.left, self.mode, self.fired = at, mode, False

    def _fires(self) -> bool:
        self.left -= 1
        self.fired = self.fired or self.left == 0
        return self.left == 0

    def write(self, descriptor, data):
        if self._fires():
            if self.mode == "torn":
                os.write(descriptor, memoryview(data)[: len(data) // 2])
            raise OSError(28, "No space left on device")
        super().write(descriptor, data)

    def sync(self, descriptor):
        if self._fires():
            raise OSError(5, "Input/output error")
        super().sync(descriptor)

    def rename(self, source, target):
        if self._fires():
            raise OSError(5, "Input/output error")
        super().rename(source, target)


def publish(target, content: bytes) -> None:
    with durable.publish(target, {"format": 1}) as folder:
        folder.add("a.bin", content)
        folder.add("b.bin", content[::-1])


@pytest.mark.parametrize("mode", ["before", "torn"])
def test_a_publication_that_fails_anywhere_leaves_the_old_folder_or_the_new_one_and_no_litter(
    tmp_path, monkeypatch, mode
):
    at, fired = 1, True
    while fired:
        target = tmp_path / f"{at}" / "thing"
        publish(target, b"old" * 100)
        faulty = Faulty(at, mode)
        with monkeypatch.context() as patch:
            patch.setattr(durable, "OPERATIONS", faulty)
            try:
                publish(target, b"new" * 100)
            except OSError:
                pass
        fired = faulty.fired
        if target.exists():
            manifest = durable.read_manifest(target, (1,))
            durable.verify(target, manifest)
        publish(target, b"later" * 100)  # whatever happened, the next one works
        assert [path.name for path in target.parent.iterdir()] == ["thing"]
        at += 1
    assert at > 7


@pytest.mark.parametrize("mode", ["before", "torn"])
def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch, mode):
    path = tmp_path / "file"
    for at in range(1, 6):
        durable.write(path, "old")
        with monkeypatch.context() as patch:
            patch.setattr(durable, "OPERATIONS", Faulty(at, mode))
            try:
                durable.write(path, "new")
            except OSError:
                pass
        assert path.read_text() in ("old", "new")
        assert [p.name for p in tmp_path.iterdir()] == ["file"]


def rewrite(folder, manifest: dict) -> None:
    manifest["digest"] = durable.digest_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit(folder, key: str, value: str) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace(f'"{key}": 1', f'"{key}": {value}'))


class Telling(durable.Operations):
    """Writes down what is done, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def write(self, descriptor, data):
        self.told.append("write")
        super().write(descriptor, data)

    def sync(self, descriptor):
        self.told.append("sync")
        super().sync(descriptor)

    def rename(self, source, target):
        self.told.append("rename")
        super().rename(source, target)


def test_everything_is_synced_before_it_becomes_visible_and_the_names_after(tmp_path, monkeypatch):
    telling = Telling()
    monkeypatch.setattr(durable, "OPERATIONS", telling)
    publish(tmp_path / "thing", b"x")
    two_files_and_the_manifest = ["write", "sync"] * 3
    assert telling.told == [*two_files_and_the_manifest, "sync", "rename", "sync"]
    telling.told.clear()
    durable.write(tmp_path / "file", "x")
    assert telling.told == ["write", "sync", "rename", "sync"]


DAMAGES = {
    "cut off": (lambda f: (f / "a.bin").write_bytes(b"ol"), "has 2 bytes instead of 300"),
    "one bit flipped": (lambda f: (f / "a.bin").write_bytes(b"nld" + b"old" * 99), "checksum differs"),
    "missing": (lambda f: (f / "a.bin").unlink(), "is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "has no manifest"),
    "manifest cut off": (lambda f: (f / "manifest.json").write_text('{"files"'), "is broken"),
    "manifest of another kind": (lambda f: (f / "manifest.json").write_text("[1]"), "is broken"),
    "newer format": (lambda f: rewrite(f, {"format": 99, "files": {}}), "format 99"),
    "manifest edited": (lambda f: edit(f, "format", "1.0"), "was changed after it was written"),
    "outside": (
        lambda f: rewrite(f, {"format": 1, "files": {"../x": {"bytes": 1, "crc32": ""}}}),
        "outside its folder",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_detected_and_named(tmp_path, name):
    damage, words = DAMAGES[name]
    publish(tmp_path / "thing", b"old" * 100)
    damage(tmp_path / "thing")
    with pytest.raises(UserError, match=words) as raised:
        durable.verify(tmp_path / "thing", durable.read_manifest(tmp_path / "thing", (1,)))
    assert str(tmp_path / "thing") in raised.value.message


def test_a_nan_is_refused_in_json(tmp_path):
    with pytest.raises(ValueError):
        durable.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()
