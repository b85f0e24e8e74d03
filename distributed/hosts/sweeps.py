"""How a sweep is put together and brought to its end: what the command and Python both do.

What is misspelt is refused before torch is imported.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import catalogue, config
from distributed.config import Given, Givens
from tasks.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from distributed.hosts.trial import Setup
    from distributed.run import Run
    from distributed.tuning.settings import Trials
    from distributed.tuning.sweep import Row, Sweep
    from search_spaces.space import Space

# A sweep decides these once for all trials, or their figures could not be compared.
NOT_VARIED = ("resources.", "parallel.", "train.objective", "log.", "checkpoint.", "trials.")


def trials(given: Givens) -> "tuple[Trials, Givens]":
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


def space(task: str, wanted: str | Mapping[str, Any] | None) -> "Space":
    """Returns a search space: of a file or a name, of plain data as such a file holds them, or the task's own."""
    from search_spaces import files
    from search_spaces.dimensions import SpaceError
    from search_spaces.space import space_of

    try:
        if wanted is None:
            return files.for_task(catalogue.folder_name(task))
        if isinstance(wanted, str):
            return files.load(wanted)
        return space_of(wanted, "given", dict.fromkeys(wanted, "given"))
    except SpaceError as error:
        raise UserError(error.message, error.hint) from None


def check_names(space: "Space", given: Givens) -> None:
    """Answers a misspelt machinery setting of the space before torch is imported."""
    from distributed.run import check_names

    named = {name: Given(None, f"search space {origin}") for name, origin in space.names()}
    for name, one in named.items():
        if name.startswith(NOT_VARIED):
            raise UserError(f"'{name}' ({one.origin}) cannot be searched: it is the same for all trials",
                            f"give it beside the space: {name}=...")  # fmt: skip
    check_names({name: one for name, one in given.items() if name == "optimizer.name"} | named)


def pin(given: Givens, space: "Space", origin: str) -> "tuple[Givens, Space]":
    """Keeps what was given there from being varied: the space gives it, so that its condition is kept."""
    from search_spaces.dimensions import SpaceError

    pinned = [name for name, _ in space.names() if name in given and given[name].origin == origin]
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
    if variants:
        return config.parse(variants[0], one)
    return yaml.safe_load(str(one.value)) if one.text else one.value


def setup(task: str, given: Givens, space: "Space", runs: Path, stores: Path, name: str) -> "Setup":
    """Returns what the trials share; raises UserError for a name that no sweep can have."""
    from distributed.hosts.trial import Setup
    from distributed.run import check_run_name

    check_run_name(name)
    directory = runs.absolute().parent / "sweeps" / catalogue.folder_name(task) / name
    origins = dict(space.names())
    free = {key: one for key, one in given.items() if key not in origins}
    return Setup(task, free, origins, runs.absolute(), stores, directory, summary=space.summary is not None)


def resolve(setup: "Setup", space: "Space", given: Givens) -> "Run":
    """Returns the run of the defaults; raises UserError for whatever in the space a trial would stumble over."""
    from distributed import weights
    from distributed.run import resolve

    begun = (setup.directory / "journal.jsonl").exists()
    for point in space.corners():
        run = setup.run(point)
        if run.train.init_from and not begun:
            weights.check(run.train.init_from, run.runs)
    fixed = {name: Given(value, f"search space {setup.origins[name]}") for name, value in space.fixed.items()}
    return resolve(setup.task, {**given, **fixed}, setup.runs)


def defaults(space: "Space", run: "Run") -> dict[str, Any]:
    """Returns the settings of trial 0000."""
    return {name: run.values[name] for name in space.dimensions if name in run.values}


def prepare(setup: "Setup", space: "Space", run: "Run", progress: Callable[[str, int, int], None]) -> Path:
    """Returns the store that the trials share, prepared now where it is not there yet."""
    from distributed.hosts import job

    first = next(space.grid(1)) if space.summary else {**space.fixed, **defaults(space, run)}
    return job.prepare(setup.run(first), setup.stores, progress=progress)


def opened(setup: "Setup", space: "Space", search: "Trials", run: "Run", store: Path) -> "Sweep":
    """Begins the sweep, or opens the one that is there; raises UserError where that is one of another plan."""
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
    plan = Plan(space, search, figure, higher_is_better, defaults(space, run), free)
    journal = setup.directory / "journal.jsonl"
    if journal.exists():
        return Sweep.resume(journal, plan)
    sweep = Sweep(plan, journal)
    header = f"# search space {space.name} of {setup.task}\n"
    settings = {name: value for name, value in asdict(search).items() if value is not None}
    durable.write(setup.directory / "space.yaml", header + config.to_yaml({"space": space.plain(), "trials": settings}))
    return sweep


def write(setup: "Setup", sweep: "Sweep") -> "Row | None":
    """Writes trials.parquet and best.yaml; returns the winner, None where there is none."""
    from distributed.tuning.table import write_best, write_parquet

    write_parquet(setup.directory / "trials.parquet", sweep)
    return write_best(setup.directory / "best.yaml", sweep, setup.task)


def test(setup: "Setup", trial: str) -> dict[str, float | None]:
    """Judges the winner's best checkpoint on the test split."""
    from distributed import saved
    from distributed.analysis.evaluate import evaluate
    from distributed.hosts.trial import prepared

    found = saved.find(str(setup.folder(trial)), setup.runs)
    return evaluate(found, prepared(found.run, setup.stores), "test").metrics
