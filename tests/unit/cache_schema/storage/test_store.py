"""What a disk may refuse, in one line that says what to do."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cache_schema import CacheRoot, StorageError, open_cache
from cache_schema.storage.store import open_store, storage_errors
from tests.caches import fill_cache, make_provenance, make_recorded, make_table


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a directory")
    for place in (tmp_path / "cache", tmp_path / "cache" / "below"):
        with pytest.raises(StorageError, match=f"{place}: .*check CACHE"):
            CacheRoot(str(place)).create_version(make_table(20), make_provenance(), make_recorded())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_write_permission(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(StorageError, match="Permission denied: check CACHE and its permissions"):
        CacheRoot(str(tmp_path / "cache")).create_version(make_table(20), make_provenance(), make_recorded())


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that even root cannot write to")
def test_a_file_system_that_takes_no_directory() -> None:
    with pytest.raises(StorageError, match=r"^/proc/tileprobe: .*choose another CACHE"):
        fill_cache("/proc/tileprobe", 20)


def test_a_file_too_large_for_the_disk(tmp_path: Path, python_env: dict[str, str]) -> None:
    """A limit on file size makes writes fail for good, as a full disk does; a process of its own, since it is one."""
    code = f"""
import resource, signal
from cache_schema import CacheRoot, StorageError
from tests.caches import *
version = CacheRoot({str(tmp_path)!r}).create_version(make_table(300), make_provenance(), make_recorded())
version.write_block(1, make_values(version.layout, 1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    version.write_block(0, make_values(version.layout, 0))
except StorageError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=python_env, capture_output=True, text=True, check=True, timeout=120
    )

    assert done.stdout.startswith(f"{tmp_path}: File too large: check CACHE")
    version = open_cache(str(tmp_path), allow_unsealed=True)
    assert version.committed().tolist() == [False, True]
    assert version.check_block(1) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_free_space(number: int) -> None:
    remedy = r"cache/x: .*: free space, or choose another CACHE; what is committed stays"
    with pytest.raises(StorageError, match=remedy), storage_errors("cache/x"):
        raise OSError(number, "full")


def test_what_is_no_system_error_passes() -> None:
    with pytest.raises(ValueError, match="x"), storage_errors("cache/x"):
        raise ValueError("x")


def test_no_request_and_no_directory_until_used(tmp_path: Path) -> None:
    open_store(str(tmp_path / "cache"), read_only=False)
    open_store("gs://no-such-bucket-anywhere/cache", read_only=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["gs://me:secret@bucket/c", "https://me:secret@host/c"])
def test_a_password_in_the_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(StorageError, match="^CACHE is a URL with a user or password in it: leave them out$"):
        CacheRoot(url)
