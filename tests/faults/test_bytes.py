"""One extraction of a bucket full of odd images, labels and names: each becomes the row that the table says."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from PIL import Image

from cache_schema import Status, open_cache
from extract.tiles.batch import make_requests
from extract.tiles.decode import MAX_FILE_BYTES
from extract.tiles.feed import TileFeed
from extract.tiles.labels import MAX_LABEL_BYTES, parse_labels
from extract.tiles.listing import label_name, list_tiles
from extract.tiles.source import LocalSource
from tests.checkpoints import make_checkpoint
from tests.faults.odd_inputs import LAST, OddInput, make_table
from tests.planted import extract_cache, fresh_seed
from tests.tiles import encode, read_arrays, relative_differences, upload, write_directory

README = Path(__file__).parents[2] / "extract" / "README.md"
TABLE = make_table()
parse_once = functools.cache(parse_labels)


def hash_tree(root: Path) -> dict[str, str]:
    """Every file and folder below `root`, with the hash of what it holds."""
    found = {}
    for folder, folders, files in os.walk(root):
        found |= {os.path.join(folder, name): "" for name in folders}
        for name in files:
            path = Path(folder, name)
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@dataclass(frozen=True)
class Extracted:
    """What the extraction left: rows by tile name, arrays, output, and what lay around it before and after."""

    tiles: list[str]
    arrays: dict[str, npt.NDArray[np.generic]]
    out: str
    root: Path
    before: dict[str, str]
    after: dict[str, str]

    def find_row(self, name: str) -> int:
        assert self.tiles.count(name) == 1
        return self.tiles.index(name)


@pytest.fixture(scope="module")
def extracted(gcs_server: str, tmp_path_factory: pytest.TempPathFactory) -> Extracted:
    """The whole table in one bucket; beside an image whose pixels are known, those very pixels as plain PNG."""
    root = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(fresh_seed())
    objects = {}
    for odd in TABLE:
        objects[f"images/{odd.name}"], pixels = odd.draw(rng)
        objects[label_name(f"images/{odd.name}")] = odd.label
        if pixels is not None:
            objects[f"images/plain/{odd.name}"] = encode(Image.fromarray(pixels))
    client = storage.Client(project="tests", credentials=AnonymousCredentials())
    bucket = client.create_bucket(f"odd-{rng.integers(2**40)}")
    upload(bucket, objects, "a/b/")
    checkpoint = make_checkpoint(root / "checkpoint", seed=fresh_seed())
    (root / "work").mkdir()
    before = hash_tree(root)
    with redirect_stdout(io.StringIO()) as out:
        cache = extract_cache(
            f"gs://{bucket.name}/a/b", root / "work" / "vectors", checkpoint, max_quarantined=1.0, unlabelled=True
        )
    tiles = open_cache(cache).read_table().tile.tolist()
    return Extracted(tiles, read_arrays(cache), out.getvalue(), root, before, hash_tree(root))


@pytest.mark.parametrize("odd", TABLE, ids=[f"{odd.kind}: {odd.what}" for odd in TABLE])
def test_row_is_as_the_table_says(extracted: Extracted, odd: OddInput) -> None:
    row = extracted.find_row(f"images/{odd.name}")
    assert Status(extracted.arrays["status"][row]) == odd.status
    counts = extracted.arrays["label_ids"][row]
    assert {int(i): int(counts[i]) for i in np.flatnonzero(counts)} == odd.counts
    assert len(parse_once(odd.label).malformed) == odd.malformed <= odd.counts.get(LAST, 0)
    finite = np.isfinite(extracted.arrays["cls"][row].astype(np.float32))
    assert finite.all() if odd.status == Status.EMBEDDED else not finite.any()


def test_nothing_else_became_a_row(extracted: Extracted) -> None:
    odd = {f"images/{odd.name}" for odd in TABLE}
    assert odd == {tile for tile in extracted.tiles if not tile.startswith("images/plain/")}
    assert len(extracted.tiles) == len(set(extracted.tiles))


def test_embedding_is_that_of_the_plain_pixels(extracted: Extracted) -> None:
    """Of the first page, the high bytes, the colours without alpha, …; both are embedded in float32."""
    plain = [tile for tile in extracted.tiles if tile.startswith("images/plain/")]
    assert len(plain) > 40
    rows = [extracted.find_row(tile.replace("plain/", "", 1)) for tile in plain]
    for name in ("cls", "patch_mean"):
        vectors = extracted.arrays[name]
        assert relative_differences(vectors[rows], vectors[list(map(extracted.find_row, plain))]).max() <= 1e-3


def test_the_run_ends_well_and_says_what_was_odd(extracted: Extracted) -> None:
    quarantined = sum(odd.status != Status.EMBEDDED for odd in TABLE)
    malformed = sum(odd.malformed for odd in TABLE)
    lines = sum(parse_once(odd.label).lines for odd in TABLE)
    assert f"{len(extracted.tiles) - quarantined} embeddings, sealed" in extracted.out
    assert f"quarantined {quarantined}:" in extracted.out
    assert f"{lines:,} label lines read, malformed ones among them: " in extracted.out
    (more,) = re.findall(r"and (\d+) more$", extracted.out.split("malformed ones among them")[1], re.MULTILINE)
    assert int(more) == malformed - 5


def test_nothing_is_written_outside_the_cache(extracted: Extracted) -> None:
    """Nor is any name of the bucket that of a file."""
    changed = {path for path in extracted.after if extracted.after[path] != extracted.before.get(path)}
    assert extracted.before.keys() <= extracted.after.keys()
    assert {Path(path).relative_to(extracted.root).parts[:2] for path in changed} == {
        ("work", "vectors"),
        ("work", "cache"),
    }
    names = {part for odd in TABLE for part in odd.name.split("/")} - {"", ".", ".."}
    assert names.isdisjoint(os.path.basename(path) for path in changed)


def test_the_users_table_is_this_one() -> None:
    shown = [line for line in README.read_text().splitlines() if re.match(r"\| (image|label|name) \|", line)]
    assert shown == [odd.markdown for odd in TABLE]


def test_objects_over_the_limit_are_not_read(tmp_path: Path) -> None:
    """The listing tells their size: memory would not hold a few such."""
    root = write_directory(tmp_path, {"images/1.png": b"", "labels/1.txt": b""})
    os.truncate(root / "images/1.png", MAX_FILE_BYTES + 1)
    os.truncate(root / "labels/1.txt", MAX_LABEL_BYTES + 1)
    source = UnreadableSource(str(root))
    (batch,) = TileFeed(source, workers=0).read([make_requests(list_tiles(source).table, [0])])
    assert batch.status.tolist() == [Status.OVER_LIMIT]
    assert (batch.label_ids.sum(), batch.label_ids[0, LAST], batch.label_lines) == (1, 1, 1)
    assert batch.problems == (
        f"images/1.png: quarantined: {Status.OVER_LIMIT.reason}",
        "labels/1.txt:1: malformed line",
    )


class UnreadableSource(LocalSource):
    def read(self, name: str, generation: int) -> bytes:
        raise AssertionError(f"{name} was read")

    read_checked = read
