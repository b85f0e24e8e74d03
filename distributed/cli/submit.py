"""`whipray submit`: the same words, run on a cluster."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from distributed import catalogue
from distributed.cli import options
from distributed.cli.jobs import JobServer, followed
from distributed.cli.output import OK, OUT
from tasks.errors import UserError, did_you_mean

Words = Annotated[
    list[str], typer.Argument(metavar="-- VERB ...", help="What to run there, as you would write it here.")
]
SharedRuns = Annotated[
    str, typer.Option("--runs", help="Folder of all runs that every node of the cluster sees: absolute.")
]
JobName = Annotated[str | None, typer.Option("--name", help="Name of the job; default: made of verb, task and time.")]
NoFollow = Annotated[bool, typer.Option("--no-follow", help="Return as soon as the job is accepted.")]
HERE_ONLY = ("submit", "jobs", "logs", "stop")  # verbs that are about a cluster, not for it


def submit(
    words: Words, runs: SharedRuns, address: JobServer = None, name: JobName = None, no_follow: NoFollow = False
) -> int:
    """Run a command on a cluster.

    The clone is sent there; logs and the exit code come back.
    """
    if name is not None:
        _check_name(name)
    if not Path(runs).is_absolute():
        hint = "give a folder that all nodes share, not a URI" if "://" in runs else f"such as {Path(runs).absolute()}"
        raise UserError(f"--runs {runs}: must be an absolute path that every node of the cluster sees", hint)
    sent, params = check_words(words)
    sent, run = _with_runs(sent, params, runs)

    from distributed.hosts import ray_jobs

    files = ray_jobs.packed()
    sent = _from_clone(sent, ray_jobs.HOME, files)
    server = ray_jobs.Server(address)
    job = server.submit(name or _job_name(sent[0], params), sent, run)
    OUT.say(f"{job}: submitted to {server.address}{f', run {run}' if run else ''}")
    if not no_follow:
        return followed(server, server.find(job))
    OUT.say(f"whipray logs {job} --follow shows what it prints, whipray stop {job} ends it")
    OUT.result(server.find(job).to_plain())
    return OK


def _check_name(name: str) -> None:
    from distributed.run import check_run_name

    check_run_name(name)


def check_words(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Returns the words and what they mean; raises UserError here for what would fail only on the cluster."""
    from typer.main import get_command

    from distributed.cli.main import application

    command: Any = get_command(application())
    verb = words[0]
    if verb.startswith("-"):
        raise UserError(f"unknown option {verb}", "options of submit come before --, what is to be run behind it")
    if verb in HERE_ONLY:
        raise UserError(f"'{verb}' cannot be submitted", f"run it here: whipray {' '.join(words)}")
    if verb not in command.commands:
        raise UserError(f"unknown command '{verb}'", did_you_mean(verb, command.commands))
    own = [word for word in words[1:] if word not in ("--json", "--debug")]
    with command.commands[verb].make_context(f"whipray {verb}", own) as context:  # raises for unknown options
        params = dict(context.params)
    if params.get("task"):
        flags = {flag: params.get(flag) for flag in options.FLAGS}
        given = options.collect(params.get("settings"), [Path(file) for file in params.get("config") or ()], **flags)
        if verb == "train":
            options.check(params["task"], given)
        else:
            catalogue.check(params["task"])
    return list(words), params


def _with_runs(words: list[str], params: dict[str, Any], runs: str) -> tuple[list[str], str | None]:
    """The words with --runs and a name, so that where the run will lie is known now; and that place."""
    if "runs" not in params:
        return words, None
    if any(word.split("=")[0] == "--runs" for word in words):
        raise UserError("--runs is given behind -- too", "give it before -- only")
    words = [*words, "--runs", runs]
    if words[0] not in ("train", "tune") or "name" not in params:
        return words, None
    name = params["name"]
    if name is None:
        name = options.fresh_name()
        words += ["--name", name]
    _check_name(name)
    root = Path(runs) if words[0] == "train" else Path(runs).parent / "sweeps"
    return words, str(root / catalogue.folder_name(params["task"]) / name)


def _from_clone(words: list[str], home: Path, files: dict[Path, int]) -> list[str]:
    """The words with files of this machine named as the job will find them, below the clone that is sent.

    Raises UserError for a relative path of a file that is not sent.
    """
    moved = []
    for word in words:
        before, equals, value = word.partition("=") if re.match(r"-*[\w.-]+=", word) else ("", "", word)
        where, colon, rest = value.partition(":")
        looks_like_a_file = "/" in where or Path(where).suffix != ""
        if not looks_like_a_file or Path(where).is_absolute() or not Path(where).exists():
            moved.append(word)
            continue
        path = Path(where).resolve()
        if not path.is_relative_to(home) or not any(file.is_relative_to(path.relative_to(home)) for file in files):
            raise UserError(f"{where}: is not sent to the cluster: only what lies in {home} and git does not ignore is",
                            "give the absolute path of a shared folder, or move it into the clone")  # fmt: skip
        moved.append(f"{before}{equals}{path.relative_to(home)}{colon}{rest}")
    return moved


def _job_name(verb: str, params: dict[str, Any]) -> str:
    task = catalogue.folder_name(params["task"]) if params.get("task") else ""
    words = "-".join(word for word in (verb, task) if word)
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', words)[:40]}-{options.fresh_name()}"
