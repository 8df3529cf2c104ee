"""Simulate, as discrete events, how an extraction shares its blocks among any number of ranks.

The simulation follows the code batch by batch. A rank draws block numbers from the shared counter when its feed
requests batches (`extract/run.py`, `_BlockDraw`). The DataLoader behind `extract/tiles/feed.py` keeps two requested
batches per worker, `_Batches` draws one more per worker, and a worker fetches its next batch while it decodes the
current one. A finished block is written in a thread while the next is computed, after the block before it
(`extract/writer.py`). Uncommitted blocks of a killed rank are drawn again.

Between events, the times of one rank follow from each other. Only what affects other ranks is an event: taking a batch
(which draws blocks and requests reads), a commit, a kill, a return.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from extract.tiles.feed import PREFETCHED_BATCHES

from .arithmetic import Ramp

Restart = Literal["rank", "job"]
RESTARTS: tuple[Restart, ...] = ("job", "rank")
Samples = npt.NDArray[np.float64]
_DRAWS = 4096
"""Samples drawn at a time, because drawing one costs more than all other work for a batch."""


@dataclass(frozen=True)
class Costs:
    """Samples of seconds; each batch or block gets one at random, with replacement.

    Attributes:
        fetch, decode, device: of a full batch. A short batch fetches and decodes in proportion, and computes for the
            full time because it is padded.
        write: of a block.
        start: from a rank's start, or return, to its first request.
    """

    fetch: Samples
    decode: Samples
    device: Samples
    write: Samples
    start: float = 0.0

    @classmethod
    def constant(cls, *, fetch: float = 0, decode: float = 0, device: float = 0, write: float = 0) -> "Costs":
        return cls(*(np.array([seconds], np.float64) for seconds in (fetch, decode, device, write)))


@dataclass(frozen=True)
class Setting:
    """Parameters of a simulation.

    Attributes:
        tiles, block_rows, batch: total tiles, tiles per block, tiles per forward pass.
        ranks: number of ranks.
        workers: feed processes per rank, 1 or more.
        kills_per_hour: kills of each rank per hour, at Poisson times.
        back_s: seconds until a killed rank starts again, without `Costs.start`.
        restart: `job`: a kill ends every rank, as with torchrun, and all start again with the uncommitted blocks.
            `rank`: only the killed rank's blocks are lost, and others draw them, the best a launcher could do.
        reads, writes: rates of the bucket, with two reads per tile and five writes per block. None: unlimited.
        most_kills: give up after this many kills.
    """

    tiles: int
    block_rows: int
    batch: int
    ranks: int
    workers: int = 1
    kills_per_hour: float = 0.0
    back_s: float = 60.0
    restart: Restart = "job"
    reads: Ramp | None = None
    writes: Ramp | None = None
    most_kills: int = 10_000

    @property
    def blocks(self) -> int:
        return -(-self.tiles // self.block_rows)

    def rows(self, block: int) -> int:
        return min(self.block_rows, self.tiles - block * self.block_rows)


@dataclass
class Outcome:
    """Result of a simulation.

    Attributes:
        makespan: seconds until the last block was committed.
        finished: False if the simulation gave up.
        device_s, feed_s, write_s: total over ranks: computing (including lost tiles), waiting for batches, for writes.
        other_s: starting, down, or without a block to draw. All four add up to `ranks` x `makespan`.
        computed: tiles embedded, counting repeats.
        lost: tiles embedded in blocks that were lost.
        most_lost: largest loss of one kill.
        commits: (blocks,) number of times each was committed.
        kills: number of kills before the end.
        finish: (ranks,) time at which each rank finished its last work.
    """

    makespan: float
    finished: bool
    device_s: float
    feed_s: float
    write_s: float
    other_s: float
    computed: int
    lost: int
    most_lost: int
    commits: npt.NDArray[np.int64]
    kills: int
    finish: Samples

    @property
    def idle_share(self) -> float:
        """Share of the ranks' time in which no device computed."""
        total = self.device_s + self.feed_s + self.write_s + self.other_s
        return 1 - self.device_s / total

    @property
    def lost_share(self) -> float:
        """Share of embedded tiles that had to be embedded again."""
        return self.lost / self.computed


class _Sampler:
    """Endless samples of one kind of cost."""

    def __init__(self, samples: Samples, rng: np.random.Generator) -> None:
        self._samples, self._rng = samples, rng
        self._drawn: list[float] = []

    def draw(self) -> float:
        if not self._drawn:
            self._drawn = self._rng.choice(self._samples, _DRAWS).tolist()
        return self._drawn.pop()


class _Bucket:
    """Bucket that answers requests in order, at the rate of a ramp."""

    def __init__(self, ramp: Ramp | None) -> None:
        self._ramp, self._taken = ramp, 0.0

    def take(self, now: float, requests: int) -> float:
        """Return the time of the last answer; `now` must not decrease."""
        if self._ramp is None:
            return now
        self._taken = max(self._taken, self._ramp.count(now)) + requests
        return self._ramp.time(self._taken)


@dataclass(slots=True)
class _Batch:
    block: int
    rows: int
    last: bool
    ready: float = 0.0


@dataclass(slots=True)
class _Rank:
    """State of a rank since its last start. `epoch` separates its events from those before a kill."""

    epoch: int = 0
    alive: bool = False
    waited: float = 0.0
    """Seconds waited for a write at the end of the last batch."""
    block: int = -1
    left: int = 0
    drawn: deque[_Batch] = field(default_factory=deque)
    """Batches drawn but not requested from a worker yet."""
    asked: deque[_Batch] = field(default_factory=deque)
    issued: int = 0
    worker_began: list[float] = field(default_factory=list)
    worker_free: list[float] = field(default_factory=list)
    fetched: list[float] = field(default_factory=list)
    free: float = 0.0
    written: float = 0.0
    in_hand: dict[int, int] = field(default_factory=dict)
    """Tiles embedded so far, by block drawn and not committed."""
    writing: dict[int, float] = field(default_factory=dict)
    """Commit times of the blocks handed to the writer."""


class _Simulation:
    def __init__(self, setting: Setting, costs: Costs, seed: int) -> None:
        self.setting, self.costs = setting, costs
        self.rng = np.random.default_rng(seed)
        draws = (_Sampler(samples, self.rng) for samples in (costs.fetch, costs.decode, costs.device, costs.write))
        self.fetch, self.decode, self.device, self.write = draws
        self.reads, self.writes = _Bucket(setting.reads), _Bucket(setting.writes)
        self.ranks = [_Rank() for _ in range(setting.ranks)]
        self.pending = deque(range(setting.blocks))
        self.idle: set[int] = set()
        self.events: list[tuple[float, int, str, int, int]] = []
        self.count = 0
        self.commits = np.zeros(setting.blocks, np.int64)
        self.committed = 0
        self.device_s = self.feed_s = self.write_s = 0.0
        self.computed = self.lost = self.most_lost = self.kills = 0
        self.finish = np.zeros(setting.ranks)

    def run(self) -> Outcome:
        for number in range(self.setting.ranks):
            self._push(self.costs.start, "begin", number)
            self._plan_kill(0.0, number)
        now = 0.0
        while self.committed < self.setting.blocks and self.kills < self.setting.most_kills:
            now, _, kind, number, epoch = heapq.heappop(self.events)
            rank = self.ranks[number]
            if kind == "kill":
                self._kill(now, number)
            elif epoch == rank.epoch:
                {"begin": self._begin, "batch": self._take_batch, "commit": self._commit}[kind](now, number)
        busy = self.device_s + self.feed_s + self.write_s
        return Outcome(
            makespan=now,
            finished=self.committed == self.setting.blocks,
            device_s=self.device_s,
            feed_s=self.feed_s,
            write_s=self.write_s,
            other_s=now * self.setting.ranks - busy,
            computed=self.computed,
            lost=self.lost,
            most_lost=self.most_lost,
            commits=self.commits,
            kills=self.kills,
            finish=self.finish,
        )

    def _push(self, when: float, kind: str, number: int) -> None:
        # The running number orders events of the same time.
        self.count += 1
        heapq.heappush(self.events, (when, self.count, kind, number, self.ranks[number].epoch))

    # Working

    def _begin(self, now: float, number: int) -> None:
        """Fill the feed of a rank that has started or was woken."""
        rank, workers = self.ranks[number], self.setting.workers
        rank.alive = True
        rank.free = max(now, rank.free)
        rank.issued = 0
        rank.worker_began, rank.worker_free, rank.fetched = [[now] * workers for _ in range(3)]
        self._draw(rank, (PREFETCHED_BATCHES + 1) * workers)
        for _ in range(PREFETCHED_BATCHES * workers):
            self._ask(rank, now)
        self._await_batch(rank, number, now)

    def _draw(self, rank: _Rank, batches: int) -> None:
        """Draw the next batches from the current block or from new ones."""
        for _ in range(batches):
            if not rank.left:
                if not self.pending:
                    return
                rank.block = self.pending.popleft()
                rank.left = self.setting.rows(rank.block)
                rank.in_hand[rank.block] = 0
            rows = min(self.setting.batch, rank.left)
            rank.left -= rows
            rank.drawn.append(_Batch(rank.block, rows, last=not rank.left))

    def _ask(self, rank: _Rank, now: float) -> None:
        """Give the next batch to the worker whose turn it is."""
        if not rank.drawn:
            return
        batch, worker = rank.drawn.popleft(), rank.issued % self.setting.workers
        share = batch.rows / self.setting.batch
        began = max(now, rank.worker_free[worker])
        # Its reads began when the worker started to decode the batch before; the first batch has none.
        reads_began = rank.worker_began[worker] if rank.issued >= self.setting.workers else began
        fetched = max(reads_began, rank.fetched[worker]) + self.fetch.draw() * share
        fetched = max(fetched, self.reads.take(now, 2 * batch.rows))
        decode_s = self.decode.draw() * share
        # Tiles are decoded as they arrive, so only one remains after the last arrival.
        batch.ready = max(began + decode_s, fetched + decode_s / batch.rows)
        rank.worker_began[worker], rank.worker_free[worker], rank.fetched[worker] = began, batch.ready, fetched
        rank.issued += 1
        rank.asked.append(batch)

    def _await_batch(self, rank: _Rank, number: int, now: float) -> None:
        if rank.asked:
            self._push(max(rank.free, rank.asked[0].ready), "batch", number)
        else:
            self.idle.add(number)
            self.finish[number] = max(now, rank.free, rank.written)

    def _take_batch(self, now: float, number: int) -> None:
        """Give the device a batch, request another from the feed, and hand a complete block to the writer."""
        rank = self.ranks[number]
        batch = rank.asked.popleft()
        self._draw(rank, 1)
        self._ask(rank, now)
        device_s = self.device.draw()
        self.feed_s += now - rank.free
        self.device_s += device_s
        self.computed += batch.rows
        rank.in_hand[batch.block] += batch.rows
        rank.free = now + device_s
        rank.waited = 0.0
        if batch.last:
            rank.waited = max(0.0, rank.written - rank.free)
            self.write_s += rank.waited
            rank.free += rank.waited
            rank.written = max(rank.free + self.write.draw(), self.writes.take(now, 5))
            rank.writing[batch.block] = rank.written
            self._push(rank.written, "commit", number)
        self._await_batch(rank, number, now)

    def _commit(self, now: float, number: int) -> None:
        """Commit the block of this rank that has been in writing for longest."""
        rank = self.ranks[number]
        block = next(iter(rank.writing))
        del rank.writing[block], rank.in_hand[block]
        self.commits[block] += 1
        self.committed += 1

    # Preemption

    def _plan_kill(self, now: float, number: int) -> None:
        if self.setting.kills_per_hour:
            # Kills do not belong to an epoch: they happen whatever the rank is doing.
            self._push(now + self.rng.exponential(3600 / self.setting.kills_per_hour), "kill", number)

    def _kill(self, now: float, number: int) -> None:
        self.kills += 1
        self._plan_kill(now, number)
        hit = [number] if self.setting.restart == "rank" else range(self.setting.ranks)
        lost = sum(self._end(now, each) for each in hit)
        self.lost += lost
        self.most_lost = max(self.most_lost, lost)
        if self.setting.restart == "job":
            self.pending = deque(np.flatnonzero(self.commits == 0).tolist())
        elif self.pending:
            for waiting in sorted(self.idle):
                self._push(now, "begin", waiting)
            self.idle.clear()

    def _end(self, now: float, number: int) -> int:
        """End a rank and drop its uncommitted blocks; return the number of tiles lost."""
        rank = self.ranks[number]
        self.idle.discard(number)
        if rank.alive:
            # A batch is booked whole when it begins, so subtract the part after this moment.
            over = max(0.0, rank.free - now)
            unwaited = min(over, rank.waited)
            self.write_s -= unwaited
            self.device_s -= over - unwaited
        self.pending.extend(rank.in_hand)
        lost = sum(rank.in_hand.values())
        self.ranks[number] = _Rank(epoch=rank.epoch + 1, free=now + self.setting.back_s + self.costs.start)
        self._push(now + self.setting.back_s + self.costs.start, "begin", number)
        return lost


def simulate(setting: Setting, costs: Costs, seed: int = 0) -> Outcome:
    """Run one simulation; the same seed gives the same outcome."""
    return _Simulation(setting, costs, seed).run()


def bound_list_schedule(blocks: Sequence[float], ranks: int) -> float:
    """Return an upper bound on any list schedule: an equal share of all work plus the longest piece.

    Graham 1969, "Bounds on multiprocessing timing anomalies", has (1 - 1/m) of that piece, rounded up to one here.
    """
    return sum(blocks) / ranks + max(blocks)
