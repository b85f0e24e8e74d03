"""Run: the resolved configuration of one training. Assembles the settings that live beside what they configure."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from distributed import averaging, catalogue, config, optimizers, schedules
from distributed.averaging import Averaging
from distributed.checkpoint import Checkpoints
from distributed.config import Given, Givens, Setting
from distributed.data.settings import Data
from distributed.optimizers import Optimizer
from distributed.parallel import Parallel
from distributed.precision import Precision
from distributed.record import Log
from distributed.resources import Resources, Workers
from distributed.schedules import Schedule
from tasks.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from tasks.task import Batch, Task


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long, from which seed, judged by what."""

    epochs: Annotated[int, Ge(1)] = 10  # passes over the training rows
    steps: Annotated[int, Ge(1)] | None = None  # stop after so many optimizer steps, whatever the epochs
    seed: int = 0  # of initial weights, order of rows, augmentation and dropout
    objective: str | None = None  # metric of the validation split that decides; none: the task's first; or "loss"
    init_from: str | None = None  # weights to begin with: RUN, FILE (.safetensors, .pth, .pt) or torchvision/NAME
    clip_norm: Annotated[float, Gt(0)] | None = None  # most that the gradient's norm may be, each optimizer apart
    clip_value: Annotated[float, Gt(0)] | None = None  # most that each number of the gradient may be, up and down
    max_skipped: Annotated[int, Ge(0)] = 0  # steps in a row that are left out where the gradient is not finite
    freeze: tuple[str, ...] = ()  # parameters that do not learn: names, parts of the network, patterns with *
    unfreeze: tuple[str, ...] = ()  # PATTERN@EPOCH: what of them learns from an epoch on, counted from 0
    patience: Annotated[int, Ge(1)] | None = None  # stop after so many evaluations without a new best
    detect_anomaly: bool = False  # name the operation whose gradient is NaN, and where it was called; slow
    profile: bool = False  # trace the steps between the first two rows of training figures, into profile/


PLAIN: dict[str, type] = {
    "data": Data, "precision": Precision, "train": Train, "parallel": Parallel, "checkpoint": Checkpoints, "log": Log,
    "resources": Resources,
}  # fmt: skip
# Groups whose settings depend on which of them is named.
NAMED: dict[str, tuple[type, Any, Mapping[str, type]]] = {
    "optimizer": (Optimizer, optimizers.settings_class, optimizers.OPTIMIZERS),
    "schedule": (Schedule, schedules.settings_class, schedules.SCHEDULES),
    "averaging": (Averaging, averaging.settings_class, averaging.AVERAGES),
}
# What an unfinished run may change when it goes on: everything else would make it another training.
MAY_CHANGE = (
    "train.epochs", "resources.", "parallel.", "log.", "checkpoint.", "data.workers", "data.prefetch",
    "data.resident", "data.max_bad", "train.detect_anomaly", "train.profile",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training of one task under one configuration."""

    name: str  # of the task, as a user writes it
    task: "Task"
    data: Data
    optimizers: dict[str, Optimizer]  # one an entry of the model
    schedule: Schedule
    averaging: Averaging
    parallel: Parallel
    precision: Precision
    train: Train
    checkpoint: Checkpoints
    log: Log
    resources: Resources
    values: dict[str, Any]  # all of the above by dotted name, as config.yaml holds it
    origins: dict[str, str]  # where each value comes from; "default" where nobody gave it
    runs: Path  # folder of all runs, where the names of others are looked up

    def transform(self, batch: "Batch", draw: Any, training: bool) -> "Batch":
        """Returns a batch as the task transforms it, in the run's type of numbers."""
        return self.precision.cast(self.task.transform(batch, draw, training))

    def givens(self) -> Givens:
        """Returns what was given, so that the run can be resolved anew elsewhere."""
        return {
            n: Given(v, self.origins[n]) for n, v in self.values.items() if self.origins[n] not in ("default", "recipe")
        }


# ---- names


def machinery() -> dict[str, list[Setting]]:
    """Returns every setting that does not depend on the task; several of one name where variants share it."""
    found: dict[str, list[Setting]] = {}
    for group, cls in PLAIN.items():
        for name, setting in config.settings_of(cls, group).items():
            found.setdefault(name, []).append(setting)
    for group, (_, _, variants) in NAMED.items():
        for cls in variants.values():
            for name, setting in config.settings_of(cls, group).items():
                found.setdefault(name, []).append(setting)
    return found


def check_names(given: Givens) -> None:
    """Raises UserError for machinery settings that no run has; `task.*` is looked at when the task is known."""
    known = machinery()
    for name, value in given.items():
        if name in known or name.startswith("task."):
            continue
        parts = name.split(".")
        if parts[0] == "optimizer" and len(parts) == 3 and f"optimizer.{parts[2]}" in known:
            continue  # of one entry of the model: which entries there are is the task's affair
        if parts[0] == "optimizer" and ":" in str(given.get("optimizer.name", Given("", "")).value):
            continue  # an optimizer class from elsewhere: its settings are known when it is imported
        hint = (
            "trials.* are settings of `whipray tune`"
            if parts[0] == "trials"
            else did_you_mean(name, _near(name, known))
        )
        raise UserError(f"unknown setting '{name}' ({value.origin})", hint)


def _near(name: str, known: Iterable[str]) -> list[str]:
    """The settings of the same group where there is such a group, else all of the same last word, else the groups."""
    known = list(known)
    group = name.partition(".")[0]
    mine = [one for one in known if one.startswith(f"{group}.")]
    same_leaf = [one for one in known if one.rpartition(".")[2] == name.rpartition(".")[2]]
    return mine or same_leaf or known


# ---- resolving


def resolve(task_name: str, given: Givens, runs: Path = Path("runs")) -> Run:
    """Returns the run that a task and the given values make; raises UserError for the first thing that is wrong."""
    check_names(given)
    catalogue.check(task_name)
    named = given.get("task.name")
    if named and catalogue.canonical(str(named.value)) != catalogue.canonical(task_name):
        raise UserError(f"task.name={named.value} ({named.origin}): these settings are not of '{task_name}'",
                        f"whipray train {named.value} ...")  # fmt: skip
    given = _anchored({name: value for name, value in given.items() if name != "task.name"})
    for group in NAMED:
        named = given.get(f"{group}.name")
        if named and isinstance(named.value, str):
            _variant(group, named.value, named.origin)  # a misspelt name needs no torch to be found

    cls = catalogue.find(task_name)
    _check_task_names(cls, given)
    task = config.build(cls, "task", given)
    recipe = {name: Given(value, "recipe") for name, value in task.recipe.items()}
    groups = {group: config.build(kind, group, {**recipe, **given}) for group, kind in PLAIN.items()}
    _refuse_together(groups["train"], groups["precision"])
    base, entries = _optimizers(cls, recipe, given)
    schedule, average = _named("schedule", recipe, given), _named("averaging", recipe, given)

    objects = {"task": task, **groups, "optimizer": base, "schedule": schedule, "averaging": average}
    values: dict[str, Any] = {"task.name": catalogue.canonical(task_name)}
    for prefix, instance in objects.items():
        values |= {name: _value(instance, name, prefix) for name in config.settings_of(type(instance), prefix)}
    origins = {name: {**recipe, **given}.get(name, Given(None, "default")).origin for name in values}
    for entry in cls.entries:
        for shared in config.settings_of(type(entries[entry]), "optimizer"):
            name = shared.replace("optimizer.", f"optimizer.{entry}.")
            values[name] = getattr(entries[entry], shared.rpartition(".")[2])
            origins[name] = given[name].origin if name in given else origins.get(shared, "default")
    return Run(
        catalogue.canonical(task_name), task, optimizers=entries, schedule=schedule, averaging=average, values=values,
        origins=origins,
        runs=runs.absolute(), **groups,
    )  # fmt: skip


def _refuse_together(train: Train, precision: Precision) -> None:
    """Raises UserError for settings that mean nothing together, before any data are read."""
    if train.max_skipped and precision.dtype == "float16":
        raise UserError("train.max_skipped: with precision.dtype=float16 the loss scaler skips steps already",
                        "leave it out")  # fmt: skip
    if train.unfreeze and not train.freeze:
        raise UserError(f"train.unfreeze={','.join(train.unfreeze)}: nothing is frozen", "say what by train.freeze")


def _anchored(given: Givens) -> Givens:
    """Makes the path of `train.init_from` absolute, where it is one: workers stand elsewhere.

    Raises UserError for `last`, which would be this very run as soon as it has begun.
    """
    one = given.get("train.init_from")
    if one is None or not isinstance(one.value, str):
        return given
    if not one.value:
        raise UserError(f"train.init_from= ({one.origin}): names no weights", "train.init_from=none begins without")
    if one.value == "last":
        raise UserError(f"train.init_from=last ({one.origin}): when this run goes on, the last run is itself",
                        "name the run; `whipray runs` lists them")  # fmt: skip
    path = Path(one.value).expanduser()
    if not (path.is_file() or (path / "config.yaml").is_file()):
        return given  # TASK/NAME, a name, torchvision/NAME, or a mistake
    return {**given, "train.init_from": dataclasses.replace(one, value=str(path.absolute()))}


def _value(instance: Any, name: str, prefix: str) -> Any:
    for part in name.removeprefix(f"{prefix}.").split("."):
        instance = getattr(instance, part)
    return instance.plain if isinstance(instance, Workers) else instance


def _check_task_names(cls: type, given: Givens) -> None:
    known = config.settings_of(cls, "task")
    for name, value in given.items():
        if name.startswith("task.") and name not in known:
            hint = did_you_mean(name, known) if known else "this task has no settings of its own"
            raise UserError(f"unknown setting '{name}' of this task ({value.origin})", hint)


def _named(group: str, recipe: Givens, given: Givens) -> Any:
    """One group whose settings depend on its name; what the recipe sets for another variant does not apply."""
    base, _, variants = NAMED[group]
    merged = {**recipe, **given}
    name = config.parse(
        config.settings_of(base, group)[f"{group}.name"], merged.get(f"{group}.name", Given(_default(base), "default"))
    )
    origin = merged[f"{group}.name"].origin if f"{group}.name" in merged else "default"
    cls = _variant(group, name, origin)
    known = config.settings_of(cls, group)
    for wanted, value in given.items():
        if wanted.startswith(f"{group}.") and wanted.count(".") == 1 and wanted not in known:
            have = [n for n, one in variants.items() if wanted in config.settings_of(one, group)]
            hint = f"{group}.name={' or '.join(have)} has it" if have else did_you_mean(wanted, known)
            raise UserError(f"'{wanted}' ({value.origin}) is not used: {group}.name is {name}", hint)
    return config.build(cls, group, {n: v for n, v in merged.items() if n in known})


def _variant(group: str, name: str, origin: str) -> Any:
    """The settings of the named one of a group."""
    try:
        return NAMED[group][1](name)
    except UserError as error:
        raise UserError(f"{group}.name={name} ({origin}): {error.message}", error.hint) from error


def _default(cls: type) -> Any:
    return next(field.default for field in dataclasses.fields(cls) if field.name == "name")


def _optimizers(cls: "type[Task]", recipe: Givens, given: Givens) -> tuple[Optimizer, dict[str, Optimizer]]:
    """The settings that all optimizers share, and those of each entry of the model."""
    merged = {**recipe, **given}
    base = _named("optimizer", recipe, given)
    for name, value in given.items():
        if name.startswith("optimizer.") and name.count(".") == 2 and name.split(".")[1] not in cls.entries:
            entry = name.split(".")[1]
            hint = (
                did_you_mean(entry, cls.entries) if cls.entries else "this task has one optimizer: write optimizer.lr"
            )
            raise UserError(f"unknown setting '{name}' ({value.origin}): the task has no entry '{entry}'", hint)
    entries = {}
    for entry in cls.entries:
        prefix = f"optimizer.{entry}."
        own = {f"optimizer.{n.removeprefix(prefix)}": v for n, v in merged.items() if n.startswith(prefix)}
        shared = {n: v for n, v in merged.items() if n.startswith("optimizer.") and n.count(".") == 1}
        # Where an entry has an optimizer of another name, shared settings that it lacks do not apply to it.
        entries[entry] = _named("optimizer", {**recipe, **shared}, own)
    return base, entries or {"model": base}


# ---- the run directory


NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


def check_run_name(name: str) -> None:
    if name == "last":
        raise UserError("'last' cannot be a name: it means the newest run", "take another --name")
    if not NAME.fullmatch(name):
        raise UserError(
            f"'{name[:80]}' cannot be a name", "use letters, digits, '.', '_' and '-', at most 64, not a dot first"
        )


def directory_of(runs: Path, run: Run, name: str) -> Path:
    """Returns the run directory of a name below the runs folder."""
    check_run_name(name)
    return runs / catalogue.folder_name(run.name) / name


def differences(run: Run, written: Mapping[str, Any]) -> list[str]:
    """Returns what an earlier config.yaml says otherwise, of all that may not change when a run goes on."""
    found = []
    for name in sorted({*run.values, *written}):
        if name.startswith(MAY_CHANGE):
            continue
        now, before = _comparable(run.values.get(name)), _comparable(written.get(name))
        if now != before:
            found.append(f"{name}: {before} before, {now} now")
    return found


def _comparable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
