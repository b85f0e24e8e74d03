"""`whipray export`: a run's network as a file for other programs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from distributed.cli import options
from distributed.cli.evaluate import Which
from distributed.cli.output import OUT


def export(
    run: options.RunName,
    to: Annotated[
        Literal["torch", "torchscript", "onnx"], typer.Option(help="torch.export's archive, TorchScript, or ONNX.")
    ] = "torch",
    out: Annotated[Path | None, typer.Option(help="File to write; default: in the run's folder export/.")] = None,
    checkpoint: Which = "best",
    runs: options.Runs = options.RUNS,
    stores: options.Stores = None,
) -> None:
    """Write a run's network in a format of others, after a comparison on real rows."""
    from distributed import saved

    found = saved.find(run, runs)

    from distributed.cli.progress import Preparing
    from distributed.export import export as exporting
    from distributed.hosts import job

    with Preparing() as progress:
        store = job.prepare(found.run, options.stores_folder(stores), progress=progress)
    made = exporting.export(found, store, to, out, checkpoint)
    inputs = ", ".join(f"{name} {one['dtype']} {_shape(one)}" for name, one in made.inputs.items())
    outputs = ", ".join(f"{one['dtype']} {_shape(one)}" for one in made.outputs)
    OUT.say(
        f"{made.path}: {made.bytes / 1e6:.2f} MB, step {made.step}\n"
        f"takes {inputs}; gives {outputs}\n"
        f"differs from the network by {made.difference:.1e} of the largest output, on {made.rows} rows"
    )
    OUT.result({
        "run": str(found.directory), "path": str(made.path), "to": to, "step": made.step, "inputs": made.inputs,
        "outputs": made.outputs, "difference": made.difference, "rows": made.rows,
    })  # fmt: skip


def _shape(one: dict) -> str:
    return f"({', '.join(map(str, one['shape']))})"
