"""`whipray tune`: many trainings of one task over a search space, the best of which wins."""

import random
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distributed.cli import options
from distributed.cli.output import FAILED, INTERRUPTED, OK, OUT
from distributed.config import COMMAND_LINE
from distributed.hosts import sweeps

if TYPE_CHECKING:
    from collections.abc import Callable

    from distributed.hosts.trial import Setup
    from distributed.run import Run
    from distributed.tuning.settings import Trials
    from distributed.tuning.sweep import Row, Sweep
    from search_spaces.space import Space

SAMPLES = 10  # that --show prints


def tune(
    task: options.TaskName,
    settings: options.Words = None,
    space: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="Search space; default: the task's.")] = None,
    trials: Annotated[str | None, typer.Option(help="Trials in all (trials.count).")] = None,
    search: Annotated[str | None, typer.Option(help="tpe, random or grid (trials.search).")] = None,
    scheduler: Annotated[str | None, typer.Option(help="asha or none (trials.scheduler).")] = None,
    workers: options.Workers = None,
    epochs: options.Epochs = None,
    seed: options.Seed = None,
    name: Annotated[str | None, typer.Option(help="Name of the sweep; a name given again goes on with it.")] = None,
    config: options.Config = None,
    runs: options.Runs = options.RUNS,
    stores: options.Stores = None,
    no_ray: options.NoRay = False,
    address: options.Address = None,
    show: Annotated[bool, typer.Option("--show", help="Only show the search space, its size and ten samples.")] = False,
) -> int:
    """Search for the settings with which a task trains best.

    `trials.*` are the settings of the search itself.
    """
    flags = {"count": trials, "search": search, "scheduler": scheduler}
    words = [*(settings or []), *(f"trials.{key}={value}" for key, value in flags.items() if value is not None)]
    given = options.collect(words, config, workers=workers, epochs=epochs, seed=seed)
    search_settings, given = sweeps.trials(given)
    given = options.check(task, given, no_ray=no_ray)
    searched = sweeps.space(task, space)
    sweeps.check_names(searched, given)
    given, searched = sweeps.pin(given, searched, COMMAND_LINE)

    setup = sweeps.setup(task, given, searched, runs, options.stores_folder(stores), name or options.fresh_name())
    run = sweeps.resolve(setup, searched, given)
    if show:
        return _show(searched)
    return _start(setup, searched, search_settings, run, address)


def _show(space: "Space") -> int:
    from rich.table import Table
    from rich.text import Text

    table = Table("setting", "values", "only where", title=Text(f"search space {space.name}"), title_justify="left")
    for row in space.describe():
        table.add_row(*map(Text, row))
    OUT.table(table)
    size = space.size()
    OUT.say(f"{size:,} points" if size is not None else "a continuum of points")
    draw = random.Random(0).random
    samples = [space.sample(draw) for _ in range(SAMPLES)]
    for sample in samples:
        OUT.say("  " + "  ".join(f"{name}={_short(value)}" for name, value in sample.items()))
    rows = [{"name": name, "values": values, "when": when} for name, values, when in space.describe()]
    OUT.result({"space": space.name, "settings": rows, "size": size, "samples": samples})
    return OK


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# ---- running it


def _start(setup: "Setup", space: "Space", search: "Trials", run: "Run", address: str | None) -> int:
    from distributed.cli.progress import Preparing

    train_all = _host(run, address)
    with Preparing() as progress:
        store = sweeps.prepare(setup, space, run, progress)
    sweep = sweeps.opened(setup, space, search, run, store)
    try:
        if sweep.finished:
            OUT.say(f"{setup.directory} is finished already; give another --name")
        else:
            OUT.say(f"{setup.task}: {sweep.total} trials, sweep {setup.directory}")
            with Lines(sweep) as lines:
                interrupted = train_all(sweep, setup, run, lines)
            if interrupted and not sweep.finished:
                OUT.say(f"stopped; the same command with --name {setup.directory.name} goes on")
                OUT.result({"sweep": str(setup.directory), "best": None, "trials": _rows(sweep)})
                return INTERRUPTED
        return _tell(setup, sweep)
    finally:
        sweep.close()


def _host(run: "Run", address: str | None) -> "Callable[[Sweep, Setup, Run, Lines], bool]":
    """Returns who trains the trials; an impossible request is refused before anything is prepared."""
    if run.resources.host == "local":
        from distributed.hosts import local_tune

        local_tune.check(run)
        return local_tune.tune
    from distributed.hosts import ray_tune

    ray_tune.connect(run, address)
    return ray_tune.tune


class Lines:
    """What one sees of a sweep while it runs: the ranked table in a terminal, else a line for every trial that ends."""

    def __init__(self, sweep: "Sweep") -> None:
        self.sweep, self.console = sweep, OUT.console()
        self.live: Any = None  # a rich.live.Live, where there is a terminal

    def __enter__(self) -> "Lines":
        if self.console.is_terminal:
            from rich.live import Live

            self.live = Live(console=self.console, transient=True, refresh_per_second=2, get_renderable=self._table)
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()

    def _table(self) -> Any:
        from distributed.tuning.table import ranked_table

        return ranked_table(self.sweep, limit=max(5, self.console.height - 10))

    def __call__(self, row: "Row") -> None:
        if self.live or row.state == "running":
            return
        figure = "-" if row.value is None else f"{row.value:.4g}"
        ended = sum(one.state != "running" for one in self.sweep.rows.values())
        words = "  ".join(f"{name}={_short(value)}" for name, value in row.settings.items())
        said = f": {row.error}" if row.error else ""
        self.console.print(
            f"[{ended}/{self.sweep.total}] trial {row.trial} {row.state}{said}  {self.sweep.plan.objective} {figure}  "
            f"epochs {row.epoch}  {row.seconds:.1f} s  {words}",
            markup=False,
        )


def _tell(setup: "Setup", sweep: "Sweep") -> int:
    from distributed.tuning.table import ranked_table

    best = sweeps.write(setup, sweep)
    told: dict[str, Any] = {"sweep": str(setup.directory), "best": None}
    table = ranked_table(sweep)
    if not OUT.console().is_terminal:
        table.padding = (0, 1)  # there are no lines between the columns
    OUT.table(table)
    if sweep.plan.space.summary:
        told["summary"] = sweep.summary()
    elif best is None:
        OUT.error(f"{setup.directory}: no trial came to a figure", "failure.json in trials/* there says why")
    else:
        metrics = {"validation": best.metrics, "test": sweeps.test(setup, best.trial)}
        told["best"] = {"trial": best.trial, "settings": best.settings, "metrics": metrics}
        figures = "  ".join(f"{name} {value:.4f}" for name, value in metrics["test"].items() if value is not None)
        OUT.say(f"trial {best.trial} on test, which no trial has seen: {figures}")
    OUT.say(f"sweep: {setup.directory}")
    if best:
        OUT.say(f"next: whipray train {setup.task} --config {setup.directory / 'best.yaml'}")
    from distributed.tuning.sweep import finite

    OUT.result(finite(told | {"trials": _rows(sweep)}))
    return FAILED if best is None and not sweep.plan.space.summary else OK


def _rows(sweep: "Sweep") -> list[dict[str, Any]]:
    return [row.plain() for row in sweep.ranked()]
