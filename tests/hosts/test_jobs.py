"""Jobs on a real cluster of one small node: submitted, followed, listed, stopped, refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distributed.cli import submit
from distributed.cli.main import run
from distributed.hosts import ray_cluster, ray_jobs
from tasks.errors import UserError
from tests.hosts.conftest import Head

pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]
HOME = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


# ---- on a cluster


def test_a_job_prints_here_and_passes_its_exit_code_on(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # An explicit address wins over the variables, although Ray would have it the other way.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    to = ["--address", head.jobs]
    assert run(["submit", "--runs", str(tmp_path), *to, "--name", "first", "--", "tasks"]) == 0
    said = capfd.readouterr().out
    assert "digits" in said and "first: succeeded" in said
    assert "Running entrypoint" not in said and "job_manager" not in said

    monkeypatch.setenv("RAY_ADDRESS", head.jobs)
    assert run(["submit", "--runs", str(tmp_path), "--name", "second", "--json", "--", "evaluate", "nosuchrun"]) == 2
    out, err = capfd.readouterr()
    assert json.loads(out) == {
        "job": "second", "status": "FAILED", "exit_code": 2, "run": None,
        "words": f"evaluate nosuchrun --runs {tmp_path}", "started": json.loads(out)["started"],
    }  # fmt: skip
    assert "no run 'nosuchrun'" in err

    assert run(["jobs", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)["jobs"]
    assert [(job["job"], job["status"]) for job in listed[:2]] == [("second", "FAILED"), ("first", "SUCCEEDED")]
    assert run(["logs", "first"]) == 0
    assert "digits" in capfd.readouterr().out
    assert run(["logs", "second", "--follow"]) == 2
    assert run(["stop", "first"]) == 0
    assert "has ended already" in capfd.readouterr().out

    assert run(["submit", "--runs", str(tmp_path), "--name", "first", "--", "tasks"]) == 2
    assert "there is a job 'first' already" in capfd.readouterr().err
    assert run(["stop", "frist"]) == 2
    assert "did you mean 'first'?" in capfd.readouterr().err


def test_a_stopped_training_leaves_a_checkpoint(
    head: Head, tmp_path: Path, stores: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "digits", "--epochs", "1000", "--name", "long", "--stores", str(stores)]
    assert run(["submit", "--runs", str(tmp_path), "--address", head.jobs, "--no-follow", "--", *words]) == 0
    assert str(tmp_path / "digits" / "long") in capfd.readouterr().out
    server = ray_jobs.Server(head.jobs)
    shown: list[str] = []

    def stop_when_it_learns(text: str) -> None:
        shown.append(text)
        if "epoch" in text and sum("accuracy" in line for line in shown) == 1:
            assert run(["stop", "digits/long", "--address", head.jobs]) == 0

    ended = server.follow(server.find("long").id, stop_when_it_learns)
    assert (ended.status, ended.exit_code) == ("STOPPED", 130), shown
    assert any("goes on" in line for line in shown), shown
    assert (tmp_path / "digits" / "long" / "checkpoints" / "last").exists()


def test_following_goes_on_over_dropped_connections_without_repeating(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ray_jobs.Server(head.jobs)
    job = server.submit("dropped", ["tasks"], None)
    whole, dropped = server._tail, []

    async def dropping(name: str):
        async for text in whole(name):
            yield text
            if len(dropped) < 2 and "digits" in text:
                dropped.append(text)
                raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    monkeypatch.setattr(server, "_tail", dropping)
    monkeypatch.setattr(ray_jobs, "RETRY", 0.1)
    shown: list[str] = []
    assert server.follow(job, shown.append).status == "SUCCEEDED"
    assert dropped
    assert "".join(shown) == server.logs(job)


@pytest.mark.slow
def test_a_guarded_cluster_takes_nothing_without_its_token(guarded_head: Head, tmp_path: Path) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": str(tmp_path)}
    command = [
        sys.executable,
        HOME / "whipray.py",
        "submit",
        "--runs",
        tmp_path,
        "--address",
        guarded_head.jobs,
        "--",
        "tasks",
    ]
    for environment in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        refused = subprocess.run(
            command, env=plain | environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert refused.returncode == 2, refused.stderr
        assert "refuses us" in refused.stderr and "auth_token" in refused.stderr
        assert "Traceback" not in refused.stderr
    taken = subprocess.run(
        command, env=plain | guarded_head.environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert taken.returncode == 0, taken.stderr
    assert "digits" in taken.stdout


# ---- refused before anything is sent


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["trian", "digits"], "unknown command 'trian'", "did you mean 'train'?"),
        (["train", "digitz"], "unknown task 'digitz'", "did you mean 'digits'?"),
        (["train", "digits", "optimizer.rl=0.1"], "unknown setting 'optimizer.rl'", "did you mean 'optimizer.lr'?"),
        (["train", "digits", "--runs", "/x"], "--runs is given behind -- too", "before --"),
        (["train", "digits", "--name", "../x"], "cannot be a name", "letters"),
        (["train", "digits", "--config", "nosuch.yaml"], "nosuch.yaml: cannot be read", "--config"),
        (["jobs"], "'jobs' cannot be submitted", "run it here"),
        (["--gpu", "train"], "unknown option --gpu", "before --"),
        (["train", "digits", "--wrokers", "2"], "--wrokers", "whipray train --help"),
    ],
)
def test_a_typo_is_found_here(words: list[str], message: str, hint: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "--runs", "/shared/runs", "--address", "http://127.0.0.1:9", "--", *words]) == 2
    said = capfd.readouterr().err
    assert message in said and hint in said


def test_runs_must_be_absolute(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "--runs", "runs", "--", "tasks"]) == 2
    assert "must be an absolute path" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:9", "no job server at http://127.0.0.1:9"),
        ("10.0.0.1:6379", "--address 10.0.0.1:6379 is not a job server's address"),
        ("ray://10.0.0.1:10001", "http://10.0.0.1:8265"),
    ],
)
def test_an_address_without_a_job_server_is_refused(
    address: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["jobs", "--address", address]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", "no cluster at 127.0.0.1:9"),
        ("http://127.0.0.1:8265", "is a job server"),
        ("ray://127.0.0.1:10001", "'ray://' is not supported"),
        ("127.0.0.1:port", "is no address"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ray_cluster.ray, "is_initialized", lambda: False
    )  # another test of this process may have joined one
    with pytest.raises(UserError) as raised:
        ray_cluster.connect(address)
    assert message in raised.value.message


def test_a_job_server_cannot_be_joined(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster.ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match="does not speak gRPC"):
        ray_cluster.connect(head.jobs.removeprefix("http://"))


# ---- the package


def test_what_git_ignores_is_not_sent(tmp_path: Path) -> None:
    for name in ("code.py", "data/big.bin", ".git/HEAD", ".venv/bin/python", "runs/x/config.yaml", "keep/runs/y.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    (tmp_path / ".gitignore").write_text("/data/\n/runs/\n")
    sent = {str(path) for path in ray_jobs.packed(tmp_path)}
    assert sent == {".gitignore", "code.py", "keep/runs/y.py"}


def test_a_package_that_is_too_large_is_refused_with_its_largest_files(tmp_path: Path) -> None:
    for name, size in (("a.bin", 90), ("b.bin", 20), ("c.txt", 0)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size * ray_jobs.MIB)
    with pytest.raises(UserError) as raised:
        ray_jobs.check_size(tmp_path)
    assert (
        "is 110 MiB, the job server takes 100; the largest: a.bin (90.0 MiB), b.bin (20.0 MiB)" in raised.value.message
    )
    (tmp_path / "a.bin").unlink()
    assert ray_jobs.check_size(tmp_path) < 21 * ray_jobs.MIB


def test_the_clone_is_small_enough_to_be_sent() -> None:
    assert ray_jobs.check_size() < 20 * ray_jobs.MIB


def test_files_are_named_as_the_job_will_find_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("clone/mine/task.py", "clone/ignored.py", "outside.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    home, files = tmp_path / "clone", {Path("mine/task.py"): 0}
    monkeypatch.chdir(home / "mine")
    words = ["train", "task.py:Mine", "--config=task.py", "task.width=3", "/elsewhere/x.py", "--epochs", "2"]
    expected = [
        "train",
        "mine/task.py:Mine",
        "--config=mine/task.py",
        "task.width=3",
        "/elsewhere/x.py",
        "--epochs",
        "2",
    ]
    assert submit._from_clone(words, home, files) == expected
    for word in ("../ignored.py:Mine", "../../outside.py:Mine", "task.source.path=../../outside.py"):
        with pytest.raises(UserError, match="is not sent to the cluster"):
            submit._from_clone(["train", word], home, files)


# ---- exit codes


@pytest.mark.parametrize(
    ("status", "driver", "message", "code"),
    [
        ("SUCCEEDED", 0, "", 0),
        ("FAILED", 2, "", 2),
        ("FAILED", None, "Job entrypoint command failed with exit code 3, last available logs", 3),
        ("FAILED", None, "runtime_env setup failed", 1),
        ("FAILED", -9, "", 137),
        ("STOPPED", None, "", 130),
        ("RUNNING", None, "", None),
    ],
)
def test_exit_code(status: str, driver: int | None, message: str, code: int | None) -> None:
    assert ray_jobs.exit_code(status, driver, message) == code
