"""What is secret stays secret, and what comes from outside stays data: in output, configurations, reports, tables."""

from __future__ import annotations

import csv
import http.server
import json
import re
import secrets
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from google.cloud import storage

from extract.__main__ import run as run_extract
from tests.checkpoints import make_checkpoint
from tests.planted import CLASSES, Finished, extract_cache, fresh_seed, plant_tiles, run_here, train
from tests.tiles import draw_tile, upload

PROJECT_ROOT = Path(__file__).parents[2]
SCRIPT = "<script>alert({})</script>"
ON_CPU = ("--device", "cpu", "--workers", 0)
ODD_CLASS = '=1+1, "x"\n;'
ODD_NAMES = [
    "=1+1",
    "@SUM(A1)",
    "+1",
    "-1",
    "a,b",
    'say "no"',
    "two\nlines",
    "a\r\nb",
    "a\rb",
    "semi;colon",
    " s ",
    "é",
]


@contextmanager
def tell_on(status: int) -> Iterator[tuple[str, list[str]]]:
    """A server that answers every request with `status` and all that was sent, and keeps it: address, requests."""
    sent: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode(errors="replace")
            sent.append(f"{self.path}\n{self.headers}\n{body}")
            told = json.dumps({"error": sent[-1], "error_description": sent[-1]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told if self.command != "HEAD" else b"")

        do_GET = do_POST = do_HEAD = answer

        def log_message(self, format: str, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@dataclass
class Work:
    """A folder in which commands ran that knew secrets.

    Attributes:
        root: all that they wrote.
        secrets: token, pieces of the key, its id and account.
        key: what the key file holds.
        printed: what each command printed.
    """

    root: Path
    secrets: list[str]
    key: dict[str, str]
    backbone: Path
    printed: list[str] = field(default_factory=list)

    def run(self, finished: Finished) -> Finished:
        self.printed += [finished.out, finished.err]
        return finished

    def assert_kept(self) -> None:
        for secret in self.secrets:
            assert len(secret) > 12
            assert not [text for text in self.printed if secret in text]
            files = [path for path in self.root.rglob("*") if path.is_file()]
            assert files
            assert not [path for path in files if secret.encode() in path.read_bytes()]


def make_key(token_uri: str) -> dict[str, str]:
    """A service account's key file, sound in every respect."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return {
        "type": "service_account",
        "project_id": "tests",
        "private_key_id": secrets.token_hex(20),
        "private_key": pem,
        "client_email": f"robot-{secrets.token_hex(8)}@tests.iam.gserviceaccount.com",
        "client_id": str(secrets.randbits(64)),
        "token_uri": token_uri,
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    """Every command of this file knows a token and a key, in the two ways that users give them."""
    root, apart = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("apart")
    token, key = f"hf_{secrets.token_hex(17)}", make_key("http://127.0.0.1:9/token")
    (apart / "key.json").write_text(json.dumps(key))
    lines = key["private_key"].splitlines()[1:-1]
    hidden = [token, key["private_key_id"], key["client_email"], key["client_id"], *lines[:-1]]
    work = Work(root, hidden, key, make_checkpoint(apart / "checkpoint", seed=fresh_seed()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", token)
        patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(apart / "key.json"))
        patch.setenv("NO_GCE_CHECK", "true")
        yield work


@pytest.fixture(scope="module")
def trained(work: Work) -> Work:
    """A small extraction and a head on it, with class names that are markup and formulas."""
    names = [SCRIPT.format(i) for i in range(60)]
    names[48] = ODD_CLASS
    with (work.root / "classes.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["class_id", "name"], *enumerate(names)])
    plant_tiles(work.root / "tiles", scenes=6, per_scene=6, seed=fresh_seed(), ids="class")
    (work.root / "vectors").mkdir()
    extract_cache(work.root / "tiles", work.root / "vectors" / "v", work.backbone)
    options = ("--epochs", 2, "--device", "cpu", "--taxonomy", work.root / "classes.csv")
    finished = work.run(train(work.root, "head", "--cache", work.root / "vectors" / "v", *options))
    assert finished.status == 0, finished.err
    return work


def test_no_secret_in_what_a_run_leaves(trained: Work) -> None:
    left = {path.name for path in trained.root.rglob("*")}
    assert {"config.json", "report.html", "history.jsonl", "zarr.json", "last", "metrics.json"} <= left
    trained.assert_kept()


def extract_from(work: Work, tiles: object, backbone: object) -> Finished:
    arguments = ("--tiles", tiles, "--backbone", backbone, "--cache", "failed", *ON_CPU)
    return work.run(run_here(run_extract, work.root, "run", *arguments))


def test_no_secret_in_the_error_of_a_key_that_cannot_be_read(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = work.key["private_key"].replace("BEGIN PRIVATE", "BEGIN PRIVATELY")
    path = work.backbone.parent / "broken.json"
    path.write_text(json.dumps(work.key | {"private_key": broken}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    finished = extract_from(work, "gs://no-such-bucket/tiles", work.backbone)
    assert finished.status == 1
    assert finished.errors == finished.err.splitlines()
    assert "GOOGLE_APPLICATION_CREDENTIALS" in finished.err
    work.assert_kept()


def test_no_secret_in_the_error_of_a_key_that_is_refused(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token server even sends back what the key has signed."""
    with tell_on(400) as (url, sent):
        path = work.backbone.parent / "refused.json"
        path.write_text(json.dumps(work.key | {"token_uri": url}))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
        monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
        finished = extract_from(work, "gs://no-such-bucket/tiles", work.backbone)
    (signed,) = {assertion for text in sent for assertion in re.findall(r"assertion=([\w.-]+)", text)}
    assert finished.status == 1
    assert finished.errors == finished.err.splitlines()
    assert signed not in finished.out + finished.err
    work.assert_kept()


def test_no_secret_in_the_error_of_the_hub(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub was given the token, refuses it, and sends it back."""
    plant_tiles(work.root / "few", scenes=1, per_scene=3, seed=fresh_seed())
    with tell_on(401) as (url, sent):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(work.root / "hub"))
        finished = extract_from(work, work.root / "few", "someone/dinov3")
    assert any(f"Bearer {work.secrets[0]}" in text for text in sent)
    assert finished.status == 1
    assert finished.errors == finished.err.splitlines()
    assert "HF_TOKEN" in finished.err
    work.assert_kept()


class Tags(HTMLParser):
    """Names of a page's tags, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_class_names_of_a_file_are_text_in_the_report(trained: Work) -> None:
    page = Tags((trained.root / "runs" / "head" / "report.html").read_text())
    assert page.tags.count("script") == 1  # its own
    shown = [SCRIPT.format(class_id) for class_id, _, _ in CLASSES.values() if class_id != 48]
    assert len(shown) == 4
    assert all(name in page.text for name in shown)


def test_names_are_data_in_the_predictions(trained: Work, bucket: storage.Bucket) -> None:
    """A name that begins a formula or breaks a line is read back as it is in the bucket, in a row of its own."""
    rng = np.random.default_rng(fresh_seed())
    upload(bucket, {f"images/{name}.png": draw_tile(rng, 40) for name in ODD_NAMES})
    out = trained.root / "predictions.csv"
    finished = train(trained.root, "predict", "--tiles", f"gs://{bucket.name}", "--out", out, *ON_CPU)
    assert trained.run(finished).status == 0, finished.err
    with out.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    assert header[3:][48] == ODD_CLASS
    assert {len(row) for row in rows} == {len(header)}
    assert [row[0] for row in rows] == sorted(f"images/{name}.png" for name in ODD_NAMES)
    trained.assert_kept()


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    names = {normalise(re.split(r"[\[<>=!~; ]", line)[0]) for line in asked} - {"tileprobe"}
    lines = [line for line in (PROJECT_ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    assert [line for line, pin in zip(lines, pins, strict=True) if not pin] == []
    pinned = [normalise(pin[1]) for pin in pins if pin]
    assert len(pinned) == len(set(pinned))
    assert len(names) > 20
    assert names - set(pinned) == set()


def normalise(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()
