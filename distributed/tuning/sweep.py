"""The sweep: a journalled ask / tell state machine that every executor drives, so that all decide alike.

An executor (Ray Tune, this process) does nothing but

    while trial := sweep.ask():                     # None: no more trials to begin
        ... train it, and after each evaluation:
        if sweep.report(trial.id, epoch, value, metrics) == "stop": end it
        sweep.finish(trial.id, "done" | "stopped" | "failed", metrics, seconds=..., directory=...)

with as many trials at once as it likes. Equal plans and equal events in equal order give equal decisions; no clock
and no other state takes part. Each event is on the disk before its call returns; `Sweep.resume` replays them. Where a
call raises OSError (disk full) the event did not happen: end the process and resume.
"""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from distributed.tuning.journal import Journal, Record, read
from distributed.tuning.schedulers import SCHEDULERS, Decision
from distributed.tuning.searchers import SEARCHERS, Settings
from distributed.tuning.settings import Trials
from search_spaces.dimensions import SpaceError, Value, plain, same
from search_spaces.space import Space, space_of
from tasks.errors import UserError

FORMAT = 1  # of the journal
Outcome = Literal["done", "stopped", "failed"]


@dataclass(frozen=True)
class Plan:
    """What a sweep is; a sweep is gone on with only under the plan that it began with."""

    space: Space
    trials: Trials
    objective: str  # name of the figure that decides, such as "accuracy"
    higher_is_better: bool
    baseline: Mapping[str, Value] | None = None  # the defaults of the space's settings: trial 0000; None: no such trial
    base: Mapping[str, Value] = field(default_factory=dict)  # what else all trials share: words of the command line

    def __post_init__(self) -> None:  # as a journal gives it back: a tuple becomes a list
        for name in ("baseline", "base"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, {key: plain(value) for key, value in given.items()})

    def header(self) -> Record:
        """Returns the plan as the first line of a journal."""
        return {
            "event": "sweep",
            "format": FORMAT,
            "objective": self.objective,
            "higher_is_better": self.higher_is_better,
            "trials": asdict(self.trials),
            "name": self.space.name,
            "space": self.space.plain(),
            "baseline": self.baseline,
            "base": self.base,
        }

    @classmethod
    def of(cls, header: Record, path: Path) -> "Plan":
        """Returns the plan in the first line of the journal `path`."""
        if header.get("event") != "sweep" or header.get("format") != FORMAT:
            raise UserError(f"{path}: not a journal that this version of whipray can read")
        try:
            return cls(
                space_of(header["space"], header["name"]),
                Trials(**header["trials"]),
                header["objective"],
                header["higher_is_better"],
                header["baseline"],
                header["base"],
            )
        except (KeyError, TypeError, AttributeError, SpaceError) as error:
            raise UserError(f"{path}:1: the journal is damaged: {error}") from None

    def differences(self, other: "Plan") -> list[str]:
        """Returns what differs in the other plan, as lines "name: this -> other"; the number at once may."""
        mine, others = flat(self.header()), flat(other.header())
        return [
            f"{name}: {mine.get(name, 'not set')} -> {others.get(name, 'not set')}"
            for name in dict.fromkeys([*mine, *others])
            if name not in ("trials.concurrent", "name")
            and (name not in mine or name not in others or not same(mine[name], others[name]))
        ]


@dataclass(frozen=True)
class Trial:
    """What an executor is to train."""

    id: str  # "0000", "0001" ... also the name of its directory
    settings: Settings  # dotted setting -> value, over the task's defaults and the plan's base
    baseline: bool = False  # the task's defaults: never stopped early
    again: bool = False  # was begun before: its directory may hold a checkpoint


@dataclass
class Row:
    """What is known of a trial; `value` is the best objective that it has shown."""

    trial: str
    settings: Settings
    baseline: bool = False
    state: Literal["running", "done", "stopped", "failed"] = "running"
    value: float | None = None
    last: float | None = None  # the newest objective
    epoch: int = 0  # of the newest report
    metrics: dict[str, Any] = field(default_factory=dict)  # when it finished, until then of the best epoch
    seconds: float = 0.0
    error: str | None = None
    directory: str | None = None
    stopping: bool = False  # the scheduler has decided to stop it

    def plain(self) -> dict[str, Any]:
        """Returns the row as strict JSON data: a NaN is null."""
        return {name: finite(value) for name, value in vars(self).items() if name not in ("last", "stopping")}


class Sweep:
    """The state of a sweep; created over a new journal, or by `resume` over an old one.

    Trial 0000 is the task's defaults, without which "better than the defaults" would be a hope. A space with a
    summary (folds) has no such trial: all its points are run, to their ends, and none wins.
    """

    _journal: Journal | None

    def __init__(self, plan: Plan, journal: Path) -> None:
        self._prepare(plan)
        self._journal = Journal.create(journal, self.plan.header())

    @classmethod
    def resume(cls, journal: Path, plan: Plan | None = None) -> "Sweep":
        """Returns the sweep as its journal left it; unfinished trials are handed out again, first.

        Raises UserError where `plan`, if given, is not the journal's.
        """
        opened, records = Journal.open(journal)
        try:
            if not records and plan is None:
                raise UserError(f"{journal}: the sweep was cut off before it began", "begin it again")
            if not records:  # killed between creating the file and its first line
                assert plan is not None
                opened.append(plan.header())
                records = [plan.header()]
            sweep = cls.__new__(cls)
            sweep._restore(records, journal, plan)
            sweep._journal = opened
            for row in sweep.rows.values():
                if row.state == "running" and row.stopping:  # was cut off between the decision and its execution
                    sweep.finish(row.trial, "stopped", row.metrics, seconds=row.seconds, directory=row.directory)
            sweep._waiting = [row.trial for row in sweep.rows.values() if row.state == "running"]
        except BaseException:
            opened.close()
            raise
        return sweep

    @classmethod
    def look(cls, journal: Path) -> "Sweep":
        """Returns the sweep as it stands in a journal that another process may be writing: to be read only."""
        records = read(journal)
        if not records:
            raise UserError(f"{journal}: the sweep has not begun")
        sweep = cls.__new__(cls)
        sweep._restore(records, journal, None)
        return sweep

    def _prepare(self, plan: Plan) -> None:
        trials = plan.trials
        search, scheduler = trials.search, trials.scheduler
        if plan.space.summary:  # all points, each to its end
            search, scheduler = "grid", "none"
            size = plan.space.size()
            if size is not None and size > trials.count:
                raise UserError(
                    f"the search space '{plan.space.name}' has {size} points, and trials.count is {trials.count}",
                    f"its {plan.space.summary} is over all of them: set trials.count={size}",
                )
        self.plan = plan
        self.rows: dict[str, Row] = {}  # in the order of asking
        self._has_baseline = plan.baseline is not None and not plan.space.summary
        better = plan.higher_is_better
        try:
            self._searcher = SEARCHERS[search](
                plan.space, seed=trials.seed, count=trials.count - self._has_baseline, higher_is_better=better
            )
        except SpaceError as error:
            raise UserError(error.message, error.hint) from None
        self._scheduler = SCHEDULERS[scheduler](grace=trials.grace, factor=trials.factor, higher_is_better=better)
        self._waiting: list[str] = []  # begun by an earlier process and not finished
        self._journal = None

    # ---- what executors call

    def ask(self) -> Trial | None:
        """Returns the next trial to train, or None when there are no more to begin."""
        if self._waiting:
            row = self.rows[self._waiting.pop(0)]
            self._happen({"event": "again", "trial": row.trial})
            return Trial(row.trial, dict(row.settings), row.baseline, again=True)
        settings = self._next()
        if settings is None:
            return None
        row = self._happen({"event": "ask", "trial": name_of(len(self.rows)), "settings": settings})
        return Trial(row.trial, dict(row.settings), row.baseline)

    def report(self, trial_id: str, epoch: int, value: float | None, metrics: Mapping[str, Any]) -> Decision:
        """Takes in one evaluation of a trial, after `epoch` whole epochs, and says whether the trial goes on.

        An epoch that was reported already, as by a trial that goes on from an older checkpoint, changes nothing.
        A trial that has just trained its last epoch ends as done, whatever the answer.
        """
        row = self._running(trial_id)
        if epoch > row.epoch and not row.stopping:
            value = None if value is None else float(value)
            record = {"event": "report", "trial": trial_id, "epoch": epoch, "value": value, "metrics": dict(metrics)}
            self._happen(record | {"decision": self._judge(row, epoch, value)})
        return "stop" if row.stopping else "continue"

    def finish(
        self,
        trial_id: str,
        outcome: Outcome,
        metrics: Mapping[str, Any],
        *,
        error: str | None = None,
        seconds: float = 0.0,
        directory: str | Path | None = None,
    ) -> None:
        """Takes in the end of a trial: "done" at its own end, "stopped" on request, "failed" with its error.

        Without `metrics` those of its best report stay.
        """
        self._running(trial_id)
        assert outcome in get_args(Outcome), outcome
        record = {"event": "finish", "trial": trial_id, "outcome": outcome, "metrics": dict(metrics), "error": error}
        self._happen(record | {"seconds": seconds, "directory": None if directory is None else str(directory)})

    def close(self) -> None:
        """Gives the journal free for other processes."""
        if self._journal is not None:
            self._journal.close()

    # ---- what reports call

    @property
    def total(self) -> int:
        """How many trials there will be."""
        limit = self._searcher.limit
        return self.plan.trials.count if limit is None else min(self.plan.trials.count, limit + self._has_baseline)

    @property
    def finished(self) -> bool:
        """Whether all trials have ended."""
        return len(self.rows) >= self.total and all(row.state != "running" for row in self.rows.values())

    @property
    def note(self) -> str:
        """What the user should know about the search, or ""."""
        return self._searcher.note

    def ranked(self) -> list[Row]:
        """Returns all trials, best first; failed ones and those without a number last."""

        def rank(row: Row) -> tuple[bool, bool, float, bool, str]:
            value = math.nan if row.value is None else row.value
            order = 0.0 if math.isnan(value) else -value if self.plan.higher_is_better else value
            return row.state == "failed", math.isnan(value), order, row.state != "done", row.trial

        return sorted(self.rows.values(), key=rank)

    def best(self) -> Row | None:
        """Returns the best trial that has ended, or None where there is none, or where the space knows no winner."""
        if self.plan.space.summary:
            return None
        ended = [row for row in self.ranked() if row.state in ("done", "stopped")]
        return ended[0] if ended and ended[0].value is not None and not math.isnan(ended[0].value) else None

    def summary(self) -> dict[str, dict[str, float]]:
        """Returns, of the objective and of every metric, {"mean", "spread", "trials"} over the trials done.

        The spread is the standard deviation of a sample, NaN over a single trial.
        """
        done = [row for row in self.rows.values() if row.state == "done"]
        columns: dict[str, list[float]] = {}
        for row in done:
            figures = {self.plan.objective: row.value} | flat(row.metrics, "/")
            for name, value in figures.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    columns.setdefault(name, []).append(float(value))
        return {
            name: {
                "mean": statistics.fmean(values),
                "spread": statistics.stdev(values) if len(values) > 1 else math.nan,
                "trials": len(values),
            }
            for name, values in columns.items()
        }

    # ---- how events change the state, when they happen and when they are replayed

    def _next(self) -> Settings | None:
        number = len(self.rows)
        if number >= self.plan.trials.count:
            return None
        if number == 0 and self._has_baseline:
            settings = {**self.plan.space.fixed, **(self.plan.baseline or {})}
            self._searcher.adopt(name_of(number), settings)
            return settings
        return self._searcher.ask(name_of(number))

    def _judge(self, row: Row, epoch: int, value: float | None) -> Decision:
        # A trial is judged, as it is ranked, by the best that it has shown; a value that is no number stops it.
        shown = value if value is None or math.isnan(value) else self._better(row.value, value)
        decision = self._scheduler.report(row.trial, epoch, shown)
        return "continue" if row.baseline else decision

    def _better(self, one: float | None, other: float) -> float:
        if one is None or math.isnan(one):
            return other
        return max(one, other) if self.plan.higher_is_better else min(one, other)

    def _apply(self, record: Record) -> Row:
        trial_id = record["trial"]
        if record["event"] == "ask":
            baseline = self._has_baseline and not self.rows
            row = self.rows[trial_id] = Row(trial_id, record["settings"], baseline)
            return row
        row = self.rows[trial_id]
        if record["event"] == "report":
            value = record["value"]
            row.epoch, row.last, row.stopping = record["epoch"], value, record["decision"] == "stop"
            if value is not None and (best := self._better(row.value, value)) != row.value:
                row.value, row.metrics = best, record["metrics"]
        elif record["event"] == "finish":
            row.state, row.error = record["outcome"], record["error"]
            row.seconds, row.directory = record["seconds"], record["directory"]
            row.metrics = record["metrics"] or row.metrics
            told = {"done": row.value, "stopped": row.last, "failed": None}[row.state]
            self._searcher.tell(trial_id, told, stopped=row.state == "stopped", epoch=row.epoch)
        return row

    def _happen(self, record: Record) -> Row:
        assert self._journal is not None, "this sweep was opened to be read only"
        self._journal.append(record | {"time": round(time.time(), 3)})  # for people; no decision reads it
        return self._apply(record)

    def _running(self, trial_id: str) -> Row:
        row = self.rows[trial_id]
        assert row.state == "running", f"trial {trial_id} has finished"
        return row

    def _restore(self, records: list[Record], path: Path, plan: Plan | None) -> None:
        begun = Plan.of(records[0], path)
        if plan is not None and (different := begun.differences(plan)):
            raise UserError(
                f"the sweep in {path.parent} began otherwise:\n  " + "\n  ".join(different),
                "go on with it as it began, or begin another under a --name of its own",
            )
        self._prepare(plan or begun)
        for number, record in enumerate(records[1:], 2):
            try:
                self._replay(record)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{path}:{number}: the journal is damaged: {error!r}") from None

    def _replay(self, record: Record) -> None:
        event, trial_id = record["event"], record["trial"]
        if event not in ("ask", "again", "report", "finish"):
            raise ValueError(f"unknown event {event!r}")
        if event == "ask":
            if trial_id != name_of(len(self.rows)):
                raise ValueError(f"trial {trial_id} is out of order")
            if self._next() != record["settings"]:  # another version of the searcher: what was done counts
                self._searcher.tell(trial_id, None)
                self._searcher.adopt(trial_id, record["settings"])
        elif self.rows[trial_id].state != "running":
            raise ValueError(f"trial {trial_id} goes on after its end")
        elif event == "report":  # the scheduler must know it; what it decided then counts
            self._judge(self.rows[trial_id], record["epoch"], record["value"])
        self._apply(record)


def name_of(number: int) -> str:
    """Returns the id of a trial."""
    return f"{number:04d}"


def flat(data: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Returns nested data as one mapping of joined names."""
    found: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, separator, f"{prefix}{name}{separator}")
        else:
            found[f"{prefix}{name}"] = value
    return found


def finite(value: Any) -> Any:
    """Returns the value with numbers that JSON does not have as None."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
