"""`whipray find`: the learning rate and the size of a micro-batch that suit a task on this machine."""

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from distributed import catalogue
from distributed.cli import options
from distributed.cli.output import FAILED, OK, OUT
from distributed.config import COMMAND_LINE, Givens
from tasks.errors import UserError

app = typer.Typer(help="Find a learning rate, or a size of micro-batches.", rich_markup_mode=None)
# Settings of a training that a search does not come to; a file of them may be given all the same.
LATER = ("train.epochs", "train.steps", "train.patience", "train.objective", "checkpoint.", "log.", "averaging.")


@app.command()
def lr(
    task: options.TaskName,
    settings: options.Words = None,
    entry: Annotated[str | None, typer.Option(help="Optimizer to search for, of a task that has several.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps, each at a higher rate.")] = 100,
    lowest: Annotated[float, typer.Option(help="Rate of the first step.")] = 1e-7,
    highest: Annotated[float, typer.Option(help="Rate of the last step.")] = 10.0,
    out: Annotated[
        Path | None, typer.Option(help="PNG file of the plot, with a JSON file beside it; default: find-lr-TASK.png.")
    ] = None,
    seed: options.Seed = None,
    config: options.Config = None,
    runs: options.Runs = options.RUNS,
    stores: options.Stores = None,
) -> int:
    """Find a learning rate by a range test.

    Trains for some steps while the rate rises, and shows where the loss falls most. Touches no run.
    """
    given = options.check(task, options.collect(settings, config, seed=seed))
    own = f"optimizer.{entry}.lr" if entry else "optimizer.lr"
    _refuse(given, own, "is what is looked for")
    _refuse(given, "schedule.", "does not act in a range test: the rate rises from step to step")
    _refuse(given, "resources.workers", "does not act here: one process learns, and the batch is the same")
    if out is not None and out.suffix != ".png":
        raise UserError(f"--out {out}: the plot is a PNG file", f"--out {out.with_suffix('.png')}")
    run = _resolved(task, given, runs, "find lr")
    out = (out or Path(f"find-lr-{catalogue.folder_name(run.name)}.png")).absolute()
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}", "make it, or name another file")

    from distributed import durable
    from distributed.analysis import finders

    finders.check(run, entry, steps, lowest, highest)  # before the data are prepared, which may take long
    store = _prepared(run, stores)
    found = finders.learning_rate(run, store, entry=entry, steps=steps, lowest=lowest, highest=highest)
    suggestion = found.suggestion
    told = {
        "task": run.name, "entry": found.entry, "suggestion": suggestion, "lowest": found.lowest,
        "diverged": found.diverged,
        "rates": found.rates, "losses": found.losses, "smoothed": found.smooth, "plot": str(out),
    }  # fmt: skip
    durable.write(out, finders.plot(found, f"{catalogue.folder_name(run.name)}, {len(found.rates)} steps"))
    durable.write_json(out.with_suffix(".json"), told)
    _show_curve(found)
    OUT.say(f"plot: {out}")
    if suggestion is None:
        OUT.say("no suggestion: the loss falls at no rate by more than it scatters; give more --steps, or look at data")
    else:
        OUT.say(f"the loss falls most at {suggestion:.2g}: {own}={suggestion:.2g}")
        OUT.say(f"it is lowest at {found.lowest:.2g}; a tenth of that is the other usual choice")
    OUT.result(told)
    return FAILED if suggestion is None else OK


@app.command()
def batch(
    task: options.TaskName,
    settings: options.Words = None,
    workers: options.Workers = None,
    config: options.Config = None,
    runs: options.Runs = options.RUNS,
    stores: options.Stores = None,
) -> None:
    """Find the largest micro-batch that fits the memory, and the quickest.

    The global batch, data.batch_size, stays as it is. Touches no run.
    """
    given = options.check(task, options.collect(settings, config, workers=workers))
    _refuse(given, "data.micro_batch_size", "is what is looked for")
    run = _resolved(task, given, runs, "find batch")
    store = _prepared(run, stores)

    from distributed.analysis import room

    found = room.micro_batch(run, store, show=_show_probe)
    exact = run.task.invariance == "exact"
    _advise(run, found, exact=exact)
    OUT.result(
        {
            "task": run.name, "batch_size": run.data.batch_size, "share": found.share, "largest": found.largest,
            "quickest": found.quickest, "whole": found.largest == found.share, "would_fit": found.would_fit,
            "exact": exact, "probes": [vars(probe) for probe in found.probes],
        }
    )  # fmt: skip


def _refuse(given: Givens, name: str, why: str) -> None:
    for one, value in given.items():
        if (one == name or (name.endswith(".") and one.startswith(name))) and value.origin == COMMAND_LINE:
            raise UserError(f"{one} ({value.origin}) {why}", "leave it out")


def _resolved(task: str, given: Givens, runs: Path, verb: str) -> Any:
    """The run whose settings are given, which this machine can hold."""
    for name in LATER:
        _refuse(given, name, f"does not act in `whipray {verb}`")
    from distributed import weights
    from distributed.hosts import local
    from distributed.run import resolve

    run = resolve(task, given, runs)
    local.check_device(run)
    if run.train.init_from:
        weights.check(run.train.init_from, run.runs)
    return run


def _prepared(run: Any, stores: Path | None) -> Path:
    """The store of a run, prepared in a process of its own, since processes are forked later."""
    from distributed.cli.progress import Preparing
    from distributed.hosts import job, local

    with Preparing() as progress:
        return local.elsewhere(functools.partial(job.prepare, run, options.stores_folder(stores), progress=progress))


def _show_curve(found: Any, lines: int = 20) -> None:
    """Prints the smoothed loss as bars, at rates that are evenly spread."""
    from rich.table import Table

    curve, best = found.smooth, found.suggestion
    if not curve:
        return
    every = max(1, len(curve) // lines)
    shown = list(range(0, len(curve), every))
    marked = min(shown, key=lambda i: abs(i - found.rates.index(best))) if best else None
    low, high = min(curve), max(curve)
    table = Table("learning rate", "loss", "")
    table.columns[0].justify = table.columns[1].justify = "right"
    for i in shown:
        bar = "█" * round(1 + 39 * (curve[i] - low) / max(high - low, 1e-12))
        table.add_row(f"{found.rates[i]:.1e}", f"{curve[i]:.4g}", bar + ("  <- falls most" if i == marked else ""))
    OUT.table(table)


def _show_probe(probe: Any) -> None:
    size = "" if probe.memory is None else f"{probe.memory / 2**20:10,.0f} MiB"
    end = f"{size}  {probe.speed:12,.0f} rows/s" if probe.fits else f"  no: {probe.why}"
    OUT.say(f"data.micro_batch_size={probe.rows:<8}{end}")


def _advise(run: Any, found: Any, *, exact: bool) -> None:
    if found.largest == found.share:
        OUT.say(f"the whole batch of {found.share} rows a worker fits: data.micro_batch_size need not be set")
        if found.would_fit is not None and found.would_fit > found.share:
            OUT.say(f"the memory would hold about {found.would_fit:,} rows; another data.batch_size learns otherwise")
    else:
        OUT.say(f"largest that fits: data.micro_batch_size={found.largest}")
    if found.quickest != found.largest:
        OUT.say(f"quickest: data.micro_batch_size={found.quickest}")
    OUT.say(
        f"it changes memory and speed alone: data.batch_size={run.data.batch_size} stays"
        if exact
        else f"data.batch_size={run.data.batch_size} stays; but this task is not exact: {run.task.invariance}"
    )
