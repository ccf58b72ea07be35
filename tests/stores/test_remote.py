"""A store copied to S3 is the store: the same values, a request a chunk, nothing written.

The server is rclone's `serve s3`. A proxy before it counts requests and does what a test asks; it
also says 206 where rclone answers a ranged request with 200, and keeps If-Match, which rclone
passes over.
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
    """Forwards to `port`, and remembers what was asked: (method, path, range)."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Forward)
        self.upstream, self.lock = port, threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.asked, self.keeps_conditions = [], True
        self.before = lambda method, path, wanted: None
        self.in_flight = self.most_in_flight = 0

    def gets(self, part: str) -> list[str | None]:
        """The ranges of GET requests of paths with that part."""
        return [r for method, path, r in self.asked if method == "GET" and part in path]


class Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # 40 ms an answer otherwise

    def answer(self) -> None:
        proxy, wanted = self.server, self.headers.get("Range")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with proxy.lock:
            proxy.asked.append((self.command, self.path, wanted))
            proxy.in_flight += 1
            proxy.most_in_flight = max(proxy.most_in_flight, proxy.in_flight)
        status = proxy.before(self.command, self.path, wanted)
        response, data = self.asked_upstream(body)
        headers = dict(response.getheaders())
        data = b"" if status else data
        status = status or (206 if "Content-Range" in headers else response.status)
        asked_for = self.headers.get("If-Match")
        if proxy.keeps_conditions and asked_for and asked_for != headers.get("Etag"):
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

    def asked_upstream(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        """S3 answers with a whole object; rclone cuts one off that is replaced meanwhile."""
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
    """Copies a local store, or one file of it, to a prefix of the bucket; returns its URL."""

    def copy(store: Path, url: str = "", file: Path | None = None) -> str:
        url = url or f"s3://bucket/{uuid.uuid4().hex}/s.zarr"
        client = from_url(url, **options, client_options={"allow_http": True})
        for path in [file] if file else store.rglob("*"):
            if path.is_file():
                obstore.put(client, str(path.relative_to(store)), path.read_bytes())
        return url

    return copy


def cells_of(rows, salt=0):
    """float16: every number of a cell tells its row and its version."""
    return np.array([np.full(CELL, 2 * row + salt, np.float16) for row in rows]).reshape(-1, *CELL)


class Made:
    """A local store with one column, in shards of 8 clips."""

    def __init__(self, write_rows, path: Path, count: int, absent=()) -> None:
        self.store, self.write_rows = FeatureStore.create(path), write_rows
        self.column = Column(path, ColumnSpec(BACKBONE, "pool", "ab" * 32, CELL, "float16", {}))
        self.write(np.setdiff1d(np.arange(count), absent), count)

    def write(self, rows, count, salt=0):
        cells = partial(cells_of, salt=salt)
        self.write_rows(self.store.path, self.column, rows, count, cells)


@pytest.fixture
def made(tmp_path, write_rows, monkeypatch):
    monkeypatch.setattr(columns, "MAX_SHARD_CLIPS", SLOTS)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return lambda count, absent=(): Made(write_rows, tmp_path / "s.zarr", count, absent)


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
    found = far.text("net:tag")
    assert found.classes == ("clap", "wave")
    np.testing.assert_array_equal(found.values, classes.values[::-1])


def test_random_rows_are_one_request_each_and_an_index_a_shard(made, server, copied, options):
    local = made(40, absent=[5, *range(24, 32)])
    feature = FeatureStore.open(copied(local.store.path), options).feature(BACKBONE, "pool")
    rows = np.array([33, 3, 1, 17, 38, 3, 35, 12])
    assert feature.valid.sum() == 31
    server.asked.clear()
    server.before = lambda method, path, wanted: time.sleep(0.03)
    np.testing.assert_array_equal(feature.read(rows), cells_of(rows))
    ranges = server.gets("/c/")
    assert len(ranges) == len(server.asked) == 7 + 4  # 3 was asked for twice; 4 shards
    assert sorted(ranges)[:4] == [f"bytes=-{INDEX_BYTES}"] * 4
    assert server.most_in_flight >= 4
    size = {int(r[6:].split("-")[1]) - int(r[6:].split("-")[0]) + 1 for r in sorted(ranges)[4:]}
    assert size == {48 + 4}
    server.asked.clear()
    np.testing.assert_array_equal(feature.read([37, 0, 18]), cells_of([37, 0, 18]))
    assert len(server.asked) == 3  # the indices are known
    with pytest.raises(LookupError, match=r"first is row 5 "):
        feature.read([4, 5])
    server.asked.clear()
    np.testing.assert_array_equal(feature.read(slice(32, 40)), cells_of(range(32, 40)))
    assert server.gets("/c/") == [None]  # all of a shard: the whole object
    bits = feature.bits(np.arange(40))
    assert bits.tobytes() == local.store.feature(BACKBONE, "pool").bits(np.arange(40)).tobytes()


@pytest.mark.parametrize("keeps_conditions", [True, False], ids=["If-Match", "ETag alone"])
def test_a_cell_read_while_its_shard_is_replaced_is_of_one_version(
    made, server, copied, options, keeps_conditions
):
    """Index and chunks of two versions would pass the checksums: here the rows have moved."""
    local = made(8, absent=[0, 1, 2])
    shard, path = local.column.shard_file(0), local.store.path
    first = shard.read_bytes()
    url = copied(path)
    feature = FeatureStore.open(url, options).feature(BACKBONE, "pool")
    assert feature.valid.sum() == 5
    server.keeps_conditions = keeps_conditions

    def replace(method, place, wanted):
        if method == "GET" and wanted and not wanted.startswith("bytes=-"):
            server.before = lambda *request: None
            copied(path, url, shard)

    local.write(np.arange(8), 8, salt=1)
    server.before = replace
    found = feature.read([6, 3])
    for cell, row in zip(found, [6, 3], strict=True):
        assert cell.tobytes() in (cells_of([row]).tobytes(), cells_of([row], salt=1).tobytes())
    np.testing.assert_array_equal(feature.read([6, 3]), cells_of([6, 3], salt=1))
    shard.write_bytes(first)
    copied(path, url, shard)  # between two reads
    np.testing.assert_array_equal(feature.read([6, 3]), cells_of([6, 3]))


def test_a_server_that_cannot_count_from_the_end_is_asked_for_the_size(
    made, copied, options, monkeypatch
):
    local, real = made(12), obstore.get_async

    async def azure(client, key, *, options):
        if "suffix" in options.get("range", ()):
            raise NotSupportedError("Azure does not support suffix range requests")
        return await real(client, key, options=options)

    monkeypatch.setattr(obstore, "get_async", azure)
    feature = FeatureStore.open(copied(local.store.path), options).feature(BACKBONE, "pool")
    np.testing.assert_array_equal(feature.read([9, 2]), cells_of([9, 2]))


def test_damage_is_told_with_the_next_move(made, server, copied, options):
    local = made(12)
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


def test_whatever_writes_refuses(made, copied, options, tmp_path, monkeypatch):
    url = copied(made(2).store.path)
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


def test_keys_and_endpoint_come_from_the_environment_too(made, copied, options, monkeypatch):
    url = copied(made(4).store.path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", options["endpoint"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for given in (url, f"{url}/", Path(url)):
        store = FeatureStore.open(given)
        assert str(store.location) == url
        assert store.feature(BACKBONE, "pool").read([3]).tobytes() == cells_of([3]).tobytes()


def test_what_cannot_be_opened_is_explained(server, options, monkeypatch):
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
    with pytest.raises(ValueError, match=r"a web server lists nothing. Give the bucket"):
        FeatureStore.open("https://host/s.zarr")
    with pytest.raises(ValueError, match=r"a URL of s3, "):
        FeatureStore.open("ftp://host/s.zarr")
    with pytest.raises(ValueError, match=r"s.zarr is a local folder"):
        FeatureStore.open("s.zarr", options)
    for module in ("obstore", "obstore.store", "obstore.exceptions"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'obstore"):
        opened()


def test_a_feature_goes_to_another_process(made, copied, options):
    feature = FeatureStore.open(copied(made(20).store.path), options).feature(BACKBONE, "pool")
    np.testing.assert_array_equal(feature.read([9, 2]), cells_of([9, 2]))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(feature.read, [19, 3]).result()
    np.testing.assert_array_equal(found, cells_of([19, 3]))


@FORKS
def test_a_forked_process_is_told_to_start_afresh(made, copied, options):
    feature = FeatureStore.open(copied(made(4).store.path), options).feature(BACKBONE, "pool")
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
    with open(reading) as told:
        assert 'multiprocessing_context="spawn"' in told.read()
    os.waitpid(child, 0)
