"""Runs in a bucket: `RUN=gs://bucket/prefix/head`, numbered `head-001`, `head-002`, … like local runs.

A run is trained in a local working folder, `runs/gs/bucket/prefix/head-001`, and copied to the bucket at checkpoints:

    gs://bucket/prefix/head-001/
        claim                        the number is taken; created only if missing
        objects/<sha256>             the bytes of the run's files
        checkpoints/000001.json      the files of one checkpoint: {"writer": …, "files": {"last/sha256": <sha256>, …}}
        config.json, history.jsonl, report.html, tensorboard/, …, and at the end best/      copies for people

The objects of a checkpoint are written first and its list last, and a list is only created, never replaced. So every
list in the bucket names a complete checkpoint, and if two processes continue one run, the second to write gets an
error. The two newest lists are kept, with their objects; if an object is damaged, the older list is used. Files that
did not change are not sent again.

A thread sends the files, which were opened when the checkpoint was written, so training does not wait. A checkpoint
that is written while another is being sent, or within two seconds, is skipped: the next one replaces it, and no object
is rewritten more often than Google Cloud Storage allows (once a second). Only the copies for people are rewritten.
There is no link to the newest run: `gs://bucket/prefix/head` is the highest number.
"""

import hashlib
import io
import itertools
import json
import re
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from cache_schema.storage.objects import Objects, open_objects
from cache_schema.storage.place import Purpose, split_url
from train.errors import CheckpointError, TrainError

WORK = Path("runs", "gs")
"""Local working folders of runs in buckets."""

PAUSE_S = 2.0
_PURPOSE = Purpose("RUN", again="what is in the bucket stays, and ARGS=--resume continues from there")
_KEPT = 2

# The files of a run. Nothing else is sent to a bucket, and no other name from a bucket becomes a path.
_FILE = re.compile(
    r"best/\w+(\.safetensors|\.json)?|last/\w+(\.\w+)?|tensorboard/\w[\w.-]*|\w+\.(jsonl?|html|md|csv|safetensors)",
    re.ASCII,
)
_DIGEST = re.compile("[0-9a-f]{64}", re.ASCII)
_LIST = re.compile(r"(\d{6,})\.json", re.ASCII)
_BEST = ("config.json", "split.json", "best/")

_uploads = ThreadPoolExecutor(1, thread_name_prefix="upload")


def claim_run(url: str) -> "BucketRun":
    """Take the next number that is free in the bucket and locally; no other process gets the same.

    Raises:
        TrainError: `url` has no name below a bucket.
        StorageError: no such bucket, or no right to write or delete there.
    """
    parent, name = _split_url(url)
    local = work_folder(f"{parent}/{name}").parent
    here = [path.name for path in local.iterdir()] if local.is_dir() else []
    used = find_numbers(name, [*open_objects(parent, _PURPOSE).list_dir(), *here])
    for number in itertools.count(max(used, default=0) + 1):
        run = BucketRun(f"{parent}/{name}-{number:03d}")
        if run.claim():
            return run
    raise AssertionError("unreachable")


def find_run(url: str) -> "BucketRun | None":
    """Find the run of exactly this name, or else its highest number; None if there is none.

    Raises:
        TrainError: `url` has no name below a bucket.
        StorageError: the bucket cannot be read.
    """
    parent, name = _split_url(url)
    names = list(open_objects(parent, _PURPOSE).list_dir())
    if name in names and (run := BucketRun(f"{parent}/{name}")).exists():
        return run
    numbers = find_numbers(name, names)
    return BucketRun(f"{parent}/{numbers[max(numbers)]}") if numbers else None


def work_folder(url: str) -> Path:
    """Return the local working folder of a run."""
    parent, name = _split_url(url)
    return WORK.joinpath(*split_url(parent), name)


class BucketRun:
    """The objects of one run, used by rank 0 only; it can be pickled until its first upload."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._objects = open_objects(url, _PURPOSE)
        self._writer = uuid.uuid4().hex
        self._lists: dict[int, set[str]] = {}  # number -> digests in that list; empty if not read
        self._newest: list[int] = []  # complete lists, the newest last
        self._whole: set[str] = set()  # digests of objects known to exist
        self._seen: set[str] = set()  # digests of objects that a stopped run may have left
        self._published: dict[str, str] = {}
        self._sent_at = -PAUSE_S
        self._job: Future[None] | None = None

    def claim(self) -> bool:
        """Create the run, after checking that the bucket can be written; False if another process has this number."""
        probe = f"probe-{self._writer}"
        self._objects.write(probe, b"")
        self._objects.delete(probe)
        return self._objects.create("claim", self._writer.encode())

    def exists(self) -> bool:
        """Return whether a run of this name was begun."""
        return bool(_read(self._objects, "claim"))

    # Sending

    def upload(self, folder: Path) -> None:
        """Send the run in the background, unless it is being sent or was sent a moment ago.

        Raises:
            StorageError, TrainError: the previous upload failed.
        """
        if self._job is not None and not self._job.done():
            return
        self._settle()
        if time.monotonic() - self._sent_at >= PAUSE_S:
            self._sent_at = time.monotonic()
            self._job = _uploads.submit(self._send, _open_files(folder))

    def finish(self, folder: Path) -> None:
        """Send the run, with `best/` among the copies for people, and wait for it.

        Raises:
            StorageError, TrainError: it could not be sent.
        """
        self._settle()
        time.sleep(max(0.0, self._sent_at + PAUSE_S - time.monotonic()))
        self._sent_at = time.monotonic()
        self._send(_open_files(folder), publish_best=True)

    def _settle(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def _send(self, files: dict[str, BinaryIO], *, publish_best: bool = False) -> None:
        digests: dict[str, str] = {}
        copies: dict[str, bytes] = {}
        for name, stream in files.items():
            with stream:
                data = stream.read()
            digest = digests[name] = hashlib.sha256(data).hexdigest()
            if digest not in self._whole:
                self._objects.write(f"objects/{digest}", data)
                self._whole.add(digest)
            if self._published.get(name) != digest and (_is_for_people(name) or (publish_best and name[:5] == "best/")):
                copies[name] = data
        number = max(self._lists, default=0) + 1
        value = json.dumps({"writer": self._writer, "files": digests}, indent=1).encode()
        if not self._objects.create(_list_name(number), value):
            raise TrainError(f"another process continues {self.url}: wait for it, or start a new run without --resume")
        self._lists[number] = set(digests.values())
        self._newest = [*self._newest, number][-_KEPT:]
        for name, data in copies.items():
            self._objects.write(name, data)
            self._published[name] = digests[name]
        self._remove_old()

    def _remove_old(self) -> None:
        for number in sorted(set(self._lists) - set(self._newest)):
            self._objects.delete(_list_name(number))
            del self._lists[number]
        needed = set().union(*self._lists.values())
        self._seen |= self._whole
        for digest in sorted(self._seen - needed):
            self._objects.delete(f"objects/{digest}")
        self._seen &= needed
        self._whole &= needed

    # Fetching

    def fetch(self, folder: Path, *, best_only: bool = False) -> list[str]:
        """Download the newest complete checkpoint, and delete all other files of `folder`.

        Files that are there already are not downloaded again.

        Args:
            folder: holds files of this run only.
            best_only: download only the files needed to apply the best epoch.

        Returns:
            a line for each newer checkpoint that is damaged.

        Raises:
            CheckpointError: no checkpoint is complete.
            StorageError: the bucket cannot be read.
        """
        found = (_LIST.fullmatch(name) for name in self._objects.list_dir("checkpoints"))
        self._lists = {int(match[1]): set() for match in found if match}
        self._seen = {name for name in self._objects.list_dir("objects") if _DIGEST.fullmatch(name)}
        damaged: list[str] = []
        for number in sorted(self._lists, reverse=True):
            try:
                files = self._read_list(number)
                wanted = {name: files[name] for name in files if not best_only or name.startswith(_BEST)}
                self._bring_down(folder, wanted)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            self._newest, self._lists[number] = [number], set(files.values())
            self._whole = set(wanted.values())
            return [f"warning: {line}: the checkpoint before it is used" for line in damaged]
        reasons = "; ".join(damaged) or "it has none"
        raise CheckpointError(f"no complete checkpoint in {self.url} ({reasons}): start a new run without --resume")

    def _read_list(self, number: int) -> dict[str, str]:
        try:
            files = json.loads(_read(self._objects, _list_name(number)) or b"")["files"]
            if all(_FILE.fullmatch(name) and _DIGEST.fullmatch(digest) for name, digest in files.items()):
                return dict(files)
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise CheckpointError(f"{self.url}/{_list_name(number)} is damaged")

    def _bring_down(self, folder: Path, files: dict[str, str]) -> None:
        try:
            for path in [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]:
                if path.relative_to(folder).as_posix() not in files:
                    path.unlink()
            for name, digest in files.items():
                path = folder / name
                if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
                    continue
                data = _read(self._objects, f"objects/{digest}")
                if data is None or hashlib.sha256(data).hexdigest() != digest:
                    raise CheckpointError(f"{self.url}: {name} is {'missing' if data is None else 'damaged'}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        except OSError as error:
            raise TrainError(f"cannot write {folder}: {error.strerror}: free space or fix the permissions") from error


def _read(objects: Objects, name: str) -> bytes | None:
    found = objects.read(name)
    return found.data if found else None


def _split_url(url: str) -> tuple[str, str]:
    """Split the URL of a run into its place and its name."""
    parts = split_url(url)
    # The parts are also the names of local folders.
    if len(parts) < 2 or any(part in ("", ".", "..") for part in parts):
        raise TrainError(f"RUN={url} names no run: write gs://bucket/prefix/name")
    return url.rstrip("/").removesuffix(f"/{parts[-1]}"), parts[-1]


def find_numbers(name: str, names: Iterable[str]) -> dict[int, str]:
    """Find the runs `NAME-001`, `NAME-002`, … among `names`: number to whole name."""
    matches = (re.fullmatch(re.escape(name) + r"-(\d+)", found) for found in names)
    return {int(match[1]): match[0] for match in matches if match}


def _list_name(number: int) -> str:
    return f"checkpoints/{number:06d}.json"


def _is_for_people(name: str) -> bool:
    return not name.startswith(("best/", "last/"))


def _open_files(folder: Path) -> dict[str, BinaryIO]:
    """Open the run's present files: checkpoints are replaced, never changed; other files are small and copied."""
    names = {path: path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: io.BytesIO(path.read_bytes()) if _is_for_people(name) else path.open("rb")
        for path, name in names.items()
        if _FILE.fullmatch(name)
    }
