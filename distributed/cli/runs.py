"""`whipray runs`: the runs of a folder, filtered, sorted and tagged."""

from typing import TYPE_CHECKING, Annotated

import typer

from distributed.cli import options
from distributed.cli.output import OUT, counted

if TYPE_CHECKING:
    from distributed.analysis.runs import Entry

STYLES = {"training now": "green", "unfinished": "yellow"}


def runs(
    names: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Only these runs.")] = None,
    runs: options.Runs = options.RUNS,
    task: Annotated[str | None, typer.Option(help="Only runs of this task.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only runs with this tag.")] = None,
    filter: Annotated[
        list[str] | None, typer.Option(metavar="CONDITION", help="Such as 'optimizer.name=adam' or 'accuracy>0.9'.")
    ] = None,
    sort: Annotated[
        str | None, typer.Option(metavar="NAME", help="Metric (accuracy, test/loss), setting or column: best first.")
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="The other way round.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = None,
    add_tag: Annotated[list[str] | None, typer.Option(metavar="TAG", help="Tag the named runs.")] = None,
    remove_tag: Annotated[list[str] | None, typer.Option(metavar="TAG", help="Take a tag from the named runs.")] = None,
) -> None:
    """List, filter, sort and tag runs.

    With the figures of their best checkpoints: validation decided which one that is.
    """
    from distributed import catalogue, saved
    from distributed.analysis import runs as analysis
    from distributed.run import check_run_name
    from tasks.errors import UserError, did_you_mean

    directories = [saved.locate(name, runs) for name in names or []]
    if add_tag or remove_tag:
        for one in add_tag or []:
            check_run_name(one)
        if not directories:
            raise UserError("which runs are to be tagged?", "whipray runs --add-tag TAG RUN...")
        for directory in directories:
            analysis.tag(directory, add_tag or [], remove_tag or [])
    found = [analysis.entry(directory, runs) for directory in directories] if names else analysis.listed(runs)
    everything = found
    if task is not None:
        folder = catalogue.folder_name(task)
        found = [one for one in found if one.task == folder]
        if not found and task not in catalogue.listed() and ":" not in task:
            raise UserError(
                f"no run is of a task '{task}'",
                did_you_mean(task, [*catalogue.listed(), *(one.task for one in everything)]),
            )
    for wanted in tag or []:
        found = [one for one in found if wanted in one.tags]
    found = analysis.matching(found, filter or [])
    if sort is not None:
        found = analysis.ordered(found, sort, reverse=reverse)
    elif reverse:
        found = found[::-1]
    shown = found[:limit]
    _print(shown, sort)
    if not everything:
        OUT.say(f"no runs in {runs.absolute()}; `whipray train digits` makes one")
    elif len(shown) < len(everything):
        OUT.say(f"{len(shown)} of {len(everything)} runs")
    OUT.result({"runs": [one.to_json() for one in shown]})


def _print(shown: "list[Entry]", sort: str | None) -> None:
    from rich.table import Table
    from rich.text import Text

    if not shown:
        return
    metrics = {name for one in shown for values in one.metrics.values() for name in values}
    metric = sort.rpartition("/")[2] if sort else ""
    extra = [sort] if sort and metric not in metrics and sort not in shown[0].to_json() else []
    table = Table("run", "state", "epochs", "metric", "validation", "test", *extra, "began", "seconds", "tags")
    table.columns[0].no_wrap = True
    for one in shown:
        name = metric if metric in metrics else one.objective
        figures = [one.value(f"{split}/{name}") for split in ("validation", "test")]
        figures += [one.value(wanted) for wanted in extra]
        began, seconds = one.time[:16].replace("T", " "), "-" if one.seconds is None else f"{one.seconds:.1f}"
        state = f"{one.state}, {counted(one.failures, 'failure')}" if one.failures else one.state
        cells = [one.name, state, str(one.epochs), name, *map(_figure, figures), began, seconds, " ".join(one.tags)]
        table.add_row(*map(Text, cells), style=STYLES.get(one.state, ""))
    OUT.table(table)


def _figure(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
