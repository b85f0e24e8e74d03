"""Who hangs: decided from pulses, which are plain numbers; and what a pulse shows of a real thread."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed.alive import MARK
from distributed.hosts import hangs
from distributed.hosts.hangs import Pulse, Sighting, Watch, culprit
from distributed.world import World

HOME = Path(__file__).parents[2]


def seen(
    rank: int, since: float, *, silent: float = 0.5, step: int = 100, waiting: bool = False, slowest: float = 0.1
) -> Sighting:
    return Sighting(
        Pulse(rank, 10 + rank, "here", 7, step, since, slowest, waiting, "own.py:3 in loss", "stack"), silent
    )


@pytest.mark.parametrize(
    ("sightings", "rank"),
    [
        ([], None),
        ([seen(0, 5), seen(1, 5)], None),
        ([seen(0, 400, waiting=True), seen(1, 2)], None),  # slow, or evaluating, or saving: it moves
        ([seen(0, 299, waiting=True), seen(1, 299)], None),
        ([seen(0, 301, waiting=True), seen(1, 301)], 1),
        ([seen(0, 301), seen(1, 301, waiting=True)], 0),
        ([seen(0, 301, waiting=True), seen(1, 1, silent=300)], 1),  # stopped: its last pulse says that it moves
        ([seen(0, 301, waiting=True), seen(1, 1, silent=300, waiting=True)], 1),  # stopped while it waited
        ([seen(0, 301), seen(1, 1, silent=300)], 1),
        ([seen(0, 900, slowest=200, waiting=True), seen(1, 900)], None),  # its steps take so long
        ([seen(0, 1001, slowest=200, waiting=True), seen(1, 1001)], 1),
        ([seen(0, 400, waiting=True), seen(1, 400, waiting=True, step=99)], 1),  # all wait: the one behind
        ([seen(0, 400, step=103), seen(1, 400, step=100), seen(2, 400, step=103)], 1),  # devices run behind their hosts
        ([seen(0, 500, silent=400), seen(1, 600, silent=500)], 1),
    ],
)
def test_the_culprit(sightings, rank):
    found = culprit(sightings, 300)
    assert (found and found.pulse.rank) == rank


@given(
    st.lists(
        st.tuples(st.floats(0, 1000), st.floats(0, 1000), st.booleans(), st.integers(0, 9)), min_size=1, max_size=5
    )
)
def test_nobody_is_guilty_while_anybody_moves_and_somebody_is_when_nobody_does(told):
    sightings = [seen(r, since, silent=silent, waiting=w, step=s) for r, (since, silent, w, s) in enumerate(told)]
    found = culprit(sightings, 300)
    assert (found is None) == (min(one.still for one in sightings) < 300)
    assert culprit([*sightings, seen(9, 0)], 300) is None


# ---- what a pulse shows


def _shown(directory: Path, rank: int = 0) -> Pulse:
    shown = hangs.read(directory, rank)
    assert shown is not None
    return shown


def test_a_pulse_tells_where_its_thread_stands_and_goes_when_the_training_ends(tmp_path):
    MARK.step = 3
    with hangs.pulse(tmp_path, World(1, 2), 1.0, judging=False):
        time.sleep(1.0)
        line = sys._getframe().f_lineno - 1
        shown = _shown(tmp_path, 1)
    assert (shown.rank, shown.pid, shown.step, shown.waiting) == (1, os.getpid(), 3, False)
    assert shown.place.startswith(f"test_hangs.py:{line} in test_a_pulse")
    assert f'test_hangs.py", line {line} in test_a_pulse' in shown.stack.splitlines()[1]
    assert not (tmp_path / hangs.FOLDER).exists()


def _beats(heart: hangs.Heart, count: int = 3) -> float:
    """Lets a heart beat some times, as its thread would; returns how long the training stands still by then."""
    for _ in range(count):
        heart.latest -= 1  # a second passes
        heart.beat()
    return heart.since


def _on_a_thread(directory: Path, body: str) -> tuple[hangs.Heart, threading.Event]:
    """A heart of a thread that runs some code until the event is set, as if it were the training's."""
    ready, ended, hearts = threading.Event(), threading.Event(), []

    def train() -> None:
        hearts.append(hangs.Heart(directory, 0, 1.0))
        ready.set()
        exec(body, {"ended": ended})

    threading.Thread(target=train, daemon=True).start()
    ready.wait()
    return hearts[0], ended


def test_time_counts_only_while_neither_step_nor_code_moves(tmp_path):
    heart, ended = _on_a_thread(tmp_path, "ended.wait()")
    _beats(heart, 5)
    assert _beats(heart) > 6
    MARK.step += 1
    heart.beat()
    assert heart.since == 0
    assert _beats(heart) >= 3
    MARK.beats += 1
    heart.beat()
    assert heart.since == 0
    ended.set()


BUSY = """
while not ended.is_set():
    a = 1
    b = 2
    c = [x for x in range(9)]
"""
IN_A_STEP = f"""
from distributed.loop import learn
class Learning:
    @property
    def run(self):
        exec({BUSY!r}, {{"ended": ended}})
try:
    learn(Learning())
except AttributeError:
    pass
"""


@pytest.mark.parametrize(
    ("code", "steps", "moves"),
    [
        (BUSY, 0, True),
        (BUSY, 100, True),  # it evaluates, saves, prepares
        (IN_A_STEP, 0, True),  # it may compile
        (IN_A_STEP, 100, False),  # a step that does not end is none
    ],
)
def test_code_that_moves_is_a_training_that_moves_but_not_for_ever_inside_of_one_step(tmp_path, code, steps, moves):
    heart, ended = _on_a_thread(tmp_path, code)
    heart.steps = steps
    for _ in range(20):  # two looks may meet the same instruction
        time.sleep(0.01)
        heart.latest -= 1
        heart.beat()
    assert (heart.since < 10) == moves
    ended.set()


def test_a_heart_that_was_stopped_itself_counts_no_lost_time(tmp_path):
    heart, ended = _on_a_thread(tmp_path, "ended.wait()")
    _beats(heart, 2)
    before = heart.since
    heart.latest -= 10_000  # the machine slept
    heart.beat()
    assert heart.since <= before + 2
    ended.set()


# ---- whoever watches


def _write(directory: Path, one: Sighting, beat: int) -> None:
    path = hangs.path_of(directory, one.pulse.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(one.pulse, beat=beat))))


def _look(watch: Watch, seconds: float = 1.0) -> hangs.Hung | None:
    watch.latest -= seconds
    return watch.look()


def test_a_watch_names_the_rank_whose_pulse_has_stopped_and_saves_all_stacks(tmp_path):
    watch = Watch(tmp_path, 2, 10)
    for beat in range(15):
        _write(tmp_path, seen(0, beat, waiting=True), beat)
        _write(tmp_path, seen(1, 0), 0)
        found = _look(watch)
        if found:
            break
    assert found is not None
    assert "rank 1 (process 11 on here) has been stopped for 10 s at step 100 (own.py:3 in loss)" in str(found)
    assert (found.rank, found.pid, found.host, found.step) == (1, 11, "here", 100)
    texts = [(tmp_path / hangs.STACKS / f"rank-0000{rank}.txt").read_text() for rank in (0, 1)]
    assert ["waits for others" in text for text in texts] == [True, False]


def test_a_watch_that_was_stopped_with_its_ranks_accuses_nobody(tmp_path):
    """Ctrl-Z, and `fg` an hour later; the ranks' own clocks know as well."""
    watch = Watch(tmp_path, 1, 10)
    _write(tmp_path, seen(0, 1), 1)
    assert _look(watch) is None
    assert _look(watch, 3600) is None


def test_a_watch_waits_for_ranks_that_have_not_begun_and_lets_those_go_that_have_ended(tmp_path):
    watch = Watch(tmp_path, 2, 10)
    _write(tmp_path, seen(0, 100), 1)
    assert _look(watch) is None
    _write(tmp_path, seen(1, 1), 1)
    assert _look(watch) is None
    hangs.path_of(tmp_path, 1).unlink()
    _write(tmp_path, seen(0, 100), 2)
    assert str(_look(watch)).startswith("rank 0")


def test_nobody_is_accused_where_nothing_can_be_written(tmp_path):
    watch = Watch(tmp_path, 1, 10)
    _write(tmp_path, seen(0, 100), 1)
    obstacle = tmp_path / hangs.FOLDER / f"watch-{os.getpid()}"
    obstacle.mkdir()
    assert _look(watch) is None
    obstacle.rmdir()
    assert _look(watch) is not None


def test_a_torn_pulse_is_none(tmp_path):
    _write(tmp_path, seen(0, 1), 1)
    path = hangs.path_of(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:40])
    assert hangs.read(tmp_path, 0) is None


ALONE = """
import os, signal, sys, time
from pathlib import Path
from distributed.hosts import hangs
from distributed.world import World
rank = int(sys.argv[2])
with hangs.pulse(Path(sys.argv[1]), World(rank, 2), 2.0):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        time.sleep(100)
"""


@pytest.mark.parametrize("stopped", [True, False])
def test_ranks_that_nobody_watches_end_themselves_and_name_the_culprit(tmp_path, stopped):
    code = ALONE if stopped else ALONE.replace("os.kill(os.getpid(), signal.SIGSTOP)", "pass")
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(rank)], cwd=HOME, stderr=subprocess.DEVNULL)
        for rank in (0, 1)
    ]
    try:
        assert ranks[0].wait(60) == hangs.HUNG
        if not stopped:
            assert ranks[1].wait(60) == hangs.HUNG
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert failure["kind"] == "Hung"
    if stopped:
        assert (failure["rank"], failure["pid"]) == (1, ranks[1].pid)
    assert (tmp_path / hangs.STACKS / "rank-00001.txt").exists()
