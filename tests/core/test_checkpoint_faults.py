"""Checkpoints under faults: a disk that is full, fails or loses its power, kills, damage after the fact, forgeries."""

import errno
import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from distributed import checkpoint, durable, saved
from distributed.hosts import job
from distributed.world import World
from tasks.errors import RunFailed, UserError
from tests import runs

KEEP = 2
FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def save(folder: Path, step: int, value: float = 0.0, best: int | None = None, *, background: bool = False) -> None:
    """Saves a checkpoint whose every tensor and number tells its value; it stands when this returns."""
    model = {"a": torch.full((3, 2), value), "b": torch.full((5,), int(value))}
    optimizer = {"optimizer/a/m": torch.full((3, 2), value + 0.5, dtype=torch.float64)}
    with checkpoint.Writer(folder, "x", KEEP, background=background) as writer:
        writer.save(step, best, model, optimizer, {"value": value})


def value_of(one: checkpoint.Checkpoint) -> float:
    """Returns the value that was saved; all that a checkpoint holds must agree on it."""
    value = one.state["value"]
    assert one.model["a"].equal(torch.full((3, 2), value)) and one.model["b"].equal(torch.full((5,), int(value)))
    assert one.optimizer["optimizer/a/m"].equal(torch.full((3, 2), value + 0.5, dtype=torch.float64))
    return value


def there(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step-*"))


def litter(folder: Path) -> list[Path]:
    return list(folder.rglob(".*"))


@pytest.fixture(scope="module")
def forker():
    """A process without threads, which can be forked at will."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        yield pool


@pytest.fixture
def memory():
    """A folder in memory, where there is one: a thousand syncs of a disk take long."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


# ---- a disk that fails or is full, at any operation


class Faulty(durable.Operations):
    """Acts at the N-th operation of all threads, "before" it or when it is half done ("torn"); "ever after" too."""

    def __init__(self, at: int, mode: str = "before", code: int = errno.ENOSPC) -> None:
        self.left, self.mode, self.code = at, mode, code
        self.failed_syncs: list[int] = []
        self.lock = threading.Lock()

    @property
    def fired(self) -> bool:
        return self.left <= 0

    def _fires(self) -> bool:
        with self.lock:
            self.left -= 1
            return self.left == 0 or (self.left < 0 and self.mode == "ever after")

    def act(self) -> None:
        raise OSError(self.code, os.strerror(self.code))

    def write(self, descriptor, data):
        if self._fires():
            if self.mode == "torn":
                os.write(descriptor, memoryview(data)[: len(data) // 2])
            self.act()
        super().write(descriptor, data)

    def sync(self, descriptor):
        inode = os.fstat(descriptor).st_ino
        assert inode not in self.failed_syncs, "what could not be synced was synced again"
        if self._fires():
            self.failed_syncs.append(inode)
            self.act()
        super().sync(descriptor)

    def rename(self, source, target):
        if self._fires():
            self.act()
        super().rename(source, target)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_that_fails_anywhere_ends_the_save_with_one_message_and_the_last_good_checkpoint(
    memory, monkeypatch, background, code
):
    for at, mode in zip(itertools.count(1), itertools.cycle(["before", "torn", "ever after"]), strict=False):
        folder = memory / str(at)
        for step in (1, 2, 3):
            save(folder, step, step)
        faulty = Faulty(at, mode, code)
        with monkeypatch.context() as patch:
            patch.setattr(durable, "OPERATIONS", faulty)
            try:
                save(folder, 4, 4, background=background)
            except RunFailed as error:
                failed = error
            else:
                assert not faulty.fired, "a failure that nobody was told of"
                break
        found, passed_over = checkpoint.newest(folder)
        assert found.step in (3, 4) and value_of(found) == found.step and passed_over == []
        message = str(failed)
        assert message.startswith(f"{checkpoint.folder_of(folder, 4)}: ")
        assert message.endswith(f"cannot be written: {os.strerror(code)}; step-{found.step:08d} stands")
        assert ".part" not in message
        assert ("make room" in failed.__notes__[0]) == (code != errno.EIO)
        assert not [path for path in litter(folder) if not path.is_dir()], "only what was being removed is left"
        if found.step == 3:
            assert there(folder) == [2, 3], "nothing goes before the new one stands"
        save(folder, 5, 5, background=background)
        assert value_of(checkpoint.newest(folder)[0]) == 5
    assert at == 19


def test_a_checkpoints_folder_that_is_deleted_live_is_made_again(tmp_path):
    save(tmp_path, 1, 1)
    shutil.rmtree(tmp_path / "checkpoints")
    save(tmp_path, 2, 2)
    assert value_of(checkpoint.newest(tmp_path)[0]) == 2


def with_little_room(plain: dict) -> None:
    """Trains in a process that may write no file of more than 20 kB."""
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            job.work(job.Job.from_plain(plain), World())
        finally:
            os._exit(1)
    os.waitpid(pid, 0)


def test_a_run_that_finds_no_room_says_which_file_and_goes_on_when_there_is_some(tmp_path, stores, forker):
    one = runs.begin(tmp_path, stores, "digits", "task.model=mlp", "data.limit=200", "train.epochs=1")
    forker.submit(with_little_room, one.to_plain()).result()
    failure = saved.failure(one.directory)
    assert failure is not None and failure["kind"] == "RunFailed"
    assert "model.safetensors cannot be written: File too large; there is no checkpoint yet" in failure["message"]
    assert not [path for path in litter(one.directory) if path.name != ".lock"]
    job.work(one, World())
    assert runs.summary(one)["epochs"] == 1


# ---- kills and power cuts at any operation


class Deadly(Faulty):
    def act(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Forgetful(Faulty):
    """A disk whose power goes at the N-th operation: what was not synced is lost, content, names and renames."""

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.content: set[Path] = set()
        self.names: set[Path] = set()
        self.renames: list[tuple[Path, Path, bytes | None]] = []

    def write(self, descriptor, data):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        self.content.add(path)
        self.names.add(path)
        super().write(descriptor, data)

    def sync(self, descriptor):
        super().sync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        self.content.discard(path)
        if path.is_dir():
            self.names = {name for name in self.names if name.parent != path}
            self.renames = [(source, target, old) for source, target, old in self.renames if target.parent != path]

    def rename(self, source, target):
        old = target.read_bytes() if target.is_file() else None
        super().rename(source, target)
        self.renames.append((source, target, old))
        for paths in (self.content, self.names):
            for path in [path for path in paths if path.is_relative_to(source)]:
                paths.remove(path)
                paths.add(target / path.relative_to(source))
        self.names.discard(target)  # undone as a rename

    def act(self):
        for path in self.content:
            if path.exists():
                os.truncate(path, 0)
        for path in self.names:
            path.unlink(missing_ok=True)
        for source, target, old in reversed(self.renames):
            if target.exists():
                target.rename(source)
                if old is not None:
                    target.write_bytes(old)
        os.kill(os.getpid(), signal.SIGKILL)


DISKS = {"killed": Deadly, "killed in the middle": lambda at: Deadly(at, "torn"), "power cut": Forgetful}


def saved_until(folder: Path, step: int, value: float, best: int | None, at: int, how: str, background: bool) -> bool:
    """Saves in a process that meets its end at the N-th operation, or right after all of them; was it in between?"""
    pid = os.fork()
    if not pid:
        try:
            durable.OPERATIONS = disk = DISKS[how](at)
            save(folder, step, value, best, background=background)
            if not disk.fired:
                disk.left, disk.mode = 0, "ever after"
                (folder / "settled").touch()
                disk.act()
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    settled = (folder / "settled").exists()
    (folder / "settled").unlink(missing_ok=True)
    return not settled


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("how", DISKS)
def test_whatever_a_kill_or_a_power_cut_interrupts_a_whole_checkpoint_stands(memory, forker, how, background):
    for at in itertools.count(1):
        folder = memory / str(at)
        for step in (1, 2, 3):
            save(folder, step, step)
        in_between = forker.submit(saved_until, folder, 4, 4.0, 1, at, how, background).result()
        found, passed_over = checkpoint.newest(folder)
        assert value_of(found) == found.step >= 3 and passed_over == []
        assert found.step == 4 or in_between, "what was told to stand is lost"
        checkpoint.repair(folder, found)
        assert not litter(folder)
        assert checkpoint.chosen(folder, "last").step == found.step
        save(folder, found.step + 1, 9)
        assert value_of(checkpoint.newest(folder)[0]) == 9
        if not in_between:
            break
    assert at > 15


def test_the_name_of_the_first_checkpoints_folder_is_on_the_disk_too(tmp_path, monkeypatch):
    synced = []

    class Noting(durable.Operations):
        def sync(self, descriptor):
            synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
            super().sync(descriptor)

    monkeypatch.setattr(durable, "OPERATIONS", Noting())
    save(tmp_path / "run", 1)
    assert {tmp_path, tmp_path / "run", tmp_path / "run" / "checkpoints"} <= set(synced)


# ---- damage after the fact


def damaged(draw: random.Random, folder: Path, other: Path) -> str:
    """Does some damage to a checkpoint, and returns what it was; `other` is one to swap files with."""
    kind = draw.choice(["flip", "flip", "cut", "append", "zeros", "gone", "swap", "exchange", "move"])
    file = draw.choice(FILES)
    path = folder / file
    whole = path.read_bytes()
    begin = draw.randrange(len(whole))
    end = begin + draw.randint(1, min(64, len(whole) - begin))
    if kind == "flip":
        changed = bytes([whole[begin] ^ 1 << draw.randrange(8)])
        path.write_bytes(whole[:begin] + changed + whole[begin + 1 :])
    elif kind == "cut":
        path.write_bytes(whole[:begin])
    elif kind == "append":
        path.write_bytes(whole + draw.randbytes(draw.randint(1, 9)))
    elif kind == "zeros":
        path.write_bytes(whole[:begin] + bytes(end - begin) + whole[end:])
    elif kind == "gone":
        path.unlink()
    elif kind == "swap":  # with the same file of another checkpoint
        path.write_bytes((other / file).read_bytes())
    elif kind == "exchange":  # with another file of the same checkpoint
        second = folder / FILES[FILES.index(file) - 1]
        path.write_bytes(second.read_bytes())
        second.write_bytes(whole)
    else:  # the whole of another one under its name
        for name in FILES:
            (folder / name).write_bytes((other / name).read_bytes())
    return f"{kind} {file} {begin}:{end}"


def test_thousands_of_damages_are_all_found_and_named_and_the_one_before_is_used(memory):
    save(memory, 1, 1)
    save(memory, 2, 2)
    older, newer = (checkpoint.folder_of(memory, step) for step in (1, 2))
    whole = {file: (newer / file).read_bytes() for file in FILES}
    draw = random.Random(5)
    blanks = 0
    for number in range(3000):
        what = damaged(draw, newer, older)
        now = {path.name: path.read_bytes() for path in newer.iterdir()}
        changed = [file for file in FILES if now.get(file) != whole[file]]
        try:
            assert value_of(checkpoint.read(newer)) == 2, what
        except UserError as error:
            assert str(newer) in error.message, what
            if number % 20 == 0:
                found, passed_over = checkpoint.newest(memory)
                assert value_of(found) == 1 and passed_over == [error.message], what
        else:  # a changed blank of the manifest, or zeros where there were zeros
            assert changed in ([], ["manifest.json"]), what
            assert json.loads(now["manifest.json"]) == json.loads(whole["manifest.json"]), what
            blanks += bool(changed)
        for file in changed:
            (newer / file).write_bytes(whole[file])
    assert blanks < 300


# ---- forgeries: what somebody made who knows how to seal a manifest


def forged(folder: Path, model: bytes, **manifest: object) -> Path:
    target = checkpoint.folder_of(folder, 2)
    told = {"format": checkpoint.FORMAT, "step": 2, "task": "x", "best_step": None, **manifest}
    with durable.publish(target, told) as one:
        one.add("model.safetensors", model)
        one.add("optimizer.safetensors", b"\2" + bytes(7) + b"{}")
        one.add("state.json", b"{}")
    return target


def file_of(header: str, num_bytes: int = 16, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header.encode() + bytes(num_bytes)


A, B = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', '"b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}'


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


FORGERIES = {
    "a header of more than 100 MB": (file_of(f"{{{A},{B}}}", length=100_000_001), "header of 100000001 bytes"),
    "a header longer than the file": (file_of(f"{{{A},{B}}}", length=99_999_999), "model.safetensors"),
    "a name twice": (file_of(f"{{{A},{A}}}", 8), "'a' stands twice"),
    "a name twice with other types": (file_of(f"{{{A},{A.replace('F32', 'I32')}}}", 8), "'a' stands twice"),
    "a key twice": (file_of(f"{{{A.replace('[2]', '[2],' + chr(34) + 'shape' + chr(34) + ':[1]')}}}", 8), "twice"),
    "overlapping tensors": (file_of(f"{{{A},{B.replace('[8,16]', '[4,12]')}}}", 12), "(?i)offset"),
    "a gap": (file_of(f"{{{A},{B.replace('[8,16]', '[12,20]')}}}", 20), "(?i)offset"),
    "a shape that overflows": (file_of(f"{{{A.replace('[2]', '[4611686018427387904,8]')}}}", 8), "(?i)overflow"),
    "a negative shape": (file_of(f"{{{A.replace('[2]', '[-2]')}}}", 8), "model.safetensors"),
    "an unknown type": (file_of(f"{{{A.replace('F32', 'PY')}}}", 8), "model.safetensors"),
    "deep nesting": (file_of("[" * 100_000), "cannot be read"),
    "a pickle": (pickle.dumps(Malicious()), "model.safetensors"),
    "nothing": (b"", "model.safetensors"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_checkpoint_is_refused_by_name_and_runs_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    data, words = FORGERIES[name]
    target = forged(tmp_path, data)
    with pytest.raises(UserError, match=words) as raised:
        checkpoint.read(target)
    assert str(target) in raised.value.message
    assert checkpoint.newest(tmp_path) == (None, [raised.value.message])
    assert not (tmp_path / "executed").exists()


def test_an_honest_file_of_the_same_making_is_read(tmp_path):
    assert checkpoint.read(forged(tmp_path, file_of(f"{{{A},{B}}}"))).model["b"].tolist() == [0, 0]


@pytest.mark.parametrize("step", [[1], "1", None, -1, 2.0])
def test_a_manifest_of_nonsense_is_refused(tmp_path, step):
    with pytest.raises(UserError, match=r"step-00000002"):
        checkpoint.read(forged(tmp_path, file_of(f"{{{A},{B}}}"), step=step))


def test_a_pickle_put_beside_a_checkpoint_is_refused_unopened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 1)
    (checkpoint.folder_of(tmp_path, 1) / "model.pt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UserError, match=r"model\.pt: is not named in the manifest"):
        checkpoint.newest(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_task_is_not_gone_on_from(tmp_path, stores):
    one = runs.begin(tmp_path, stores, "digits", "data.limit=100")
    save(one.directory, 1)
    with pytest.raises(UserError, match="is of the task x"):
        job.work(one, World())


# ---- whatever happens, in whatever order


class Life(RuleBasedStateMachine):
    """A run directory through saves, resumes, failures, kills, power cuts and damage, beside what should stand in it."""

    forker: ProcessPoolExecutor
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.run = Path(tempfile.mkdtemp(dir=self.folder))
        self.standing: dict[int, float] = {}
        self.cut_off: set[int] = set()  # damaged so that a look at the sizes shows it
        self.rotten: set[int] = set()  # damaged under its size
        self.step, self.best, self.value = 0, None, 0.0

    def sound(self) -> list[int]:
        return [step for step in sorted(self.standing) if step not in self.cut_off | self.rotten]

    def next(self) -> tuple[int, float, int | None]:
        self.step, self.value = self.step + 3, self.value + 1
        return self.step, self.value, self.best

    def saved(self, step: int, value: float) -> None:
        self.standing[step] = value
        self.cut_off.discard(step)
        self.rotten.discard(step)
        whole = [one for one in sorted(self.standing, reverse=True) if one not in self.cut_off]
        oldest = whole[:KEEP][-1] if len(whole) >= KEEP else 0
        self.standing = {s: v for s, v in self.standing.items() if s >= oldest or s in (step, self.best)}

    @rule(background=st.booleans(), is_best=st.booleans())
    def save(self, background: bool, is_best: bool) -> None:
        step, value, _ = self.next()
        self.best = step if is_best else self.best
        save(self.run, step, value, self.best, background=background)
        self.saved(step, value)

    @rule(at=st.integers(1, 20), mode=st.sampled_from(["before", "torn", "ever after"]), background=st.booleans())
    def fail(self, at: int, mode: str, background: bool) -> None:
        step, value, best = self.next()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(durable, "OPERATIONS", faulty := Faulty(at, mode))
            try:
                save(self.run, step, value, best, background=background)
            except RunFailed:
                assert faulty.fired
        self.interrupted(step, value)

    @rule(at=st.integers(1, 20), how=st.sampled_from(sorted(DISKS)), background=st.booleans())
    def kill(self, at: int, how: str, background: bool) -> None:
        step, value, best = self.next()
        stopped = self.forker.submit(saved_until, self.run, step, value, best, at, how, background).result()
        assert stopped or step in there(self.run)
        self.interrupted(step, value)

    def interrupted(self, step: int, value: float) -> None:
        """A save may have come to its end, or up to what it removes; then the run is begun again."""
        if step in there(self.run):
            before = dict(self.standing)
            self.saved(step, value)
            self.standing |= {step: value for step, value in before.items() if step in there(self.run)}
        self.resume()

    @precondition(lambda self: self.standing)
    @rule(pick=st.integers(0, 9), file=st.sampled_from(FILES), cut=st.booleans(), place=st.integers(0))
    def damage(self, pick: int, file: str, cut: bool, place: int) -> None:
        step = sorted(self.standing)[pick % len(self.standing)]
        path = checkpoint.folder_of(self.run, step) / file
        data = bytearray(path.read_bytes() if path.exists() else b"")
        if cut or not data:
            path.unlink(missing_ok=True)
        elif file != "manifest.json" and step not in self.rotten:
            data[place % len(data)] ^= 16
            path.write_bytes(data)
            self.rotten.add(step)
            return
        else:
            path.write_bytes(data[:-2])
        self.cut_off.add(step)

    @rule()
    def resume(self) -> None:
        found, _ = checkpoint.newest(self.run)
        checkpoint.repair(self.run, found)
        assert not litter(self.run)
        if found:
            self.standing = {step: value for step, value in self.standing.items() if step <= found.step}
            self.step, self.best = found.step, found.best_step
            assert checkpoint.chosen(self.run, "last").step == found.step

    @invariant()
    def nothing_that_should_stand_is_lost(self) -> None:
        assert there(self.run) == sorted(self.standing)
        found, passed_over = checkpoint.newest(self.run)
        sound = self.sound()
        assert (found.step if found else None) == (sound[-1] if sound else None)
        if found:
            assert value_of(found) == self.standing[found.step]
        assert len(passed_over) == sum(not sound or step > sound[-1] for step in self.standing)


def test_through_any_life_the_newest_sound_checkpoint_is_restored_and_none_disappears(memory, forker):
    Life.forker, Life.folder = forker, memory
    health = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        Life, settings=settings(max_examples=20, stateful_step_count=15, deadline=None, suppress_health_check=health)
    )
