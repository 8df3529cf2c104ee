"""Ranks that watch each other over a real store, all in this process, whose end is only noted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import timedelta

import pytest
import torch.distributed as dist

from extract.errors import ConfigError
from extract.ranks.heartbeat import read_peer_timeout, watch_peers

SILENCE_S = 1.0
DEADLINE_S = 60


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=DEADLINE_S))


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    return statuses


def connect(server: dist.TCPStore) -> dist.Store:
    return dist.PrefixStore("peers", dist.TCPStore("127.0.0.1", server.port, is_master=False))


def wait_for_beats(server: dist.TCPStore, rank: int, beats: int) -> None:
    read_beats = lambda: int(connect(server).get(f"beat/{rank}").split()[0])  # noqa: E731
    start = read_beats()
    wait_until(lambda: read_beats() >= start + beats)


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def silence_s() -> float:
    return SILENCE_S


@pytest.fixture
def watches(server: dist.TCPStore, ended: list[int], silence_s: float) -> Iterator[list[ExitStack]]:
    """Three ranks that watch, for as long as the end of the process is only noted."""
    with ExitStack() as at_end:
        ranks = [at_end.enter_context(ExitStack()) for _ in range(3)]
        for rank, stack in enumerate(ranks):
            stack.enter_context(watch_peers(connect(server), rank, 3, silence_s))
        yield ranks


@pytest.mark.parametrize("silence_s", [3.0])  # so long a busy machine may not let them beat
def test_ranks_that_beat_or_leave_in_order_are_not_missed(
    server: dist.TCPStore, watches: list[ExitStack], ended: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    wait_for_beats(server, 1, 25)  # 20 make up the time
    watches[2].close()
    wait_for_beats(server, 0, 25)
    watches[0].close()
    wait_for_beats(server, 1, 25)
    assert (ended, capfd.readouterr().err) == ([], "")


def test_a_rank_that_fails_is_missed_by_name(
    watches: list[ExitStack], ended: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    with suppress(ZeroDivisionError), watches[2]:
        raise ZeroDivisionError
    wait_until(lambda: ended)
    line = f"error: rank 2 on {os.uname().nodename} has not been heard of for 1 s (PEER_TIMEOUT), so rank 0 exits: once"
    assert line in capfd.readouterr().err
    assert set(ended) == {1}


def test_rank_0_is_missed_by_the_others(
    server: dist.TCPStore, ended: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    connect(server).set("beat/0", "0 there")
    with watch_peers(connect(server), 1, 2, SILENCE_S):
        wait_until(lambda: ended)
    assert "error: rank 0 on there has not been heard of for 1 s" in capfd.readouterr().err


def test_the_time_is_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, seconds in (("", 120), ("7.5", 7.5)):
        monkeypatch.setenv("PEER_TIMEOUT", text)
        assert read_peer_timeout() == seconds
    for text in ("0", "-1", "2min", "inf", "nan"):
        monkeypatch.setenv("PEER_TIMEOUT", text)
        with pytest.raises(ConfigError, match=f"PEER_TIMEOUT={text}: give seconds"):
            read_peer_timeout()
