"""Runs on disk as rows of a table: their state, figures, settings and tags; filtered and sorted. No torch here."""

import json
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from distributed import config, durable, record, saved
from tasks.errors import UserError, did_you_mean

TAGS, LOCK, FAILURES = "tags.json", ".lock", "attempts.jsonl"
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "<": operator.lt, ">": operator.gt, "=": operator.eq,
}  # fmt: skip
CONDITION = re.compile(r"\s*([\w./:-]+?)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*")
# Figures of which less is better; of all others, accuracies above all, more is.
LESS = re.compile(r"loss|error|rmse|mse|mae|perplexity|entropy|(^|[/_])(wer|cer|fid)$|seconds|name|task|state")


@dataclass(frozen=True)
class Entry:
    """One run of the list."""

    directory: Path
    name: str  # TASK/NAME
    state: str  # "finished", "training now" or "unfinished"
    epochs: int
    steps: int
    metrics: dict[str, dict[str, float]]  # of the best checkpoint, a split each
    objective: str  # the metric that decided which is the best
    time: str  # when it began
    seconds: float | None
    tags: list[str] = field(default_factory=list)
    failures: int = 0  # workers that were lost, hung or raised so far, whether or not the run went on by itself

    @property
    def task(self) -> str:
        return self.name.rpartition("/")[0]

    @cached_property
    def settings(self) -> dict[str, Any]:
        return {name: given.value for name, given in config.from_yaml(self.directory / saved.CONFIG).items()}

    def names(self) -> list[str]:
        """Everything that `value` knows, besides settings."""
        figures = [f"{split}/{name}" for split, values in self.metrics.items() for name in values]
        return [*self.to_json(), *figures, *self.metrics.get("validation", {})]

    def value(self, name: str) -> Any:
        """Returns a column, a setting, a metric of the validation split or SPLIT/METRIC; None where there is none."""
        split, slash, metric = name.partition("/")
        if slash:
            return self.metrics.get(split, {}).get(metric)
        if "." in name:
            return self.settings.get(name)
        plain = self.to_json()
        return plain[name] if name in plain else self.metrics.get("validation", {}).get(name)

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.directory), "name": self.name, "task": self.task, "state": self.state,
            "epochs": self.epochs, "steps": self.steps, "metrics": self.metrics, "time": self.time,
            "seconds": self.seconds, "tags": self.tags, "failures": self.failures,
        }  # fmt: skip


def listed(runs: Path) -> list[Entry]:
    """Returns every run below a folder, newest first."""
    return [entry(directory, runs) for directory in saved.listed(runs)]


def entry(directory: Path, runs: Path) -> Entry:
    """Returns what a run's files say about it, whatever state it is in."""
    directory, runs = directory.absolute(), runs.absolute()
    name = (
        str(directory.relative_to(runs))
        if directory.is_relative_to(runs)
        else f"{directory.parent.name}/{directory.name}"
    )
    summary = saved.summary(directory)
    state = "finished" if summary else "training now" if is_owned(directory) else "unfinished"
    told = summary or _so_far(directory)
    return Entry(
        directory, name, state, told["epochs"], told["steps"], told["metrics"], told["objective"], _began(directory),
        told["seconds"], tags(directory), _failures(directory),
    )  # fmt: skip


def is_owned(directory: Path) -> bool:
    """Whether a process is training the run now: it holds the lock."""
    if not (directory / LOCK).exists():
        return False
    try:
        with FileLock(directory / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # on a file system that is read-only nobody trains
        return False


def _began(directory: Path) -> str:
    return str(saved.environment(directory).get("time", ""))


def _failures(directory: Path) -> int:
    try:
        return sum(line.startswith(b"{") for line in (directory / FAILURES).read_bytes().splitlines())
    except OSError:
        return 0


def _so_far(directory: Path) -> dict[str, Any]:
    """What the rows of a run that is not finished say: its figures are those of the best checkpoint, or the latest."""
    try:
        rows = record.read(directory / record.METRICS)
    except (OSError, UnicodeDecodeError):
        rows = []
    judged = [row for row in rows if row["kind"] == "validation"]
    latest = rows[-1] if rows else {"epoch": 0, "step": 0}
    try:
        best = int((directory / "checkpoints" / "best").read_text().strip().removeprefix("step-"))
    except (OSError, ValueError):
        best = None
    chosen = next((row for row in judged if row["step"] == best), judged[-1] if judged else None)
    figures = {
        n: v for n, v in (chosen or {}).items() if n not in ("kind", "epoch", "step", "time", "samples_per_second")
    }
    epochs = judged[-1]["epoch"] if judged else 0
    seconds = round(rows[-1]["time"] - rows[0]["time"], 3) if len(rows) > 1 else None
    return {
        "epochs": epochs, "steps": latest["step"], "metrics": {"validation": figures} if figures else {},
        "objective": next(iter(figures), ""), "seconds": seconds,
    }  # fmt: skip


# ---- tags


def tags(directory: Path) -> list[str]:
    """Returns the tags of a run, in alphabetical order."""
    try:
        found = json.loads((directory / TAGS).read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / TAGS}: cannot be read: {error}", "remove it; the run has no tags then") from None
    return sorted(str(tag) for tag in found) if isinstance(found, list) else []


def tag(directory: Path, add: Iterable[str], remove: Iterable[str]) -> None:
    """Adds tags to a run and takes others away."""
    durable.write_json(directory / TAGS, sorted({*tags(directory), *add} - set(remove)))


# ---- filtering and sorting


def condition(text: str) -> tuple[str, str, str]:
    """Returns (name, comparison, value) of a condition such as `optimizer.lr=0.1` or `accuracy>0.9`."""
    match = CONDITION.fullmatch(text)
    if not match or not match[3]:
        raise UserError(f"'{text}' is no condition", "write optimizer.name=adam, accuracy>0.9 or test/loss<=0.1")
    return match[1], match[2], match[3]


def matching(entries: Sequence[Entry], conditions: Iterable[str]) -> list[Entry]:
    """Returns the runs that fulfil all conditions; raises UserError for a name that no run has."""
    kept = list(entries)
    for text in conditions:
        name, comparison, wanted = condition(text)
        _check_name(name, entries)
        kept = [one for one in kept if _holds(one.value(name), comparison, wanted)]
    return kept


def _holds(value: Any, comparison: str, wanted: str) -> bool:
    """Compares as numbers where both are numbers, else as words; a run without the value does not match."""
    meant = yaml.safe_load(wanted) if re.fullmatch(r"[\w.+-]+", wanted) else wanted
    if isinstance(value, bool) or isinstance(meant, bool) or value is None:
        return (
            value == (None if wanted == "none" else meant)
            if comparison == "="
            else comparison == "!=" and value != meant
        )
    try:
        return COMPARISONS[comparison](float(value), float(wanted))
    except (TypeError, ValueError):
        words = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        return COMPARISONS[comparison](words, wanted)


def ordered(entries: Sequence[Entry], name: str, *, reverse: bool = False) -> list[Entry]:
    """Returns the runs best first: the largest figure first, of losses, errors and seconds the smallest.

    Runs without it come last. Raises UserError for a name that no run has.
    """
    _check_name(name, entries)
    have = [one for one in entries if one.value(name) is not None]
    less = bool(LESS.search(name)) or name.startswith(("optimizer.", "data.", "train.", "task."))
    numbers = all(isinstance(one.value(name), (int, float)) for one in have)
    have.sort(key=lambda one: one.value(name) if numbers else str(one.value(name)), reverse=not less)
    return (have[::-1] if reverse else have) + [one for one in entries if one.value(name) is None]


def _check_name(name: str, entries: Sequence[Entry]) -> None:
    known = {n for one in entries for n in one.names()} - {"metrics", "tags", "run"}
    if "." in name and "/" not in name:
        known |= {n for one in entries for n in one.settings}
    if entries and name not in known:
        raise UserError(f"no run has '{name}'", did_you_mean(name, known))
