"""Who writes to a version: told, taken over, lost; on a real file system and the real storage server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from cache_schema import CacheRoot, OwnedError, own_version
from cache_schema.storage.objects import open_objects
from cache_schema.upkeep.gc import list_versions, remove_versions
from cache_schema.upkeep.lock import SUFFIX, Owner, Pace, find_owner
from tests.caches import fill_cache, get_bytes, put_bytes

VERSION = "0123456789abcdef0123"
PACE = Pace(beat_s=0.05, look_s=0.05, stale_s=1.0)
"""Twenty heartbeats to a take-over, so that a busy machine does not bury a live owner."""


def here(url: str) -> Owner:
    """What the owner object of `VERSION` names."""
    owner = Owner.parse(get_bytes(url, VERSION + SUFFIX) or b"")
    assert owner
    return owner


def elsewhere(**changes: Any) -> Owner:
    """A process of a machine that is not this one."""
    return replace(Owner.make(), **({"machine": "another", "host": "far", "pid": 77} | changes))


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def owner_of(process: subprocess.Popen[bytes]) -> Owner:
    stat = open(f"/proc/{process.pid}/stat").read()  # noqa: SIM115
    return replace(Owner.make(), pid=process.pid, born=int(stat.rpartition(")")[2].split()[19]))


def test_an_owner_is_there_meanwhile_and_gone_afterwards(cache_url: str) -> None:
    with own_version(cache_url, VERSION, pace=PACE):
        first = here(cache_url)
        assert (first.pid, first.machine) == (os.getpid(), Owner.make().machine)
        assert first.born > 0
        wait_until(lambda: here(cache_url).beats >= 2)
        assert here(cache_url).token == first.token
        assert CacheRoot(cache_url).versions() == []
    assert get_bytes(cache_url, VERSION + SUFFIX) is None
    with pytest.raises(ZeroDivisionError), own_version(cache_url, VERSION, pace=PACE):
        _ = 1 / 0
    assert get_bytes(cache_url, VERSION + SUFFIX) is None


def test_a_live_process_of_this_machine_is_told_at_once(cache_url: str) -> None:
    """Its heartbeat is not asked for: a stopped process may go on."""
    with sleeper() as process:
        owner = owner_of(process)
        put_bytes(cache_url, VERSION + SUFFIX, owner.to_bytes())
        said: list[str] = []
        with pytest.raises(OwnedError) as refused, own_version(cache_url, VERSION, say=said.append):
            pass
        assert str(refused.value) == (
            f"version {VERSION} is being written by process {process.pid} on {owner.host} since {owner.since[:-6]} UTC"
            ": let it finish, or end it; then the same command continues from there"
        )
        assert said == []
        assert get_bytes(cache_url, VERSION + SUFFIX) == owner.to_bytes()


@pytest.mark.parametrize("how", ["killed", "killed, not waited for", "another process has its pid", "this process"])
def test_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path: Any, how: str) -> None:
    """With the real pace, so nothing can have waited for a heartbeat."""
    url = str(tmp_path)
    with sleeper() as process:
        owner = owner_of(process)
        if how.startswith("killed"):
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        if how == "killed":
            process.wait()
        if how == "another process has its pid":
            owner = replace(owner, born=owner.born - 1)
        if how == "this process":
            owner = Owner.make()
        put_bytes(url, VERSION + SUFFIX, owner.to_bytes())
        said: list[str] = []
        with own_version(url, VERSION, say=said.append):
            assert here(url).pid == os.getpid()
            assert here(url).token != owner.token
    assert said == [f"{owner} is gone: version {VERSION} is taken over from it"]


def test_a_restart_of_the_same_job_is_its_own_wherever_it_runs(tmp_path: Any) -> None:
    put_bytes(str(tmp_path), VERSION + SUFFIX, elsewhere(job="job-1").to_bytes())
    with own_version(str(tmp_path), VERSION, job="job-1"):
        assert here(str(tmp_path)).job == "job-1"


@pytest.mark.parametrize("left", ["an owner", "no job", "nonsense", "nothing at all", "another's fields"])
def test_without_a_heartbeat_it_is_taken_over(cache_url: str, left: str) -> None:
    owner = elsewhere(since="2001-01-01 00:00:00+00:00")
    data = {
        "an owner": replace(owner, job="job-1").to_bytes(),
        "no job": owner.to_bytes(),
        "nonsense": b"\xff{",
        "nothing at all": b"",
        "another's fields": json.dumps({"token": 1}).encode(),
    }[left]
    put_bytes(cache_url, VERSION + SUFFIX, data)
    said: list[str] = []
    with own_version(cache_url, VERSION, pace=replace(PACE, stale_s=0.2), say=said.append):
        assert here(cache_url).pid == os.getpid()
    name = "process 77 on far since 2001-01-01 00:00:00 UTC" if left in ("an owner", "no job") else "an owner that"
    assert said[0].startswith(f"version {VERSION} was being written by {name}")
    assert said[0].endswith(": waiting 0 s for its heartbeat")
    assert said[1].endswith(f"is gone: version {VERSION} is taken over from it")
    assert len(said) == 2


def test_with_a_heartbeat_it_is_told(cache_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far its clock is off: only that the object changes is looked at."""
    with own_version(cache_url, VERSION, pace=PACE):
        # The owner's own object, as it would look to another machine.
        monkeypatch.setattr("cache_schema.upkeep.lock._name_machine", lambda: "another")
        assert find_owner(cache_url, VERSION, pace=Pace(look_s=0.05), say=lambda line: None)
        with pytest.raises(OwnedError, match=f"is being written by process {os.getpid()} on "):
            with own_version(cache_url, VERSION, pace=Pace(look_s=0.05), say=lambda line: None):
                pass


def test_one_that_ends_while_it_is_watched_makes_room(cache_url: str) -> None:
    objects = open_objects(cache_url)
    stored = objects.replace(VERSION + SUFFIX, elsewhere().to_bytes(), None)
    assert stored
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        objects.delete(VERSION + SUFFIX, stored)

    with own_version(cache_url, VERSION, pace=Pace(look_s=0.05), say=say):
        assert here(cache_url).pid == os.getpid()
    assert len(said) == 1


def test_of_many_that_come_at_once_one_owns_it(cache_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """First where nobody is, then over one that is gone; each of them looks like another machine to the rest."""
    monkeypatch.setattr("cache_schema.upkeep.lock._name_machine", lambda: threading.current_thread().name)
    barrier, count = threading.Barrier(8), 8

    def come(_: int) -> bool:
        with ExitStack() as stack:
            barrier.wait(30)
            try:
                stack.enter_context(own_version(cache_url, VERSION, pace=PACE, say=lambda line: None))
            except OwnedError:
                return False
            finally:
                barrier.wait(30)  # the owner stays until all the others were told
            return True

    with ThreadPoolExecutor(count) as threads:
        assert sum(threads.map(come, range(count))) == 1
        put_bytes(cache_url, VERSION + SUFFIX, elsewhere().to_bytes())
        assert sum(threads.map(come, range(count))) == 1
    assert get_bytes(cache_url, VERSION + SUFFIX) is None


def test_an_owner_that_lost_it_warns_once_and_leaves_the_other_alone(
    cache_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = elsewhere()
    with own_version(cache_url, VERSION, pace=PACE):
        warned = ""
        put_bytes(cache_url, VERSION + SUFFIX, other.to_bytes())

        def is_warned() -> bool:
            nonlocal warned
            warned += capsys.readouterr().err
            return bool(warned)

        wait_until(is_warned)
    assert f"warning: {other} has taken over what this run writes" in warned + capsys.readouterr().err
    assert warned.count("\n") == 1
    assert get_bytes(cache_url, VERSION + SUFFIX) == other.to_bytes()


def test_a_write_that_was_done_but_not_acknowledged_counts(cache_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second answer is lost on its way back, as a bucket's may be."""
    kind = type(open_objects(cache_url))
    swap, lost = kind.replace, []

    def lose(self: Any, name: str, data: bytes, over: Any) -> Any:
        stored = swap(self, name, data, over)
        lost.append(stored is not None and len(lost) % 2 == 0)
        return None if lost[-1] else stored

    monkeypatch.setattr(kind, "replace", lose)
    with own_version(cache_url, VERSION, pace=PACE, say=pytest.fail):
        wait_until(lambda: here(cache_url).beats >= 4)
    assert sum(lost) >= 2
    assert get_bytes(cache_url, VERSION + SUFFIX) is None


def test_the_thread_does_not_keep_a_process_alive(tmp_path: Any, python_env: dict[str, str]) -> None:
    """Nor does an exit that skips every clean-up; what it leaves is taken over at once."""
    code = f"""
from cache_schema import own_version
context = own_version({str(tmp_path)!r}, {VERSION!r})
context.__enter__()
"""
    done = subprocess.run([sys.executable, "-c", code + "import os; os._exit(3)"], env=python_env, timeout=60)
    assert done.returncode == 3
    assert here(str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], env=python_env, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "is gone: version" in done.stdout


# What else writes to a version


def test_gc_leaves_a_version_that_is_owned(cache_url: str) -> None:
    doomed, unfinished = fill_cache(cache_url, 20, depth=4), fill_cache(cache_url, 20, depth=5, seal=False)
    fill_cache(cache_url, 20, depth=6)
    root, pace = CacheRoot(cache_url), replace(PACE, stale_s=0.2)
    with sleeper() as process:
        owner = owner_of(process)
        for version in (doomed, unfinished):
            put_bytes(cache_url, version + SUFFIX, owner.to_bytes())
        kept = {found.id: found.kept for found in list_versions(root, {}, unsealed=True, pace=pace)}
        assert kept[doomed] == kept[unfinished] == f"being written by {owner}"
        put_bytes(cache_url, doomed + SUFFIX, elsewhere().to_bytes())
        found = [version for version in list_versions(root, {}, unsealed=True, pace=pace) if not version.kept]
        assert [version.id for version in found] == [doomed]

        put_bytes(cache_url, doomed + SUFFIX, owner.to_bytes())  # since they were listed
        with pytest.raises(OwnedError):
            remove_versions(root, found)
        assert doomed in root.versions()
    remove_versions(root, found)
    assert root.versions() == sorted([unfinished, root.current() or ""])
    assert get_bytes(cache_url, doomed + SUFFIX) is None


def test_repair_leaves_a_version_that_is_owned(tmp_path: Any, run: Callable[..., Any]) -> None:
    url = str(tmp_path / "cache")
    version = fill_cache(url, 20)
    (tmp_path / "cache" / f"{version}.zarr/status/c/0").unlink()
    with sleeper() as process:
        put_bytes(url, version + SUFFIX, owner_of(process).to_bytes())
        refused = run("verify", url, "--repair")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.startswith(f"error: version {version} is being written by process {process.pid} on ")
        assert run("verify", url).returncode == 3, "to look is no harm"
    assert "cleared the seal" in run("verify", url, "--repair").stdout
    assert get_bytes(url, version + SUFFIX) is None
