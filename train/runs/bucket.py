"""Runs in a bucket: `RUN=gs://bucket/prefix/head`, numbered `head-001`, `head-002`, … as local ones are.

A run is trained in a local working folder, `runs/gs/bucket/prefix/head-001`, and copied to the bucket at checkpoints:

    gs://bucket/prefix/head-001/
        claim                        the number is taken; made create-only
        objects/<sha256>             the bytes of the run's files
        checkpoints/000001.json      the files of one moment: {"writer": …, "files": {"last/sha256": <sha256>, …}}
        config.json, history.jsonl, report.html, tensorboard/, …, and in the end best/      copies for people

A checkpoint's objects are put first, its list last and create-only, so that every list in the bucket names a whole
checkpoint, and of two processes that continue one run the second to write is told. The two newest lists stay, with
what they name; a damaged object makes the older one be used. Files that did not change are not sent again.

Sending happens in a thread, from files opened when the checkpoint was written: training waits for none of it. A
checkpoint that comes while another is being sent, or within two seconds of it, is passed over: the next one takes its
place, and no object is rewritten more often than Google Cloud Storage takes (once a second). Only the copies for people
are rewritten at all. The link to the newest run has no counterpart: `gs://bucket/prefix/head` is the highest number.
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
from typing import TYPE_CHECKING, BinaryIO

from train.errors import CheckpointError, TrainError

if TYPE_CHECKING:
    from cache_schema.storage.gcs import GcsObjects

WORK = Path("runs", "gs")
"""Local working folders of runs in buckets."""

PAUSE_S = 2.0
DEADLINE_S = 120.0
FIRST_DELAY_S = 1.0
_AGAIN = "what is in the bucket stays, and ARGS=--resume goes on from there"
_KEPT = 2

# What a run consists of. Nothing else goes to a bucket, and no other name from there becomes a path.
_FILE = re.compile(
    r"best/\w+(\.safetensors|\.json)?|last/\w+(\.\w+)?|tensorboard/\w[\w.-]*|\w+\.(jsonl?|html|md|csv|safetensors)",
    re.ASCII,
)
_DIGEST = re.compile("[0-9a-f]{64}", re.ASCII)
_LIST = re.compile(r"(\d{6,})\.json", re.ASCII)
_BEST = ("config.json", "split.json", "best/")

_uploads = ThreadPoolExecutor(1, thread_name_prefix="upload")


def is_bucket(run: str) -> bool:
    """Whether a run's place is a bucket's."""
    return run.startswith("gs://")


def read_object(url: str) -> bytes:
    """An object outside any run, such as a `split.json`.

    Raises:
        FileNotFoundError: there is none.
        StorageError: the bucket cannot be read.
    """
    parent, name = _split_url(url)
    data = _read(_open_objects(parent), name)
    if data is None:
        raise FileNotFoundError(f"no object {url}")
    return data


def claim_run(url: str) -> "BucketRun":
    """Take the next free number in the bucket, past all local ones too; no other process gets the same.

    Raises:
        TrainError: `url` has no name below a bucket.
        StorageError: no such bucket, or no right to write or delete there.
    """
    parent, name = _split_url(url)
    local = work_folder(f"{parent}/{name}").parent
    here = [path.name for path in local.iterdir()] if local.is_dir() else []
    used = _find_numbers(name, [*_open_objects(parent).list_dir(), *here])
    for number in itertools.count(max(used, default=0) + 1):
        run = BucketRun(f"{parent}/{name}-{number:03d}")
        if run.claim():
            return run
    raise AssertionError("unreachable")


def find_run(url: str) -> "BucketRun | None":
    """The run of that very name, or else the newest of its numbers; None if there is none.

    Raises:
        TrainError: `url` has no name below a bucket.
        StorageError: the bucket cannot be read.
    """
    parent, name = _split_url(url)
    names = list(_open_objects(parent).list_dir())
    if name in names and (run := BucketRun(f"{parent}/{name}")).exists():
        return run
    numbers = _find_numbers(name, names)
    return BucketRun(f"{parent}/{numbers[max(numbers)]}") if numbers else None


def work_folder(url: str) -> Path:
    """Where a run of that name is worked on, on this machine."""
    parent, name = _split_url(url)
    return WORK.joinpath(*parent.removeprefix("gs://").split("/"), name)


class BucketRun:
    """One run's objects. Only rank 0 uses it; it can be pickled until the first upload in the background."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._objects = _open_objects(url)
        self._writer = uuid.uuid4().hex
        self._lists: dict[int, set[str]] = {}  # number -> digests it names; empty where nobody asked
        self._newest: list[int] = []  # whole lists, the last the newest
        self._whole: set[str] = set()  # digests known to be there
        self._seen: set[str] = set()  # digests there, perhaps left behind by a run that was stopped
        self._published: dict[str, str] = {}
        self._sent_at = -PAUSE_S
        self._job: Future[None] | None = None

    def claim(self) -> bool:
        """Make the run in the bucket, after seeing that it can be written; False if another process has it."""
        probe = f"probe-{self._writer}"
        self._objects.upload(probe, b"")
        self._objects.delete(probe)
        return self._objects.create("claim", self._writer.encode())

    def exists(self) -> bool:
        """Whether a run was begun under this name."""
        return bool(_read(self._objects, "claim"))

    # Sending

    def upload(self, folder: Path) -> None:
        """Send the run in the background, unless that is under way or was done a moment ago.

        Raises:
            StorageError, TrainError: the upload before failed.
        """
        if self._job is not None and not self._job.done():
            return
        self._settle()
        if time.monotonic() - self._sent_at >= PAUSE_S:
            self._sent_at = time.monotonic()
            self._job = _uploads.submit(self._send, _open_files(folder))

    def finish(self, folder: Path) -> None:
        """Send the run and wait until it is there, with `best/` among the copies for people.

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
                self._objects.upload(f"objects/{digest}", data)
                self._whole.add(digest)
            if self._published.get(name) != digest and (_is_for_people(name) or (publish_best and name[:5] == "best/")):
                copies[name] = data
        number = max(self._lists, default=0) + 1
        value = json.dumps({"writer": self._writer, "files": digests}, indent=1).encode()
        if not self._objects.create(_list_name(number), value):
            raise TrainError(
                f"another process goes on with {self.url}: wait for it, or start a new run without --resume"
            )
        self._lists[number] = set(digests.values())
        self._newest = [*self._newest, number][-_KEPT:]
        for name, data in copies.items():
            self._objects.upload(name, data)
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
        """Make `folder` what the newest whole checkpoint holds, and nothing else; what is there already stays.

        Args:
            folder: of this run alone.
            best_only: bring down just what applying the best epoch takes.

        Returns:
            a line for each newer checkpoint that is damaged.

        Raises:
            CheckpointError: none is whole.
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
        raise CheckpointError(f"no whole checkpoint in {self.url} ({reasons}): start a new run without --resume")

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
            raise TrainError(f"cannot write {folder}: {error.strerror}: free space or mend permissions") from error


def _open_objects(url: str) -> "GcsObjects":
    from cache_schema.storage.gcs import GcsObjects

    return GcsObjects(url, deadline_s=DEADLINE_S, first_delay_s=FIRST_DELAY_S, setting="RUN", again=_AGAIN)


def _read(objects: "GcsObjects", key: str) -> bytes | None:
    found = objects.download(key)
    return found[0] if found else None


def _split_url(url: str) -> tuple[str, str]:
    """The place of a run and its name."""
    parts = url.removeprefix("gs://").rstrip("/").split("/")
    # The parts name local folders too.
    if len(parts) < 2 or any(part in ("", ".", "..") for part in parts):
        raise TrainError(f"RUN={url} names no run: write gs://bucket/prefix/name")
    return "gs://" + "/".join(parts[:-1]), parts[-1]


def _find_numbers(name: str, names: Iterable[str]) -> dict[int, str]:
    matches = (re.fullmatch(re.escape(name) + r"-(\d+)", found) for found in names)
    return {int(match[1]): match[0] for match in matches if match}


def _list_name(number: int) -> str:
    return f"checkpoints/{number:06d}.json"


def _is_for_people(name: str) -> bool:
    return not name.startswith(("best/", "last/"))


def _open_files(folder: Path) -> dict[str, BinaryIO]:
    """The run's files as they are now: checkpoints are replaced by others, never changed; the rest is small."""
    names = {path: path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: io.BytesIO(path.read_bytes()) if _is_for_people(name) else path.open("rb")
        for path, name in names.items()
        if _FILE.fullmatch(name)
    }
