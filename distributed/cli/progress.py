"""What a person sees of a training: a bar in a terminal, clean lines elsewhere, and a table at the end."""

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from distributed import catalogue, initial
from distributed.cli.output import OUT, counted, unless_full
from distributed.monitor import Course
from distributed.processes import flush
from distributed.record import is_measured

if TYPE_CHECKING:
    from distributed.hosts.job import Job

INTERVAL = 5.0  # seconds between two lines of training figures where there is no terminal
NOT_FIGURES = ("kind", "epoch", "step", "lr")


def figures(row: dict[str, Any], most: int = 4) -> str:
    """Returns the figures of a row in one line."""
    shown = [
        (n, v)
        for n, v in row.items()
        if n not in NOT_FIGURES and not n.startswith("lr/") and not is_measured(n) and v is not None
    ]
    return "  ".join(f"{name} {value:.4g}" for name, value in shown[:most])


def measured(row: dict[str, Any]) -> str:
    """Returns speed, and how busy the device or the cores are, in one line."""
    speed = [f"{row['samples_per_second']:,.0f} samples/s"] if "samples_per_second" in row else []
    busy = [f"{name} {row[name]:.0f} %" for name in ("gpu", "cpu") if row.get(name) is not None]
    return "  ".join([*speed, *busy[:1]])


def _left(seconds: float) -> str:
    """Returns 45 s, 12 min or 3 h 20 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


class Lines:
    """Shows the rows of metrics.jsonl as they come, and what held the training up where that is clear."""

    def __init__(self, one: "Job") -> None:
        self.epochs, self.steps = one.run.train.epochs, one.total_steps
        self.console = OUT.console()
        # Started with the first row: a bar has a thread, and ranks may be forked before.
        self.bar = (
            _Bar(catalogue.folder_name(one.run.name), self.steps, self.console) if self.console.is_terminal else None
        )
        self.course = Course(one.run.values)
        self.began = (0, 0.0)  # step and time at which the training that is watched began
        self.latest, self.said = 0.0, ""
        self.directory = one.directory
        # A run that goes on has said before which weights it began with.
        self.told_weights = not one.run.train.init_from or initial.line(one.directory) is not None

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()
        self._advise()

    def __call__(self, row: dict[str, Any]) -> None:
        self.course.add(row)
        if not self.told_weights and row["kind"] != "begin":
            self.told_weights = True
            self._print(initial.line(self.directory) or "")
        if self.bar:
            self.bar.show(row)
        if row["kind"] == "begin":
            self.began = row["step"], time.monotonic()
        elif row["kind"] == "validation":
            self._print(f"epoch {row['epoch']}/{self.epochs}  step {row['step']}  {figures(row)}")
        elif row["kind"] == "train":
            if not self.bar and time.monotonic() - self.latest > INTERVAL:
                self.latest = time.monotonic()
                words = [f"step {row['step']}", figures(row), measured(row), self._time_left(row["step"])]
                self._print("  ".join(word for word in words if word))
            if not self.said:
                self._advise()

    def _time_left(self, step: int) -> str:
        first, began = self.began
        if step <= first or step >= self.steps:
            return ""
        return f"{_left((time.monotonic() - began) / (step - first) * (self.steps - step))} left"

    def _advise(self) -> None:
        """Says what holds the training up: once when it is clear, and at the end if it is something else by then."""
        hint = self.course.hint()
        about = hint.partition(",")[0] if hint else ""
        if hint and about != self.said:
            self.said = about
            self._print(f"hint: {hint}")

    def _print(self, line: str) -> None:
        with unless_full(self.console):
            self.console.print(line, markup=False)


class _Bar:
    """A progress bar over the whole training, with speed, loss and time left."""

    def __init__(self, task: str, steps: int, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(), TextColumn("left"), console=console, transient=True,
        )  # fmt: skip
        self.task = self.progress.add_task(task, total=steps, figures="")

    def stop(self) -> None:
        self.progress.stop()
        sys.breakpointhook = sys.__breakpointhook__

    def _make_way(self, *arguments: Any, **named: Any) -> Any:
        """A breakpoint() in a task: the bar would draw over the debugger."""
        import pdb

        self.stop()
        if os.environ.get("PYTHONBREAKPOINT"):  # a debugger of the user's choice
            return sys.__breakpointhook__(*arguments, **named)
        return pdb.Pdb().set_trace(sys._getframe().f_back)

    def show(self, row: dict[str, Any]) -> None:
        if row["kind"] == "begin":
            self.progress.start()
            sys.breakpointhook = self._make_way
        figure = self.progress.tasks[0].fields["figures"]
        if row["kind"] == "train":
            figure = f"{figures(row, 1)}  {measured(row)}"
        self.progress.update(self.task, completed=row["step"], figures=figure)


class Preparing:
    """Shows the progress of a preparation that takes over a second: a bar in a terminal, now and then a line elsewhere.

    The bar is drawn by whoever tells of progress, never by a thread: processes are forked meanwhile.
    """

    def __init__(self) -> None:
        self.console = OUT.console()
        self.began = self.latest = time.monotonic()
        self.bar: Any = None
        self.stage = ""

    def __enter__(self) -> "Preparing":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()
        if self.console.is_terminal:
            self.console.show_cursor(True)  # a bar of a forked process has hidden it

    def __call__(self, stage: str, done: int, total: int) -> None:
        with unless_full(self.console):
            self._tell(stage, done, total)

    def _tell(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage == "written":
            self.__exit__()
            self.bar = None
            self.console.print(f"preparing data: written {done:,} rows, {now - self.began:.1f} s", markup=False)
        elif self.console.is_terminal and now - self.began > 1:
            self._draw(stage, done, total)
        elif now - self.latest > INTERVAL:
            self.latest = now
            of = f" of {total:,}" if total else ""
            self.console.print(f"preparing data: {stage} {done:,}{of} rows", markup=False)
        flush()

    def _draw(self, stage: str, done: int, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self.bar is None or stage != self.stage:
            if self.bar:
                self.bar.stop()
            self.stage = stage
            self.bar = Progress(
                TextColumn("preparing data: {task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[speed]:,.0f} rows/s"), TimeRemainingColumn(), console=self.console,
                transient=True, auto_refresh=False,
            )  # fmt: skip
            self.bar.add_task(stage, total=total or None, speed=0.0)
            self.bar.start()
        task = self.bar.tasks[0]
        self.bar.update(task.id, completed=done, speed=task.speed or 0.0, refresh=True)


def show_summary(summary: dict[str, Any]) -> None:
    """Prints the figures of a finished run."""
    from rich.table import Table

    metrics = summary["metrics"]
    table = Table()
    table.add_column("split")
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    for name in names:
        table.add_column(name, justify="right")
    for split, values in metrics.items():
        cells = ["-" if values.get(name) is None else f"{values[name]:.4f}" for name in names]
        table.add_row(split, *cells, style="bold" if split == "test" else "")
    epochs = counted(summary["epochs"], "epoch")
    OUT.say(f"best of {epochs} by {summary['objective']}: step {summary['best_step']} of {summary['steps']}")
    OUT.table(table)
    OUT.say(
        f"{summary['seconds']:.1f} s, {summary['samples_per_second']:,.0f} samples/s, "
        f"{counted(summary['parameters'], 'parameter')}, {counted(summary['workers'], 'worker')} on {summary['device']}"
    )
