"""Trains a run in several processes of this machine, begun by a fresh one that this process starts.

A notebook, or a script that has already computed something, cannot fork its ranks: the threads of OpenMP and the
context of CUDA do not survive it.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from distributed import durable, saved
from distributed.hosts import local
from distributed.hosts.follow import Rows
from distributed.hosts.job import Job, Show
from distributed.processes import die_with_parent
from distributed.run import Run
from tasks.errors import RunFailed, UserError

POLL = 0.3  # seconds between two looks at what is recorded
HOME = Path(__file__).resolve().parents[2]
BEGIN = f"import sys; sys.path.insert(0, {str(HOME)!r}); from distributed.hosts import apart; apart.begin()"


def connect(run: Run, address: str | None) -> None:
    """Raises UserError where this machine lacks the devices that the run asks for."""
    local.connect(run, address)


def train(one: Job, stores: Path, show: Show = lambda row: None) -> bool:
    """Trains in processes of a fresh one; returns whether it was interrupted before its end.

    Raises UserError and RunFailed as these processes raise them, RuntimeError for whatever else ended them.
    """
    rows = Rows(one.directory)
    told = {**one.to_plain(), "stores": str(stores)}
    # A session of its own: an interrupt from the keyboard reaches this process alone, which passes on what it wishes.
    process = subprocess.Popen([sys.executable, "-c", BEGIN], stdin=subprocess.PIPE, text=True, start_new_session=True)
    try:
        with local.interruptible() as stopped:
            assert process.stdin is not None, "it is a pipe"
            with process.stdin as pipe:
                pipe.write(durable.to_json(told))
            show({"kind": "begin", "step": 0})
            while process.poll() is None:
                time.sleep(POLL)
                if stopped():
                    saved.ask_to_stop(one.directory)
                for row in rows.new():
                    show(row)
    finally:
        process.kill()  # its ranks go with it
        process.wait()
    for row in rows.new():
        show(row)
    if process.returncode:
        _raise(one, process.returncode)
    return stopped() and saved.summary(one.directory) is None


def _raise(one: Job, code: int) -> None:
    failure = saved.failure(one.directory)
    if failure is None:
        raise RuntimeError(f"{one.directory}: the process that trains ended with exit code {code}")
    if failure["kind"] == "UserError":
        raise UserError(failure["message"], failure["hint"])
    kind = RunFailed if failure["kind"] == "RunFailed" else RuntimeError
    place = f" ({failure['place']})" if failure["place"] else ""
    error = kind(f"rank {failure['rank']}: {failure['kind']}: {failure['message']}{place}")
    error.add_note(f"{one.directory / saved.FAILURE} holds the whole traceback")
    raise error


def begin() -> None:
    """In the fresh process: takes a job from standard input and trains it; exits with 1 where that fails."""
    die_with_parent()
    told = json.loads(sys.stdin.read())
    stores = Path(told.pop("stores"))
    one = Job.from_plain(told)
    try:
        local.train(one, stores)
    except Exception as error:  # noqa: BLE001 - the process that asked reads it, whatever it is
        saved.write_failure(one.directory, 0, error)
        sys.exit(1)
