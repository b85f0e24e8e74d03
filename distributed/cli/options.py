"""The options that several verbs share, and how their words become settings."""

import os
import secrets
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from distributed import catalogue, config
from distributed.config import COMMAND_LINE, Given, Givens

TaskName = Annotated[
    str, typer.Argument(metavar="TASK", help="A name of `whipray tasks`, FILE.py:Class, or module:Class.")
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run: its path, TASK/NAME, a unique NAME, or last.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME=VALUE]...", help="Settings, such as optimizer.lr=0.1; `whipray config TASK` lists them."
    ),
]
Runs = Annotated[Path, typer.Option(help="Folder of all runs.")]
Stores = Annotated[Path | None, typer.Option(help="Folder or URI (s3://...) of prepared data; default: in your cache.")]
Name = Annotated[str | None, typer.Option(help="Name of the run; a name given again goes on with that run.")]
Config = Annotated[
    list[Path] | None, typer.Option(help="YAML file of settings; later ones win, the command line wins over all.")
]
Workers = Annotated[
    str | None, typer.Option(help="Processes that share each batch, such as 2 or 1..8 (resources.workers).")
]
Epochs = Annotated[str | None, typer.Option(help="Passes over the training rows (train.epochs).")]
Seed = Annotated[str | None, typer.Option(help="Seed of all randomness (train.seed).")]
NoRay = Annotated[bool, typer.Option("--no-ray", help="Without Ray (resources.host=local).")]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster to use; default: RAY_ADDRESS, else one of this machine's own.")
]
Fast = Annotated[
    bool, typer.Option("--fast", help="Rehearse: 2 batches of everything, with a stop and a resume; ends in seconds.")
]
Overfit = Annotated[
    str | None, typer.Option(metavar="ROWS", help="Learn so few training rows by heart, unaugmented (data.overfit).")
]
Profile = Annotated[
    bool,
    typer.Option("--profile", help="Trace a few steps after the warm-up; print what takes longest (train.profile)."),
]
SkipOrStop = Literal["skip", "stop"]
OnError = Annotated[SkipOrStop, typer.Option(help="Broken rows of the data: skip (up to data.max_bad) or stop.")]

RUNS = Path("runs")


def collect(words: list[str] | None, files: list[Path] | None = None, **flags: str | None) -> Givens:
    """Returns all given settings; the command line wins over files, and later files over earlier ones.

    Flags are settings too: `workers="2"` is resources.workers.
    """
    given: Givens = {}
    for file in files or []:
        given |= config.from_yaml(file)
    shorthands = [f"{FLAGS[name]}={value}" for name, value in flags.items() if value is not None]
    return given | config.from_words([*(words or []), *shorthands])


FLAGS = {"overfit": "data.overfit", "workers": "resources.workers", "epochs": "train.epochs", "seed": "train.seed"}


def check(task: str, given: Givens, *, no_ray: bool = False) -> Givens:
    """Answers a misspelt task or setting before torch is imported; returns what is given, `--no-ray` included."""
    from distributed.run import check_names

    catalogue.check(task)
    check_names(given)
    return given | ({"resources.host": Given("local", COMMAND_LINE)} if no_ray else {})


def stores_folder(stores: Path | None) -> Path:
    """Returns the folder of stores as an absolute path; a URI stays as it is, but for its credentials: refused."""
    if stores and config.is_uri(stores):
        config.refuse_credentials(config.as_uri(stores))
        return stores
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (stores or cache / "whipray" / "stores").absolute()


def fresh_name() -> str:
    """Returns a time and four hex digits."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
