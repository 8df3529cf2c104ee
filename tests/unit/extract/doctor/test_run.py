"""The doctor's parts: how checks depend on each other, what it counts, and what it derives."""

from __future__ import annotations

import http.server
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from google.cloud import storage
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import CacheRoot, TileprobeError, TileTable, open_cache
from extract.config import ExtractConfig
from extract.doctor.cache import Pending, check_space, check_version
from extract.doctor.checkpoint import check_backbone
from extract.doctor.estimate import Speed, check_estimate, check_speed, choose_batch, estimate
from extract.doctor.finding import Concern, Examination, Finding, Verdict
from extract.doctor.machine import Device, check_device, check_open_files, check_packages, check_shared_memory
from extract.doctor.storage import Found, check_clock, check_layout
from extract.doctor.tiles import check_sample, is_no_accident
from extract.errors import ConfigError
from extract.tiles.source import GcsSource, ListedPage, LocalSource, open_source
from tests.checkpoints import make_checkpoint
from tests.planted import extract_cache, fresh_seed, plant_tiles
from tests.tiles import upload

# Findings


def test_a_check_that_fails_ends_no_other() -> None:
    said: list[Finding] = []
    exam = Examination(said.append)

    def raise_(error: Exception) -> Verdict[int]:
        raise error

    first = exam.check("first", lambda: raise_(ConfigError("it is wrong: mend it")))
    second = exam.check("second", lambda: Verdict(first.get() + 1, "more"))
    third = exam.check("third", lambda: Verdict(1, "else"), second)
    crash = exam.check("crash", lambda: raise_(ZeroDivisionError("by zero")))
    zero = exam.check("zero", lambda: Verdict(0, "nothing found"))
    last = exam.check("last", lambda: Verdict(zero.get() + 5, "five"))
    assert exam.findings == said
    assert [(finding.check, finding.status) for finding in said] == [
        ("first", "fail"),
        ("second", "skipped"),
        ("third", "skipped"),
        ("crash", "fail"),
        ("zero", "ok"),
        ("last", "ok"),
    ]
    assert (said[0].detail, said[0].remedy) == ("it is wrong", "mend it")
    assert "`first`" in said[1].detail
    assert "`second`" in said[2].detail
    assert "ZeroDivisionError: by zero" in said[3].detail
    assert (third.value, crash.value, last.value) == (None, None, 5)


def test_the_gravest_concern_decides() -> None:
    exam = Examination(lambda finding: None)
    light, grave = Concern("warning", "odd", "look"), Concern("fail", "broken", "mend")
    exam.check("both", lambda: Verdict(1, "seen", [light, grave, light]))
    assert exam.findings == [Finding("both", "fail", "broken; odd; odd; seen", "mend; look")]
    assert "\x1b" not in str(Finding("x", "warning", "a\x1b[1mb", "c\x1b"))


# The listing


class SmallPages(LocalSource):
    """A directory that is listed a few at a time, in order of names as a bucket is."""

    size = 5

    def list(self, folder: str) -> Iterator[ListedPage]:
        whole = ListedPage.concatenate(list(super().list(folder)))
        order = np.argsort(whole.name, kind="stable")
        for start in range(0, len(order), self.size):
            yield whole.select(order[start : start + self.size])


class InOrder(SmallPages, GcsSource):
    """Such a one that counts as a bucket."""


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_a_listing_cut_short_judges_only_what_both_halves_reached(tmp_path: Path) -> None:
    """Of 40 tiles, every seventh without a label and two labels without a tile, the first pages."""
    names = [f"{i // 4:02}_{i % 4}" for i in range(40)]
    write(tmp_path, *(f"images/{name}.png" for name in names))
    write(tmp_path, *(f"labels/{name}.txt" for i, name in enumerate(names) if i % 7 != 3))
    write(tmp_path, "labels/00_9.txt", "labels/99_9.txt")
    whole = check_layout(InOrder(str(tmp_path)), unlabelled=False)
    assert whole.value.whole
    assert len(whole.value.table) == 34
    assert [concern.detail.split(",")[0] for concern in whole.concerns] == [
        "6 tiles have no label file and are skipped",
        "2 label files have no tile",
    ]
    cut = check_layout(InOrder(str(tmp_path)), unlabelled=False, seconds=-1)
    # Five images, 00_0 to 01_0, and five labels, 00_0 to 00_9 and 01_0 without 00_3.
    assert not cut.value.whole
    assert cut.value.table.tile.tolist() == [f"images/{name}.png" for name in ("00_0", "00_1", "00_2", "01_0")]
    assert "at least 4 tiles to embed of 5" in cut.detail
    assert [concern.detail.split(",")[0] for concern in cut.concerns] == [
        "1 tiles have no label file and are skipped",
        "1 label files have no tile",
    ]
    unordered = check_layout(SmallPages(str(tmp_path)), unlabelled=False, seconds=-1)
    assert "labels were not compared" in unordered.detail
    assert unordered.concerns == []
    assert len(unordered.value.table) == 5


@pytest.mark.parametrize(
    "without_label, without_tile, missing, orphans",
    # The first five names of either folder: labels reach 0_5, so whether 1_0 has one is not known; images reach 1_0.
    [({"0_3"}, {"0_4", "0_5", "0_6"}, 1, 2), ({"0_0", "0_1", "0_2"}, {"0_9"}, 3, 1)],
    ids=["labels lag", "images lag"],
)
def test_of_a_listing_cut_short_the_half_that_lags_is_not_blamed(
    tmp_path: Path, without_label: set[str], without_tile: set[str], missing: int, orphans: int
) -> None:
    names = {f"{i // 4}_{i % 4}" for i in range(24)}
    write(tmp_path, *(f"images/{name}.png" for name in names))
    write(tmp_path, *(f"labels/{name}.txt" for name in (names | without_tile) - without_label))
    cut = check_layout(InOrder(str(tmp_path)), unlabelled=False, seconds=-1)
    assert [concern.detail.split(",")[0] for concern in cut.concerns] == [
        f"{missing} tiles have no label file and are skipped",
        f"{orphans} label files have no tile",
    ]


def test_a_long_listing_of_a_real_bucket(bucket: storage.Bucket) -> None:
    names = [f"{i:04}_0" for i in range(1100)]
    upload(bucket, {f"{folder}/{name}.{suffix}": b"" for name in names for folder, suffix in (("images", "png"),)})
    source = open_source(f"gs://{bucket.name}")
    found = check_layout(source, unlabelled=True).value
    assert (len(found.table), found.whole, found.pages) == (1100, True, 3)


# What is there already


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, seed = tmp_path_factory.mktemp("doctor"), fresh_seed()
    plant_tiles(root / "tiles", scenes=8, per_scene=4, seed=seed)
    make_checkpoint(root / "small", seed=seed)
    extract_cache(root / "tiles", root / "cache", root / "small")
    return root


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "own")
    return tmp_path / "own"


@lru_cache
def find_cpu() -> Device:
    """This machine's, measured once."""
    return check_device(ExtractConfig(tiles="x", device="cpu", precision="float32"), None).value


def ask(root: Path, cache: str = "cache", **options: object) -> Verdict[Pending]:
    settings = {"tiles": str(root / "tiles"), "backbone": str(root / "small"), "precision": "float32", **options}
    config = ExtractConfig(device="cpu", **settings)  # type: ignore[arg-type]
    source = open_source(config.tiles)
    device = find_cpu()
    weights = check_backbone(config.backbone, None, device).value
    found = check_layout(source, unlabelled=False).value
    return check_version(config, str(root / cache), source, found, weights, device)


def test_what_an_extraction_would_do(own: Path) -> None:
    version = open_cache(str(own / "cache"))
    assert ask(own).detail == f"version {version.id} is finished: an extraction has nothing to do"
    assert ask(own).value == Pending(0, 0)
    assert ask(own, "other").detail == f"a new version {version.id}; no versions there"
    bf16 = ask(own, precision="bf16")
    assert "1 version there; the one in use differs in precision: float32, not bf16" in bf16.detail
    assert bf16.value == Pending(32, 32)
    for folder, suffix in (("images", "png"), ("labels", "txt")):
        shutil.copy(own / "tiles" / folder / f"s00_0.{suffix}", own / "tiles" / folder / f"s99_0.{suffix}")
    grown = ask(own)
    assert f"since version {version.id}: 1 new, 0 changed, 0 removed, 0 relabelled, 32 kept" in grown.detail
    assert grown.value == Pending(1, 33)
    for path in (own / "tiles").glob("*/s0[0-2]_*"):
        path.unlink()
    with pytest.raises(TileprobeError, match=r"12 of the 32 tiles .*--yes"):
        ask(own)
    assert "12 removed" in ask(own, yes=True).detail


def test_a_version_that_is_begun(own: Path) -> None:
    root = CacheRoot(str(own / "cache"))
    version = root.open_version(open_cache(root.url).id, read_only=False)
    version.reopen_blocks([0])
    begun = ask(own)
    assert begun.detail.startswith(f"version {version.id} is unfinished: 0 of 1 block committed")
    assert begun.value == Pending(32, 32)
    (own / "cache" / f"{version.id}.zarr/commit/zarr.json").unlink()
    assert ask(own).detail == f"version {version.id} was not created completely, and starts again"


def test_room_for_the_cache(tmp_path: Path) -> None:
    """Rows of 2 vectors of float16 and 128 counts of uint16."""
    free = shutil.disk_usage(tmp_path).free
    row = 2 * 2 * 4096 + 2 * 128
    for rows, status in {free // row // 4: None, free // row * 24 // 25: "warning", free // row * 2: "fail"}.items():
        verdict = check_space(str(tmp_path / "none/yet"), Pending(0, rows), 4096)
        assert [concern.status for concern in verdict.concerns] == ([status] if status else [])
        assert verdict.value == rows * row
    assert check_space("gs://some-bucket/x", Pending(0, 10**12), 4096).concerns == ()


# The machine


def test_packages_are_those_that_are_asked_for() -> None:
    verdict = check_packages()
    assert verdict.concerns == []
    assert f"torch {torch.__version__}" in verdict.detail


@pytest.mark.parametrize("workers, few", [(1, False), (10**6, True)])
def test_open_files(workers: int, few: bool) -> None:
    verdict = check_open_files(workers)
    assert [concern.status for concern in verdict.concerns] == (["warning"] if few else [])
    assert all("ulimit -n" in concern.remedy for concern in verdict.concerns)


@pytest.mark.parametrize("batch_bytes, workers, small", [(100, 2, False), (2**50, 2, True), (2**50, 0, False)])
def test_shared_memory(batch_bytes: int, workers: int, small: bool) -> None:
    verdict = check_shared_memory(workers, 1, batch_bytes)
    assert [concern.status for concern in verdict.concerns] == (["fail"] if small else [])
    assert all("--shm-size" in concern.remedy for concern in verdict.concerns)


@contextmanager
def tell_time(ahead: timedelta, status: int = 404) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(status)
            self.send_header("Date", format_datetime(datetime.now(UTC) + ahead, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("minutes, status, wrong", [(0, 200, False), (0, 404, False), (7, 404, True), (-7, 200, True)])
def test_the_clock(minutes: int, status: int, wrong: bool) -> None:
    with tell_time(timedelta(minutes=minutes), status) as address:
        verdict = check_clock(address)
    assert verdict.value == pytest.approx(-60 * minutes, abs=30)
    assert [concern.status for concern in verdict.concerns] == (["warning"] if wrong else [])


def test_a_clock_that_does_not_answer() -> None:
    with pytest.raises(TileprobeError, match="check the network"):
        check_clock("http://127.0.0.1:9")


# The sample


def test_the_seed_draws_the_sample(made: Path) -> None:
    source = open_source(str(made / "tiles"))
    found = check_layout(source, unlabelled=False).value
    rows = [check_sample(source, found, 8, seed, 0.01).value.batch.rows.tolist() for seed in (3, 3, 4)]
    assert rows[0] == rows[1] != rows[2]
    assert all(len(set(drawn)) == 8 for drawn in rows)
    assert len(check_sample(source, found, 1000, 0, 0.01).value.batch) == 32


@given(failed=st.integers(0, 24), share=st.sampled_from([0.0, 0.01, 0.1, 0.5]))
def test_so_many_failures_are_no_accident(failed: int, share: float) -> None:
    """By the survival function of the binomial distribution, from another library."""
    from scipy.stats import binom

    assert is_no_accident(failed, 24, share) == bool(binom.sf(failed - 1, 24, share) < 0.05)


# The estimate


def simulate(speed: Speed, tiles: int) -> float:
    """Seconds until one rank has embedded so many tiles, event by event.

    Each worker fetches its next tile while it decodes the present one; the backbone takes tiles in turns as they come.
    At most as many workers as cores decode at a time.
    """
    workers, cores = speed.workers, min(speed.workers, speed.cores)
    fetched, decoded, core_free = [0.0] * workers, [0.0] * workers, [0.0] * cores
    done = 0.0
    for tile in range(tiles):
        worker = tile % workers
        fetched[worker] += speed.fetch_s
        core = min(range(cores), key=core_free.__getitem__)
        decoded[worker] = max(fetched[worker], decoded[worker], core_free[core]) + speed.decode_s
        core_free[core] = decoded[worker]
        done = max(done, decoded[worker]) + speed.backbone_s
    return done


seconds = st.floats(1e-4, 1.0)


@given(seconds, seconds, seconds, st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_speed_is_that_of_a_simulated_pipeline(
    backbone_s: float, fetch_s: float, decode_s: float, ranks: int, cores: int, workers: int
) -> None:
    speed = Speed(backbone_s, fetch_s, decode_s, ranks, cores, workers, on_cpu=False)
    tiles = 400
    start = fetch_s + decode_s + backbone_s
    measured = simulate(speed, tiles)
    assert measured == pytest.approx(tiles * speed.tile_s * ranks, rel=0.06, abs=3 * start)


def test_speed_by_hand() -> None:
    gpu = Speed(0.010, 0.008, 0.030, ranks=4, cores=8, workers=4, on_cpu=False)
    assert (gpu.wall, gpu.tile_s) == ("backbone", 0.010 / 4)
    assert replace(gpu, decode_s=0.080).wall == "decoding"
    assert replace(gpu, decode_s=0.080).tile_s == pytest.approx(0.080 / 4 / 4)
    assert replace(gpu, fetch_s=0.1).wall == "fetching"
    assert replace(gpu, workers=0).tile_s == pytest.approx(0.048 / 4)
    # On a CPU, eight cores that decode for 30 ms leave the backbone waiting for 3.75 ms of each tile.
    cpu = replace(gpu, on_cpu=True, ranks=1)
    assert (cpu.wall, cpu.tile_s) == ("backbone and decoding", pytest.approx(0.01375))


def make_found(rng: np.random.Generator, tiles: int, pages: int) -> Found:
    sizes = rng.integers(1000, 500_000, tiles)
    labels = rng.integers(-1, 3, tiles) * 100  # none (negative), empty, or of 100 and 200 bytes
    table = TileTable(
        tile=np.array([f"images/{i:07}.png" for i in range(tiles)], np.dtypes.StringDType()),
        size=sizes,
        crc32c=np.zeros(tiles, np.uint32),
        generation=np.zeros(tiles, np.int64),
        label_size=np.where(labels < 0, -1, labels),
        label_crc32c=np.zeros(tiles, np.uint32),
    )
    return Found(table, True, pages)


def test_estimate_by_hand() -> None:
    rng = np.random.default_rng(fresh_seed())
    found = make_found(rng, 1000, pages=2)
    table = found.table
    speed = Speed(0.5, 0.01, 0.01, ranks=2, cores=4, workers=3, on_cpu=False)
    whole = estimate(found, Pending(1000, 1000), speed, tiles_in_bucket=True, cache_in_bucket=True)
    labels = [int(size) for size in table.label_size if size > 0]
    assert whole.seconds == pytest.approx(1000 * 0.5 / 2)
    assert whole.read_bytes == sum(int(size) for size in table.size) + sum(labels)
    assert whole.class_b == 1000 + len(labels)
    assert whole.class_a == 2 + 4 * 5  # four blocks of 256 rows; cls, patch_mean, label_ids, status and commit of each
    assert whole.request_usd == pytest.approx(22 * 5e-6 + whole.class_b * 4e-7)
    none = estimate(found, Pending(0, 0), speed, tiles_in_bucket=True, cache_in_bucket=True)
    assert (none.seconds, none.read_bytes, none.class_a, none.class_b) == (0, 0, 2, 0)
    local = estimate(found, Pending(1000, 1000), speed, tiles_in_bucket=False, cache_in_bucket=False)
    assert (local.class_a, local.class_b) == (0, 0)


def test_cost_and_a_long_extraction() -> None:
    found = make_found(np.random.default_rng(0), 1000, pages=2)
    speed = Speed(720.0, 0.01, 0.01, ranks=8, cores=4, workers=3, on_cpu=False)
    here = ("tiles", "cache")
    verdict = check_estimate(found, Pending(1000, 1000), speed, here, price=12.5)
    assert "about 25.0 h on this hardware, 312.50 at 12.5 an hour" in verdict.detail
    assert [concern.status for concern in verdict.concerns] == ["warning"]
    assert "200.00 device-hours" in check_estimate(found, Pending(1000, 1000), speed, here, price=None).detail
    assert check_estimate(found, Pending(900, 900), speed, here, price=None).concerns == []


def test_a_backbone_that_is_not_here_is_derived_from_its_flop(made: Path) -> None:
    device = replace(find_cpu(), flop_s=1e9)
    weights = check_backbone(str(made / "small"), None, device).value
    source = open_source(str(made / "tiles"))
    sample = check_sample(source, check_layout(source, unlabelled=False).value, 8, 0, 0.01).value
    far = check_speed(replace(weights, download=1), device, sample, 32, 1)
    assert far.value.backbone_s == pytest.approx(weights.checkpoint.flop / 0.8e9)
    assert "derived" in far.detail
    assert "measured in batches of 32" in check_speed(weights, device, sample, 32, 1).detail
    assert "derived" in check_speed(weights, replace(device, flop_s=1.0), sample, 32, 1).detail
    assert [choose_batch(s, 32) for s in (1e-3, 0.5, 1.0, 3.0)] == [32, 5, 2, 0]


def test_weights_that_do_not_fit(made: Path) -> None:
    device = find_cpu()
    crowd = replace(device, ranks=replace(device.ranks, local_world_size=10**9))
    assert check_backbone(str(made / "small"), None, device).concerns == []
    (concern,) = check_backbone(str(made / "small"), None, crowd).concerns
    assert concern.status == "fail"
    assert "do not fit" in concern.detail
