"""Runs on disk: found by path or name, listed, and resolved again from what they wrote."""

import contextlib
import json
import os
import platform
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import config, durable
from distributed.alive import MARK
from distributed.run import Run, resolve
from tasks.errors import RunFailed, UserError, did_you_mean, place_of

CONFIG, FACTS, SUMMARY, ENVIRONMENT, METRICS, LOG = (
    "config.yaml", "facts.json", "summary.json", "environment.json", "metrics.jsonl", "log.txt",
)  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """A run that was begun, whether or not it is finished."""

    directory: Path
    run: Run
    facts: dict[str, Any]


def listed(runs: Path) -> list[Path]:
    """Returns every run directory below a folder, newest first."""
    found = [path.parent for path in runs.glob(f"**/{CONFIG}")] if runs.is_dir() else []
    return sorted(found, key=lambda path: (path / CONFIG).stat().st_mtime, reverse=True)


def locate(reference: str, runs: Path) -> Path:
    """Returns the directory of RUN: a path, TASK/NAME, a unique NAME, or `last`; raises UserError with the nearest."""
    if (Path(reference) / CONFIG).exists():
        return Path(reference).absolute()
    there = listed(runs)
    if reference == "last" and there:
        return there[0].absolute()
    matches = [path for path in there if path.name == reference or str(path.relative_to(runs)) == reference]
    if len(matches) > 1:
        names = ", ".join(str(path.relative_to(runs)) for path in matches)
        raise UserError(f"several runs are called '{reference}': {names}", "write TASK/NAME")
    if not matches:
        names = [path.name for path in there] + [str(path.relative_to(runs)) for path in there]
        hint = did_you_mean(reference, names) or (
            "whipray runs lists them" if there else f"there are no runs in {runs}"
        )
        raise UserError(f"no run '{reference}'", hint)
    return matches[0].absolute()


def find(reference: str, runs: Path) -> Saved:
    """Returns a run as it was written."""
    directory = locate(reference, runs)
    given = config.from_yaml(directory / CONFIG)
    if "task.name" not in given:
        raise UserError(f"{directory / CONFIG}: does not say of which task it is", "it was changed by hand")
    try:
        facts = json.loads((directory / FACTS).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory / FACTS}: cannot be read: {error}", "the run did not begin, or was damaged"
        ) from None
    return Saved(directory, resolve(str(given["task.name"].value), given, runs), facts)


def summary(directory: Path) -> dict[str, Any] | None:
    """Returns what a finished run wrote at its end, None where it is not finished."""
    return _told(directory / SUMMARY)


def environment(directory: Path) -> dict[str, Any]:
    """Returns where and with what a run was last begun; empty where that is not known."""
    return _told(directory / ENVIRONMENT) or {}


def _told(path: Path) -> dict[str, Any] | None:
    """Returns an object that a run has written; None where it has not, or where it was damaged."""
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


def begin(directory: Path, run: Run, facts: dict[str, Any], environment: dict[str, Any]) -> None:
    """Writes what identifies a run: its settings, the facts of its data, and where it ran."""
    directory.mkdir(parents=True, exist_ok=True)
    given = {name: origin for name, origin in run.origins.items() if origin != "default"}
    comments = "".join(f"# {name}: {origin}\n" for name, origin in given.items() if name != "task.name")
    header = (
        f"# Settings of this run; not by default:\n{comments}"
        if comments
        else "# Settings of this run, all by default.\n"
    )
    durable.write(directory / CONFIG, header + config.to_yaml(run.values))
    durable.write(directory / FACTS, durable.to_json(facts))
    durable.write_json(directory / ENVIRONMENT, environment)


class Removed(RunFailed):
    """The directory of a run was taken away while it trained; the one that may stand there now is another run's."""


class Held:
    """The directory that a process trains in, for as long as it is the same one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._descriptor = os.open(directory, os.O_RDONLY)  # open, so that no other folder gets its number
        self._environment = environment(directory)

    def is_there(self) -> bool:
        """Returns False where it is gone, or another run was begun in its place: nothing is to be written there."""
        try:
            same = os.path.samestat(self.directory.stat(), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False
        return same or environment(self.directory) == self._environment  # network file systems may number folders anew

    def check(self) -> None:
        """Raises Removed where it is not there any more."""
        if self.is_there():
            return
        error = Removed(f"{self.directory}: was removed, or moved, while it trained")
        error.add_note("what it has learned since is not saved")
        raise error

    def close(self) -> None:
        os.close(self._descriptor)


# ---- what processes of one run tell one another through its directory

STOP, FAILURE = ".stop", "failure.json"
MOST_ROWS = 64  # training rows of the micro-batch at which it failed that failure.json lists


def clear_marks(directory: Path) -> None:
    """Forgets what an earlier attempt left: a wish to stop, the cause of its failure."""
    for name in (STOP, FAILURE):
        (directory / name).unlink(missing_ok=True)


def ask_to_stop(directory: Path) -> None:
    """Asks whoever trains this run for a checkpoint and the end."""
    (directory / STOP).touch()


def is_asked_to_stop(directory: Path) -> bool:
    return (directory / STOP).exists()


def write_failure(directory: Path, rank: int, error: BaseException) -> None:
    """Names the cause in the run directory; that another rank went away is no cause, and gives way to one."""
    if isinstance(error, Removed):
        return
    known = failure(directory)
    if known and not (known["echo"] and not is_echo(error)):
        return
    message, hint = (error.message, error.hint) if isinstance(error, UserError) else (str(error), "")
    told = {
        "rank": getattr(error, "rank", rank), "host": getattr(error, "host", platform.node()),
        "pid": getattr(error, "pid", os.getpid()), "time": time.time(), "step": getattr(error, "step", MARK.step),
        "rows": getattr(error, "rows", [])[:MOST_ROWS],
        "kind": type(error).__name__, "message": message, "hint": hint, "place": place_of(error),
        "traceback": getattr(error, "remote_traceback", "") or "".join(traceback.format_exception(error)),
        "echo": is_echo(error),
    }  # fmt: skip
    note(directory, f"rank {rank} failed: {told['kind']}: {message.splitlines()[0] if message else ''}")
    with contextlib.suppress(OSError):  # of a full disk, say: the cause itself is what must be told
        durable.write_json(directory / FAILURE, told)


def note(directory: Path, words: str) -> None:
    """Adds a line to log.txt, the history of a run for people; one that cannot be written is let go."""
    with contextlib.suppress(OSError):
        durable.append(directory / LOG, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {platform.node()} {words}")


def is_echo(error: BaseException) -> bool:
    """Whether an error only says that another rank went away."""
    words = str(error)
    return any(sign in words for sign in ("Connection closed by peer", "Connection reset by peer", "gloo"))


@contextlib.contextmanager
def naming_failures(directory: Path, rank: int) -> Iterator[None]:
    """Writes down whatever is raised inside, and lets it pass."""
    held = Held(directory)
    try:
        yield
    except BaseException as error:
        if not held.is_there():
            raise
        write_failure(directory, rank, error)
        if not isinstance(error, UserError):
            error.add_note(f"{directory / FAILURE} holds the whole traceback")
            if getattr(error, "rows", []):  # it arose in an optimizer step
                where = f"--step {error.__dict__['step']} --rank {error.__dict__['rank']}"
                error.add_note(f"whipray replay {directory} {where} shows that step")
        raise
    finally:
        held.close()


def failure(directory: Path) -> dict[str, Any] | None:
    """Returns what the first failing rank wrote, None where none did."""
    return _told(directory / FAILURE)
