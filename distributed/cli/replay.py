"""`whipray replay`: one optimizer step of a run, executed again and looked at."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from distributed.cli import options
from distributed.cli.output import FAILED, OK, OUT, counted
from tasks.errors import UserError

if TYPE_CHECKING:
    from distributed.analysis.replay import Replayed

SHOWN = 12  # row numbers of a micro-batch that are shown to a person


def replay(
    run: options.RunName,
    step: Annotated[int, typer.Option(help="Optimizer step, from 0, as failure.json and messages name it.")],
    rank: Annotated[int | None, typer.Option(help="Only the rows of this worker; default: of all workers.")] = None,
    pdb: Annotated[
        bool, typer.Option("--pdb", help="Stop in the debugger before that step, micro-batch by micro-batch.")
    ] = False,
    runs: options.Runs = options.RUNS,
    stores: options.Stores = None,
) -> int:
    """Execute one optimizer step of a run again, in this process on the CPU, with its rows and draws.

    It starts from the newest checkpoint at or before the step, else from the beginning. The run is not changed.
    """
    from distributed import saved

    if pdb and OUT.json:
        raise UserError("--pdb is for a person, --json for a program", "leave one out")
    found = saved.find(run, runs)

    from distributed.analysis import replay as analysis
    from distributed.cli.progress import Preparing
    from distributed.hosts import job

    with Preparing() as progress:
        store = job.prepare(found.run, options.stores_folder(stores), progress=progress)
    begun = analysis.begin(found, store, step)
    for note in begun.notes:
        OUT.say(note)
    start = f"the checkpoint of step {begun.start}" if begun.start else "the beginning"
    OUT.say(f"from {start}: {counted(begun.before, 'step')} before step {step}")
    try:
        told = analysis.replay(found, begun, rank=rank, debugger=pdb)
    except Exception as error:
        rows = getattr(error, "rows", [])
        if rows:
            error.add_note(
                f"as it is executed again: step {step}, rank {error.__dict__['rank']}, training rows {_some(rows)}"
            )
        raise
    _show(told)
    OUT.result(
        {
            "run": str(found.directory), "step": told.step, "epoch": told.epoch, "start": told.start,
            "workers": told.ranks, "losses": told.losses, "gradient_norms": told.gradients, "lr": told.rates,
            "not_finite": told.not_finite or None, "failed": told.failed or None, "difference": told.difference,
            "parts": [{"rank": one.rank, "rows": one.rows, "losses": one.losses} for one in told.parts],
        }
    )  # fmt: skip
    return FAILED if told.failed or told.not_finite else OK


def _show(told: "Replayed") -> None:
    from rich.table import Table

    names = list(dict.fromkeys(name for part in told.parts for name in part.losses))
    table = Table(
        "rank", *names, "training rows", title=f"step {told.step}, epoch {told.epoch}, one line a micro-batch"
    )
    for part in told.parts:
        table.add_row(str(part.rank), *(_number(part.losses.get(name)) for name in names), _some(part.rows))
    OUT.table(table)
    for name, norm in told.gradients.items():
        OUT.say(f"gradient norm of {name}: {_number(norm)}")
    for name, rate in told.rates.items():
        OUT.say(f"learning rate of {name}: {_number(rate)}")
    if told.difference is not None:
        same = "to the bit" if told.difference == 0 else f"within {told.difference:.1e} of itself"
        OUT.say(f"the figures of metrics.jsonl up to this step come out again {same}")
    else:
        OUT.say("metrics.jsonl has no row that ends with this step")
    OUT.say(f"first tensor that is not finite: {told.not_finite}" if told.not_finite else "all tensors are finite")
    if told.failed:
        OUT.say(f"training ends here: {told.failed}")


def _some(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:SHOWN])) + (f" ... ({len(rows)})" if len(rows) > SHOWN else "")


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}"
