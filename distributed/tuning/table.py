"""What a sweep shows and leaves behind: the ranked table, best.yaml, trials.parquet."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from distributed import durable
from distributed.config import to_yaml
from distributed.tuning.sweep import Row, Sweep, finite, flat
from search_spaces.dimensions import Value, same

STYLES = {"running": "cyan", "done": "", "stopped": "dim", "failed": "red"}


def ranked_table(sweep: Sweep, limit: int | None = None) -> Table:
    """Returns the table of trials, best first, live or final; with a limit the best and all that are running."""
    ranked = sweep.ranked()
    shown = [row for rank, row in enumerate(ranked) if limit is None or rank < limit or row.state == "running"]
    settings = varied(ranked)
    best = sweep.best()
    table = Table(
        title=Text(headline(sweep)),
        title_justify="left",
        caption=Text(caption(sweep, len(ranked) - len(shown))),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        show_edge=False,  # five settings fit into 80 columns
    )
    table.add_column("trial", no_wrap=True)
    for title in [*titles(settings), sweep.plan.objective, "epochs"]:
        table.add_column(Text(title.replace("_", "_\n")), justify="right")
    table.add_column("state", no_wrap=True)
    table.add_column("time", justify="right")
    for row in shown:
        winner = best is not None and row.trial == best.trial
        cells = [cell(row.settings[name], 3) if name in row.settings else "-" for name in settings]
        seconds = f"{row.seconds:.1f} s" if row.state != "running" else ""
        mark = "*" if winner else "=" if row.baseline else ""
        texts = [f"{row.trial}{mark}", *cells, cell(row.value), str(row.epoch), row.state, seconds]
        table.add_row(*map(Text, texts), style="bold green" if winner else STYLES[row.state])
    return table


def headline(sweep: Sweep) -> str:
    states: Counter[str] = Counter(row.state for row in sweep.rows.values())
    counts = ", ".join(f"{states[state]} {state}" for state in STYLES if states[state])
    return f"{len(sweep.rows)} of {sweep.total} trials{f': {counts}' if counts else ''}"


def caption(sweep: Sweep, hidden: int) -> str:
    lines = [f"{hidden} more are not shown"] if hidden else []
    if sweep.plan.space.summary:
        lines += [
            f"{name}: {cell(figures['mean'])} +- {cell(figures['spread'])} over {figures['trials']} trials"
            for name, figures in sweep.summary().items()
        ]
    else:
        best = sweep.best()
        if best is not None:
            lines.append(f"* the winner{', the defaults' if best.baseline else ''}: trial {best.trial}")
        if any(row.baseline for row in sweep.rows.values()) and not (best is not None and best.baseline):
            lines.append("= the defaults")
    if sweep.note:
        lines.append(sweep.note)
    return "\n".join(lines)


def varied(rows: list[Row]) -> list[str]:
    """Returns the settings in which the trials differ, in the order of the space."""
    names = dict.fromkeys(name for row in sorted(rows, key=lambda row: row.trial) for name in row.settings)
    first = rows[0].settings if rows else {}
    return [
        name
        for name in names
        if len(rows) == 1
        or any(
            (name in row.settings) != (name in first) or (name in first and not same(row.settings[name], first[name]))
            for row in rows
        )
    ]


def titles(settings: list[str]) -> list[str]:
    """Returns the last part of each dotted name, the whole name where that would be ambiguous."""
    last = Counter(name.rpartition(".")[2] for name in settings)
    return [name if last[name.rpartition(".")[2]] > 1 else name.rpartition(".")[2] for name in settings]


def cell(value: Value, digits: int = 4) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def write_best(path: Path, sweep: Sweep, task: str) -> Row | None:
    """Writes the winner's settings as a file for `--config`; returns its row, or None where nothing won."""
    best = sweep.best()
    if best is None:
        return None
    figure = f"{sweep.plan.objective} {cell(best.value)} on validation within {best.epoch} epochs"
    lines = [
        f"trial {best.trial}{' (the defaults)' if best.baseline else ''}, best of {len(sweep.rows)}: {figure}",
        f"whipray train {task} --config {path}",
    ]
    settings = {**sweep.plan.base, **best.settings}
    durable.write(path, "".join(f"# {' '.join(line.split())}\n" for line in lines) + to_yaml(settings))
    return best


def write_parquet(path: Path, sweep: Sweep) -> None:
    """Writes all trials, best first: one column a setting and a metric, under their dotted and slashed names."""
    import pyarrow
    from pyarrow import parquet

    rows = [as_columns(row) for row in sweep.ranked()]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: column([row.get(name) for row in rows]) for name in names}
    unknown = [name for name, values in columns.items() if all(value is None for value in values)]
    table = pyarrow.table(columns | {name: pyarrow.nulls(len(rows), pyarrow.string()) for name in unknown})
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    durable.write(path, sink.getvalue().to_pybytes())


def as_columns(row: Row) -> dict[str, Any]:
    own = ("trial", "baseline", "state", "value", "epoch", "seconds", "error", "directory")
    return {name: getattr(row, name) for name in own} | row.settings | flat(row.metrics, "/")


def column(values: list[Any]) -> list[Any]:
    """Returns values of one type: numbers as they are, all as floats if some are; anything mixed as JSON text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    if len(kinds) <= 1 and kinds <= {bool, int, float, str}:
        return values
    return [None if value is None else json.dumps(finite(value)) for value in values]
