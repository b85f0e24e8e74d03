"""`whipray tasks`: what can be trained."""

from distributed import catalogue
from distributed.cli.output import OUT


def tasks() -> None:
    """List the tasks by name."""
    from rich.table import Table
    from rich.text import Text

    found = {name: title for name, (_, title) in catalogue.listed().items()}
    table = Table("task", "what it is")
    for name, title in found.items():
        table.add_row(Text(name, "bold"), Text(title))
    OUT.table(table)
    OUT.say("next: whipray train TASK | whipray config TASK | whipray new my_task.py for one of your own")
    OUT.result({"tasks": [{"name": name, "title": title} for name, title in found.items()]})
