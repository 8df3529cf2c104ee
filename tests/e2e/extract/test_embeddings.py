"""What a cache holds: embeddings against an independent computation, on one rank and on two."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from cache_schema import Status, open_cache
from extract.config import LAST_CACHE
from extract.run import run_extraction
from extract.tiles.labels import parse_labels
from extract.tiles.listing import label_name
from tests.checkpoints import MEAN, STD
from tests.e2e.extract.extraction import BLOCKS, SLOW, TILES, assert_same_cache, extract
from tests.planted import fresh_seed
from tests.tiles import (
    MODES,
    Objects,
    cosines,
    draw_tile,
    read_arrays,
    run_extract,
    upload,
)


def embed_independently(checkpoint: Path, data: bytes, size: int) -> dict[str, npt.NDArray[np.float32]]:
    """Pillow decodes and resizes in float, transformers runs the model in float32; nothing of this project's own."""
    image = Image.open(io.BytesIO(data))
    if image.mode == "I;16":
        pixels = np.stack([np.asarray(image) // 256] * 3, axis=2)
    else:
        pixels = np.asarray(image.convert("RGB"))
    channels = []
    for c in range(3):
        channel = Image.fromarray((pixels[:, :, c] / 255).astype(np.float32))
        resized = np.asarray(channel.resize((size, size), Image.Resampling.BILINEAR))
        channels.append((resized - MEAN[c]) / STD[c])
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        output = model(torch.from_numpy(np.stack(channels)[None]).float())
    patches = output.last_hidden_state[0, 1 + model.config.num_register_tokens :]
    assert len(patches) == (size // 16) ** 2
    return {"cls": output.pooler_output[0].numpy(), "patch_mean": patches.mean(dim=0).numpy()}


@pytest.fixture(scope="module")
def varied(make_bucket: Any) -> tuple[str, Objects]:
    """Tiles of several sizes and every mode, and their labels."""
    rng = np.random.default_rng(fresh_seed())
    objects = {}
    for size in [(64, 64), (48, 48), (96, 96), (37, 91), (200, 200)]:
        for mode in MODES:
            name = f"{size[0]}x{size[1]}-{mode.replace(';', '')}_{len(objects)}"
            objects[f"images/{name}.png"] = draw_tile(rng, *size, mode=mode)
            objects[f"labels/{name}.txt"] = b"18 0.5 0.5 0.1 0.1\n" * int(rng.integers(0, 5))
    bucket = make_bucket()
    upload(bucket, objects)
    return f"gs://{bucket.name}", objects


def test_a_cache_holds_the_pooling_that_was_asked_for(varied: tuple[str, Objects], config: Any) -> None:
    """And the same vectors, whatever else is stored; a second run has nothing to do."""
    for cache, pooling in (("both", "cls+patch_mean"), ("one", "patch_mean")):
        run_extraction(config(varied[0], cache=cache, pooling=pooling))
        assert open_cache(cache).layout.pooling == tuple(pooling.split("+"))
    both, one = read_arrays("both"), read_arrays("one")
    assert both.keys() - one.keys() == {"cls"}
    np.testing.assert_array_equal(one["patch_mean"], both["patch_mean"])
    again = run_extraction(config(varied[0], cache="one", pooling="patch_mean"))
    assert again is not None
    assert again.values["computed"] == 0


@pytest.mark.parametrize("precision, least", [("float32", 0.9999), ("bf16", 0.999)])
@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_embeddings_equal_an_independent_computation(
    varied: tuple[str, Objects],
    checkpoints: dict[str, Path],
    config: Any,
    kind: str,
    precision: str,
    least: float,
) -> None:
    tiles, objects = varied
    run_extraction(config(tiles, backbone=str(checkpoints[kind]), cache="vectors", precision=precision))
    arrays = read_arrays("vectors")
    assert (arrays["status"] == Status.EMBEDDED).all()
    assert arrays["tile"].tolist() == sorted(name for name in objects if name.startswith("images/"))
    expected = [embed_independently(checkpoints[kind], objects[name], 64) for name in arrays["tile"]]
    for pooling in ("cls", "patch_mean"):
        reference = np.stack([vectors[pooling] for vectors in expected])
        found = cosines(arrays[pooling], reference)
        print(f"{pooling}: least cosine {found.min():.7f}")
        assert found.min() >= least
        # Vectors that are all alike would agree whatever went wrong: a neighbour's must not pass.
        assert cosines(arrays[pooling], np.roll(reference, 1, axis=0)).max() < least
    counts = np.stack([parse_labels(objects[label_name(name)]).counts for name in arrays["tile"]])
    np.testing.assert_array_equal(arrays["label_ids"], counts)


def test_so_do_those_of_a_run_of_torchrun(
    undisturbed: tuple[Path, str], checkpoints: dict[str, Path], objects: Objects
) -> None:
    """A sample of its rows, from every block."""
    arrays = read_arrays(undisturbed[0])
    rows = [row for row in range(0, TILES, 37) if arrays["status"][row] == Status.EMBEDDED]
    expected = [embed_independently(checkpoints["plain"], objects[str(arrays["tile"][row])], 160) for row in rows]
    for pooling in ("cls", "patch_mean"):
        assert cosines(arrays[pooling][rows], [vectors[pooling] for vectors in expected]).min() >= 0.9999


def test_one_rank_and_two_make_the_same_cache(
    undisturbed: tuple[Path, str],
    tiles: str,
    checkpoints: dict[str, Path],
    env: dict[str, str],
    make_bucket: Any,
    tmp_path: Path,
) -> None:
    """The second in a bucket, where blocks are written by both."""
    cache = f"gs://{make_bucket().name}/caches/two"
    result = run_extract(
        "--tiles", tiles, "--backbone", checkpoints["plain"], "--cache", cache, *SLOW,
        env=env, cwd=tmp_path, nproc=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert_same_cache(cache, undisturbed[0])
    version = open_cache(cache)
    assert version.layout.blocks == BLOCKS
    assert [version.check_block(block) for block in range(BLOCKS)] == [None] * BLOCKS
    assert version.check_seal()
    per_rank = re.search(r"\(per rank ([\d, ]+)\)", result.stdout)
    assert per_rank
    assert len(per_rank[1].split(",")) == 2, "both ranks took blocks"
    assert (tmp_path / LAST_CACHE).read_text() == f"{cache}\n"


def test_what_is_printed(undisturbed: tuple[Path, str], tiles: str, objects: Objects) -> None:
    cache, output = undisturbed
    lines = output.splitlines()
    version = open_cache(str(cache)).id
    assert lines[0] == f"560 tiles under {tiles}"
    assert lines[1] == f"560 to do in float32 -> vectors (version {version})"
    assert lines[2] == "48 px -> 160 px: a 15 px car becomes 50 px"
    assert lines[3] == f"vectors: 559 embeddings, sealed (version {version})"
    assert lines[4:6] == ["quarantined 1:", "  images/103_3.png: cannot be decoded as an image"]
    read = sum(parse_labels(data).lines for name, data in objects.items() if name.startswith("labels/"))
    assert lines[6] == f"{read:,} label lines read"
    assert re.fullmatch(r"560 tiles in [\d.]+ s: [\d,]+ tiles/s .*; waiting: fetch [\d.]+ %, decode .*", lines[7])


def test_a_second_run_has_nothing_to_do(
    undisturbed: tuple[Path, str], tiles: str, checkpoints: dict[str, Path]
) -> None:
    cache = undisturbed[0]
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    result = extract(cache.parent, "--tiles", tiles, "--backbone", checkpoints["plain"], "--cache", "vectors", *SLOW)
    assert result.status == 0, result.err
    assert re.search(r"^0 to do, \d+ s$", result.out, re.MULTILINE)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == before
