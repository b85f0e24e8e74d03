"""A small Ray head with a job server, for the tests that need a cluster; all on loopback."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest


@dataclass(frozen=True)
class Head:
    """A running head of a cluster."""

    address: str  # HOST:PORT, to join
    jobs: str  # http://HOST:PORT, to send jobs to
    environment: dict[str, str] = field(default_factory=dict)  # of a process that may use it


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """A head that asks nobody for a token: what is in force in this process is fixed when Ray is imported."""
    with running({"RAY_AUTH_MODE": "disabled"}) as one:
        yield one


@pytest.fixture
def guarded_head() -> Iterator[Head]:
    """A head that asks for a token; only other processes can use it."""
    with running({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}) as one:
        yield one


@contextlib.contextmanager
def running(environment: dict[str, str]) -> Iterator[Head]:
    """Starts a head as `ray start` does; kills its processes, and no others, at the end."""
    port, dashboard, agent, client = _free_ports(4)
    python = Path(sys.executable)
    folder = tempfile.mkdtemp(prefix="whipray-head-", dir="/tmp")  # sockets below it: the path must be short
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | environment | {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",  # `python` of a job is the cluster's
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only
        "RAY_enable_worker_prestart": "0",
    }  # fmt: skip
    ours.pop("PYTHONPATH", None)  # a job must find the clone by itself
    starting = subprocess.Popen(
        [python.parent / "ray", "start", "--head", f"--port={port}", "--dashboard-host=127.0.0.1",
         f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
         f"--ray-client-server-port={client}",
         f"--temp-dir={folder}", "--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats"],
        env=ours, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = starting.communicate(timeout=120)
        assert starting.returncode == 0, said
        yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment)
    finally:
        _kill_session(starting.pid)
        shutil.rmtree(folder, ignore_errors=True)


def _kill_session(session: int) -> None:
    """Ends every process of a session: a daemon leaves its parent, but not its session."""
    for _ in range(3):  # one that is just being started is met the next time
        members = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
                if os.getsid(process.pid) == session:
                    process.kill()
                    members.append(process)
        psutil.wait_procs(members, timeout=5)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]
