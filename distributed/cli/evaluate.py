"""`whipray evaluate`: the figures of a run on one split."""

from typing import Annotated

import typer

from distributed.cli import options
from distributed.cli.output import OUT
from tasks.errors import UserError, did_you_mean

Which = Annotated[str, typer.Option("--checkpoint", metavar="best|last|STEP", help="Checkpoint of the run to use.")]


def evaluate(
    run: options.RunName,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    checkpoint: Which = "best",
    runs: options.Runs = options.RUNS,
    stores: options.Stores = None,
) -> None:
    """Judge a run on one split of its data."""
    from distributed.data.split import SPLITS

    if split not in SPLITS:
        raise UserError(f"unknown split '{split}'", did_you_mean(split, SPLITS))
    from distributed import saved

    found = saved.find(run, runs)

    from rich.table import Table

    from distributed.analysis import evaluate as analysis
    from distributed.cli.progress import Preparing
    from distributed.hosts import job

    with Preparing() as progress:
        store = job.prepare(found.run, options.stores_folder(stores), progress=progress)
    judged = analysis.evaluate(found, store, split, checkpoint)
    table = Table("metric", split, title=f"{found.directory.parent.name}/{found.directory.name}, step {judged.step}")
    table.columns[1].justify = "right"
    for name, value in judged.metrics.items():
        table.add_row(name, "not finite" if value is None else f"{value:.4f}")
    table.caption = f"{judged.rows:,} rows, {judged.seconds:.1f} s on {judged.device}"
    OUT.table(table)
    OUT.result({"run": str(found.directory), "split": split, "metrics": judged.metrics})
