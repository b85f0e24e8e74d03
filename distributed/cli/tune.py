"""`whipray tune`: many trainings of one task over a search space, the best of which wins."""

import random
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distributed import catalogue, config
from distributed.cli import options
from distributed.cli.output import FAILED, INTERRUPTED, OK, OUT
from distributed.config import COMMAND_LINE, Given, Givens
from tasks.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from distributed.hosts.trial import Setup
    from distributed.run import Run
    from distributed.tuning.settings import Trials
    from distributed.tuning.sweep import Row, Sweep
    from search_spaces.space import Space

SAMPLES = 10  # that --show prints
# A sweep decides these once for all trials, or their figures could not be compared.
NOT_VARIED = ("resources.", "train.objective", "log.", "checkpoint.", "trials.")


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
    search_settings, given = _trials(given)
    given = options.check(task, given, no_ray=no_ray)
    searched = _space(task, space)
    _check_names(searched, given)
    # A word of the command line is not varied: the space gives it, so that its condition is kept.
    given, searched = _pin(given, searched)

    from distributed.hosts.trial import Setup

    directory = runs.absolute().parent / "sweeps" / catalogue.folder_name(task) / _checked_name(name)
    free = {key: one for key, one in given.items() if key not in dict(searched.names())}
    setup = Setup(
        task, free, dict(searched.names()), runs.absolute(), options.stores_folder(stores), directory,
        summary=searched.summary is not None,
    )  # fmt: skip
    run = _resolve(setup, searched, given)
    if show:
        return _show(searched)
    return _start(setup, searched, search_settings, run, address)


# ---- reading what is wanted


def _trials(given: Givens) -> "tuple[Trials, Givens]":
    """Takes the settings of the search out of those of the trainings."""
    from distributed.run import machinery
    from distributed.tuning.settings import Trials

    mine = {name: one for name, one in given.items() if name.startswith("trials.")}
    known = config.settings_of(Trials, "trials")
    groups = {name.partition(".")[0] for name in machinery()} | {"task", "trials"}
    for name, one in given.items():
        group = name.partition(".")[0]
        misspelt = group not in groups and did_you_mean(group, groups) == "did you mean 'trials'?"
        if misspelt or (name in mine and name not in known):
            raise UserError(f"unknown setting '{name}' ({one.origin})", did_you_mean(name, known))
    return config.build(Trials, "trials", mine), {name: one for name, one in given.items() if name not in mine}


def _space(task: str, wanted: str | None) -> "Space":
    from search_spaces import files
    from search_spaces.dimensions import SpaceError

    try:
        return files.for_task(catalogue.folder_name(task)) if wanted is None else files.load(wanted)
    except SpaceError as error:
        raise UserError(error.message, error.hint) from None


def _check_names(space: "Space", given: Givens) -> None:
    """Answers a misspelt machinery setting of the space before torch is imported."""
    from distributed.run import check_names

    named = {name: Given(None, f"search space {origin}") for name, origin in space.names()}
    for name, one in named.items():
        if name.startswith(NOT_VARIED):
            raise UserError(f"'{name}' ({one.origin}) cannot be searched: it is the same for all trials",
                            f"give it on the command line: {name}=...")  # fmt: skip
    check_names({name: one for name, one in given.items() if name == "optimizer.name"} | named)


def _pin(given: Givens, space: "Space") -> "tuple[Givens, Space]":
    from search_spaces.dimensions import SpaceError

    pinned = [name for name, _ in space.names() if name in given and given[name].origin == COMMAND_LINE]
    try:
        for name in pinned:
            if name in dict(space.names()):  # a setting that was pinned before may have made it impossible
                space = space.pinned(name, _parsed(name, given[name]))
    except SpaceError as error:
        raise UserError(error.message, error.hint) from None
    if not space.dimensions:
        raise UserError(f"nothing is left to search: {', '.join(pinned)} are given", "leave one out, or whipray train")
    kept = {name: one for name, one in given.items() if name not in pinned or name not in dict(space.names())}
    return kept, space


def _parsed(name: str, one: Given) -> Any:
    """The value of a word: of its type where the machinery knows it, a task's own as YAML reads it."""
    import yaml

    from distributed.run import machinery

    variants = machinery().get(name, [])
    return config.parse(variants[0], one) if variants else yaml.safe_load(str(one.value))


def _checked_name(name: str | None) -> str:
    from distributed.run import check_run_name

    if name is not None:
        check_run_name(name)
    return name or options.fresh_name()


def _resolve(setup: "Setup", space: "Space", given: Givens) -> "Run":
    """Returns the run of the defaults; raises UserError for whatever in the space a trial would stumble over."""
    from distributed.run import resolve

    for point in space.corners():
        setup.run(point)
    fixed = {name: Given(value, f"search space {setup.origins[name]}") for name, value in space.fixed.items()}
    return resolve(setup.task, {**given, **fixed}, setup.runs)


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
    from distributed.hosts import job

    train_all = _host(run, address)
    defaults = {name: run.values[name] for name in space.dimensions if name in run.values}
    first = next(space.grid(1)) if space.summary else {**space.fixed, **defaults}
    with Preparing() as progress:
        store = job.prepare(setup.run(first), setup.stores, progress=progress)
    sweep = _sweep(setup, space, search, run, defaults, store)
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


def _sweep(
    setup: "Setup", space: "Space", search: "Trials", run: "Run", defaults: dict[str, Any], store: Path
) -> "Sweep":
    """Begins the sweep, or opens the one that is there."""
    from distributed import durable
    from distributed.data.store import Store
    from distributed.evaluation import objective
    from distributed.run import MAY_CHANGE
    from distributed.tuning.sweep import Plan, Sweep

    free = {"task.name": run.values["task.name"]}
    for name in setup.given:
        if not name.startswith(MAY_CHANGE) or name.startswith("train."):
            free[name] = run.values[name]
    figure, higher_is_better = objective(run, Store(store, dict(run.task.fields)).facts)
    plan = Plan(space, search, figure, higher_is_better, defaults, free)
    journal = setup.directory / "journal.jsonl"
    if journal.exists():
        return Sweep.resume(journal, plan)
    sweep = Sweep(plan, journal)
    header = f"# search space {space.name} of {setup.task}\n"
    settings = {name: value for name, value in asdict(search).items() if value is not None}
    durable.write(setup.directory / "space.yaml", header + config.to_yaml({"space": space.plain(), "trials": settings}))
    return sweep


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
    from distributed.tuning.table import ranked_table, write_best, write_parquet

    write_parquet(setup.directory / "trials.parquet", sweep)
    best = write_best(setup.directory / "best.yaml", sweep, setup.task)
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
        metrics = {"validation": best.metrics, "test": _test(setup, best.trial)}
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


def _test(setup: "Setup", trial: str) -> dict[str, float | None]:
    """Judges the winner's best checkpoint on the test split."""
    from distributed import saved
    from distributed.analysis.evaluate import evaluate
    from distributed.hosts.trial import prepared

    found = saved.find(str(setup.folder(trial)), setup.runs)
    return evaluate(found, prepared(found.run, setup.stores), "test").metrics
