"""Who hangs? Every rank shows a pulse in the run directory; whoever watches them names the rank that stands still.

A run hangs when none of its ranks has moved for `resources.hang` seconds: a rank that waits for others does not move,
so that one slow rank keeps all of them alive. What a rank does outside of steps (it evaluates, saves, prepares), and
in the first steps of its process (it compiles), is movement as long as its threads get anywhere.
"""

import contextlib
import dataclasses
import itertools
import json
import linecache
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from distributed import loop, saved, world
from distributed.alive import MARK
from distributed.world import World
from tasks.errors import RunFailed

FOLDER, STACKS = ".pulse", "stacks"
INTERVAL = 1.0  # seconds between two beats, at most
SLOWEST = 5  # a run does not hang before this many times the slowest step that was seen
WARM = 3  # movements of the step in a process's first time: to where it goes on, and two steps that may compile
HUNG = 75  # exit code of a process that has found its run hanging: EX_TEMPFAIL
DEPTH = 60  # frames of a stack that are shown


class Hung(RunFailed):
    """A rank has stopped moving, and the run with it."""

    rank: int
    pid: int
    host: str
    step: int  # optimizer steps that it had done
    place: str  # where it stands: "my_task.py:33 in loss"
    remote_traceback: str


@dataclass(frozen=True)
class Pulse:
    """What a rank tells of itself."""

    rank: int
    pid: int
    host: str
    beat: int  # counts up: a rank that is stopped does not
    step: int  # optimizer steps done
    since: float  # seconds since its training last moved
    slowest: float  # seconds, the longest that it has stood still and gone on
    waiting: bool  # for other ranks, in a collective or in a backward
    place: str  # where its training thread is, in code that is no library's
    stack: str  # of that thread, innermost first
    others: str = ""  # stacks of its other threads, where it stands still


@dataclass(frozen=True)
class Sighting:
    """A pulse, as it looks from outside."""

    pulse: Pulse
    silent: float  # seconds since it last beat, by the watcher's own clock

    @property
    def still(self) -> float:
        """Seconds without a movement."""
        return self.pulse.since + self.silent


def culprit(seen: Sequence[Sighting], limit: float) -> Sighting | None:
    """Returns the rank because of which nobody has moved for `limit` seconds; None where somebody has.

    It is one whose pulse has stopped, else one that does not wait for others, else the one that is furthest behind.
    """
    limit = max([limit, *(SLOWEST * one.pulse.slowest for one in seen)])
    if not seen or min(one.still for one in seen) < limit:
        return None
    stopped = [one for one in seen if one.silent > limit / 2]
    working = [one for one in seen if not one.pulse.waiting]
    return min(stopped or working or seen, key=lambda one: (one.pulse.step, -one.still))


def interval(hang: float | None) -> float:
    """Returns the seconds between two beats, and between two looks at them."""
    return INTERVAL if hang is None else min(INTERVAL, hang / 5)


# ---- a rank


@contextlib.contextmanager
def pulse(directory: Path, world: World, hang: float | None, *, judging: bool = True) -> Iterator["Heart"]:
    """Shows a pulse of this thread's training while inside.

    With `judging` the process also watches the others, and ends itself with exit code HUNG where the run hangs for
    `hang` seconds, after it has written failure.json: for ranks whose parent does not watch them. None: it never does.
    """
    heart = Heart(directory, world.rank, interval(hang))
    watch = Watch(directory, world.size, hang) if judging and hang is not None else None
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(heart.interval):
            heart.beat()
            hung = watch.look() if watch else None
            if hung:
                saved.write_failure(directory, hung.rank, hung)
                os._exit(HUNG)  # the training thread cannot be ended otherwise

    heart.beat()
    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    thread.start()
    try:
        yield heart
    finally:
        ended.set()
        thread.join()
        heart.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others still have theirs in it
            heart.path.parent.rmdir()


class Heart:
    """Sees whether the training thread moves, and writes it down."""

    def __init__(self, directory: Path, rank: int, interval: float) -> None:
        self.path, self.rank, self.interval = path_of(directory, rank), rank, interval
        self.thread = threading.get_ident()  # of the training
        self.steps = 0  # how often the step has been seen to move
        self.marked: tuple[int, int] = (MARK.step, MARK.beats)
        self.threads: tuple[tuple[int, int], ...] = ()
        self.beats, self.since, self.slowest, self.latest = 0, 0.0, 0.0, time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def beat(self) -> None:
        now = time.monotonic()
        # Time in which this thread stood still too, because the machine slept, is no time that the training lost.
        self.since += min(now - self.latest, 2 * self.interval)
        self.latest = now
        frames = _frames(self.thread)
        mine = frames[self.thread]
        if self._moves(frames):
            if self.steps > WARM:
                self.slowest = max(self.slowest, self.since)
            self.since = 0.0
        self.beats += 1
        others = [_text(frame, f"Thread {name}") for name, frame in frames.items() if frame is not mine]
        shown = Pulse(
            self.rank, os.getpid(), platform.node(), self.beats, MARK.step, round(self.since, 2),
            round(self.slowest, 2), is_waiting(mine), place_of(mine), _text(mine, "Training thread"),
            "\n".join(others) if self.since > 5 * self.interval else "",
        )  # fmt: skip
        with contextlib.suppress(OSError):  # a full disk: whoever watches sees that nobody can write
            _write(self.path, json.dumps(dataclasses.asdict(shown)))

    def _moves(self, frames: dict[int, FrameType]) -> bool:
        marked = MARK.step, MARK.beats
        threads = tuple((id(one.f_code), one.f_lasti) for frame in frames.values() for one in _outwards(frame))
        moved = marked != self.marked
        self.steps += marked[0] != self.marked[0]
        if not moved and (self.steps < WARM or not _is_in_step(frames[self.thread])):
            moved = threads != self.threads
        self.marked, self.threads = marked, threads
        return moved


HOME = str(Path(loop.__file__).parent) + os.sep
OTHERS = (HOME + "hosts" + os.sep, HOME + "monitor.py")  # their threads move whatever the training does
TORCH = Path(torch.__file__).parent
STANDARD = str(Path(os.__file__).parent)
# Code that waits for other ranks. A task's own code, called by it, lies further inside.
WAITING = (
    str(TORCH / "distributed") + os.sep, str(TORCH / "nn/parallel/distributed.py"),
    str(TORCH / "autograd/graph.py"), str(Path(world.__file__)),
)  # fmt: skip


def _frames(training: int) -> dict[int, FrameType]:
    """The innermost frames of the training thread, and of those that run code of ours for it."""
    return {
        name: frame
        for name, frame in sys._current_frames().items()
        if name == training or _is_for_training([one.f_code.co_filename for one in _outwards(frame)])
    }


def _is_for_training(files: list[str]) -> bool:
    return any(name.startswith(HOME) for name in files) and not any(name.startswith(OTHERS) for name in files)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_in_step(frame: FrameType) -> bool:
    return any(one.f_code is loop.learn.__code__ for one in _outwards(frame))


def is_waiting(frame: FrameType) -> bool:
    """Returns whether a thread is inside a collective, or a backward that may be waiting for one."""
    return frame.f_code.co_filename.startswith(WAITING)


def place_of(frame: FrameType) -> str:
    """Returns where a thread is in code that is no library's: "my_task.py:33 in loss"."""
    for one in _outwards(frame):
        name = one.f_code.co_filename
        if "site-packages" not in name and not name.startswith((STANDARD, "<")):
            return f"{Path(name).name}:{one.f_lineno} in {one.f_code.co_name}"
    return ""


def _text(frame: FrameType, title: str) -> str:
    lines = []
    for one in itertools.islice(_outwards(frame), DEPTH):
        name, number = one.f_code.co_filename, one.f_lineno
        source = linecache.getline(name, number).strip()
        lines += [f'  File "{name}", line {number} in {one.f_code.co_name}', *([f"    {source}"] if source else [])]
    return "\n".join([f"{title} (most recent call first):", *lines])


# ---- whoever watches


class Watch:
    """Looks at the pulses of a run now and then."""

    def __init__(self, directory: Path, size: int, limit: float) -> None:
        self.directory, self.size, self.limit = directory, size, limit
        self.interval = interval(limit)
        self.latest = time.monotonic()
        self.known: dict[int, Sighting] = {}

    def look(self) -> Hung | None:
        """Returns what is to be said about a run that hangs, after all stacks are saved; None while it does not."""
        now = time.monotonic()
        if now - self.latest < self.interval / 2:
            return None
        # A watcher that was stopped itself, with the whole command, has missed beats that were there.
        passed, self.latest = min(now - self.latest, 2 * self.interval), now
        if not self._can_write():  # nor can the ranks: their silence says nothing
            self.known = {}
            return None
        seen = []
        for rank in range(self.size):
            shown, before = read(self.directory, rank), self.known.get(rank)
            if shown and before and (before.pulse.beat, before.pulse.pid) == (shown.beat, shown.pid):
                seen.append(Sighting(shown, before.silent + passed))
            elif shown:
                seen.append(Sighting(shown, 0.0))
            elif before is None:
                return None  # it has not begun
        self.known |= {one.pulse.rank: one for one in seen}
        guilty = culprit(seen, self.limit)
        if guilty is None:
            return None
        for one in seen:
            with contextlib.suppress(OSError):  # what is known must be told all the same
                _save_stack(self.directory, one)
        return hung(guilty, self.directory, certain=any(one.silent or not one.pulse.waiting for one in seen))

    def _can_write(self) -> bool:
        probe = self.directory / FOLDER / f"watch-{os.getpid()}"
        try:
            probe.write_text("looks")
            probe.unlink()
        except OSError:
            return False
        return True


def hung(guilty: Sighting, directory: Path, *, certain: bool = True) -> Hung:
    """Returns the error that names the guilty rank."""
    one = guilty.pulse
    who = f"rank {one.rank} (process {one.pid} on {one.host})"
    if guilty.silent > one.since:
        what = f"has been stopped for {guilty.still:.0f} s at step {one.step}"
    else:
        what = f"hangs at step {one.step}, for {guilty.still:.0f} s"
        if not certain:
            what += "; all ranks wait for one another, and it is furthest behind"
    error = Hung(f"{who} {what}" + (f" ({one.place})" if one.place else ""))
    error.__dict__.update(
        rank=one.rank, pid=one.pid, host=one.host, step=one.step, place=one.place, remote_traceback=one.stack
    )
    error.add_note(f"{directory / STACKS} holds the stacks of all ranks; resources.hang=SECONDS allows more")
    return error


def path_of(directory: Path, rank: int) -> Path:
    return directory / FOLDER / f"rank-{rank:05d}.json"


def read(directory: Path, rank: int) -> Pulse | None:
    """Returns the pulse of a rank, None where it has none."""
    try:
        return Pulse(**json.loads(path_of(directory, rank).read_bytes()))
    except (OSError, ValueError, TypeError):  # not there, cut off by a full disk, or of another version
        return None


def clear(directory: Path) -> None:
    """Forgets the pulses of an earlier attempt."""
    shutil.rmtree(directory / FOLDER, ignore_errors=True)


def _save_stack(directory: Path, one: Sighting) -> None:
    path = directory / STACKS / f"rank-{one.pulse.rank:05d}.txt"
    path.parent.mkdir(exist_ok=True)
    about = (
        f"rank {one.pulse.rank}, process {one.pulse.pid} on {one.pulse.host}, step {one.pulse.step}, "
        f"still for {one.still:.0f} s" + (", waits for others" if one.pulse.waiting else "")
    )
    _write(path, "\n".join([about, "", one.pulse.stack, "", one.pulse.others]).rstrip() + "\n")


def _write(path: Path, text: str) -> None:
    """Replaces a small file as a whole. Nothing here has to survive a crash of the machine."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(text)
    temporary.replace(path)
