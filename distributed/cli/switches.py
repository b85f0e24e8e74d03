"""The switches of `whipray train` that help to find faults: settings that belong together, and what comes of them."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed.cli.output import OUT, counted
from distributed.config import Given, Givens
from tasks.errors import UserError

if TYPE_CHECKING:
    from distributed.hosts.job import Job

BATCHES, EPOCHS = 2, 2  # of a rehearsal
LEARNED = 0.05  # share of the first loss below which rows count as learned by heart
STEPS = 100  # optimizer steps that a few rows get to be learned by heart
PROFILED = 5  # optimizer steps of a warm-up, and of a profile


def applied(task: str, given: Givens, runs: Path, *, fast: bool, profile: bool) -> Givens:
    """Returns the settings with what the switches make of them; raises UserError where two of them contradict."""
    if fast and "data.overfit" in given:
        raise UserError("--fast and --overfit both say which rows are used", "leave one of them out")
    if fast and profile:
        raise UserError("--fast takes too few steps for --profile", "leave one of them out")
    if profile:
        given = {"log.every": Given(PROFILED, "--profile")} | given | {"train.profile": Given(True, "--profile")}
    if not fast and "data.overfit" not in given:
        return given
    from distributed.run import resolve

    run = resolve(task, given, runs)
    if not fast:
        steps = math.ceil((run.data.overfit or 0) / run.data.batch_size)
        epochs = {} if "train.steps" in given else {"train.epochs": Given(math.ceil(STEPS / steps), "--overfit")}
        return epochs | {"log.every": Given(1, "--overfit")} | given
    wanted = {"data.limit": BATCHES * run.data.batch_size, "train.epochs": EPOCHS, "train.steps": None, "log.every": 1}
    changed = [f"{name}={value}" for name, value in wanted.items() if run.values[name] != value]
    OUT.say(f"a rehearsal: {', '.join(changed)}; a stop after the first step, and a resume")
    return given | {name: Given(value, "--fast") for name, value in wanted.items()}


def learned_by_heart(directory: Path) -> dict[str, Any]:
    """Returns the losses of the first and the last row of training figures, and whether it went to about 0."""
    from distributed import record

    losses = [row["loss"] for row in record.read(directory / record.METRICS) if row["kind"] == "train"]
    first, last = losses[0], losses[-1]
    known = first is not None and last is not None
    return {"first_loss": first, "last_loss": last, "learned": bool(known and last <= LEARNED * math.fabs(first))}


def exported(one: "Job") -> dict[str, Any]:
    """Exports what a rehearsal has learned; prints how it went, and returns it as it goes into the result.

    A network that cannot be exported is none the worse for it. Raises RunFailed where the export says something else.
    """
    from distributed.data.store import Store
    from distributed.export.export import export
    from distributed.saved import Saved

    found = Saved(one.directory, one.run, Store(one.store, dict(one.run.task.fields)).facts)
    try:
        made = export(found, one.store, "torch")
    except UserError as error:
        OUT.say(f"not exported: {error.message}")
        return {"export": None}
    OUT.say(f"exported: {made.path}, compared on {counted(made.rows, 'row')}")
    return {"export": str(made.path)}


def tell(run: Any, directory: Path) -> dict[str, Any]:
    """Prints what the switches of a finished run have shown; returns it as it goes into the result."""
    told: dict[str, Any] = {}
    if run.data.overfit:
        told["overfit"] = learned_by_heart(directory)
        rows, (first, last, learned) = counted(run.data.overfit, "row"), told["overfit"].values()
        words = f"the loss of {rows} went from {first:.4g} to {last:.4g}" if first and last is not None else "no losses"
        advice = (
            "the network can learn these rows by heart" if learned
            else "it should come near 0: look at the targets, the loss, optimizer.lr, and whether gradients arrive "
            "(whipray verify)"
        )  # fmt: skip
        OUT.say(f"{words}: {advice}")
    if run.train.profile:
        from distributed.hosts.debugging import PROFILE, TABLE

        table = directory / PROFILE / TABLE
        if table.exists():
            OUT.say(table.read_text("utf-8"))
            told["profile"] = [str(path) for path in sorted((directory / PROFILE).iterdir())]
    return told
