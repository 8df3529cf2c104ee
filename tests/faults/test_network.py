"""A network that harms requests, for a while or for good."""

from __future__ import annotations

import uuid
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from cache_schema import CacheRoot, Status
from extract.errors import SourceError, TransportError
from tests.caches import get_all
from tests.checkpoints import make_checkpoint
from tests.planted import fresh_seed
from tests.proxy import Fault, Proxy
from tests.tiles import draw_objects, upload

from .network import extract_in_small_blocks, run_network_faults

TILES = 120


@pytest.fixture(scope="module")
def tiles(gcs_server: str) -> str:
    client = storage.Client(project="tests", credentials=AnonymousCredentials())
    bucket = client.create_bucket(f"test-{uuid.uuid4().hex[:16]}")
    upload(bucket, draw_objects(np.random.default_rng(fresh_seed()), TILES, size=32), "tiles/")
    return f"gs://{bucket.name}/tiles"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "backbone", seed=fresh_seed(), image_size=32)


@pytest.fixture(scope="module")
def undisturbed(tiles: str, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return extract_in_small_blocks(tiles, tmp_path_factory.mktemp("cache") / "undisturbed", backbone)


@pytest.mark.parametrize("place", ["directory", "bucket"])
def test_three_requests_in_ten_are_harmed(
    tiles: str, backbone: Path, undisturbed: str, bucket: storage.Bucket, proxy: Proxy, tmp_path: Path, place: str
) -> None:
    cache = str(tmp_path / "harmed") if place == "directory" else f"gs://{bucket.name}/harmed"
    run_network_faults(tiles, undisturbed, cache, backbone, proxy, fresh_seed())


@pytest.mark.parametrize(
    "fault, error, message",
    [
        (503, TransportError, "kept failing .503 Service Unavailable.: check the network; committed blocks are kept"),
        ("reset", TransportError, "kept failing .no answer.: check the network; committed blocks are kept"),
        (401, SourceError, "access to gs://.* refused: .*gcloud auth application-default login.*blocks are kept"),
    ],
    ids=["503", "reset", "credentials expire"],
)
def test_what_does_not_recover_ends_the_run_and_quarantines_nothing(
    tiles: str,
    backbone: Path,
    undisturbed: str,
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr("extract.tiles.gcs_reader._DEADLINE_S", 1.0)
    cache, read = str(tmp_path / "harmed"), iter(range(TILES))

    def fail_after_most(path: str) -> Fault:
        return fault if "/images/" in unquote(urlsplit(path).path) and next(read, TILES) >= 0.8 * TILES else None

    proxy.choose_fault = fail_after_most
    with pytest.raises(error, match=message):
        extract_in_small_blocks(tiles, cache, backbone)
    root = CacheRoot(cache)
    assert root.current() is None
    version = root.open_version(*root.versions())
    assert version.committed().any()
    assert set(version.read_status().tolist()) == {Status.PENDING, Status.EMBEDDED}

    proxy.choose_fault = lambda path: None
    extract_in_small_blocks(tiles, cache, backbone)
    assert get_all(cache) == get_all(undisturbed)
