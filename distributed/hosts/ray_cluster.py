"""Joins a Ray cluster, or starts a small Ray of this machine's own, and says what it has.

Ray waits for minutes where no cluster is, and ends the process where a cluster refuses it; here both are a UserError
within seconds. A Ray that we start listens on loopback only, and asks everyone for a token that only this process and
its children know (measured with Ray 2.60: by default it listens on all interfaces).
"""

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray._private.ray_constants
import yaml
from ray.exceptions import AuthenticationError

from distributed.hosts.feasibility import UNLIMITED
from distributed.resources import cpu_count
from tasks.errors import UserError

HOME = Path(__file__).resolve().parents[2]  # of `distributed` and `tasks`; what is sent to a cluster
PATIENCE = 3.0  # seconds in which a head must take a connection
HEAD = "node:__internal_head__"  # a resource that the head alone has
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # `ray up` leaves the launcher file there, on the head
# What a Ray of our own does without; a value that the user has set wins.
QUIET = {
    "RAY_enable_worker_prestart": "0",  # else it starts a worker a core before anybody asks: 0.7 CPU-s each
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_metrics_collection": "false",  # nobody reads them without a dashboard
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default, else a FutureWarning; we never ask for 0 devices
}
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": Ray's switch, off Linux the default, to stay on 127.0.0.1
SEND = "whipray submit --runs FOLDER --address {} -- train ..."


@dataclass(frozen=True)
class Cluster:
    """What this process is connected to."""

    address: str  # host:port of the cluster's head
    own: bool  # started by this process, and ended with it


def connect(address: str | None = None) -> Cluster:
    """Joins the cluster at `address`, else at RAY_ADDRESS, else starts a Ray of this process's own.

    Called again, it returns the cluster that this process is connected to already. Raises UserError for an address
    where no cluster is, one that refuses us, or one of another version. Ray takes over SIGTERM: set handlers
    afterwards.
    """
    if ray.is_initialized():
        return _here()
    address = address or os.environ.get("RAY_ADDRESS") or None
    paths = [str(HOME), *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(HOME))]
    with _quiet_about_tokens():
        if address in (None, "local"):
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # workers inherit it
            _start()
        else:
            _join(_reachable(address), os.pathsep.join(paths))
    return _here()


def _here() -> Cluster:
    node = ray._private.worker._global_node
    return Cluster(ray.get_runtime_context().gcs_address, own=node is not None and node.is_head())


def nodes() -> list[dict[str, float]]:
    """Returns what every living node has in all, whoever uses it now: `{"CPU": 8.0, "GPU": 2.0, "memory": ...}`."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def may_add() -> list[tuple[dict[str, float], int]]:
    """Returns the kinds of nodes that the cluster's autoscaler, if any, may start yet, and how many of each."""
    told = ray._private.state.state.get_cluster_config()  # KubeRay's and other autoscalers tell the cluster
    if told is not None:
        groups = [(dict(group.resources), int(group.max_count)) for group in told.node_group_configs]
        kinds = [(resources, UNLIMITED if count < 0 else count) for resources, count in groups]
    else:
        kinds = from_launcher(BOOTSTRAP.expanduser())
    return remaining(kinds, nodes())


def remaining(
    kinds: list[tuple[dict[str, float], int]], there: list[dict[str, float]]
) -> list[tuple[dict[str, float], int]]:
    """Returns the kinds without those of their nodes that are there already, told by their cores and devices."""
    left: list[list[Any]] = [[resources, count] for resources, count in kinds]
    for node in there:
        if HEAD in node:
            continue
        for kind in left:
            if kind[1] > 0 and all(kind[0].get(key, 0) == node.get(key, 0) for key in ("CPU", "GPU")):
                kind[1] -= 1
                break
    return [(resources, count) for resources, count in left if count > 0]


def from_launcher(path: Path) -> list[tuple[dict[str, float], int]]:
    """Returns the kinds of nodes of a cluster launcher's file; machines of one's own are all there from the start."""
    try:
        launched = yaml.safe_load(path.read_text("utf-8"))
        if launched["provider"]["type"] == "local":
            return []
        kinds = [kind for name, kind in launched["available_node_types"].items() if name != launched["head_node_type"]]
        limit = launched.get("max_workers", 2)
        return [(dict(kind.get("resources") or {}), min(kind.get("max_workers", limit), limit)) for kind in kinds]
    except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return []  # there is none, or it is not what we take it for: then only what is there counts


# ---- starting, joining


def _start() -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not (
        os.environ.get("RAY_AUTH_MODE") or os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else Ray writes one that others can read (mode 0644)
    before = ray._private.ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(LOOPBACK)
    os.environ[LOOPBACK] = "0"  # for the processes that Ray starts
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # for this one, which has read the environment before
    try:
        ray.init(
            address="local",
            num_cpus=cpu_count(),
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=True,
        )
    except (Exception, SystemExit) as error:  # a bare Exception where it takes too long, on a busy machine
        raise UserError(f"Ray does not start on this machine: {_first_line(error)}",
                        "--no-ray works without it; /tmp/ray/session_latest/logs says why") from error  # fmt: skip
    finally:
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = before[0]
        if before[1] is None:
            del os.environ[LOOPBACK]
        else:
            os.environ[LOOPBACK] = before[1]


def _join(address: str, python_path: str) -> None:
    # A job's files are everywhere already, and its environment must not be given twice.
    inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    runtime_env: dict[str, Any] | None = None if inside_job else {"env_vars": {"PYTHONPATH": python_path}}
    try:
        ray.init(address=address, runtime_env=runtime_env, logging_level=logging.ERROR, log_to_driver=True)
    except AuthenticationError as error:
        raise UserError(f"{address}: the cluster refuses us: {_first_line(error)}", HOW_TO_PROVE) from error
    except (RuntimeError, ConnectionError, SystemExit) as error:
        # Ray ends the process (SystemExit) where what listens there is no head.
        raise UserError(f"{address}: cannot join the cluster: {_why(error)}", _what_to_do(error, address)) from error


HOW_TO_PROVE = "put the cluster's token into ~/.ray/auth_token, or give RAY_AUTH_TOKEN, with RAY_AUTH_MODE=token"


def _why(error: BaseException) -> str:
    if "Version mismatch" in str(error):
        return " ".join(str(error).split())
    return (
        "what listens there does not answer as a head of Ray" if isinstance(error, SystemExit) else _first_line(error)
    )


def _what_to_do(error: BaseException, address: str) -> str:
    if "Version mismatch" in str(error):
        return "install the cluster's versions here, or here's on the cluster: constraints.txt holds ours"
    server = f"http://{address.rpartition(':')[0]}:8265"
    return f"only a machine of the cluster can join it; from elsewhere: {SEND.format(server)}"


def _reachable(address: str) -> str:
    """The address as host:port, once something there speaks as a head does; Ray itself would wait for minutes."""
    if address == "auto":
        return address
    scheme, _, _ = address.rpartition("://")
    if scheme in ("http", "https"):
        raise UserError(f"{address} is a job server, which a run is sent to and cannot join", SEND.format(address))
    if scheme:
        raise UserError(
            f"{address}: '{scheme}://' is not supported", "give HOST:PORT of the head, such as 10.0.0.1:6379"
        )
    host, port = split(address, 6379)
    speaks = _speaks_grpc(host, port)
    if speaks is None:
        raise UserError(f"no cluster at {address}: nothing takes a connection there",
                        "`ray start --head` prints HOST:PORT; without --address, this machine is used")  # fmt: skip
    if not speaks:
        raise UserError(f"{address} is no head of a Ray cluster (it does not speak gRPC)",
                        f"6379 is the usual port; to a job server: {SEND.format(f'http://{address}')}")  # fmt: skip
    return f"{host}:{port}"


def split(address: str, port: int) -> tuple[str, int]:
    """Returns host and port of HOST[:PORT]; raises UserError."""
    host, colon, number = address.rpartition(":")
    if not colon:
        return address, port
    if not host or not number.isdigit() or not 0 < int(number) < 65536:
        raise UserError(f"'{address}' is no address", "write HOST:PORT, such as 10.0.0.1:6379")
    return host.strip("[]"), int(number)


def takes_connections(host: str, port: int) -> bool:
    """Returns whether anything listens there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=PATIENCE):
        return True
    return False


def _speaks_grpc(host: str, port: int) -> bool | None:
    """Whether a server answers HTTP/2's opening with HTTP/2's, as gRPC does; None where nothing listens."""
    settings = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # an empty SETTINGS frame
    try:
        with socket.create_connection((host, port), timeout=PATIENCE) as link:
            try:
                link.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
                return link.recv(9)[3:4] == b"\x04"
            except OSError:
                return bool(os.environ.get("RAY_USE_TLS", "0") == "1")  # a server with TLS hangs up on plain words
    except OSError:
        return None


@contextlib.contextmanager
def _quiet_about_tokens() -> Iterator[None]:
    """Ray warns that its token is on, which is what we want."""
    logger = logging.getLogger("ray._private.authentication.authentication_token_setup")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first_line(error: BaseException) -> str:
    words = str(error).strip().splitlines()
    return words[0] if words else type(error).__name__
