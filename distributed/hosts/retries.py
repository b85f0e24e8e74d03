"""Is a run that has failed begun again by itself? Decided by what has failed, where, and how often it has before.

A worker that was lost or hung is replaced `resources.replace_lost` and `resources.replace_hung` times; a failure
counts until the run has a checkpoint beyond the step at which it happened. What the task's own code raises is tried
again once, from a checkpoint; the same error at the same step, a loss that is not finite and a user's mistake end the
run at once. attempts.jsonl in the run directory has one line a failure: it outlives the driver.
"""

import contextlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from distributed import durable, saved
from distributed.resources import Resources
from tasks.errors import RunFailed, UserError

Kind = Literal["user", "training", "lost", "hung", "memory", "echo"]
FILE = "attempts.jsonl"
LONGEST = 30.0  # seconds between two attempts
LOOK = 0.2  # seconds between two looks at whether it is to end meanwhile
MEMORY = "take a smaller data.micro_batch_size (the batch stays as it is), or precision.dtype=bfloat16"
log = logging.getLogger("whipray")
T = TypeVar("T")


class Lost(RunFailed):
    """A process of the run went without a word."""

    place = ""  # nowhere in the code


# Names of exceptions: those of Ray and of a rank that is gone are known by nothing else.
KINDS: dict[str, Kind] = {
    "UserError": "user", "RunFailed": "training", "Hung": "hung", "Lost": "lost", "SystemExit": "lost",
    "MemoryError": "memory", "OutOfMemoryError": "memory", "RayActorError": "lost", "ActorDiedError": "lost",
    "ActorUnavailableError": "lost", "WorkerCrashedError": "lost", "NodeDiedError": "lost",
    "WorkerGroupError": "lost", "ControllerError": "lost", "TrainingFailedError": "lost",
}  # fmt: skip


def classify(failure: Mapping[str, Any] | None, error: BaseException) -> Kind:
    """Returns what has failed, from what the first failing rank wrote down, else from what its host has noticed."""
    name = str(failure["kind"]) if failure else type(error).__name__
    words = str(failure["message"]) if failure else str(error)
    if name not in KINDS and "can't allocate memory" in words:
        return "memory"
    if (failure["echo"] if failure else saved.is_echo(error)) and name not in KINDS:
        return KINDS.get(type(error).__name__, "echo")
    return KINDS.get(name, "user")


def is_mistake(failure: Mapping[str, Any] | None, error: BaseException) -> bool:
    """Returns whether it is an error that a user puts right, or lies in the training: no attempt would go better."""
    return (failure["kind"] if failure else type(error).__name__) in ("UserError", "RunFailed")


@dataclass(frozen=True)
class Failed:
    """A line of attempts.jsonl."""

    time: float
    kind: Kind
    step: int  # optimizer steps that were done
    rank: int | None
    host: str
    message: str


class Retries:
    """What has failed so far in a run, and what follows from it."""

    def __init__(self, limits: Mapping[Kind, int], before: Sequence[Failed] = ()) -> None:
        """`limits`: failures of a kind after which there is another attempt; 0 for those that it does not name."""
        self.limits, self.failed = limits, list(before)

    def next(self, kind: Kind, step: int, message: str, checkpoint: int | None = None) -> Literal["again", "give up"]:
        """Takes a failure into account; returns whether there is to be another attempt, from step `checkpoint`."""
        again = self.count(kind, checkpoint) < self.limits.get(kind, 0)
        if kind in ("user", "memory"):
            same = any((one.kind, one.step, one.message) == (kind, step, message) for one in self.failed)
            again = again and not same and checkpoint is not None and checkpoint <= step
        self.failed.append(Failed(time.time(), kind, step, None, platform.node(), message))
        return "again" if again else "give up"

    def count(self, kind: Kind, checkpoint: int | None) -> int:
        """Returns the failures of a kind that still count where the run goes on from step `checkpoint`."""
        forgiven = -1 if kind in ("user", "memory") or checkpoint is None else checkpoint
        alike = ("lost", "echo") if kind in ("lost", "echo") else (kind,)  # an echo is all that is known of a lost one
        return sum(one.kind in alike and one.step >= forgiven for one in self.failed)

    def pause(self, checkpoint: int | None) -> float:
        """Returns the seconds to wait before another attempt: what has failed may need a moment to go away."""
        return min(LONGEST, 0.1 * 2 ** sum(one.step >= (checkpoint or 0) for one in self.failed))


def limits(resources: Resources) -> dict[Kind, int]:
    """Returns how often each kind of failure is followed by another attempt."""
    return {"lost": resources.replace_lost, "echo": resources.replace_lost, "hung": resources.replace_hung,
            "user": 1, "memory": 1}  # fmt: skip


def read(directory: Path) -> list[Failed]:
    """Returns the failures of a run so far; a line that was cut off is passed over."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (directory / FILE).read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError):
                found.append(Failed(**json.loads(line)))
    return found


def persist(directory: Path, resources: Resources, attempt: Callable[[], T], stopped: Callable[[], bool]) -> T:
    """Makes attempts until one ends as it should; returns what that one returns.

    Raises what the last one raised, with what was tried in its notes. An attempt is to leave no process behind.
    """
    retries = Retries(limits(resources), read(directory))
    while True:
        try:
            return attempt()
        except saved.Removed:  # there is no place to go on in, nor to write it down
            raise
        except Exception as error:  # whatever has failed, the question is the same
            if stopped():
                raise
            again = decide(directory, retries, error)
            if again is None:
                raise
            log.warning("%s", again)
            saved.note(directory, again)
            if not _waited(retries.pause(newest_step(directory)), stopped):
                raise
        (directory / saved.FAILURE).unlink(missing_ok=True)


def _waited(seconds: float, stopped: Callable[[], bool]) -> bool:
    """Waits so long; returns False as soon as another attempt is not wanted any more."""
    until = time.monotonic() + seconds
    while not stopped() and time.monotonic() < until:
        time.sleep(min(LOOK, seconds))
    return not stopped()


@contextlib.contextmanager
def hinting() -> Iterator[None]:
    """Says what to shrink where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's are of the latter
        if classify(None, error) == "memory":
            error.add_note(MEMORY)
        raise


def decide(directory: Path, retries: Retries, error: BaseException) -> str | None:
    """Writes a failure down; returns what a person is to read before another attempt, None where there is none.

    What a rank has left in failure.json goes before what its host has noticed. An error that ends the run gets notes.
    """
    told = saved.failure(directory) or {}
    kind, checkpoint = classify(told or None, error), newest_step(directory)
    if is_mistake(told or None, error):
        checkpoint = None  # no attempt would go better
    meant = isinstance(error, RunFailed | UserError)  # for people, as it is
    words = (str(error) if meant or not told else told["message"]).splitlines() or [""]
    message = words[0] if meant else f"{told.get('kind') or type(error).__name__}: {words[0]}"
    # The step of a killed rank is what it last told of itself, which may be a while before its checkpoint.
    step = max(told.get("step") or getattr(error, "step", None) or 0, newest_step(directory) or 0)
    decided = retries.next(kind, step, message, checkpoint)
    failed = Failed(
        retries.failed[-1].time, kind, step, told.get("rank", getattr(error, "rank", None)),
        told.get("host", platform.node()), message,
    )  # fmt: skip
    retries.failed[-1] = failed
    with contextlib.suppress(OSError):  # of a full disk: the failure itself is what must be told
        torn = (directory / FILE).exists() and not (directory / FILE).read_bytes().endswith(b"\n")
        durable.append(directory / FILE, "\n" * torn + json.dumps(asdict(failed), ensure_ascii=False), sync=True)
    if kind == "memory":
        error.add_note(MEMORY)
    count, limit = retries.count(kind, checkpoint), retries.limits.get(kind, 0)
    if decided == "give up":
        if kind in ("lost", "hung", "echo") and limit:
            setting = f"resources.replace_{'hung' if kind == 'hung' else 'lost'}"
            times = "once" if limit == 1 else f"{limit} times"
            error.add_note(f"it was begun again {times} ({setting}); the same command goes on")
        return None
    who = message if failed.rank is None or message.startswith("rank ") else f"rank {failed.rank} failed: {message}"
    place = f" ({told['place']})" if told.get("place") and told["place"] not in who else ""
    where = f"step {checkpoint}" if checkpoint is not None else "the beginning"
    at = "" if f"at step {step}" in who else f" at step {step}"
    return f"{who}{place}{at}: going on from {where} ({count} of {limit})"


def newest_step(directory: Path) -> int | None:
    """Returns the step of the newest checkpoint, whole or not; None where there is none."""
    names = [folder.name for folder in directory.glob("checkpoints/step-*")]
    return max((int(name[5:]) for name in names if name[5:].isdigit()), default=None)
