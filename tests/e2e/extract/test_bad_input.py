"""Bad input: one line that names the remedy, a status, nothing written."""

from __future__ import annotations

import http.client
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.extract.extraction import extract
from tests.tiles import (
    list_tree,
    run_extract,
)


class GatedHub(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"error": "Access to this model is restricted"}).encode()
        self.send_response_only(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def gated_hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), GatedHub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


BAD_INPUT: dict[str, tuple[dict[str, str], str]] = {
    "no tiles given": ({"--tiles": ""}, r"TILES is not set: give gs://bucket/prefix or a directory"),
    "no such bucket": ({"--tiles": "gs://no-such-bucket/x"}, r"no bucket no-such-bucket .*check the name in TILES"),
    "no images/": ({"--tiles": "{tiles}/images"}, r"no tiles under .*/images/images/: check TILES"),
    "no credentials": ({"--tiles": "gs://some-bucket/x"}, r"no Google credentials .*gcloud"),
    "image size": ({"--image-size": "100"}, r"IMAGE_SIZE 100 is not a multiple of the 16 px patch: try 96 or 112"),
    "scene pattern": ({"--limit": "5", "--scene-regex": r"^(?P<scene>x.+)$"}, r"560 tile names do not fit"),
}  # fmt: skip


BAD_HUB: dict[str, tuple[str, str]] = {
    "gated model": ("vitl16", r"is gated .*https://huggingface\.co/facebook/dinov3.*HF_TOKEN"),
    "no network": ("org/model", r"cannot download org/model .*check the network"),
}


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """Variables of a user who has no credentials."""
    home = str(tmp_path / "home")
    return {"HF_HOME": home, "HOME": home, "CLOUDSDK_CONFIG": home, "NO_GCE_CHECK": "true"}


def assert_one_line(status: int, out: str, err: str, message: str, work: Path) -> None:
    assert status == 1
    assert out == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", err), err
    assert list_tree(work) == []


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line(
    tiles: str,
    checkpoints: dict[str, Path],
    home: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    for name, value in home.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    if case == "no credentials":
        monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    work = tmp_path / "work"
    work.mkdir()
    changes, message = BAD_INPUT[case]
    options = {"--tiles": tiles, "--backbone": str(checkpoints["plain"])} | changes
    result = extract(work, *(part.replace("{tiles}", tiles) for option in options.items() for part in option))
    assert_one_line(result.status, result.out, result.err, message, work)


@pytest.mark.parametrize("case", BAD_HUB)
def test_a_hub_without_the_model_is_one_line(
    tiles: str, env: dict[str, str], gated_hub: str, home: dict[str, str], tmp_path: Path, case: str
) -> None:
    """Processes of their own: the address of the hub is read when its library is imported."""
    work = tmp_path / "work"
    work.mkdir()
    env = {name: value for name, value in env.items() if name != "HF_TOKEN"} | home
    env |= {
        "HF_ENDPOINT": gated_hub if case == "gated model" else "http://127.0.0.1:9",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    backbone, message = BAD_HUB[case]
    result = run_extract("--tiles", tiles, "--backbone", backbone, env=env, cwd=work)
    assert_one_line(result.returncode, result.stdout, result.stderr, message, work)


def test_bad_input_under_torchrun_is_the_same_line(env: dict[str, str], tmp_path: Path) -> None:
    result = run_extract("--tiles", "./nowhere", "--backbone", "./x", env=env, cwd=tmp_path, nproc=2)
    assert result.returncode == 1
    assert result.stderr.count("error:") == 1, result.stderr
    assert "error: no checkpoint at ./x" in result.stderr
    assert "Traceback" not in result.stderr
    assert list_tree(tmp_path) == []


def test_unknown_choice_shows_usage(tmp_path: Path) -> None:
    result = extract(tmp_path, "--tiles", "x", "--precision", "fp8")
    assert result.status == 2
    assert "Usage: python -m extract run" in result.err
    assert "Traceback" not in result.err
