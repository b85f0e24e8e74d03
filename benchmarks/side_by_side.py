"""Measures several ways of doing one thing in turns, in one run on one machine: only such a ratio counts.

Each way lives in a process of its own, so that none has another's settings of memory, threads or caches.
"""

import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

Measure = Callable[[], float]  # takes one figure
Contender = Callable[[], Measure]  # gets ready, in its own process, and returns what takes the figures
FORK = multiprocessing.get_context("fork")  # what a contender works on is made once, and inherited
BATCHES = 3  # of a figure, at least: those of several workers come in bursts
SMALLER_IS_BETTER = ("ms", "s", "MiB")


@dataclass(frozen=True)
class Figures:
    """What one contender reached."""

    values: list[float]  # one a round
    name: str = ""  # of the variant that was best
    beaten: str = ""  # the other variants, and what they reached in the first round

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Row:
    """One line of a benchmark: ours and a peer, measured in turns; no peer, where it is not installed."""

    name: str
    unit: str
    ours: Figures
    peer: Figures | None
    peer_name: str
    at_least: float | None = None  # the ratio that is aimed at
    at_most: float | None = None  # the figure that is aimed at, in `unit`
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times better ours is than the peer, by the medians."""
        return self._ratio(self.ours.median, self.peer.median) if self.peer else None

    def _ratio(self, ours: float, peer: float) -> float:
        return peer / ours if self.unit in SMALLER_IS_BETTER else ours / peer

    @property
    def spread(self) -> str:
        """The smallest and the largest ratio of any round."""
        if not self.peer:
            return ""
        ratios = [self._ratio(*pair) for pair in zip(self.ours.values, self.peer.values, strict=True)]
        return f"{_short(min(ratios))} .. {_short(max(ratios))}"

    @property
    def met(self) -> bool | None:
        if self.at_most is not None:
            return self.ours.median <= self.at_most
        return None if self.at_least is None or self.ratio is None else self.ratio >= self.at_least

    @property
    def target(self) -> str:
        if self.at_most is not None:
            return f"<= {_short(self.at_most)} {self.unit}"
        return "" if self.at_least is None else f">= {_short(self.at_least)} x"


# ---- measuring


def in_turns(contenders: Mapping[str, Mapping[str, Contender]], rounds: int) -> dict[str, Figures]:
    """Returns the figures of each contender: one a round, all contenders after one another in every round.

    A contender may have variants, such as a number of workers: the one with the largest figure of a round that is
    not counted, in which all get warm, stands for it. One without variants is not installed, and left out.
    """
    with contextlib.ExitStack() as stack:
        chosen: dict[str, Measure] = {}
        figures: dict[str, Figures] = {}
        for name, variants in contenders.items():
            measures = {key: stack.enter_context(in_process(f"{name} {key}", one)) for key, one in variants.items()}
            reached = {key: measure() for key, measure in measures.items()}
            if not reached:
                continue
            best = max(reached, key=lambda key: reached[key])
            others = ", ".join(f"{key}: {_short(value)}" for key, value in reached.items() if key != best)
            figures[name], chosen[name] = Figures([], best, others), measures[best]
        for _ in range(rounds):
            for name, measure in chosen.items():
                figures[name].values.append(measure())
    return figures


@contextlib.contextmanager
def in_process(name: str, contender: Contender) -> Iterator[Measure]:
    """Gets a contender ready in a process of its own; what is yielded takes figures there."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=_serve, args=(there, contender))
    process.start()
    there.close()

    def measure() -> float:
        try:
            here.send(True)
            return here.recv()
        except (EOFError, BrokenPipeError):
            raise SystemExit(f"{name}: failed, see above") from None

    try:
        yield measure
    finally:
        with contextlib.suppress(BrokenPipeError):
            here.send(False)
        process.join(timeout=10)
        process.kill()


def _serve(connection: Any, contender: Contender) -> None:
    measure = contender()
    while connection.recv():
        connection.send(measure())


def rate(batches: Callable[[], Iterable[Any]], main: Callable[[Any], Any], seconds: float, untimed: int = 1) -> Measure:
    """Returns what measures rows per second of the endless `batches()`, begun anew for each figure.

    `main(batch)` is what has one entry a row; the first number of the first one is looked at. `untimed` batches go
    before: as many as workers have ready before anybody asks.
    """

    def measure() -> float:
        rows, start = 0, 0.0
        for number, batch in enumerate(batches()):
            values = main(batch)
            values[0][(0,) * values[0].ndim].item()
            if number < untimed:
                start = time.perf_counter()
                continue
            rows += len(values)
            if (took := time.perf_counter() - start) >= seconds and number - untimed >= BATCHES:
                return rows / took
        raise AssertionError("the batches ended")

    return measure


def speed(steps: Iterator[int], seconds: float, untimed: int = 1, least: int = BATCHES) -> Measure:
    """Returns what measures rows per second of endless steps, each of which tells how many rows it had.

    A step of no rows is something else in between, and not counted; nor are the first `untimed` ones of a figure.
    """

    def measure() -> float:
        for _ in range(untimed):
            next(steps)
        rows, took, counted = 0, 0.0, 0
        while took < seconds or counted < least:
            start = time.perf_counter()
            if one := next(steps):
                rows, took, counted = rows + one, took + time.perf_counter() - start, counted + 1
        return rows / took

    return measure


def duration(action: Callable[[], Any]) -> Measure:
    """Returns what measures the milliseconds that `action` takes."""

    def measure() -> float:
        start = time.perf_counter()
        kept = action()
        took = 1e3 * (time.perf_counter() - start)
        del kept  # the end of workers is no part of it
        return took

    return measure


def pin(cores: int) -> None:
    """Keeps this process, and all that it will start, to so many cores; does nothing where that cannot be done."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


# ---- telling


def report(title: str, rows: Iterable[Row], *, as_json: bool, packages: Iterable[str] = ()) -> None:
    """Prints rows as a table, with the machine and the versions of `packages`; or nothing but the agreed JSON."""
    rows = list(rows)
    if as_json:
        print(json.dumps({"rows": [_plain(row) for row in rows]}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("row", "ours", "peer", "", "ratio", "of rounds", "target", "", title=title, title_justify="left")
    for row in rows:
        peer = _short(row.peer.median) if row.peer else "missing"
        name = f"{row.peer_name} ({row.peer.name})" if row.peer and row.peer.name else row.peer_name
        ratio = f"{_short(row.ratio)} x" if row.ratio else ""
        verdict = {True: "met", False: "[bold]missed[/]", None: ""}[row.met]
        ours = f"{_short(row.ours.median)} {row.unit}"
        table.add_row(row.name, ours, peer, name, ratio, row.spread, row.target, verdict)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for row in rows:
        beaten = f"{row.peer_name}, {row.peer.beaten}" if row.peer and row.peer.beaten else ""
        if told := "; ".join(part for part in (row.note, beaten) if part):
            console.print(f"{row.name}: {told}")
    console.print(machine(packages))


def _plain(row: Row) -> dict[str, Any]:
    peer = row.peer.median if row.peer else None
    name = f"{row.peer_name} ({row.peer.name})" if row.peer and row.peer.name else row.peer_name
    return {
        "name": row.name, "ours": row.ours.median, "peer": peer, "peer_name": name, "ratio": row.ratio,
        "unit": row.unit,
    }  # fmt: skip


def machine(packages: Iterable[str] = ()) -> str:
    """Returns cores, processor and versions, on one line."""
    cores = os.cpu_count()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    versions = [f"{name} {metadata.version(name)}" for name in packages if _is_installed(name)]
    return ", ".join([f"{cores} cores of {processor}", f"Python {platform.python_version()}", *versions])


def _is_installed(name: str) -> bool:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(name))
    return False


def _short(number: float) -> str:
    """Three figures, which is what a measurement is good for."""
    if number >= 100:
        digits = 10 ** max(0, len(str(int(number))) - 3)
        return f"{round(number / digits) * digits:,}"
    return f"{number:.3g}"
