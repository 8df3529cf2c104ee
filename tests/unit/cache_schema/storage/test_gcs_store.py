"""The gs:// store against the real server: zarr's own store tests, then processes, threads and a faulty network."""

import asyncio
import http.client
import http.server
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import zarr
from google.cloud import storage
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, cpu, default_buffer_prototype
from zarr.core.sync import sync
from zarr.testing.store import StoreTests

from cache_schema.errors import StorageError
from cache_schema.storage import gcs as gcs_objects
from cache_schema.storage.gcs_store import GcsStore

PROTOTYPE = default_buffer_prototype()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def store(bucket: storage.Bucket) -> GcsStore:
    return GcsStore(f"gs://{bucket.name}/cache")


def put(store: GcsStore, key: str, data: bytes) -> None:
    sync(store.set(key, PROTOTYPE.buffer.from_bytes(data)))


def write(store: GcsStore, method: str, key: str, data: bytes) -> None:
    """Write by the store's `set` or by its objects' `create`."""
    if method == "set":
        put(store, key, data)
    else:
        assert store._objects.create(key, data)


def read(store: GcsStore, key: str) -> bytes | None:
    value = sync(store.get(key, PROTOTYPE))
    return None if value is None else value.to_bytes()


@pytest.mark.anyio
@pytest.mark.usefixtures("anyio_backend")  # for the tests that are not coroutines but use fixtures that are
class TestGcsStore(StoreTests[GcsStore, cpu.Buffer]):
    """zarr.testing.store.StoreTests, whose `set` and `get` go past the store."""

    store_cls = GcsStore
    buffer_cls = cpu.Buffer

    @pytest.fixture
    def store_kwargs(self, bucket: storage.Bucket) -> dict[str, Any]:
        return {"url": f"gs://{bucket.name}/some/prefix", "read_only": False}

    @pytest.fixture(autouse=True)
    def _remember_bucket(self, bucket: storage.Bucket) -> None:
        self.objects = bucket

    async def set(self, store: GcsStore, key: str, value: Buffer) -> None:
        self.objects.blob(f"some/prefix/{key}").upload_from_string(value.to_bytes())

    async def get(self, store: GcsStore, key: str) -> Buffer:
        return self.buffer_cls.from_bytes(self.objects.blob(f"some/prefix/{key}").download_as_bytes())

    def test_store_repr(self, store: GcsStore) -> None:
        assert repr(store) == f"GcsStore('gs://{self.objects.name}/some/prefix')"
        assert str(store) == f"gs://{self.objects.name}/some/prefix"

    def test_store_supports_writes(self, store: GcsStore) -> None:
        assert store.supports_writes

    def test_store_supports_listing(self, store: GcsStore) -> None:
        assert store.supports_listing


def test_zarr_array_round_trip(store: GcsStore) -> None:
    values = np.arange(700, dtype=np.float16).reshape(70, 10)
    array = zarr.create_array(store, name="v.zarr/cls", shape=(70, 10), chunks=(32, 10), dtype="float16")
    array[:] = values
    reopened = zarr.open_array(store.with_read_only(True), path="v.zarr/cls", mode="r")
    np.testing.assert_array_equal(reopened[:], values)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (RangeByteRequest(1, 3), b"12"),
        (RangeByteRequest(0, 1), b"0"),
        (RangeByteRequest(3, 99), b"34"),
        (OffsetByteRequest(4), b"4"),
        (OffsetByteRequest(5), b""),
        (SuffixByteRequest(2), b"34"),
        (SuffixByteRequest(99), b"01234"),
    ],
    ids=str,
)
def test_part_of_an_object(store: GcsStore, request_: ByteRequest, expected: bytes) -> None:
    put(store, "a", b"01234")
    value = sync(store.get("a", PROTOTYPE, request_))
    assert value is not None
    assert value.to_bytes() == expected
    assert sync(store.get("b", PROTOTYPE, request_)) is None


def test_part_without_a_byte_is_refused(store: GcsStore) -> None:
    with pytest.raises(ValueError, match="holds no byte"):
        sync(store.get("a", PROTOTYPE, RangeByteRequest(2, 2)))


def test_neighbouring_prefix_is_another_store(bucket: storage.Bucket, store: GcsStore) -> None:
    other = GcsStore(f"gs://{bucket.name}/cache-2")
    put(store, "a", b"1")
    put(other, "a", b"2")
    sync(store.clear())
    assert read(store, "a") is None
    assert read(other, "a") == b"2"


def test_unopened_store_is_used_by_two_tasks_at_once(store: GcsStore) -> None:
    async def read_twice() -> list[Buffer | None]:
        return await asyncio.gather(*(store.get(key, PROTOTYPE) for key in "ab"))

    assert sync(read_twice()) == [None, None]


# Processes and threads


def test_two_processes_write_different_keys(store: GcsStore, python_env: dict[str, str]) -> None:
    program = """
import asyncio, pickle, sys
from zarr.core.buffer import default_buffer_prototype
store, name = pickle.load(sys.stdin.buffer)
async def write():
    values = [(f"{name}/{i}", default_buffer_prototype().buffer.from_bytes(f"{name}{i}".encode())) for i in range(20)]
    await asyncio.gather(*(store.set(*value) for value in values))
asyncio.run(write())
"""
    put(store, "0", b"made before pickling, so that the store has a client to leave behind")
    writers = [subprocess.Popen([sys.executable, "-c", program], env=python_env, stdin=-1) for _ in range(2)]
    for name, writer in zip("xy", writers, strict=True):
        writer.stdin.write(pickle.dumps((store, name)))
        writer.stdin.close()
    assert [writer.wait(60) for writer in writers] == [0, 0]
    for name in "xy":
        assert [read(store, f"{name}/{i}") for i in range(20)] == [f"{name}{i}".encode() for i in range(20)]


def test_threads_write_different_keys(store: GcsStore) -> None:
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda i: put(store, f"k/{i}", bytes([i]) * 1000), range(64)))
    assert [read(store, f"k/{i}") for i in range(64)] == [bytes([i]) * 1000 for i in range(64)]


def test_fork_then_read(store: GcsStore) -> None:
    put(store, "a", b"before the fork")

    def read_in_child() -> None:
        value = asyncio.run(store.get("a", PROTOTYPE))
        assert value is not None
        assert value.to_bytes() == b"before the fork"

    child = multiprocessing.get_context("fork").Process(target=read_in_child)
    child.start()
    child.join(30)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 0
    assert read(store, "a") == b"before the fork"


def test_one_of_eight_threads_creates(store: GcsStore) -> None:
    barrier = threading.Barrier(8)

    def create(index: int) -> bool:
        barrier.wait()
        return store._objects.create("owner", b"writer %d" % index)

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(create, range(8)))
    assert won.count(True) == 1
    assert read(store, "owner") == b"writer %d" % won.index(True)


# Faults


class Proxy:
    """Passes requests on to the server and lets a test spoil them on the way there or back.

    Attributes:
        change_request: given method, path and body, returns path and body to send on.
        change_answer: given method, path, status, headers and body, returns the answer to send; None closes the
            connection instead.
    """

    def __init__(self, target: str) -> None:
        self.change_request: Callable[[str, str, bytes], tuple[str, bytes]] = lambda method, path, body: (path, body)
        self.change_answer: Callable[..., tuple[int, dict[str, str], bytes] | None] = (
            lambda method, path, status, headers, body: (status, headers, body)
        )
        proxy, address = self, urlsplit(target).netloc

        class Handler(http.server.BaseHTTPRequestHandler):
            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path, body = proxy.change_request(self.command, self.path, body)
                onward = http.client.HTTPConnection(address, timeout=20)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "content-length")}
                onward.request(self.command, path, body, headers)
                answer = onward.getresponse()
                received = {k: v for k, v in answer.getheaders() if k.lower() != "transfer-encoding"}
                result = proxy.change_answer(self.command, self.path, answer.status, received, answer.read())
                onward.close()
                self.close_connection = True
                if result is None:
                    return
                status, headers, body = result
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() != "content-length":
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = forward

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def proxy(gcs_server: str, bucket: storage.Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that stores opened from now on go through; pauses are short."""
    proxy = Proxy(gcs_server)
    thread = threading.Thread(target=proxy.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    monkeypatch.setattr(gcs_objects, "_TRANSFER_PAUSE_S", 0.01)
    yield proxy
    proxy.server.shutdown()
    thread.join()
    proxy.server.server_close()


@pytest.fixture
def proxied(proxy: Proxy, bucket: storage.Bucket) -> GcsStore:
    return GcsStore(f"gs://{bucket.name}/cache", deadline_s=10, first_delay_s=0.02)


def flip(body: bytes) -> bytes:
    """The body with one bit of a payload of b"payload…" turned over, if it holds one."""
    return body.replace(b"payload", b"qayload")


@pytest.mark.parametrize("hashed", [True, False], ids=["with hash header", "without"])
def test_damaged_download_is_read_again(proxy: Proxy, proxied: GcsStore, hashed: bool) -> None:
    put(proxied, "a", b"payload" * 100)
    damaged = 0

    def damage_twice(method: str, path: str, status: int, headers: dict[str, str], body: bytes) -> Any:
        nonlocal damaged
        if not hashed:
            headers = {name: value for name, value in headers.items() if name.lower() != "x-goog-hash"}
        if damaged < 2 and flip(body) != body:
            damaged += 1
            body = flip(body)
        return status, headers, body

    proxy.change_answer = damage_twice
    assert read(proxied, "a") == b"payload" * 100
    assert damaged == 2


def test_download_that_stays_damaged_is_an_error(proxy: Proxy, proxied: GcsStore) -> None:
    put(proxied, "a", b"payload")
    proxy.change_answer = lambda method, path, status, headers, body: (status, headers, flip(body))
    with pytest.raises(StorageError, match=r"cache/a arrived damaged 10 times"):
        read(proxied, "a")


@pytest.mark.parametrize("method", ["set", "create"])
def test_damaged_upload_is_sent_again(proxy: Proxy, proxied: GcsStore, method: str) -> None:
    damaged = 0

    def damage_twice(method: str, path: str, body: bytes) -> tuple[str, bytes]:
        nonlocal damaged
        if damaged < 2 and flip(body) != body:
            damaged += 1
            body = flip(body)
        return path, body

    proxy.change_request = damage_twice
    write(proxied, method, "a", b"payload")
    assert damaged == 2
    assert read(proxied, "a") == b"payload"


def test_upload_that_stays_damaged_is_an_error(proxy: Proxy, proxied: GcsStore) -> None:
    proxy.change_request = lambda method, path, body: (path, flip(body))
    with pytest.raises(StorageError, match="arrived damaged"):
        put(proxied, "a", b"payload")


@pytest.mark.parametrize("method", ["set", "create"])
def test_lost_acknowledgement_of_an_upload(proxy: Proxy, proxied: GcsStore, method: str) -> None:
    statuses: list[int] = []

    def lose_first(method: str, path: str, status: int, headers: dict[str, str], body: bytes) -> Any:
        if method == "POST":
            statuses.append(status)
            if len(statuses) == 1:
                return None
        return status, headers, body

    proxy.change_answer = lose_first
    write(proxied, method, "owner", b"run 7f3a")
    assert statuses == ([200, 412] if method == "create" else [200, 200])
    assert read(proxied, "owner") == b"run 7f3a"
    assert not proxied._objects.create("owner", b"run 0000")


def test_lost_acknowledgement_of_a_delete(proxy: Proxy, proxied: GcsStore) -> None:
    put(proxied, "a", b"1")
    statuses: list[int] = []

    def lose_first(method: str, path: str, status: int, headers: dict[str, str], body: bytes) -> Any:
        if method == "DELETE":
            statuses.append(status)
        return None if method == "DELETE" and len(statuses) == 1 else (status, headers, body)

    proxy.change_answer = lose_first
    sync(proxied.delete("a"))
    assert len(statuses) == 2
    assert read(proxied, "a") is None


def test_requests_are_repeated_while_the_server_is_busy(proxy: Proxy, proxied: GcsStore) -> None:
    refused: dict[str, int] = {}

    def refuse_twice(method: str, path: str, status: int, headers: dict[str, str], body: bytes) -> Any:
        key = f"{method} {urlsplit(path).path}"
        if "/o" not in path:  # the library asks for the bucket in the background, and does not insist
            return status, headers, body
        refused[key] = refused.get(key, 0) + 1
        return (429 if refused[key] == 1 else 503, {}, b"") if refused[key] <= 2 else (status, headers, body)

    proxy.change_answer = refuse_twice
    put(proxied, "a/b", b"1")
    assert read(proxied, "a/b") == b"1"
    assert sync(proxied.getsize("a/b")) == 1
    sync(proxied.delete("a/b"))
    assert len(refused) >= 5
    assert min(refused.values()) >= 3


def test_server_that_never_recovers_is_an_error(proxy: Proxy, bucket: storage.Bucket) -> None:
    store = GcsStore(f"gs://{bucket.name}/cache", deadline_s=0.5, first_delay_s=0.02)
    proxy.change_answer = lambda method, path, status, headers, body: (503, {}, b"")
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"kept failing.*continues from there"):
        put(store, "a", b"1")
    assert time.monotonic() - started < 10


def test_listing_of_many_pages(proxy: Proxy, proxied: GcsStore) -> None:
    for i in range(7):
        put(proxied, f"c/{i}", b"")
    pages = 0

    def shorten(method: str, path: str, body: bytes) -> tuple[str, bytes]:
        nonlocal pages
        if method == "GET" and path.partition("?")[0].endswith("/o"):
            pages += 1
            path += "&maxResults=2"
        return path, body

    proxy.change_request = shorten

    async def collect() -> list[str]:
        return [key async for key in proxied.list_dir("c")]

    assert sorted(sync(collect())) == [str(i) for i in range(7)]
    assert pages == 4


# Refusals


@pytest.mark.usefixtures("gcs_server")
@pytest.mark.parametrize("action", [read, lambda store, key: put(store, key, b"1")], ids=["read", "write"])
def test_wrong_bucket_is_named(action: Callable[[GcsStore, str], object]) -> None:
    with pytest.raises(StorageError, match="no bucket no-such-bucket"):
        action(GcsStore("gs://no-such-bucket/cache"), "zarr.json")


@pytest.mark.parametrize("url", ["gs://", "gs:///prefix", "gs://ab/c", "s3://bucket/prefix", "bucket/prefix"])
def test_url_without_bucket(url: str) -> None:
    with pytest.raises(StorageError, match="names no bucket"):
        GcsStore(url)


@pytest.mark.parametrize(("read_only", "role"), [(True, "Storage Object Viewer"), (False, "Storage Object User")])
def test_refused_access_names_the_role(proxy: Proxy, bucket: storage.Bucket, read_only: bool, role: str) -> None:
    store = GcsStore(f"gs://{bucket.name}/cache", read_only=read_only)
    proxy.change_answer = lambda method, path, status, headers, body: (403, {}, b"{}")
    with pytest.raises(StorageError, match=rf"refused \(403\).*{role}"):
        read(store, "zarr.json")


def test_missing_credentials_name_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # or the search asks the network
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    with pytest.raises(StorageError, match=r"no Google credentials.*`gcloud auth application-default login`"):
        read(GcsStore("gs://some-bucket/cache"), "zarr.json")
