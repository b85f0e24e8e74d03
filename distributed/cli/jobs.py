"""`whipray jobs`, `logs`, `stop`: what was submitted to a cluster."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from distributed.cli.output import INTERRUPTED, OK, OUT

if TYPE_CHECKING:
    from distributed.hosts.ray_jobs import Job, Server

Reference = Annotated[str, typer.Argument(metavar="JOB", help="A job of `whipray jobs`, or the run that it trains.")]
JobServer = Annotated[
    str | None, typer.Option(help="Job server, http://HEAD:8265; default: RAY_ADDRESS, else this machine's.")
]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends; its exit code is passed on.")]


def jobs(address: JobServer = None) -> int:
    """List the jobs of a cluster, the newest first."""
    from distributed.hosts import ray_jobs

    server = ray_jobs.Server(address)
    found = server.jobs()
    OUT.result({"jobs": [job.to_plain() for job in found]})
    if OUT.json:
        return OK
    if not found:
        OUT.say(f"no jobs at {server.address}")
        return OK
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("job", "status", "started", "words", "run"):
        table.add_column(column, overflow="fold")
    for job in found:
        code = f" ({job.exit_code})" if job.status == "FAILED" else ""
        table.add_row(job.id, job.status.lower() + code, ray_jobs.started_words(job), job.words, job.run or "")
    OUT.table(table)
    return OK


def logs(job: Reference, follow: Follow = False, address: JobServer = None) -> int:
    """Show what a job printed; with --follow until it ends."""
    from distributed.hosts import ray_jobs

    server = ray_jobs.Server(address)
    found = server.find(job)
    if follow:
        return followed(server, found)
    text = server.logs(found.id)
    if OUT.json:
        OUT.result({**found.to_plain(), "logs": text})
    else:
        _show(text)
    return OK


def stop(job: Reference, address: JobServer = None) -> int:
    """Stop a job.

    A training writes a checkpoint first, from which the same words go on.
    """
    from distributed.hosts import ray_jobs

    server = ray_jobs.Server(address)
    found = server.find(job)
    stopped = server.stop(found.id)
    if stopped:
        OUT.say(f"{found.id}: asked to stop; it is killed after {ray_jobs.STOP_SECONDS} s")
    else:
        OUT.say(f"{found.id} has ended already: {found.status.lower()}")
    OUT.result({**server.find(found.id).to_plain(), "stopped": stopped})
    return OK


def followed(server: "Server", job: "Job") -> int:
    """Shows a job's logs until it ends; returns its own exit code. Ctrl-C leaves the job running."""
    try:
        ended = server.follow(job.id, _show)
    except KeyboardInterrupt:
        words = f"whipray logs {job.id} --follow, or whipray stop {job.id}"
        OUT.say(f"\n{job.id} goes on at {server.address}: {words}")
        OUT.result(server.find(job.id).to_plain())
        return INTERRUPTED
    OUT.result(ended.to_plain())
    code = OK if ended.exit_code is None else ended.exit_code
    if code == 127:
        OUT.say("the cluster has no `python` on its PATH: activate its environment before `ray start`")
    elif ended.status == "FAILED" and ended.message and "entrypoint command failed" not in ended.message:
        OUT.say(ended.message)  # it never got as far as its command
    OUT.say(f"{ended.id}: {ended.status.lower()}{f', exit code {code}' if code else ''}")
    return code


def _show(text: str) -> None:
    stream = sys.stderr if OUT.json else sys.stdout
    stream.write(text)
    stream.flush()
