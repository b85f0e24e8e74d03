"""`whipray verify`: does a task keep what the engine relies on? The whole life of it, in seconds."""

from distributed.cli import options
from distributed.cli.output import FAILED, OK, OUT


def verify(
    task: options.TaskName,
    settings: options.Words = None,
    config: options.Config = None,
    runs: options.Runs = options.RUNS,
    stores: options.Stores = None,
) -> int:
    """Check a task: trains it in miniature, in several ways, and compares. Without Ray, on the CPU.

    A step, its gradients and its repetition, an evaluation, a kill and a resume, micro-batches, 2 and 3 workers.
    """
    given = options.check(task, options.collect(settings, config))

    from rich.table import Table
    from rich.text import Text

    from distributed.hosts import verify as host

    run = host.small(task, given, runs)
    checks = []
    table = Table("check", "", "seen", title=f"whipray verify {task}")
    for check in host.verify(run, options.stores_folder(stores)):
        checks.append(check)
        mark = Text("-") if check.ok is None else Text("ok", "green") if check.ok else Text("FAILED", "bold red")
        table.add_row(Text(check.name), mark, Text(check.seen))
    failed = [check.name for check in checks if check.ok is False]
    OUT.table(table)
    OUT.say(f"failed: {', '.join(failed)}" if failed else "all that could be checked is as it must be")
    OUT.result(
        {
            "task": run.name,
            "ok": not failed,
            "checks": [{"name": one.name, "ok": one.ok, "seen": one.seen} for one in checks],
        }
    )
    return FAILED if failed else OK
