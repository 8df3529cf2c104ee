"""Every fault, long: `make soak`. Prints a table and writes `runs/soak.json`, a list of `{fault, tried, survived}`."""

from __future__ import annotations

import json
import random
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from extract.demo.server import serve_bucket
from tests.checkpoints import make_checkpoint
from tests.proxy import Proxy
from tests.tiles import draw_objects, upload

from .extraction_kills import run_extraction_kills, run_hung_rank
from .fuzz import fuzz_images, fuzz_labels
from .merge_machine import run_merge_machine
from .network import extract_in_small_blocks, run_network_faults
from .trainer_kills import FIRST_SAVE, LATER_SAVES, run_named_kills, run_trainer_kills

RESULT = Path("runs/soak.json")
Rows = list[dict[str, Any]]


def soak_network(folder: Path, url: str, bucket: str, seed: int) -> Rows:
    """500 tiles across harmed requests, into a directory and into a bucket."""
    client = storage.Client(project="tests", credentials=AnonymousCredentials())
    upload(client.bucket(bucket), draw_objects(np.random.default_rng(seed), 500, size=32), "tiles/")
    backbone = make_checkpoint(folder / "backbone", seed=seed, image_size=32)
    tiles, rows = f"gs://{bucket}/tiles", []
    undisturbed = extract_in_small_blocks(tiles, folder / "undisturbed", backbone)
    with Proxy(url).serve() as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        for cache in (str(folder / "harmed"), f"gs://{bucket}/harmed"):
            rows += run_network_faults(tiles, undisturbed, cache, backbone, proxy, seed)
    return rows


@contextmanager
def make_bucket() -> Iterator[tuple[str, str]]:
    """The real server with an empty bucket: its address, and the bucket's name."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serve_bucket(None, log=Path(folder, "server.log")) as url,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        client = storage.Client(project="tests", credentials=AnonymousCredentials())
        yield url, client.create_bucket(f"soak-{uuid.uuid4().hex[:16]}").name


@click.command()
@click.option("--seed", type=int, help="Of everything that is drawn; without it, another every time.")
def main(seed: int | None) -> None:
    """Run them all; the first that loses something ends with an error that names it."""
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}: repeat with ARGS='--seed {seed}'", flush=True)
    rows: Rows = []
    with make_bucket() as (url, bucket):
        parts: dict[str, Callable[[Path], Rows]] = {
            "extraction kills": lambda folder: run_extraction_kills(folder, 50, seed),
            "extraction kills, bucket": lambda folder: run_extraction_kills(folder, 12, seed, f"gs://{bucket}/killed"),
            "hung rank": lambda folder: run_hung_rank(folder, seed),
            "trainer kills": lambda folder: run_trainer_kills(folder, 20, seed),
            "trainer kills, named": lambda folder: run_named_kills(folder, FIRST_SAVE, LATER_SAVES, seed),
            "network": lambda folder: soak_network(folder, url, bucket, seed),
            "changes": lambda folder: run_merge_machine(100, seed),
            "images": lambda folder: fuzz_images(5000, seed),
            "labels": lambda folder: fuzz_labels(5000, seed),
        }
        for name, run in parts.items():
            started = time.monotonic()
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                rows += run(Path(folder))
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(json.dumps(merge(rows), indent=2) + "\n")
    for row in merge(rows):
        print(f"{row['survived']:>6,} of {row['tried']:>6,}  {row['fault']}")


def merge(rows: Rows) -> Rows:
    """One row for each kind of fault."""
    faults = dict.fromkeys(row["fault"] for row in rows)
    return [
        {
            "fault": fault,
            **{key: sum(row[key] for row in rows if row["fault"] == fault) for key in ("tried", "survived")},
        }
        for fault in faults
    ]


if __name__ == "__main__":
    main()
