"""`whipray doctor`: what this machine has, what is missing, and how to get it."""

import os
from pathlib import Path

from distributed.cli import options
from distributed.cli.output import FAILED, OK, OUT


def doctor(runs: options.Runs = options.RUNS, stores: options.Stores = None) -> int:
    """Look at what this machine has and lacks.

    Packages, devices, memory, disk and Ray; exit code 1 if something essential is missing.
    """
    from rich.table import Table
    from rich.text import Text

    from distributed.analysis import machine

    told = machine.examine(
        runs.absolute(), options.stores_folder(stores), os.environ.get("RAY_ADDRESS"), Path(__file__).parents[2]
    )
    table = Table("what", "found")
    for name, value in told["found"].items():
        table.add_row(Text(name, "bold"), Text(value))
    OUT.table(table)
    for problem in told["problems"]:
        word = "missing" if problem["essential"] else "note"
        OUT.say(f"{word}: {problem['message']}\n  {problem['hint']}")
    OUT.say("all that is needed is here" if told["ok"] else "something essential is missing")
    OUT.result(told)
    return OK if told["ok"] else FAILED
