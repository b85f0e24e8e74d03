"""Sends commands to a Ray cluster as jobs: the clone is packed, the same words run there, the logs come back.

The job server's own limit of 100 MiB ends in a traceback of the server, so the package is measured before. Ray calls a
job FAILED whatever its exit code was; the code itself is passed on here.
"""

import asyncio
import contextlib
import logging
import os
import re
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from distributed.hosts.ray_cluster import HOME, HOW_TO_PROVE, split, takes_connections
from tasks.errors import UserError, did_you_mean

MIB = 1 << 20
LIMIT = 100 * MIB  # of a package: DASHBOARD_CLIENT_MAX_SIZE of Ray's job server
PER_FILE = 200  # bytes that a zip adds to each file, about
# Beside what .gitignore names, .git and virtual environments.
EXCLUDES = ["/.ci", ".pytest_cache", ".ruff_cache", ".hypothesis", "*.egg-info"]
PORT = 8265
STOP_SECONDS = 60  # between SIGTERM and SIGKILL: time for a checkpoint; Ray's own is 3
RETRY = 1.0  # seconds between two attempts to follow the logs
ATTEMPTS = 30  # without a word from the server, until we give up
# Loggers of Ray that tell of every step, and set their level themselves when they are imported.
CHATTERERS = (
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
)
CHATTER = re.compile(r"(\d{4}-\d\d-\d\d [\d:,]+\s+INFO job_manager\.py.*|Running entrypoint for job .*)\n?")


@dataclass(frozen=True)
class Job:
    """One job as the server knows it."""

    id: str
    status: str  # PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED
    words: str  # what whipray was asked for
    started: float | None  # seconds since 1970
    run: str | None  # directory of its run or sweep, where it has one
    exit_code: int | None  # None while it runs
    message: str  # Ray's, of a job that did not get as far as its command

    @property
    def ended(self) -> bool:
        return JobStatus(self.status).is_terminal()

    def to_plain(self) -> dict[str, Any]:
        """Returns what programs are told."""
        return {"job": self.id, "status": self.status, "words": self.words, "started": self.started, "run": self.run,
                "exit_code": self.exit_code}  # fmt: skip


class Server:
    """The job server of a cluster; raises UserError for one that is not there, or refuses us."""

    def __init__(self, address: str | None) -> None:
        self.address = resolve(address)
        for name in CHATTERERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        parts = urlsplit(self.address)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        if not parts.hostname or not takes_connections(parts.hostname, port):
            raise UserError(f"no job server at {self.address}: nothing takes a connection there", WHERE)
        with self._told(), _without_address():
            self.client = JobSubmissionClient(self.address)

    def submit(self, job: str, words: list[str], run: str | None, package: Path = HOME) -> str:
        """Sends a command with the package that it runs from; returns the job's id."""
        check_size(package)
        told = shlex.join(words)
        with self._told():
            if any(one.id == job for one in self.jobs()):
                raise UserError(f"there is a job '{job}' already at {self.address}", "give another --name")
            return self.client.submit_job(
                entrypoint=f"python whipray.py {told}",
                submission_id=job,
                metadata={"whipray_words": told, **({"whipray_run": run} if run else {})},
                runtime_env={
                    "working_dir": str(package),
                    "excludes": EXCLUDES,
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
                },
            )

    def jobs(self) -> list[Job]:
        """Returns all jobs that were submitted, newest first."""
        with self._told():
            listed: list[Any] = self.client.list_jobs()
        found = [_job(details) for details in listed if details.submission_id]
        return sorted(found, key=lambda job: job.started or 0, reverse=True)

    def find(self, reference: str) -> Job:
        """Returns the job of an id, or of the run that it trains: its path, TASK/NAME or NAME; raises UserError."""
        there = self.jobs()
        found = [job for job in there if job.id == reference]
        found = found or [job for job in there if job.run and f"/{job.run}".endswith(f"/{reference.strip('/')}")]
        if not found:
            names = [job.id for job in there]
            hint = did_you_mean(reference, names) or (
                "whipray jobs lists them" if there else "no job was submitted there yet"
            )
            raise UserError(f"no job '{reference}' at {self.address}", hint)
        return found[0]  # the newest, where a run was submitted again

    def logs(self, job: str) -> str:
        """Returns what a job has printed so far."""
        with self._told():
            return "".join(clean([self.client.get_job_logs(job)]))

    def stop(self, job: str) -> bool:
        """Asks a job to write a checkpoint and end; returns whether it was running."""
        with self._told():
            return self.client.stop_job(job)

    def follow(self, job: str, show: Callable[[str], None]) -> Job:
        """Shows what a job prints until it ends, over dropped connections too; returns how it ended."""
        return asyncio.run(self._follow(job, show))

    async def _follow(self, job: str, show: Callable[[str], None]) -> Job:
        filtered, seen, silent = Clean(show), 0, 0
        while True:
            place = 0
            try:
                async for text in self._tail(job):
                    if place + len(text) > seen:  # every new connection begins at the beginning
                        filtered.add(text[max(0, seen - place) :])
                        silent = 0
                    place += len(text)
                    seen = max(seen, place)
                now = await asyncio.to_thread(self.find, job)
                if now.ended:
                    filtered.end()
                    return now
            except (RuntimeError, aiohttp.ClientError, OSError) as error:
                silent += 1
                if silent >= ATTEMPTS:
                    raise UserError(f"{self.address}: the connection is lost: {_first_line(error)}",
                                    f"the job goes on: whipray logs {job} --follow") from error  # fmt: skip
            await asyncio.sleep(RETRY)

    async def _tail(self, job: str) -> AsyncIterator[str]:
        try:
            async for text in self.client.tail_job_logs(job):
                yield text
        except aiohttp.WSServerHandshakeError as error:
            if error.status in (401, 403):
                raise UserError(f"{self.address} refuses us: HTTP {error.status}", HOW_TO_PROVE) from error
            raise

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turns what the client raises into errors for people."""
        try:
            yield
        except AuthenticationError as error:
            raise UserError(f"{self.address} refuses us: {_first_line(error)}", HOW_TO_PROVE) from error
        except requests.RequestException as error:
            raise UserError(f"{self.address} does not answer as a job server: {_first_line(error)}", WHERE) from error
        except (ConnectionError, RuntimeError) as error:
            words = str(error)
            if "413" in words:
                raise UserError(f"{self.address}: the package is too large for the job server", SMALLER) from error
            if "status code" in words or "Failed to connect" in words or "returned 404" in words:
                raise UserError(f"{self.address}: {_server_words(words)}", WHERE) from error
            raise


WHERE = "give --address http://HEAD:8265, or through `ssh -L 8265:127.0.0.1:8265 HEAD`: http://127.0.0.1:8265"
SMALLER = "name data and results in .gitignore or .rayignore: code is sent, data is read from a shared folder"


def resolve(address: str | None) -> str:
    """Returns the job server's URL; raises UserError for an address of another kind.

    It is the given one, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else this machine's.
    """
    origin = "--address"
    if not address:
        names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
        origin = next((name for name in names if os.environ.get(name)), "")
        address = os.environ.get(origin, f"http://127.0.0.1:{PORT}")
    if address in ("auto", "local"):
        return f"http://127.0.0.1:{PORT}"
    scheme, _, rest = address.rpartition("://")
    if scheme in ("http", "https"):
        return address.rstrip("/")
    host = split(rest, PORT)[0]
    raise UserError(
        f"{origin} {address} is not a job server's address", f"the cluster's is usually http://{host}:{PORT}"
    )


@contextlib.contextmanager
def _without_address() -> Iterator[None]:
    """Ray lets these variables win over an address that is given explicitly."""
    taken = {name: os.environ.pop(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


# ---- the package


def packed(directory: Path = HOME) -> dict[Path, int]:
    """Returns the files that are sent, with their bytes, by Ray's own rules: .gitignore and .rayignore are honoured."""
    found: dict[Path, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            found[path.relative_to(directory)] = path.stat().st_size

    excludes = _get_excludes(directory, [*get_runtime_env_default_excludes(), *EXCLUDES])
    _dir_travel(directory, [excludes], add, include_gitignore=True, logger=logging.getLogger(__name__))
    return found


def check_size(directory: Path = HOME) -> int:
    """Returns the bytes of the package; raises UserError naming the largest files where the server would refuse it."""
    files = packed(directory)
    total = sum(files.values()) + PER_FILE * len(files)
    if total > LIMIT:
        largest = sorted(files.items(), key=lambda one: one[1], reverse=True)[:5]
        names = ", ".join(f"{path} ({size / MIB:.1f} MiB)" for path, size in largest)
        raise UserError(
            f"{directory} is {total / MIB:.0f} MiB, the job server takes {LIMIT // MIB}; the largest: {names}", SMALLER
        )
    return total


# ---- what a job says


class Clean:
    """Passes on text line by line, without what Ray adds before a job's own first line."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self.show, self.rest = show, ""

    def add(self, text: str) -> None:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if not CHATTER.fullmatch(line):
                self.show(f"{line}\n")

    def end(self) -> None:
        if self.rest and not CHATTER.fullmatch(self.rest):
            self.show(self.rest)
        self.rest = ""


def clean(texts: list[str]) -> list[str]:
    """Returns the lines of a job's log that are its own."""
    lines: list[str] = []
    filtered = Clean(lines.append)
    for text in texts:
        filtered.add(text)
    filtered.end()
    return lines


def _job(details: Any) -> Job:  # JobDetails, which Ray defines only where pydantic is
    known = details.metadata or {}
    message = details.message or ""
    return Job(
        str(details.submission_id), details.status.value, known.get("whipray_words") or details.entrypoint,
        details.start_time / 1000 if details.start_time else None, known.get("whipray_run"),
        exit_code(details.status.value, details.driver_exit_code, message), message,
    )  # fmt: skip


def exit_code(status: str, driver: int | None, message: str) -> int | None:
    """Returns the command's own exit code: 130 where it was stopped, 1 where it never began, None while it runs."""
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return 130
    if status != "FAILED":
        return None
    if driver is None:
        told = re.search(r"failed with exit code (-?\d+)", message)
        driver = int(told[1]) if told else 1
    return 128 - driver if driver < 0 else driver  # killed by a signal: as a shell says it


def started_words(job: Job) -> str:
    """Returns when a job was begun, in this machine's time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started)) if job.started else ""


def _server_words(words: str) -> str:
    """What a server said, without its traceback."""
    told = re.search(r"status code (\d+): (.*)", words, re.DOTALL)
    if not told:
        return words.strip().splitlines()[0]
    lines = [line for line in told[2].strip(" .\n").splitlines() if line.strip()]
    return f"HTTP {told[1]}: {lines[-1] if lines else ''}"


def _first_line(error: BaseException) -> str:
    words = str(error).strip().splitlines()
    return words[0] if words else type(error).__name__
