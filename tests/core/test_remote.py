"""What lies at a URI comes whole, once a machine, or not at all, and goes again when the cache is full."""

import dataclasses
import errno
import http.server
import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from pyarrow import fs

from distributed import config, durable, saved
from distributed.cli import main
from distributed.data import convert, remote
from distributed.data.settings import Data
from distributed.data.store import Store
from distributed.hosts import job
from distributed.run import resolve
from tasks import digits
from tasks.digits import Digits
from tasks.errors import UserError
from tests.counted import Counted

KEYS = {
    "AWS_ACCESS_KEY_ID": "it", "AWS_SECRET_ACCESS_KEY": "is secret", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")  # S3's threads would not survive a fork
CONTEXT.set_forkserver_preload(["distributed.data.remote"])


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """An S3 server with one bucket; gives the query that leads to it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line a request
        host, port = moto.get_host_and_port()
        query = f"endpoint_override={host}:{port}&scheme=http"
        fs.FileSystem.from_uri(f"s3://bucket?{query}&allow_bucket_creation=true")[0].create_dir("bucket")
        yield query
        moto.stop()


@pytest.fixture(params=["file", "s3"])
def there(request, tmp_path) -> str:
    """The URI of an empty place."""
    if request.param == "file":
        return (tmp_path / "there").as_uri()
    return f"s3://bucket/{uuid.uuid4().hex}?{request.getfixturevalue('server')}"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "whipray"


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    """A small store: three shards and their manifest."""
    return convert.prepare(Counted(), "counted", Data(), tmp_path_factory.mktemp("made"))


def read(uri: str) -> bytes:
    filesystem, path = fs.FileSystem.from_uri(uri)
    with filesystem.open_input_stream(path, compression=None) as stream:
        return stream.read()


def write(uri: str, data: bytes) -> None:
    filesystem, path = fs.FileSystem.from_uri(uri)
    if uri.startswith("file:"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with filesystem.open_output_stream(path, compression=None) as stream:
        stream.write(data)


def names(uri: str) -> list[str]:
    filesystem, path = fs.FileSystem.from_uri(uri)
    return sorted(one.base_name for one in filesystem.get_file_info(fs.FileSelector(path)))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != remote.MANIFEST}


def visible(folder: Path) -> list[str]:
    """What a person sees in a folder of stores, but the marks beside them."""
    return [path.name for path in folder.iterdir() if path.suffix not in (".lock", ".used") and path.name[0] != "."]


class Watched(durable.Operations):
    """Does what is to be done before each operation on this machine's disk, which are counted."""

    def __init__(self, before) -> None:
        self.before, self.count, self.bytes = before, 0, 0

    def _next(self) -> None:
        self.count += 1
        self.before(self.count)

    def write(self, descriptor, data):
        self._next()
        self.bytes += len(data)
        super().write(descriptor, data)

    def sync(self, descriptor):
        self._next()
        super().sync(descriptor)

    def rename(self, source, target):
        self._next()
        super().rename(source, target)


# ---- stores


def test_a_store_comes_back_as_it_was_pushed(there, store, tmp_path):
    uri = remote.join(there, "counted", store.name)
    assert not remote.exists(uri)
    remote.push(store, uri)
    assert remote.exists(uri)
    path = remote.fetch(uri, tmp_path / "stores" / "counted" / store.name)
    durable.verify(path, Store(path).manifest)
    assert Store(path).manifest == Store(store).manifest and content(path) == content(store)
    assert remote.fetch(uri, path) == path, "and is not fetched again"


def test_a_store_that_is_there_is_left_alone(there, store, monkeypatch):
    remote.push(store, there)
    first = read(remote.join(there, "manifest.json"))
    write(remote.join(there, "manifest.json"), b"of somebody else")
    remote.push(store, there)
    assert read(remote.join(there, "manifest.json")) == b"of somebody else" != first


def test_a_push_that_breaks_off_is_not_there_and_the_next_one_is(there, store, monkeypatch):
    manifest = Store(store).manifest
    broken = {**manifest, "files": {**manifest["files"], "absent.arrow": {"bytes": 1, "crc32": "00000000"}}}
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(durable, "read_manifest", lambda *_: broken)
        remote.push(store, there)
    assert not remote.exists(there) and "manifest.json" not in names(there)
    remote.push(store, there)
    assert remote.exists(there)


def test_a_damaged_store_is_not_pushed(there, store, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for name, data in content(store).items():
        (own / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (own / "manifest.json").write_bytes((store / "manifest.json").read_bytes())
    with pytest.raises(UserError, match=r"own/.*\.arrow: its checksum differs"):
        remote.push(own, there)
    assert not remote.exists(there)


def sealed(text: bytes, **changes) -> bytes:
    manifest = {**json.loads(text), **changes}
    manifest.pop("digest")
    return json.dumps({**manifest, "digest": durable.digest_of(manifest)}).encode()


SHARD = "train-00000-of-"
DAMAGE = [
    (SHARD, lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], rf"{SHARD}.*: its checksum differs"),
    (SHARD, lambda data: data[:-1], rf"{SHARD}.*: has \d+ bytes instead of \d+"),
    (SHARD, lambda data: data + b"x", rf"{SHARD}.*: has \d+ bytes instead of \d+"),
    (SHARD, lambda data: b"", rf"{SHARD}.*: has 0 bytes"),
    (SHARD, None, rf"{SHARD}.*: is missing"),
    ("manifest", None, r"manifest\.json.*: is not there"),
    ("manifest", lambda data: data[:100], r"manifest\.json.*: is broken"),
    ("manifest", lambda data: data.replace(b'"rows"', b'"wors"', 1), r"manifest\.json.*: was changed after"),
    ("manifest", lambda data: sealed(data, format=99), r"manifest\.json.*: is of format 99, this whipray reads"),
    (
        "manifest",
        lambda data: sealed(data, files={"../../x": {"bytes": 1, "crc32": "00000000"}}),
        "names a file outside its folder",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("which", "change", "message"), DAMAGE)
def test_what_is_damaged_or_missing_there_is_named_and_nothing_is_published(
    there, store, tmp_path, which, change, message
):
    remote.push(store, there)
    uri = remote.join(there, next(name for name in names(there) if name.startswith(which)))
    if change:
        write(uri, change(read(uri)))
    else:
        filesystem, path = fs.FileSystem.from_uri(uri)
        filesystem.delete_file(path)
    with pytest.raises(UserError, match=message) as raised:
        remote.fetch(there, tmp_path / "here" / "store")
    assert there.partition("?")[0] in raised.value.message and str(tmp_path / "here") not in raised.value.message
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["store.lock", "store.used"]


# ---- while it comes


def test_a_disk_that_fails_at_any_moment_is_told_and_leaves_nothing(there, store, tmp_path, monkeypatch):
    remote.push(store, there)
    here = tmp_path / "here"

    def full(count: int) -> None:
        if count >= at:  # a full disk stays full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for at in range(1, 1000):
        watched = Watched(full)
        monkeypatch.setattr(durable, "OPERATIONS", watched)
        try:
            remote.fetch(there, here / "store")
        except UserError as error:
            assert "here/store: cannot be written: No space left on device" in error.message
        if watched.count < at:
            break
        assert not [path for path in here.iterdir() if path.suffix == ".part"]
        if visible(here):  # renamed already, and only the folder could not be synced
            assert content(here / "store") == content(store)
            break
    assert at > 10 and content(here / "store") == content(store)


def _fetch(uri: str, path: Path, kill_at: int, pause: float, told: Path) -> None:
    """What another process does: fetches, perhaps to be killed, and tells how many bytes it has written."""
    os.environ.update(KEYS)

    def before(count: int) -> None:
        time.sleep(pause)
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    durable.OPERATIONS = watched = Watched(before)
    remote.fetch(uri, path)
    told.write_text(str(watched.bytes))


def test_kill_9_at_any_moment_leaves_nothing_that_is_partial_and_the_next_fetch_goes_through(there, store, tmp_path):
    remote.push(store, there)
    here, told = tmp_path / "here", tmp_path / "told"
    for at in (1, 4, 7, 12, 10**6):  # the twelfth is the renaming
        process = CONTEXT.Process(target=_fetch, args=(there, here / "store", at, 0.0, told))
        process.start()
        process.join()
        if visible(here):
            assert content(here / "store") == content(store)
            break
        assert process.exitcode == -signal.SIGKILL
    assert at > 5 and visible(here) == ["store"]
    assert not [path for path in here.iterdir() if path.suffix == ".part"], "what the killed ones left is gone"


def test_of_two_processes_one_fetches_and_the_other_waits(there, store, tmp_path):
    remote.push(store, there)
    told = [tmp_path / "told-1", tmp_path / "told-2"]
    both = [CONTEXT.Process(target=_fetch, args=(there, tmp_path / "here" / "store", 0, 0.02, one)) for one in told]
    for process in both:
        process.start()
    for process in both:
        process.join()
    written = sorted(int(one.read_text()) for one in told)
    assert written[0] == 0
    assert written[1] >= sum(entry["bytes"] for entry in Store(store).manifest["files"].values())
    assert content(tmp_path / "here" / "store") == content(store)


# ---- raw data


def test_a_remote_folder_comes_with_its_names_and_times(there, tmp_path):
    files = {"a.csv": b"1,2\n", "deep/b.csv.gz": b"\x1f\x8bno gzip", "deep/er/空 c.txt": b"", "manifest.json": b"{}"}
    for name, data in files.items():
        write(remote.join(there, "raw", quote(name)), data)
    uri = remote.join(there, "raw")
    local = remote.source(uri, tmp_path / "sources")
    assert local.name == "raw"
    assert {str(path.relative_to(local)): path.read_bytes() for path in local.rglob("*") if path.is_file()} == files
    again = remote.source(uri, tmp_path / "of another machine")
    assert [path.stat().st_mtime_ns for path in sorted(local.rglob("*.*"))] == [
        path.stat().st_mtime_ns for path in sorted(again.rglob("*.*"))
    ]
    inode = (local / "a.csv").stat().st_ino
    assert (remote.source(uri, tmp_path / "sources") / "a.csv").stat().st_ino == inode, "fetched once"
    (local / "a.csv").write_bytes(b"1")
    assert (remote.source(uri, tmp_path / "sources") / "a.csv").read_bytes() == b"1,2\n", "a cut copy is replaced"
    write(remote.join(uri, "a.csv"), b"1,2,3\n")
    assert (remote.source(uri, tmp_path / "sources") / "a.csv").read_bytes() == b"1,2,3\n", "and so is an old one"


def test_a_remote_file_keeps_its_name(there, tmp_path):
    write(remote.join(there, "table.csv"), b"a\n1\n")
    local = remote.source(remote.join(there, "table.csv"), tmp_path)
    assert local.name == "table.csv" and local.read_bytes() == b"a\n1\n"


def test_a_source_that_is_not_there_is_refused(there, tmp_path):
    write(remote.join(there, "a"), b"")
    with pytest.raises(UserError, match="is not there"):
        remote.source(remote.join(there, "b"), tmp_path)


def test_a_source_that_changes_meanwhile_is_refused(there, tmp_path, monkeypatch):
    uri = remote.join(there, "raw")
    write(remote.join(uri, "a"), b"before")
    monkeypatch.setattr(durable, "OPERATIONS", Watched(lambda count: write(remote.join(uri, "b"), b"more")))
    with pytest.raises(UserError, match="changed while it was fetched"):
        remote.source(uri, tmp_path / "sources")
    assert visible(tmp_path / "sources") == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["x/a", "x/a/b"], "'a' is a file and a folder as well"),
        (["x//a"], "'/a' is no name for a local file"),
    ],
)  # fmt: skip
def test_keys_that_cannot_be_files_are_refused(server, tmp_path, keys, message):
    import boto3

    endpoint = f"http://{server.partition('=')[2].partition('&')[0]}"
    prefix = uuid.uuid4().hex
    for key in keys:
        boto3.client("s3", endpoint_url=endpoint).put_object(Bucket="bucket", Key=f"{prefix}/{key}", Body=b"x")
    with pytest.raises(UserError, match=message):
        remote.source(f"s3://bucket/{prefix}/x?{server}", tmp_path)


# ---- services that refuse


def test_a_bucket_that_is_not_there_is_named_before_anything_is_prepared(server, home, monkeypatch):
    monkeypatch.setattr(Digits, "examples", None)
    run = resolve("digits", {})
    with pytest.raises(UserError, match=r"s3://nobucket/.*: there is no such bucket"):
        job.prepare(run, Path(f"s3://nobucket/stores?{server}"))
    with pytest.raises(UserError, match=r"s3://nobucket/.*: there is no such bucket"):
        remote.source(f"s3://nobucket/raw?{server}", home)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gopher://x/y", "Unrecognized filesystem type"),
        ("s3://bucket/x?colour=red", "Unexpected query parameter"),
        ("s3://", "names no bucket"),
        ("s3://[bucket/x", "not a URI: Invalid IPv6 URL"),
    ],
)  # fmt: skip
def test_a_uri_that_means_nothing_here_is_refused(uri, message, tmp_path):
    with pytest.raises(UserError, match=message):
        remote.source(uri, tmp_path)


class Service(http.server.ThreadingHTTPServer):
    """An S3 service with one object, which answers its first requests with `refusals`."""

    daemon_threads = True

    def __init__(self, *refusals: int) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.refusals = list(refusals)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def uri(self) -> str:
        return f"s3://bucket/object?endpoint_override=127.0.0.1:{self.server_port}&scheme=http"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        body = b"" if self.server.refusals else b"the object"
        self.send_response(self.server.refusals.pop(0) if self.server.refusals else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Mon, 02 Nov 2026 10:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, *words):
        pass


def test_a_passing_failure_is_logged_and_tried_again(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(remote, "WAIT", 0.01)
    with Service(400, 400) as service, caplog.at_level(logging.WARNING, "whipray"):
        assert remote.source(service.uri, tmp_path).read_bytes() == b"the object"
        service.shutdown()
    assert "attempt 1 of 3 failed" in caplog.text and "attempt 2 of 3 failed" in caplog.text and "400" in caplog.text


def test_denied_access_is_told_at_once_without_a_word_of_the_keys(server, tmp_path, caplog):
    with Service(*[403] * 9) as service, pytest.raises(UserError, match="access is denied") as raised:
        remote.source(service.uri, tmp_path)
    service.shutdown()
    assert "AWS_ACCESS_KEY_ID" in raised.value.hint and len(service.refusals) == 8
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in str(raised.value) + caplog.text


def test_a_service_out_of_reach_is_named(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 1)  # of ours; the client's own take six seconds
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        uri = f"s3://bucket/x?endpoint_override=127.0.0.1:{taken.getsockname()[1]}&scheme=http"
        with pytest.raises(UserError, match=r"s3://bucket/x.*: cannot be reached: .*connect"):
            remote.source(uri, tmp_path)


# ---- what takes room


def _fetch_all(uri: str, paths: list[Path]) -> None:
    os.environ.update(KEYS)
    for path in paths:
        remote.fetch(uri, path)


def _hold(path: Path, ready) -> None:
    remote.use(path)
    ready.set()
    time.sleep(60)


def test_the_longest_unused_copy_goes_first_and_never_one_in_use(store, tmp_path):
    uri = (tmp_path / "there").as_uri()
    remote.push(store, uri)
    cache = tmp_path / "cache"
    old, older, used, kept, own = copies = [cache / "stores" / f"task/{name}" for name in ("a", "b", "c", "d", "e")]
    process = CONTEXT.Process(target=_fetch_all, args=(uri, copies[:4]))
    process.start()
    process.join()
    convert.shutil.copytree(store, own)  # prepared here: nowhere else to be had
    size = sum(path.stat().st_size for path in old.iterdir())
    for age, path in enumerate((kept, used, older, old)):
        os.utime(path.with_suffix(".used"), (1000 + age, 1000 + age))

    ready = CONTEXT.Event()
    holder = CONTEXT.Process(target=_hold, args=(used, ready))
    holder.start()
    ready.wait()
    assert used.with_suffix(".used").stat().st_mtime > 2000, "a copy is as old as its last use"
    assert remote.evict(cache, 4 * size, {kept}) == []
    assert remote.evict(cache, 3 * size, {kept}) == [older]
    assert sorted(visible(cache / "stores" / "task")) == ["a", "c", "d", "e"]
    assert remote.evict(cache, 0, {kept}) == [old]
    holder.kill()  # the lock goes with the process, however it ends
    holder.join()
    assert remote.evict(cache, 0, {kept}) == [used]
    assert sorted(visible(cache / "stores" / "task")) == ["d", "e"]
    assert not list(cache.rglob("*.part"))


def test_what_this_process_has_fetched_stays_until_it_ends(there, store, tmp_path):
    remote.push(store, there)
    remote.fetch(there, tmp_path / "cache" / "store")
    assert remote.evict(tmp_path / "cache", 0) == [] and visible(tmp_path / "cache") == ["store"]


def test_a_preparation_keeps_the_cache_within_its_bound(there, home, tmp_path, monkeypatch):
    def prepare(*words: str) -> Path:
        return job.prepare(resolve("digits", config.from_words(words)), Path(there))

    stale = home / "stores" / "digits" / "stale"
    stale.mkdir(parents=True)
    (stale / "x").write_bytes(bytes(10_000))
    stale.with_suffix(".used").touch()
    os.utime(stale.with_suffix(".used"), (1000, 1000))
    monkeypatch.setenv("WHIPRAY_CACHE_BYTES", "1e9")
    prepare()
    assert stale.exists()
    monkeypatch.setenv("WHIPRAY_CACHE_BYTES", "1000")
    path = prepare()
    assert path.exists() and not stale.exists(), "the store asked for stays, however large it is"
    monkeypatch.setenv("WHIPRAY_CACHE_BYTES", "lots")
    with pytest.raises(UserError, match="WHIPRAY_CACHE_BYTES=lots: expected a number of bytes"):
        prepare()


# ---- whole runs


def train(runs: Path, *words: str) -> int:
    settings = ["task.model=mlp", "train.epochs=1", "data.limit=200", "log.tensorboard=false"]
    return main.run(["train", "digits", *settings, "--no-ray", "--runs", str(runs), "--name", "run", *words])


def test_a_second_machine_trains_without_preparing(there, tmp_path, monkeypatch):
    for machine in ("first", "second"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        assert train(tmp_path / machine / "runs", "--stores", there) == 0
        monkeypatch.setattr(Digits, "examples", None)  # reads no raw data from now on
    first, second = (next((tmp_path / m / "whipray/stores/digits").glob("*/")) for m in ("first", "second"))
    assert content(first) == content(second)
    summaries = [saved.summary(tmp_path / machine / "runs/digits/run") for machine in ("first", "second")]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]


def test_a_remote_source_makes_the_same_store_as_a_local_one(there, home, tmp_path, monkeypatch):
    uri = remote.join(there, digits.BUNDLED.name)
    write(uri, digits.BUNDLED.read_bytes())
    local = job.prepare(resolve("digits", {}), tmp_path / "local")
    assert train(tmp_path / "runs", f"task.source.path={uri}") == 0
    path = home / "stores" / "digits" / local.name
    assert Store(path).manifest["splits"] == Store(local).manifest["splits"]
    written = config.from_yaml(tmp_path / "runs/digits/run" / saved.CONFIG)
    assert written["task.source.path"].value == uri, "a run keeps where its data came from"


# ---- URIs


@pytest.mark.parametrize(
    ("place", "uri"),
    [
        ("s3://bucket/a?region=x", "s3://bucket/a?region=x"),
        (Path("s3://bucket/a?region=x"), "s3://bucket/a?region=x"),
        ("file:///tmp/a", "file:///tmp/a"),
        (Path("file:///tmp/a"), "file:///tmp/a"),
        ("hdfs:///tmp/a", "hdfs:///tmp/a"),
        (Path("hdfs://node:8020/a"), "hdfs://node:8020/a"),
    ],
)  # fmt: skip
def test_a_uri_is_told_from_a_path_and_survives_being_one(place, uri):
    assert config.is_uri(place) and config.as_uri(place) == uri


@pytest.mark.parametrize("place", ["", "a/b", "/tmp/x", "~/x", "C:/x", "s3", "my_task.py:Task", "a b://c"])
def test_paths_are_no_uris(place):
    assert not config.is_uri(place)


SECRET = "hunter2/+x"
BEARERS = [
    f"s3://AKIA:{SECRET}@bucket/x",  # its slash ends what a URI calls the host
    "s3://AKIA:hunter2@bucket/x",
    "s3://hunter2@bucket/x",
    "s3://bucket/x?access_key=AKIA&secret_key=hunter2",
    "s3://bucket/x?endpoint_override=u:hunter2@host",
    "s3://bucket/x?endpoint_override=u:hunter2%40host",
    "hdfs://me:hunter2@node:8020/x",
    "abfs://container/x?account_key=hunter2",
    "abfs://container/x?sas_token=hunter2",
    "https://host/x?X-Amz-Signature=hunter2",
]


@pytest.mark.parametrize("uri", BEARERS)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri, tmp_path, capfd):
    runs = tmp_path / "runs"
    for words in (["--stores", uri], [f"task.source.path={uri}"]):
        assert train(runs, *words) == 2
        told = "".join(capfd.readouterr())
        assert "must hold no credentials" in told and "AWS_ACCESS_KEY_ID" in told and "hunter2" not in told
    assert not runs.exists()
    with pytest.raises(UserError, match="must hold no credentials"):
        remote.source(uri, tmp_path)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/monkeys?region=eu&endpoint_override=host:9000&scheme=http", "gs://anonymous@bucket/x",
        "hdfs://me@node:8020/x?replication=1", "hdfs://[::1]:8020/x", "abfs://container@account.dfs.core.windows.net/x",
        "file:///a:b/c@d",
    ],
)  # fmt: skip
def test_other_uris_are_taken_as_they_are(uri):
    config.refuse_credentials(uri)
    source = resolve("digits", config.from_words([f"task.source.path={uri}"])).task.source
    assert source.path == uri and dataclasses.replace(source).path == uri


@given(st.lists(st.sampled_from("abc"), min_size=1), st.sampled_from(["", "?region=x"]))
def test_joining_goes_below_and_keeps_the_query(parts, query):
    joined = remote.join(f"s3://bucket/{query}", *parts)
    assert joined == f"s3://bucket/{'/'.join(parts)}{query}"
