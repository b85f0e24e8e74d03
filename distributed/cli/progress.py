"""What a person sees of a training: a bar in a terminal, clean lines elsewhere, and a table at the end."""

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from distributed import catalogue
from distributed.cli.output import OUT, counted

if TYPE_CHECKING:
    from distributed.hosts.job import Job

INTERVAL = 5.0  # seconds between two lines of training figures where there is no terminal
NOT_FIGURES = ("kind", "epoch", "step", "time", "samples_per_second", "lr")


def figures(row: dict[str, Any], most: int = 4) -> str:
    """Returns the figures of a row in one line."""
    shown = [(n, v) for n, v in row.items() if n not in NOT_FIGURES and not n.startswith("lr/") and v is not None]
    return "  ".join(f"{name} {value:.4g}" for name, value in shown[:most])


class Lines:
    """Shows the rows of metrics.jsonl as they come."""

    def __init__(self, one: "Job") -> None:
        self.epochs = one.run.train.epochs
        self.console = OUT.console()
        # Started with the first row: a bar has a thread, and ranks may be forked before.
        self.bar = (
            _Bar(catalogue.folder_name(one.run.name), one.total_steps, self.console)
            if self.console.is_terminal
            else None
        )
        self.latest, self.lost = 0.0, False

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, row: dict[str, Any]) -> None:
        if self.bar:
            self.bar.show(row)
        if row["kind"] == "validation":
            self._print(f"epoch {row['epoch']}/{self.epochs}  step {row['step']}  {figures(row)}")
        elif row["kind"] == "train" and not self.bar and time.monotonic() - self.latest > INTERVAL:
            self.latest = time.monotonic()
            speed = f"  {row['samples_per_second']:,.0f} samples/s" if "samples_per_second" in row else ""
            self._print(f"step {row['step']}  {figures(row)}{speed}")

    def _print(self, line: str) -> None:
        if self.lost:
            return
        try:
            self.console.print(line, markup=False)
        except (BrokenPipeError, SystemExit):  # rich leaves the program when nobody reads any more
            self.lost = True
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - for as long as the process lives


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
            speed = f"{row['samples_per_second']:,.0f} samples/s" if "samples_per_second" in row else ""
            figure = f"{figures(row, 1)}  {speed}"
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
        sys.stdout.flush()

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
