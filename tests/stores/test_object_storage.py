"""A copy of a store on S3 reads as the local store, with one request per chunk and no write.

The server is rclone's `serve s3`. A proxy in front of it counts requests and injects faults. It
also answers a ranged request with 206, where rclone sends 200, and obeys If-Match, which rclone
ignores.
"""

import contextlib
import http.client
import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import obstore
import pandas as pd
import pytest
from obstore.exceptions import NotSupportedError
from obstore.store import from_url

from varve.stores import Damaged, FeatureStore, NotAStore, Unreachable, columns, text_features
from varve.stores.columns import Column, ColumnSpec
from varve.stores.text_features import TextFeatures

CELL = (4, 6)
SLOTS = 8  # clips a shard
INDEX_BYTES = 16 * SLOTS + 4
BACKBONE = "hf-hub:a/b c"  # on the server: features/hf-hub:a%2Fb c/
FORKS = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


class Proxy(ThreadingHTTPServer):
    """Proxy that forwards to `port` and records the requests: (method, path, range)."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Forward)
        self.upstream, self.lock = port, threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.requests, self.obeys_conditions = [], True
        self.before = lambda method, path, wanted: None
        self.in_flight = self.most_in_flight = 0

    def gets(self, part: str) -> list[str | None]:
        """Return the ranges of the GET requests whose path contains `part`."""
        return [r for method, path, r in self.requests if method == "GET" and part in path]


class Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # 40 ms an answer otherwise

    def answer(self) -> None:
        proxy, wanted = self.server, self.headers.get("Range")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with proxy.lock:
            proxy.requests.append((self.command, self.path, wanted))
            proxy.in_flight += 1
            proxy.most_in_flight = max(proxy.most_in_flight, proxy.in_flight)
        status = proxy.before(self.command, self.path, wanted)
        response, data = self.upstream_response(body)
        headers = dict(response.getheaders())
        data = b"" if status else data
        status = status or (206 if "Content-Range" in headers else response.status)
        condition = self.headers.get("If-Match")
        if proxy.obeys_conditions and condition and condition != headers.get("Etag"):
            status, data = 412, b""
        with proxy.lock:
            proxy.in_flight -= 1
        self.send_response(status)
        size = headers.get("Content-Length") if self.command == "HEAD" else len(data)
        for name, value in (headers | {"Content-Length": str(size)}).items():
            if name not in ("Transfer-Encoding", "Date", "Server", "Connection"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def upstream_response(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        """Repeat a request that rclone truncates because the object is replaced meanwhile."""
        while True:
            upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream)
            with contextlib.closing(upstream), contextlib.suppress(http.client.IncompleteRead):
                upstream.request(self.command, self.path, body, dict(self.headers))
                response = upstream.getresponse()
                return response, response.read()

    do_GET = do_PUT = do_HEAD = answer

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rclone = subprocess.Popen(
        [Path(sys.executable).with_name("rclone"), "serve", "s3", root, "--config", os.devnull,
         "--addr", f"127.0.0.1:{port}", "--auth-key", "key,secret", "--vfs-write-back", "0s"],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    proxy = Proxy(port)
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    try:
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.02)
        yield proxy
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
        rclone.kill()
        rclone.wait()


@pytest.fixture
def server(running, monkeypatch):
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    running.reset()
    yield running
    running.reset()


@pytest.fixture
def options(server):
    return {
        "endpoint": f"http://127.0.0.1:{server.server_port}",
        "access_key_id": "key",
        "secret_access_key": "secret",
    }


@pytest.fixture
def copied(options):
    """Return a function that copies a store, or one of its files, to the bucket."""

    def copy(store: Path, url: str = "", file: Path | None = None) -> str:
        url = url or f"s3://bucket/{uuid.uuid4().hex}/s.zarr"
        client = from_url(url, **options, client_options={"allow_http": True})
        for path in [file] if file else store.rglob("*"):
            if path.is_file():
                obstore.put(client, str(path.relative_to(store)), path.read_bytes())
        return url

    return copy


def cells_of(rows, salt=0):
    """Return float16 cells whose every number encodes the row and the version."""
    return np.array([np.full(CELL, 2 * row + salt, np.float16) for row in rows]).reshape(-1, *CELL)


class LocalStore:
    """A local store with one column, in shards of 8 clips."""

    def __init__(self, write_rows, path: Path, count: int, absent=()) -> None:
        self.store, self.write_rows = FeatureStore.create(path), write_rows
        self.column = Column(path, ColumnSpec(BACKBONE, "pool", "ab" * 32, CELL, "float16", {}))
        self.write(np.setdiff1d(np.arange(count), absent), count)

    def write(self, rows, count, salt=0):
        cells = partial(cells_of, salt=salt)
        self.write_rows(self.store.path, self.column, rows, count, cells)


@pytest.fixture
def make(tmp_path, write_rows, monkeypatch):
    monkeypatch.setattr(columns, "MAX_SHARD_CLIPS", SLOTS)
    return lambda count, absent=(): LocalStore(write_rows, tmp_path / "s.zarr", count, absent)


def test_a_copied_store_reads_as_the_local_one(store, copied, options):
    classes = TextFeatures(("wave", "clap"), np.eye(2, 5, dtype=np.float32))
    text_features.write(store.path, "net:tag", {"prompts": ["a {}"]}, classes)
    store.set_attributes({"classes": ["clap", "wave"]})
    far = FeatureStore.open(copied(store.path), options)
    pd.testing.assert_frame_equal(far.clips, store.clips)
    assert far.attributes == store.attributes
    assert repr(far) == f"<FeatureStore {far.location}: 3 clips, 2 features>"
    assert len(far.features()) == len(store.features()) == 2
    for a, b in zip(far.features(), store.features(), strict=True):
        assert (a.backbone, a.name, a.fingerprint) == (b.backbone, b.name, b.fingerprint)
        assert (a.shape, a.dtype, a.spec) == (b.shape, b.dtype, b.spec)
        np.testing.assert_array_equal(a.valid, b.valid)
        for rows in ([1, 0, 1], [0], slice(0, 2), b.valid):
            assert a.read(rows).tobytes() == b.read(rows).tobytes()
        np.testing.assert_array_equal(a.to_dask().compute(), b.to_dask().compute())
        (x, label), (y, same) = a.dataset()[1], b.dataset()[1]
        assert x.tobytes() == y.tobytes()
        assert label == same
        with pytest.raises(LookupError, match=r"first is row 2 \(a/z.mp4; quarantined: corrupt"):
            a.read([0, 2])
    result = far.text("net:tag")
    assert result.classes == ("clap", "wave")
    np.testing.assert_array_equal(result.values, classes.values[::-1])


def test_random_rows_take_one_request_each_and_one_per_index(make, server, copied, options):
    local = make(40, absent=[5, *range(24, 32)])
    feature = FeatureStore.open(copied(local.store.path), options).feature(BACKBONE, "pool")
    rows = np.array([33, 3, 1, 17, 38, 3, 35, 12])
    assert feature.valid.sum() == 31
    server.requests.clear()
    server.before = lambda method, path, wanted: time.sleep(0.03)
    np.testing.assert_array_equal(feature.read(rows), cells_of(rows))
    ranges = server.gets("/c/")
    assert len(ranges) == len(server.requests) == 7 + 4  # row 3 was requested twice; 4 shards
    assert sorted(ranges)[:4] == [f"bytes=-{INDEX_BYTES}"] * 4
    assert server.most_in_flight >= 4
    size = {int(r[6:].split("-")[1]) - int(r[6:].split("-")[0]) + 1 for r in sorted(ranges)[4:]}
    assert size == {48 + 4}
    server.requests.clear()
    np.testing.assert_array_equal(feature.read([37, 0, 18]), cells_of([37, 0, 18]))
    assert len(server.requests) == 3  # the indices are known
    with pytest.raises(LookupError, match=r"first is row 5 "):
        feature.read([4, 5])
    server.requests.clear()
    np.testing.assert_array_equal(feature.read(slice(32, 40)), cells_of(range(32, 40)))
    assert server.gets("/c/") == [None]  # all of a shard: the whole object
    bits = feature.bits(np.arange(40))
    assert bits.tobytes() == local.store.feature(BACKBONE, "pool").bits(np.arange(40)).tobytes()


@pytest.mark.parametrize("obeys_conditions", [True, False], ids=["If-Match", "ETag alone"])
def test_a_cell_read_while_its_shard_is_replaced_is_of_one_version(
    make, server, copied, options, obeys_conditions
):
    """Index and chunks of two versions would pass the checksums: here the rows have moved."""
    local = make(8, absent=[0, 1, 2])
    shard, path = local.column.shard_file(0), local.store.path
    first = shard.read_bytes()
    url = copied(path)
    feature = FeatureStore.open(url, options).feature(BACKBONE, "pool")
    assert feature.valid.sum() == 5
    server.obeys_conditions = obeys_conditions

    def replace(method, key, wanted):
        if method == "GET" and wanted and not wanted.startswith("bytes=-"):
            server.before = lambda *request: None
            copied(path, url, shard)

    local.write(np.arange(8), 8, salt=1)
    server.before = replace
    result = feature.read([6, 3])
    for cell, row in zip(result, [6, 3], strict=True):
        assert cell.tobytes() in (cells_of([row]).tobytes(), cells_of([row], salt=1).tobytes())
    np.testing.assert_array_equal(feature.read([6, 3]), cells_of([6, 3], salt=1))
    shard.write_bytes(first)
    copied(path, url, shard)  # between two reads
    np.testing.assert_array_equal(feature.read([6, 3]), cells_of([6, 3]))


def test_the_size_is_requested_from_a_server_without_suffix_ranges(
    make, copied, options, monkeypatch
):
    local, real = make(12), obstore.get_async

    async def azure(client, key, *, options):
        if "suffix" in options.get("range", ()):
            raise NotSupportedError("Azure does not support suffix range requests")
        return await real(client, key, options=options)

    monkeypatch.setattr(obstore, "get_async", azure)
    feature = FeatureStore.open(copied(local.store.path), options).feature(BACKBONE, "pool")
    np.testing.assert_array_equal(feature.read([9, 2]), cells_of([9, 2]))


def test_the_error_of_damage_names_the_repair(make, server, copied, options):
    local = make(12)
    url, path = copied(local.store.path), local.store.path
    feature = FeatureStore.open(url, options).feature(BACKBONE, "pool")
    shard = local.column.shard_file(1)
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    copied(path, url, shard)
    with pytest.raises(Damaged, match=r"(?s)c/1/0/0 is damaged near row .*Copy the store there"):
        feature.read([8, 10])
    (path / "clips.parquet").write_bytes(b"no table")
    copied(path, url, path / "clips.parquet")
    with pytest.raises(ValueError, match=r"clips.parquet is damaged .*Copy the store there"):
        _ = FeatureStore.open(url, options).clips
    server.before = lambda method, path, wanted: 503
    with pytest.raises(Unreachable, match=r"/c/0/0/0 cannot be read: .*503"):
        feature.read([3, 1])
    del feature.valid
    with pytest.raises(Unreachable, match=r"\.done.* cannot be read: .*503"):
        _ = feature.valid


def test_every_write_is_refused(make, copied, options, tmp_path, monkeypatch):
    url = copied(make(2).store.path)
    far = FeatureStore.open(url, options)
    monkeypatch.chdir(tmp_path)
    before = dict(far.attributes)
    for write in [
        lambda: FeatureStore.create(url),
        lambda: FeatureStore.create(Path(url)),
        lambda: far.set_attributes({"classes": []}),
        lambda: far.add_reference(tmp_path, ["ab" * 32]),
        lambda: far.remove_reference(tmp_path),
        lambda: far.gc(),
        lambda: far.gc(dry_run=True),
        lambda: far.path,
        lambda: far.feature(BACKBONE, "pool").path,
    ]:
        with pytest.raises(io.UnsupportedOperation, match=r"read only. Build on a local disk and"):
            write()
    assert far.attributes == before
    assert not list(tmp_path.glob("s3*"))


def test_keys_and_endpoint_come_from_the_environment_too(make, copied, options, monkeypatch):
    url = copied(make(4).store.path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", options["endpoint"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for address in (url, f"{url}/", Path(url)):
        store = FeatureStore.open(address)
        assert str(store.location) == url
        assert store.feature(BACKBONE, "pool").read([3]).tobytes() == cells_of([3]).tobytes()


def test_a_failure_to_open_is_explained(server, options, monkeypatch):
    def opened(url="s3://bucket/none.zarr", **changes):
        return FeatureStore.open(url, options | changes)

    with pytest.raises(NotAStore, match=r"none.zarr is no store: .*none.zarr/zarr.json.*NoSuchKey"):
        opened()
    with pytest.raises(NotAStore, match=r"NoSuchBucket"):
        opened("s3://no-such-bucket/s.zarr")
    with pytest.raises(Unreachable, match=r"SignatureDoesNotMatch.*Check the keys, and that they"):
        opened(secret_access_key="wrong")
    with pytest.raises(Unreachable, match=r"s3://bucket/none.zarr/zarr.json cannot .* endpoint"):
        opened(endpoint="http://127.0.0.1:1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        patience = {"read_timeout": "200ms"}
        with pytest.raises(Unreachable, match=r"cannot be read"):
            opened(endpoint=address, client_options=patience, retry_config={"max_retries": 0})
    with pytest.raises(ValueError, match=r"s3://bucket/none.zarr cannot be opened: .*'keys'"):
        opened(keys="key")
    with pytest.raises(ValueError, match=r"a web server has no listing. Give the bucket"):
        FeatureStore.open("https://host/s.zarr")
    with pytest.raises(ValueError, match=r"a URL of s3, "):
        FeatureStore.open("ftp://host/s.zarr")
    with pytest.raises(ValueError, match=r"s.zarr is a local folder"):
        FeatureStore.open("s.zarr", options)
    for module in ("obstore", "obstore.store", "obstore.exceptions"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'obstore"):
        opened()


def test_a_feature_reads_in_another_process(make, copied, options):
    feature = FeatureStore.open(copied(make(20).store.path), options).feature(BACKBONE, "pool")
    np.testing.assert_array_equal(feature.read([9, 2]), cells_of([9, 2]))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        result = pool.submit(feature.read, [19, 3]).result()
    np.testing.assert_array_equal(result, cells_of([19, 3]))


@FORKS
def test_the_error_in_a_forked_process_recommends_spawn(make, copied, options):
    feature = FeatureStore.open(copied(make(4).store.path), options).feature(BACKBONE, "pool")
    feature.read([1])
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(20)  # obstore would wait for ever
        try:
            feature.read([2])
        except Unreachable as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as output:
        assert 'multiprocessing_context="spawn"' in output.read()
    os.waitpid(child, 0)
