"""`whipray config`: every setting of a task, with its value, type, meaning, and where the value comes from."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from distributed.cli import options
from distributed.cli.output import OUT

if TYPE_CHECKING:
    from distributed.config import Setting
    from distributed.run import Run


def config(
    task: options.TaskName,
    settings: options.Words = None,
    config: options.Config = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only what is not by default.")] = False,
) -> None:
    """Show every setting of a task.

    With its value, type, meaning, and where the value comes from.
    """
    given = options.check(task, options.collect(settings, config))

    from rich.table import Table
    from rich.text import Text

    from distributed.config import describe
    from distributed.run import resolve

    run = resolve(task, given)
    rows: list[dict[str, Any]] = []
    for name, setting in _settings(run).items():
        origin = run.origins[name]
        if not changed or origin != "default":
            value = run.values[name]
            rows.append({"name": name, "value": list(value) if isinstance(value, tuple) else value,
                         "type": describe(setting.type), "meaning": setting.meaning, "origin": origin})  # fmt: skip
    table = Table("setting", "value", "type", "meaning", "origin")
    table.columns[0].no_wrap = True
    group = ""
    for row in rows:
        if group and row["name"].partition(".")[0] != group:
            table.add_section()
        group = row["name"].partition(".")[0]
        style = "" if row["origin"] == "default" else "bold"
        table.add_row(
            *map(Text, (row["name"], _shown(row["value"]), row["type"], row["meaning"], row["origin"])), style=style
        )
    OUT.table(table)
    if not changed:
        OUT.say(
            "Another optimizer.name, schedule.name or averaging.name brings other settings; name it here to see them."
        )
    OUT.result({"settings": rows})


def _settings(run: "Run") -> "dict[str, Setting]":
    """Every setting of the run, in the order of its config.yaml; task.name is no setting, it is the task."""
    from distributed.config import settings_of
    from distributed.optimizers import settings_class
    from distributed.run import PLAIN

    found = settings_of(type(run.task), "task")
    for group, cls in PLAIN.items():
        found = found | settings_of(cls, group)
    found |= settings_of(settings_class(run.values["optimizer.name"]), "optimizer")
    found |= settings_of(type(run.schedule), "schedule") | settings_of(type(run.averaging), "averaging")
    for entry, optimizer in run.optimizers.items():
        found |= settings_of(type(optimizer), f"optimizer.{entry}")
    return {name: found[name] for name in run.values if name in found}


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
