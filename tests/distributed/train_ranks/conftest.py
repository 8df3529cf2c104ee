"""Caches on disk and in a bucket, and the same runs on one rank and on two."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from rasterio.transform import Affine

from tests.caches import plant_cache
from tests.checkpoints import make_checkpoint
from tests.distributed.train_ranks.ranks import (
    CONTROLLED,
    CONVEX,
    COPIES,
    DROPPING,
    FINETUNE,
    HEAD,
    NAMED,
    PREDICT,
    READS,
    STILL,
    STREAMED,
    VECTORS,
    InBucket,
    data,
    make_env,
    name_inputs,
    run_in_turn,
    spoil_copies,
)
from tests.planted import extract_cache, fresh_seed, plant_tiles
from tests.planted import train as run_train
from tests.proxy import Proxy


@pytest.fixture(scope="session")
def in_bucket(made: Path, gcs_server: str) -> Iterator[InBucket]:
    client = storage.Client(project="tests", credentials=AnonymousCredentials())
    bucket = client.create_bucket(f"test-{uuid.uuid4().hex[:16]}")
    for path in filter(Path.is_file, (made / "vectors").rglob("*")):
        for copy in COPIES:
            bucket.blob(f"{copy}/{path.relative_to(made / 'vectors')}").upload_from_filename(path)
    with Proxy(gcs_server).serve() as proxy:
        yield InBucket(f"gs://{bucket.name}", proxy)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """66 tiles: 49 train, so that the last batch of 4 or 8 has one row; 17 validate, for one rank and two unequally."""
    root = tmp_path_factory.mktemp("ranks")
    seed = fresh_seed()
    plant_tiles(root / "tiles", scenes=6, per_scene=11, seed=seed)
    extract_cache(root / "tiles", root / "cache", make_checkpoint(root / "checkpoint", seed=seed))
    tiles = sorted(f"images/{path.name}" for path in (root / "tiles" / "images").iterdir())
    shown = [tile for tile in tiles if (root / "tiles" / "labels" / f"{Path(tile).stem}.txt").read_text()]
    plant_cache(str(root / "vectors"), 2_100, seed=seed)  # nine blocks, 66K
    plant_cache(str(root / "others"), 200, seed=seed + 1)  # one block, so that a rank of two has none
    spoil_copies(root)
    # 35 x 35 windows of 8 pixels: more batches than two ranks put in order at once, and more rows than a batch has.
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 280, 280), dtype=np.uint8)
    placed: dict[str, Any] = {"crs": "EPSG:32633", "transform": Affine(0.3, 0, 500_000, 0, -0.3, 5_000_000)}
    with rasterio.open(root / "scene.tif", "w", "GTiff", 280, 280, 3, dtype="uint8", **placed) as raster:
        raster.write(pixels)
    (root / "split.json").write_text(
        json.dumps({"train": shown[:49], "val": [t for t in tiles if t not in shown[:49]]})
    )
    return root


@pytest.fixture(scope="session")
def both(made: Path, in_bucket: InBucket, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Working directories of the same runs, head and fine-tuned, on one rank and on two; the two also predict with the
    one's model. The two fine-tune from the prefix cache and in parts. Heads on made-up vectors are trained in memory on
    one rank, streamed on two. Then the two read caches between them, see `READS`."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    head = ("head", *data(made), *HEAD, "--folds", 2)
    finetune = ("finetune", *data(made), *FINETUNE, "--views", "d4", "--head-run", one / "runs" / "head")
    vectors = ("head", "--cache", made / "vectors", *VECTORS, "--run-dir")
    held = ((*vectors, "runs/vectors", *CONVEX), (*vectors, "runs/still", *STILL))
    controlled = ("head", *data(made), *CONTROLLED)
    prefix = (*finetune, "--workers", 0, "--cache-prefix", "--run-dir", "runs/prefix")
    shuffled = (*vectors, "runs/shuffled", *CONVEX, "--seed", 1, "--split-file", one / "runs/vectors/split.json")
    for command in (head, (*finetune, "--workers", 0), prefix, controlled, *held, shuffled):
        result = run_train(one, *command)
        assert result.status == 0, result.err
    predict = ("predict", "--run-dir", one / "runs" / "finetune", "--tiles", made / "tiles", *PREDICT)
    named = ("predict", "--run-dir", one / "runs" / "head", *name_inputs(made), *NAMED)
    streamed = ((*command, *STREAMED) for command in held)
    in_parts = (*finetune, "--cache-prefix", "--accumulate", 2, "--grad-checkpoint")
    places = {name: in_bucket.find(made, name) for name in READS}
    reads = (("read", two / name, place, made / "others", READS[name]) for name, place in places.items())
    env = make_env() | {"STORAGE_EMULATOR_HOST": in_bucket.proxy.url}
    out = run_in_turn(two, env, head, in_parts, predict, named, controlled, *streamed, *reads)
    assert out.count("vectors stay in the cache") == 2
    return one, two


@pytest.fixture
def env() -> dict[str, str]:
    return make_env()


@pytest.fixture(scope="session")
def undisturbed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with `runs/head` of one rank, and `runs/whole` of two, which others stop and resume."""
    root = tmp_path_factory.mktemp("undisturbed")
    result = run_train(root, "head", *data(made), *HEAD)
    assert result.status == 0, result.err
    run_in_turn(root, make_env(), ("head", *data(made), *DROPPING, "--run-dir", "runs/whole"))
    return root
