"""What a machine has of what whipray needs: packages, devices, memory, disk, a cluster that answers."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import tomllib
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from distributed.resources import cpu_count

TIMEOUT = 3.0  # seconds that a cluster has to answer
LITTLE_DISK, LITTLE_MEMORY = 2 * 10**9, 2 * 10**9  # bytes below which a training soon is in trouble
SHOWN = ("torch", "torchvision", "ray", "pyarrow", "numpy", "optuna", "tensorboard")


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be."""

    message: str
    hint: str
    essential: bool


def examine(runs: Path, stores: Path, ray_address: str | None, home: Path) -> dict[str, Any]:
    """Returns what was found, in words, and the problems; "ok" is false where an essential thing is missing."""
    problems = list(packages(home))
    devices, more = _devices()
    problems += [*more, *_python(home), *_folders({"runs": runs, "stores": stores}), *_memory_problem()]
    versions = {name: _version(name) for name in SHOWN}
    found = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "packages": ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items()),
        "devices": "; ".join(devices) or "no accelerator: training runs on the CPU",
        "cores": str(cpu_count()),
        "memory": "{:.1f} GB free of {:.1f} GB".format(*(size / 1e9 for size in memory())),
        "disk, runs": _disk(runs),
        "disk, stores": _disk(stores),
    }
    if ray_address:
        answer, problem = cluster(ray_address)
        found["ray"] = answer
        problems += [problem] if problem else []
    else:
        found["ray"] = "RAY_ADDRESS is not set: several workers and sweeps start a Ray of this machine's own"
    return {
        "ok": not any(problem.essential for problem in problems),
        "found": found, "versions": {"python": platform.python_version(), **versions}, "devices": devices,
        "cores": cpu_count(), "memory": dict(zip(("free", "total"), memory(), strict=True)),
        "problems": [asdict(problem) for problem in problems],
    }  # fmt: skip


# ---- packages


def packages(home: Path) -> Iterator[Problem]:
    """Yields what is missing or too old of what pyproject.toml asks for."""
    try:
        project = tomllib.loads((home / "pyproject.toml").read_text("utf-8"))["project"]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        yield Problem(
            f"{home / 'pyproject.toml'} cannot be read: {error}",
            "whipray runs from a whole clone of its repository",
            True,
        )
        return
    for text in project["dependencies"]:
        yield from _missing(Requirement(text), f"pip install '{text}'", essential=True)
    for extra, texts in project["optional-dependencies"].items():
        for text in texts:
            yield from _missing(Requirement(text), f"pip install -e '{home}[{extra}]' (for {extra})", essential=False)


def _missing(requirement: Requirement, hint: str, *, essential: bool) -> Iterator[Problem]:
    version = _version(requirement.name)
    if version is None:
        yield Problem(f"the package {requirement.name} is not installed", hint, essential)
    elif not requirement.specifier.contains(version, prereleases=True):
        yield Problem(f"{requirement.name} {version} is installed, {requirement.specifier} is needed", hint, essential)
    else:
        for part in _parts(requirement):
            if _version(part) is None:
                yield Problem(
                    f"{requirement.name} is installed without {part}, which {requirement} brings", hint, essential
                )


def _parts(requirement: Requirement) -> Iterable[str]:
    """What the extras of a requirement bring along, such as the job client of ray[default]."""
    for text in importlib.metadata.requires(requirement.name) or []:
        part = Requirement(text)
        if part.marker and any(part.marker.evaluate({"extra": extra}) for extra in requirement.extras):
            yield part.name


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python(home: Path) -> Iterator[Problem]:
    if sys.prefix == sys.base_prefix:
        yield Problem(
            "no virtual environment is active",
            f"python3 -m venv .venv && . .venv/bin/activate && pip install -e {home}",
            False,
        )


# ---- devices, memory, disk


def _devices() -> tuple[list[str], list[Problem]]:
    """Returns the accelerators that torch can use, and why it cannot use others."""
    driver = _driver()
    try:
        import torch
    except (ImportError, OSError) as error:
        return [], [
            Problem(f"torch cannot be imported: {error}", "pip install --force-reinstall torch torchvision", True)
        ]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    if there:
        devices = []
        for index in range(torch.cuda.device_count()):
            known = torch.cuda.get_device_properties(index)
            size = f"{known.total_memory / 1e9:.0f} GB"
            devices.append(f"cuda:{index} {known.name}, {size}, CUDA {torch.version.cuda}, driver {driver or '?'}")
        return devices, []
    if torch.backends.mps.is_available():
        return ["mps (Apple)"], []
    if driver:
        reason = (
            str(said[0].message).splitlines()[0] if said else f"torch is built for {torch.version.cuda or 'the CPU'}"
        )
        return [], [
            Problem(
                f"there is a GPU (driver {driver}) that torch cannot use: {reason}",
                "install a torch for this driver: pytorch.org",
                False,
            )
        ]
    return [], []


def _driver() -> str | None:
    """The version of NVIDIA's driver, where there is one."""
    program = shutil.which("nvidia-smi")
    if not program:
        return None
    try:
        words = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(told.stdout.split()), None)


def memory() -> tuple[int, int]:
    """Returns bytes of memory that are free, and in all; a container may have less than its machine."""
    import psutil

    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    with contextlib.suppress(OSError, ValueError):
        most = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if most < total:
            free, total = min(free, max(most - used, 0)), most
    return free, total


def _memory_problem() -> Iterator[Problem]:
    if memory()[0] < LITTLE_MEMORY:
        yield Problem(
            f"only {memory()[0] / 1e9:.1f} GB of memory are free", "close other programs, or use fewer workers", False
        )


def _folders(folders: dict[str, Path]) -> Iterator[Problem]:
    for name, folder in folders.items():
        there = _there(folder)
        if not os.access(there, os.W_OK | os.X_OK):
            yield Problem(
                f"{there} cannot be written to, where the {name} are to lie",
                f"give another folder: --{name} FOLDER",
                True,
            )
        elif shutil.disk_usage(there).free < LITTLE_DISK:
            yield Problem(
                f"{there} has little space for the {name}: {_disk(folder)}",
                f"make room, or give --{name} FOLDER",
                False,
            )


def _disk(folder: Path) -> str:
    usage = shutil.disk_usage(_there(folder))
    return f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f} GB ({folder})"


def _there(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


# ---- Ray


def cluster(address: str) -> tuple[str, Problem | None]:
    """Returns what answers at a Ray address, asked without importing Ray, and the problem where nothing does."""
    if address == "auto":
        return "RAY_ADDRESS=auto: whatever Ray runs on this machine", None
    hint = (
        "start it (ray start --head, ray up cluster.yaml), correct RAY_ADDRESS, or unset it to use this machine alone"
    )
    parsed = urllib.parse.urlsplit(address if "://" in address else f"ray://{address}")
    try:
        if parsed.scheme in ("http", "https"):
            with urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=TIMEOUT) as answer:  # noqa: S310 - http
                return f"answers at {address} ({answer.status})", None
        if not parsed.hostname or not parsed.port:
            return f"'{address}' is no address", Problem(
                f"RAY_ADDRESS={address} has no host and port", "such as http://head:8265", True
            )
        with socket.create_connection((parsed.hostname, parsed.port), timeout=TIMEOUT):
            return f"answers at {address}", None
    except urllib.error.HTTPError as error:
        return f"answers at {address} with {error.code} {error.reason}", None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return f"nothing answers at {address}", Problem(
            f"no Ray cluster at RAY_ADDRESS={address}: {reason}", hint, True
        )
