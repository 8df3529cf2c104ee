"""The feed: what arrives, in which order, and what becomes of tiles and labels that are not as they were listed."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from google.cloud import storage

from cache_schema import Status, TileTable
from extract.errors import RunError, TransportError
from extract.tiles.batch import ImageStack, TileBatch, TileRequest, make_requests
from extract.tiles.decode import decode_tile
from extract.tiles.feed import PREFETCHED_BATCHES, TileFeed
from extract.tiles.labels import parse_labels
from extract.tiles.listing import label_name, list_tiles
from extract.tiles.source import GcsSource, LocalSource, Source, open_source
from tests.planted import fresh_seed
from tests.tiles import Objects, draw_objects, draw_pixels, draw_tile, encode_png, upload, write_directory

TIMEOUT_S = 20


@pytest.fixture(autouse=True)
def _release_workers() -> Iterator[None]:
    yield
    gc.collect()  # a feed's workers end with it


def cut(requests: list[TileRequest], size: int) -> list[list[TileRequest]]:
    return [requests[i : i + size] for i in range(0, len(requests), size)]


def read_all(source: Source, table: TileTable, size: int = 4, workers: int = 0) -> list[TileBatch]:
    feed = TileFeed(source, workers=workers)
    return list(feed.read(cut(make_requests(table, range(len(table))), size)))


def assert_same(a: TileBatch, b: TileBatch) -> None:
    np.testing.assert_array_equal(a.rows, b.rows)
    np.testing.assert_array_equal(a.status, b.status)
    np.testing.assert_array_equal(a.label_ids, b.label_ids)
    assert (a.problems, a.label_lines) == (b.problems, b.label_lines)
    assert isinstance(a.images, torch.Tensor) == isinstance(b.images, torch.Tensor)
    assert len(a.images) == len(b.images)
    for mine, yours in zip(a.images, b.images, strict=True):
        assert torch.equal(mine, yours)


@pytest.fixture(scope="module")
def objects() -> Objects:
    """50 tiles, some of another size, two unreadable, one with malformed labels, one without a label."""
    rng = np.random.default_rng(fresh_seed())
    objects = draw_objects(rng, 50, size=24)
    for name in ("images/101_3.png", "images/101_7.png", "images/103_0.png"):
        objects[name] = draw_tile(rng, 20, 31)
    objects["images/102_2.png"] = b"no image"
    objects["images/102_9.png"] = draw_tile(rng, 24)[:-150]  # breaks off when most of it is decoded already
    objects["labels/102_0.txt"] = b"18 0 0 0 0\n"
    objects["labels/102_5.txt"] = b"18 0 0 0 0\ncar 0 0 0 0\n\n18 0 0 9 0\n"
    del objects["labels/104_9.txt"]
    return objects


@pytest.fixture(scope="module")
def source(objects: Objects, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(write_directory(tmp_path_factory.mktemp("tiles"), objects)))


@pytest.fixture(scope="module")
def table(source: Source) -> TileTable:
    return list_tiles(source, unlabelled=True).table


# What arrives


def test_batches_hold_what_the_files_hold(objects: Objects, source: Source, table: TileTable) -> None:
    batches = read_all(source, table)
    assert [len(batch) for batch in batches] == [4] * 12 + [2]
    assert np.concatenate([batch.rows for batch in batches]).tolist() == list(range(50))
    for batch in batches:
        for i, row in enumerate(batch.rows):
            name = str(table.tile[row])
            labels = parse_labels(objects.get(label_name(name), b""))
            np.testing.assert_array_equal(batch.label_ids[i], labels.counts)
            if name in ("images/102_2.png", "images/102_9.png"):
                assert batch.status[i] == Status.UNDECODABLE
                assert not batch.images[i].any()
            else:
                assert batch.status[i] == Status.EMBEDDED
                np.testing.assert_array_equal(batch.images[i], decode_tile(objects[name]))
    assert sum(batch.label_lines for batch in batches) == sum(
        parse_labels(data).lines for name, data in objects.items() if name.startswith("labels/")
    )


def test_sizes_that_agree_come_as_one_tensor(source: Source, table: TileTable) -> None:
    batches = read_all(source, table)
    mixed = [i for i, batch in enumerate(batches) if not isinstance(batch.images, torch.Tensor)]
    assert mixed == [row // 4 for row in (13, 17, 30)]
    assert {image.shape for image in batches[3].images} == {(24, 24, 3), (20, 31, 3)}
    assert all(image.dtype == torch.uint8 for batch in batches for image in batch.images)


def test_one_large_tile_reserves_no_room_for_the_others() -> None:
    """A size is a batch's own once two tiles have it: a row for every tile of the first one's could be more than there
    is, as it is for ten million."""
    rng = np.random.default_rng(fresh_seed())
    images = [draw_pixels(rng, size, size) for size in (300, 16, 16, 16)]
    ImageStack(10**7).put(0, images[0])
    stack = ImageStack(64)
    for row, image in enumerate(images):
        stack.put(row, image)
    stacked = stack.finish(np.arange(64) < 4)
    for mine, expected in zip(stacked, images, strict=False):
        np.testing.assert_array_equal(mine, expected)
    assert {tuple(image.shape) for image in stacked[4:]} == {(16, 16, 3)}
    assert not any(image.any() for image in stacked[4:])


def test_problems_name_file_and_line(source: Source, table: TileTable) -> None:
    problems = [problem for batch in read_all(source, table) for problem in batch.problems]
    assert problems[0].startswith("images/102_2.png: quarantined: cannot be decoded as an image (")
    assert problems[1:3] == ["labels/102_5.txt:2: malformed line", "labels/102_5.txt:4: malformed line"]
    assert problems[3].startswith("images/102_9.png: quarantined: cannot be decoded as an image (")
    assert len(problems) == 4


def test_examples_of_malformed_lines_are_few(tmp_path: Path) -> None:
    objects = {"images/1.png": draw_tile(np.random.default_rng(fresh_seed()), 8), "labels/1.txt": b"junk\n" * 5000}
    source = open_source(str(write_directory(tmp_path, objects)))
    (batch,) = read_all(source, list_tiles(source).table)
    assert len(batch.problems) == 20
    assert (batch.label_lines, batch.label_ids[0, -1]) == (5000, 5000)


def test_rows_come_in_the_order_asked_for(source: Source, table: TileTable) -> None:
    rows = np.random.default_rng(fresh_seed()).permutation(50).tolist()
    feed = TileFeed(source, workers=0)
    read = [batch.rows.tolist() for batch in feed.read(cut(make_requests(table, rows), 7))]
    assert sum(read, []) == rows


def test_workers_change_nothing_in_two_passes(source: Source, table: TileTable) -> None:
    alone = TileFeed(source, workers=0)
    feed = TileFeed(source, workers=2)
    requests = make_requests(table, range(50))
    workers: list[set[int | None]] = []
    for size in (4, 7):  # what is asked for may differ from pass to pass
        expected = list(alone.read(cut(requests, size)))
        for a, b in zip(feed.read(cut(requests, size)), expected, strict=True):
            assert_same(a, b)
        workers.append({child.pid for child in multiprocessing.active_children()})
    assert workers[0] == workers[1], "workers are kept from one pass to the next"
    assert len(workers[0]) >= 2


def test_a_pass_that_was_left_early_does_not_leak_into_the_next(source: Source, table: TileTable) -> None:
    feed = TileFeed(source, workers=2)
    batches = cut(make_requests(table, range(50)), 4)
    for batch in feed.read(batches):
        assert batch.rows[0] == 0
        break
    assert [batch.rows[0] for batch in feed.read(batches[5:])] == list(range(20, 50, 4))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_drawn_late(source: Source, table: TileTable, workers: int) -> None:
    """Ranks share blocks by drawing them: one that draws all at once would leave none to the others."""
    drawn = 0

    def draw() -> Iterator[list[TileRequest]]:
        nonlocal drawn
        for batch in cut(make_requests(table, range(50)), 2):
            drawn += 1
            yield batch

    for received, _ in enumerate(TileFeed(source, workers=workers).read(draw()), start=1):
        assert drawn <= received + max(workers, 1) + workers * PREFETCHED_BATCHES


def test_without_labels_no_label_is_read(objects: Objects, tmp_path: Path) -> None:
    source = open_source(str(write_directory(tmp_path, objects)))
    table = list_tiles(source).table
    for path in (tmp_path / "labels").iterdir():
        path.unlink()
    (batch,) = TileFeed(source, workers=0).read([make_requests(table, range(8), labels=False)])
    assert (batch.status == Status.EMBEDDED).all()
    assert not batch.label_ids.any()
    assert batch.label_lines == 0


# Tiles that are not as listed


def damage_tiles(bucket: storage.Bucket) -> tuple[TileTable, dict[str, Status]]:
    """List 9 tiles, then harm them; the table is the earlier listing's."""
    rng = np.random.default_rng(fresh_seed())
    expected = dict.fromkeys((f"images/{i}.png" for i in range(9)), Status.EMBEDDED)
    objects = {name: draw_tile(rng, 24) for name in expected}
    objects["images/1.png"] = b"no image"
    objects["images/2.png"] = objects["images/2.png"][:-300]
    objects["images/3.png"] = encode_png((9000, 9000, 8, 2), b"")
    upload(bucket, objects | {label_name(name): b"18 0 0 0 0\n" for name in objects})
    table = list_tiles(open_source(f"gs://{bucket.name}")).table
    bucket.delete_blob("images/4.png")
    upload(bucket, {"images/5.png": objects["images/0.png"]})  # its generation is pinned: gone
    upload(bucket, {"images/6.png": objects["images/0.png"], "images/7.png": bytes(len(objects["images/7.png"]))})
    generation = table.generation.copy()
    generation[[6, 7]] = 0  # what a listing without generations would read: other bytes under the same name
    expected |= {
        "images/1.png": Status.UNDECODABLE,
        "images/2.png": Status.UNDECODABLE,
        "images/3.png": Status.OVER_LIMIT,
        "images/4.png": Status.GONE,
        "images/5.png": Status.GONE,
        "images/6.png": Status.CHECKSUM_MISMATCH,
        "images/7.png": Status.CHECKSUM_MISMATCH,
    }
    return replace(table, generation=generation), expected


class CountingSource(GcsSource):
    """Counts reads, and spoils the fast ones of the names it is given."""

    def __init__(self, url: str, spoil: frozenset[str] = frozenset()) -> None:
        super().__init__(url)
        self.reads: list[str] = []
        self.spoil = spoil
        self.lock = threading.Lock()

    def read(self, name: str, generation: int) -> bytes:
        data = self.count(name, super().read(name, generation))
        return bytes([data[0] ^ 1]) + data[1:] if name in self.spoil else data

    def read_checked(self, name: str, generation: int) -> bytes:
        return self.count(name, super().read_checked(name, generation))

    def count(self, name: str, data: bytes) -> bytes:
        with self.lock:
            self.reads.append(name)
        return data


def test_status_of_every_kind_of_bad_tile(bucket: storage.Bucket) -> None:
    table, expected = damage_tiles(bucket)
    source = CountingSource(f"gs://{bucket.name}")
    (batch,) = read_all(source, table, size=9)
    assert {str(table.tile[i]): Status(batch.status[i]) for i in range(9)} == expected
    bad = [name for name, status in expected.items() if status != Status.EMBEDDED]
    assert [problem.split(":")[0] for problem in batch.problems] == bad
    assert all(expected[name].reason in text for name, text in zip(bad, batch.problems, strict=True))
    for i in np.flatnonzero(batch.status != Status.EMBEDDED):
        assert not batch.images[i].any()
    assert (batch.label_ids[:, 18] == 1).all(), "a bad tile keeps its labels"
    assert [source.reads.count(f"images/{i}.png") for i in (0, 1, 6, 7)] == [1, 1, 3, 3]


def test_all_tiles_bad(bucket: storage.Bucket) -> None:
    table, expected = damage_tiles(bucket)
    rows = [i for i, status in enumerate(expected.values()) if status != Status.EMBEDDED]
    (batch,) = TileFeed(CountingSource(f"gs://{bucket.name}"), workers=0).read([make_requests(table, rows)])
    assert len(batch.images) == len(rows)
    assert isinstance(batch.images, torch.Tensor)
    assert not batch.images.any()


def test_a_spoilt_read_is_read_again(bucket: storage.Bucket) -> None:
    rng = np.random.default_rng(fresh_seed())
    objects = {"images/1.png": draw_tile(rng, 24), "labels/1.txt": b"18 0 0 0 0\n"}
    upload(bucket, objects)
    source = CountingSource(f"gs://{bucket.name}", spoil=frozenset(objects))
    (batch,) = read_all(source, list_tiles(source).table)
    assert (batch.status[0], batch.label_ids[0, 18], batch.problems) == (Status.EMBEDDED, 1, ())
    np.testing.assert_array_equal(batch.images[0], decode_tile(objects["images/1.png"]))
    assert sorted(source.reads) == ["images/1.png"] * 2 + ["labels/1.txt"] * 2


def test_file_of_another_size(tmp_path: Path, objects: Objects) -> None:
    source = open_source(str(write_directory(tmp_path, objects)))
    table = list_tiles(source).table
    (tmp_path / table.tile[0]).write_bytes(objects[table.tile[0]] + b"x")
    (tmp_path / table.tile[1]).unlink()
    (batch,) = TileFeed(source, workers=0).read([make_requests(table, range(4))])
    assert batch.status.tolist() == [Status.CHECKSUM_MISMATCH, Status.GONE, Status.EMBEDDED, Status.EMBEDDED]


# What is no tile's fault


@pytest.mark.parametrize("change", ["changed", "gone"])
def test_label_that_is_not_as_listed_ends_the_pass(bucket: storage.Bucket, change: str) -> None:
    """It would put wrong labels beside a right vector; nobody could tell later."""
    rng = np.random.default_rng(fresh_seed())
    upload(bucket, {"images/1.png": draw_tile(rng, 24), "labels/1.txt": b"18 0 0 0 0\n"})
    source = open_source(f"gs://{bucket.name}")
    table = list_tiles(source).table
    bucket.delete_blob("labels/1.txt")
    if change == "changed":
        upload(bucket, {"labels/1.txt": b"19 0 0 0 0\n"})
    with pytest.raises(TransportError, match=r"labels/1.txt was changed or deleted.*run the same command again"):
        read_all(source, table)


@pytest.mark.parametrize("workers", [0, 2])
def test_error_of_a_worker_arrives_as_itself_and_the_feed_goes_on(
    tmp_path: Path, objects: Objects, workers: int
) -> None:
    source = open_source(str(write_directory(tmp_path, objects)))
    table = list_tiles(source).table
    (tmp_path / "labels/102_0.txt").write_bytes(b"18 0 0 0 0\n" * 50)
    feed = TileFeed(source, workers=workers)
    batches = cut(make_requests(table, range(len(table))), 4)
    before = []
    try:
        before.extend(feed.read(batches))
    except TransportError as error:
        text = str(error)
        # It holds the feed, which holds it: left to the garbage collector, the workers would be waited for.
        error.__traceback__ = None
    assert text.startswith("labels/102_0.txt was changed")
    assert "\n" not in text
    assert len(before) == 5
    assert [batch.rows[0] for batch in feed.read(batches[:3])] == [0, 4, 8]


def test_killed_worker_ends_the_run_with_a_remedy(source: Source, table: TileTable) -> None:
    feed = TileFeed(source, workers=2)
    others = {child.pid for child in multiprocessing.active_children()}
    batches = cut(make_requests(table, [row % 50 for row in range(4000)]), 4)
    with pytest.raises(RunError, match=r"a feed worker died .*lower --workers or --batch-size.*last committed block"):
        for number, _ in enumerate(feed.read(batches)):
            if number == 3:
                mine = [c.pid for c in multiprocessing.active_children() if c.pid not in others]
                assert len(mine) == 2
                os.kill(int(mine[0] or 0), signal.SIGKILL)


def test_only_its_rank_can_ask_a_worker_to_end(source: Source, table: TileTable) -> None:
    """A SIGTERM that torchrun sends to all processes of a rank is the rank's to answer."""
    feed = TileFeed(source, workers=2)
    others = set(multiprocessing.active_children())
    batches = cut(make_requests(table, [row % 50 for row in range(400)]), 4)
    rows = []
    for number, batch in enumerate(feed.read(batches)):
        rows += batch.rows.tolist()
        if number == 3:
            mine = [child for child in multiprocessing.active_children() if child not in others]
            subprocess.run(["kill", "-TERM", *(str(child.pid) for child in mine)], check=True)
    assert rows == [row % 50 for row in range(400)]
    assert len(mine) == 2
    for child in mine:
        child.terminate()
        child.join(TIMEOUT_S)
        assert not child.is_alive()


IS_KILLED = """
import os, signal, sys

from extract.tiles.batch import make_requests
from extract.tiles.feed import TileFeed
from extract.tiles.listing import list_tiles
from extract.tiles.source import open_source

if __name__ == "__main__":
    source = open_source(sys.argv[1])
    feed = TileFeed(source, workers=2)
    next(feed.read([[request] for request in make_requests(list_tiles(source).table, range(20))]))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_rank_that_is_killed(tmp_path: Path, objects: Objects, python_env: dict[str, str]) -> None:
    """They hold its output open: its end is theirs."""
    script = tmp_path / "is_killed.py"
    script.write_text(IS_KILLED)
    tiles = write_directory(tmp_path / "tiles", objects)
    result = subprocess.run(
        [sys.executable, script, tiles], env=python_env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout) == (-signal.SIGKILL, "")
    assert "Traceback" not in result.stderr


REPORTS_PRELOAD = """
import sys


def report(connection):
    connection.send("extract.tiles.feed" in sys.modules)


if __name__ == "__main__":  # imported in the worker too, which must not load the module by itself
    from extract.tiles.feed import make_forkserver

    context = make_forkserver()
    here, there = context.Pipe()
    worker = context.Process(target=report, args=(there,))
    worker.start()
    print(here.recv())
    worker.join()
"""


def test_the_fork_server_loads_the_feed_for_its_workers(tmp_path: Path, python_env: dict[str, str]) -> None:
    """Python ignores a module that it cannot preload, and each worker would then spend seconds on it."""
    script = tmp_path / "reports_preload.py"
    script.write_text(REPORTS_PRELOAD)
    result = subprocess.run(
        [sys.executable, script], env=python_env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr


HANGS_UP = """
import socket, sys
from multiprocessing import resource_sharer

from extract.tiles.batch import make_requests
from extract.tiles.feed import TileFeed
from extract.tiles.listing import list_tiles
from extract.tiles.source import open_source
from extract.ranks.signals import Stopped

def hang_up(ticket):
    address, _ = ticket
    with socket.socket(socket.AF_UNIX) as rank:
        rank.connect(address)
    raise Stopped(15)

if __name__ == "__main__":
    source = open_source(sys.argv[1])
    batches = [[request] for request in make_requests(list_tiles(source).table, range(6))]
    feed = TileFeed(source, workers=1)
    resource_sharer._resource_sharer.get_connection, connect = hang_up, resource_sharer._resource_sharer.get_connection
    try:
        list(feed.read(batches))
    except Stopped:
        resource_sharer._resource_sharer.get_connection = connect
        print(len(list(feed.read(batches))), "after", "Stopped")
"""


def test_a_rank_told_to_stop_while_it_takes_over_a_batch_leaves_no_traceback_of_its_worker(
    tmp_path: Path, objects: Objects, python_env: dict[str, str]
) -> None:
    """The rank hangs up on the worker's server of shared memory, which is a thread of Python's own."""
    script = tmp_path / "hangs_up.py"
    script.write_text(HANGS_UP)
    tiles = write_directory(tmp_path / "tiles", objects)
    result = subprocess.run(
        [sys.executable, script, tiles], env=python_env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.stdout, result.stderr) == ("6 after Stopped\n", "")


def test_error_that_is_no_workers_is_not_disguised(source: Source, table: TileTable) -> None:
    def draw() -> Iterator[list[TileRequest]]:
        yield make_requests(table, range(2))
        raise RuntimeError("a fault of the caller")

    with pytest.raises(RuntimeError, match="a fault of the caller") as caught:
        list(TileFeed(source, workers=0).read(draw()))
    assert not isinstance(caught.value, RunError)


def test_tiles_of_a_batch_are_fetched_together(source: Source, table: TileTable) -> None:
    """A read waits until one for each tile is under way: one after another they would wait for ever."""
    requests = [request for request in make_requests(table, range(50)) if request.label_size > 0][:8]
    feed = TileFeed(MeetingSource(source.url, parties=8), workers=0)
    (batch,) = feed.read([requests])
    assert batch.rows.tolist() == [request.row for request in requests]
    assert batch.fetch_s > 0


class MeetingSource(LocalSource):
    def __init__(self, path: str, parties: int) -> None:
        super().__init__(path)
        self.meeting = threading.Barrier(parties, timeout=TIMEOUT_S)

    def read(self, name: str, generation: int) -> bytes:
        self.meeting.wait()
        return super().read(name, generation)


def test_a_worker_fetches_its_next_batch_while_it_decodes_the_present_one(source: Source, table: TileTable) -> None:
    """The first batch cannot end before a read of the next one began; for a worker of two, that is the one after."""
    batches = cut(make_requests(table, range(12), labels=False), 4)
    feed = TileFeed(EagerSource(source.url, held=batches[0][-1].tile, until=batches[2][0].tile), workers=2)
    assert [batch.rows[0] for batch in feed.read(batches)] == [0, 4, 8]


class EagerSource(LocalSource):
    """Holds the read of one tile back until that of another has begun."""

    def __init__(self, path: str, held: str, until: str) -> None:
        super().__init__(path)
        self.held, self.until = held, until

    def read(self, name: str, generation: int) -> bytes:
        begun = _begun_in_this_worker
        if name == self.until:
            begun.set()
        elif name == self.held and not begun.wait(TIMEOUT_S):
            raise TransportError(f"{self.until} was not asked for")
        return super().read(name, generation)


_begun_in_this_worker = threading.Event()
