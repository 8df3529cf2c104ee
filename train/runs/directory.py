"""A run's directory: numbered, never overwritten, with a link to the newest; or the local copy of a run in a bucket."""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cache_schema import CacheFormatError, Provenance
from cache_schema.storage.place import is_bucket
from train.config import TrainConfig
from train.errors import TrainError

from .bucket import BucketRun, claim_run, find_numbers, find_run, work_folder

T = TypeVar("T")


class RunDirectory:
    """The files of one run; the README describes them.

    Attributes:
        path: their directory on this machine.
        notes: lines for the user about the download from a bucket.
    """

    def __init__(self, path: Path, remote: BucketRun | None = None, notes: tuple[str, ...] = ()) -> None:
        self.path = path
        self.notes = notes
        self._remote = remote
        self.best = path / "best"
        self.last = path / "last"
        self.history = path / "history.jsonl"

    @classmethod
    def create(cls, link: str) -> "RunDirectory":
        """Create `runs/head-004` for the link `runs/head` and point the link at it; in a bucket, take the next number.

        Raises:
            TrainError: `link` is a directory, not a link, or cannot be written.
            StorageError: the bucket cannot be written.
        """
        if is_bucket(link):
            remote = claim_run(link)
            path = work_folder(remote.url)
            try:
                path.mkdir(parents=True)
            except OSError as error:
                raise TrainError(f"cannot make the working folder {path}: {error.strerror}") from error
            return cls(path, remote)
        base = Path(link)
        if base.exists() and not base.is_symlink():
            raise TrainError(f"{link} is a directory, not a link to the newest run: choose another RUN")
        try:
            base.parent.mkdir(parents=True, exist_ok=True)
            numbers = find_numbers(base.name, os.listdir(base.parent))
            path = base.with_name(f"{base.name}-{max(numbers, default=0) + 1:03d}")
            path.mkdir()
            temporary = base.with_name(base.name + ".tmp")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(path.name)
            temporary.rename(base)
        except OSError as error:
            raise TrainError(f"cannot make a run directory for {link}: {error.strerror}: choose another RUN") from error
        return cls(path)

    @classmethod
    def find(cls, run: str) -> "RunDirectory | None":
        """Open an existing run that has a best epoch; None if there is none."""
        found = find_run(run) if is_bucket(run) else Path(run, "best").is_dir()
        opened = cls.open(run) if found else None
        return opened if opened and opened.best.is_dir() else None

    @classmethod
    def open(cls, run: str) -> "RunDirectory":
        """Open an existing run by its link or name; from a bucket, download its best epoch until this process ends.

        Raises:
            TrainError: there is none, or it is an export.
            StorageError: the bucket cannot be read.
        """
        if is_bucket(run):
            remote = _find_remote(run)
            folder = Path(tempfile.mkdtemp(prefix="tileprobe-run-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            return cls(folder, remote, tuple(remote.fetch(folder, best_only=True)))
        if Path(run, "head.json").is_file():  # its config.json is the backbone's
            raise TrainError(
                f"{run} is an export, which `make predict` alone takes: RUN is the run it was made of, such as "
                "runs/finetune"
            )
        if not Path(run, "config.json").is_file():
            raise _no_run(run)
        return cls(Path(os.path.realpath(run)))

    @classmethod
    def resume(cls, run: str) -> "RunDirectory":
        """Open an existing run to continue it; from a bucket, download it into its working folder.

        Raises:
            TrainError: there is none.
            StorageError: the bucket cannot be read.
        """
        if not is_bucket(run):
            return cls.open(run)
        remote = _find_remote(run)
        path = work_folder(remote.url)
        return cls(path, remote, tuple(remote.fetch(path)))

    def __str__(self) -> str:
        return self._remote.url if self._remote else os.path.relpath(self.path)

    def find_siblings(self) -> list["RunDirectory"]:
        """Find the other runs of the same name in the same folder, newest first."""
        base, _, _ = self.path.name.rpartition("-")
        numbers = find_numbers(base, os.listdir(self.path.parent))
        paths = [self.path.with_name(numbers[number]) for number in sorted(numbers, reverse=True)]
        return [RunDirectory(path) for path in paths if path != self.path]

    @property
    def split_file(self) -> str:
        """Path or URL of its split; a URL can be read on any machine."""
        return f"{self._remote.url}/split.json" if self._remote else str(self.path / "split.json")

    def upload(self) -> None:
        """Send a checkpoint to the bucket in the background; do nothing for a local run."""
        if self._remote:
            self._remote.upload(self.path)

    def finish(self) -> None:
        """Send everything to the bucket and wait for it; do nothing for a local run."""
        if self._remote:
            self._remote.finish(self.path)

    def write_json(self, name: str, value: Any) -> None:
        self._replace(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def _replace(self, name: str, text: str) -> None:
        temporary = self.path / f"{name}.tmp"
        temporary.write_text(text)
        temporary.rename(self.path / name)

    def read_json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, ValueError) as error:
            raise TrainError(f"{self.path / name} cannot be read: {error}") from error

    def read_config(self) -> TrainConfig:
        """Read the settings that the run was started with; TrainError if another release wrote them."""
        return self._read_setting("config", TrainConfig.from_json)

    def read_version(self) -> str:
        """Read the id of the cache version that it was trained on; TrainError if another release wrote it."""
        return self._read_setting("version", str)

    def read_provenance(self) -> Provenance:
        """Read the provenance of the embeddings that it was trained on; TrainError if another release wrote it."""
        return self._read_setting("provenance", Provenance.from_json)

    def _read_setting(self, name: str, parse: Callable[[Any], T]) -> T:
        try:
            return parse(self.read_json("config.json")[name])
        except (KeyError, TypeError, CacheFormatError) as error:
            raise TrainError(f"{self}/config.json is not of this release: {error}") from error

    def append_history(self, line: dict[str, Any]) -> None:
        _append_line(self.history, line)

    def append_timing(self, line: dict[str, Any]) -> None:
        """Write durations to another file, so that the history of a resumed run equals that of an undisturbed one."""
        _append_line(self.path / "timings.jsonl", line)

    def read_timings(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "timings.jsonl").read_text().splitlines()]

    def read_history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.history.read_text().splitlines()] if self.history.exists() else []

    def cut_history(self, epochs: int) -> None:
        """Keep the first `epochs` lines: a resumed run writes the others again."""
        # The unfinished line of a stopped run is not JSON; it comes after the first `epochs` lines.
        kept = self.history.read_text().splitlines(keepends=True)[:epochs] if self.history.exists() else []
        self._replace(self.history.name, "".join(kept))


def _append_line(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def _find_remote(run: str) -> BucketRun:
    remote = find_run(run)
    if remote is None:
        raise _no_run(run)
    return remote


def _no_run(run: str) -> TrainError:
    return TrainError(f"no run at {run}: train one first (`make train-head`), or check RUN")
