"""What a listing, cut short or whole, says of the tiles, and what the clock says."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import numpy as np
import pytest
from google.cloud import storage

from cache_schema import TileprobeError
from extract.doctor.storage import check_clock, check_layout
from extract.tiles.source import GcsSource, ListedPage, LocalSource, open_source
from tests.tiles import upload


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
