"""Reading objects of a real server through a proxy that refuses, resets, cuts and flips."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from google.cloud import storage
from obstore.exceptions import GenericError

from cache_schema import Status
from extract.errors import SourceError, TransportError
from extract.tiles import gcs_reader
from extract.tiles.batch import make_requests
from extract.tiles.feed import TileFeed
from extract.tiles.gcs_reader import GcsReader, RequestGate, can_name
from extract.tiles.listing import list_tiles
from extract.tiles.source import open_source
from tests.planted import fresh_seed
from tests.proxy import Fault, Proxy
from tests.tiles import draw_tile, upload

TIMEOUT_S = 20


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs_reader, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(gcs_reader, "_LONGEST_PAUSE_S", 0.05)


def fail_first(proxy: Proxy, *faults: Fault) -> None:
    """The first answers are harmed, the rest are not."""
    left = itertools.chain(faults, itertools.repeat(None))
    proxy.choose_fault = lambda path: next(left)


@pytest.mark.parametrize("fault", [408, 429, 500, 502, 503, 504, "reset", "cut"])
def test_what_passes_is_tried_again(bucket: storage.Bucket, proxy: Proxy, fault: Fault) -> None:
    data = np.random.default_rng(fresh_seed()).bytes(50_000)
    upload(bucket, {"a b/ü%20.png": data})
    fail_first(proxy, fault, fault, fault)
    assert GcsReader(bucket.name, 16).read("a b/ü%20.png", 0) == data
    assert proxy.met == [fault] * 3


def test_what_does_not_pass_ends_with_the_last_status(
    bucket: storage.Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs_reader, "_DEADLINE_S", 0.3)
    upload(bucket, {"x": b"data"})
    proxy.choose_fault = lambda path: 503
    with pytest.raises(TransportError, match=r"gs://.*/x kept failing \(503 Service Unavailable\): check the network"):
        GcsReader(bucket.name, 16).read("x", 0)
    assert len(proxy.met) > 3


@pytest.mark.parametrize("status", [401, 403])
def test_refused_access_is_said_at_once(bucket: storage.Bucket, proxy: Proxy, status: int) -> None:
    upload(bucket, {"x": b"data"})
    proxy.choose_fault = lambda path: status
    with pytest.raises(SourceError, match=r"access to gs://.*/x refused: give the account the role Storage Object Vie"):
        GcsReader(bucket.name, 16).read("x", 0)
    assert proxy.met == [status]


def test_without_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    empty = str(tmp_path_factory.mktemp("home"))
    for name in ("HOME", "CLOUDSDK_CONFIG"):
        monkeypatch.setenv(name, empty)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(SourceError, match=r"no Google credentials for gs://some-bucket: run `gcloud auth"):
        GcsReader("some-bucket", 16)


def test_the_server_on_loopback_is_read_whatever_key_file_is_set(
    bucket: storage.Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A kind that the fast client does not know: workload identity."""
    (tmp_path / "key.json").write_text('{"type": "external_account", "audience": "a"}')
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    bucket.blob("1").upload_from_string(b"bytes")
    assert GcsReader(bucket.name, 2).read("1", 0) == b"bytes"


def test_a_third_of_all_bodies_harmed_and_no_tile_lost(bucket: storage.Bucket, proxy: Proxy) -> None:
    """Flipped bits too: the fast read checks nothing, the listing's checksum notices, the checked read decides."""
    rng = np.random.default_rng(fresh_seed())
    objects = {f"images/{i}.png": draw_tile(rng, 24) for i in range(40)}
    labels = {f"labels/{i}.txt": b"18 0 0 0 0\n" * (i + 1) for i in range(40)}
    upload(bucket, objects | labels)
    source = open_source(f"gs://{bucket.name}")
    table = list_tiles(source).table
    faults: tuple[Fault, ...] = (503, 429, "reset", "cut", "flip")
    proxy.choose_fault = lambda path: faults[rng.integers(len(faults))] if rng.random() < 0.3 else None
    (batch,) = TileFeed(source, workers=0).read([make_requests(table, range(40))])
    assert (batch.status == Status.EMBEDDED).all()
    assert {name: int(batch.label_ids[i, 18]) for i, name in enumerate(table.tile)} == {
        f"images/{i}.png": i + 1 for i in range(40)
    }
    assert set(proxy.met) == set(faults)


@pytest.mark.parametrize("path, fits", [
    ("images/1.png", True), ("a b/ü%20.png", True), ("..a/b..", True), ("a\\b~", True),
    ("images/../1.png", False), ("./1.png", False), ("a//b.png", False), ("/a.png", False), ("a.png/", False),
    ("a\nb.png", False), ("a\x7f.png", False),
])  # fmt: skip
def test_paths_the_fast_client_would_change_or_refuse(path: str, fits: bool) -> None:
    assert can_name(path) == fits


# The gate


def refuse() -> None:
    raise GenericError("503")


def refusals(gate: RequestGate, count: int) -> None:
    for _ in range(count):
        with pytest.raises(GenericError):
            gate.run(refuse)


def test_gate_halves_on_a_refusal_and_recovers_by_one_a_round() -> None:
    gate = RequestGate(16)
    limits = []
    for _ in range(6):
        refusals(gate, 1)
        limits.append(gate.limit)
    assert limits == [8, 4, 2, 1, 1, 1]
    for expected in (2, 3, 4):
        for _ in range(expected):  # a round, and the rounding of its sum
            gate.run(lambda: None)
        assert gate.limit in (expected - 1, expected)
    for _ in range(500):
        gate.run(lambda: None)
    assert gate.limit == 16


def test_gate_counts_refusals_of_one_burst_once() -> None:
    """All sixteen were on their way when the server had had enough: that is one sign, not sixteen."""
    gate, together = RequestGate(16), threading.Barrier(16, timeout=TIMEOUT_S)

    def refuse_together() -> None:
        together.wait()
        refuse()

    with ThreadPoolExecutor(16) as threads:
        errors = [future.exception() for future in [threads.submit(gate.run, refuse_together) for _ in range(16)]]
    assert all(isinstance(error, GenericError) for error in errors)
    assert gate.limit == 8


def test_gate_never_lets_more_through_than_its_limit() -> None:
    gate, lock = RequestGate(4), threading.Lock()
    now, most = 0, 0

    def request() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        threading.Event().wait(0.002)
        with lock:
            now -= 1

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda _: gate.run(request), range(100)))
    assert most == 4
