"""`whipray new`: a file with a small task of one's own, that trains as it is written."""

import keyword
import re
from pathlib import Path
from typing import Annotated

import typer

from distributed.cli.output import OUT
from tasks.errors import UserError

TEMPLATE = '''"""A task of my own; as it stands it learns made-up pictures: whipray train FILE:CLASS"""

from collections.abc import Iterable

import numpy as np
from torch import nn

from tasks.task import Example, Facts, Image, Label, Load, Source, Task


class CLASS(Task):
    """Stripes: a grey picture of 8x8 pixels -> lying or standing."""

    width: int = 16  # channels of the convolution; set it by task.width=32

    # What a row holds: tasks/fields.py has Vector(length), Text(), Number(target=True) and more.
    fields = {"image": Image(1, 8, 8), "label": Label(names=("lying", "standing"))}
    # Settings with which this task trains well; the command line and --config win over them.
    recipe = {"train.epochs": 5, "data.batch_size": 32, "optimizer.name": "adam", "optimizer.lr": 1e-2}

    def examples(self, source: Source) -> Iterable[Example]:
        # Replace: one Example for each file or line below task.source.path; here its number is all there is.
        return (Example(number) for number in range(600))

    def row(self, reference: int) -> dict:
        # Replace: read this one example; raise BadRow("why") of tasks.task where it is broken.
        draw, label = np.random.default_rng(reference), reference % 2
        picture = draw.integers(0, 100, (8, 8))
        picture[draw.integers(8)] += 100
        return {"image": [picture.T if label else picture], "label": label}

    def build(self, facts: Facts, load: Load) -> nn.Module:
        # Replace: any network from a batch of pictures, float32 in 0..1, to one score a class.
        stripes = nn.Sequential(nn.Conv2d(1, self.width, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())
        return nn.Sequential(stripes, nn.Linear(self.width, 2))
'''
TAKEN = set(re.findall(r"\b[A-Z]\w+", TEMPLATE.partition("class ")[0].rpartition("import")[2]))


def new(
    file: Annotated[Path, typer.Argument(metavar="FILE.py", help="File to write; it must not exist yet.")],
    class_name: Annotated[
        str | None, typer.Option("--class", help="Name of the task's class; default: from the file's name.")
    ] = None,
) -> None:
    """Write a small task of your own to start from.

    It trains as it is written.
    """
    if file.suffix != ".py":
        raise UserError(f"'{file}' is no name of a Python file", f"whipray new {file.with_suffix('.py')}")
    name = class_name or "".join(part[:1].upper() + part[1:] for part in re.split(r"\W|_", file.stem))
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name) or name in TAKEN:
        raise UserError(f"'{name}' cannot be the name of the class", "give another one: --class MyTask")
    try:
        with file.open("x", encoding="utf-8") as written:
            written.write(TEMPLATE.replace("FILE:CLASS", f"{file.name}:{name}").replace("class CLASS", f"class {name}"))
    except FileExistsError:
        raise UserError(
            f"{file}: is there already, and is left as it is", "give another name, or remove it first"
        ) from None
    except OSError as error:
        raise UserError(
            f"{file}: cannot be written: {error.strerror}", "is the folder there, and may you write to it?"
        ) from None
    reference = f"{file}:{name}"
    OUT.say(f"wrote {file}\nnext: whipray train {reference}")
    OUT.say(
        f"then replace what its comments say, and look: whipray data prepare {reference} | whipray config {reference}"
    )
    OUT.result({"file": str(file.absolute()), "task": reference})
