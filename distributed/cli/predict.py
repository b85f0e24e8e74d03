"""`whipray predict`: what a run says about files."""

from pathlib import Path
from typing import Annotated, Any

import typer

from distributed.cli import options
from distributed.cli.evaluate import Which
from distributed.cli.output import OUT

MOST = 200  # rows that are shown to a person


def predict(
    run: options.RunName,
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Files to predict: pictures or a folder of them, text, tables."),
    ],
    checkpoint: Which = "best",
    runs: options.Runs = options.RUNS,
) -> None:
    """Predict from files with a trained run."""
    from distributed import saved

    found = saved.find(run, runs)

    from rich.table import Table
    from rich.text import Text

    from distributed.analysis import predict as analysis

    predictions = list(analysis.predict(found, files, checkpoint))
    columns = list(dict.fromkeys(name for one in predictions for name in one))
    if all(one["row"] == 1 for one in predictions):
        columns.remove("row")
    table = Table(*columns)
    for one in predictions[:MOST]:
        table.add_row(*(Text(_shown(one.get(name))) for name in columns))
    if len(predictions) > MOST:
        table.caption = f"the first {MOST} of {len(predictions):,} rows; --json gives all"
    OUT.table(table)
    OUT.result({"run": str(found.directory), "predictions": predictions})


def _shown(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
