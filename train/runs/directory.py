"""A run's directory: numbered, never overwritten, and a link to the newest; or its working copy of one in a bucket."""

import atexit
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cache_schema import CacheFormatError, Provenance
from train.config import TrainConfig
from train.errors import TrainError

from .bucket import BucketRun, claim_run, find_run, is_bucket, work_folder


class RunDirectory:
    """The files one run leaves; see the README for what each holds.

    Attributes:
        path: where they lie on this machine.
        notes: lines for the user about what came down from the bucket.
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
        """Make `runs/head-004` for the link `runs/head` and point the link at it; in a bucket, take that number.

        Raises:
            TrainError: `link` is a directory, not a link, or nothing can be written there.
            StorageError: the bucket refuses.
        """
        if is_bucket(link):
            return cls._create_working_copy(claim_run(link))
        base = Path(link)
        if base.exists() and not base.is_symlink():
            raise TrainError(f"{link} is a directory, not a link to the newest run: choose another RUN")
        try:
            base.parent.mkdir(parents=True, exist_ok=True)
            numbers = [int(match[1]) for path in base.parent.iterdir() if (match := _numbered(base.name, path.name))]
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
    def _create_working_copy(cls, remote: BucketRun) -> "RunDirectory":
        path = work_folder(remote.url)
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise TrainError(f"cannot make the working folder {path}: {error.strerror}") from error
        return cls(path, remote)

    @classmethod
    def find(cls, run: str) -> "RunDirectory | None":
        """An existing run with a best epoch, None if there is none."""
        found = find_run(run) if is_bucket(run) else Path(run, "best").is_dir()
        opened = cls.open(run) if found else None
        return opened if opened and opened.best.is_dir() else None

    @classmethod
    def open(cls, run: str) -> "RunDirectory":
        """An existing run, by its link or its own name; of one in a bucket, its best epoch until this process ends.

        Raises:
            TrainError: there is none, or an export lies there.
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
        """An existing run to go on with; the working folder of one in a bucket becomes what the bucket holds.

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
        """The other runs of the same name beside it on this machine, newest first."""
        base, _, _ = self.path.name.rpartition("-")
        numbers = {int(match[1]): path for path in self.path.parent.iterdir() if (match := _numbered(base, path.name))}
        return [
            RunDirectory(numbers[number]) for number in sorted(numbers, reverse=True) if numbers[number] != self.path
        ]

    @property
    def split_file(self) -> str:
        """Where its split can be read from, on any machine if it is in a bucket."""
        return f"{self._remote.url}/split.json" if self._remote else str(self.path / "split.json")

    def upload(self) -> None:
        """Send a checkpoint to the bucket in the background; nothing to do for a local run."""
        if self._remote:
            self._remote.upload(self.path)

    def finish(self) -> None:
        """Send everything to the bucket and wait for it; nothing to do for a local run."""
        if self._remote:
            self._remote.finish(self.path)

    def write_json(self, name: str, value: Any) -> None:
        temporary = self.path / f"{name}.tmp"
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        temporary.rename(self.path / name)

    def read_json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, ValueError) as error:
            raise TrainError(f"{self.path / name} cannot be read: {error}") from error

    def read_config(self) -> TrainConfig:
        """The settings the run was started with.

        Raises:
            TrainError: they cannot be read, or are another release's.
        """
        try:
            return TrainConfig.from_json(self.read_json("config.json")["config"])
        except (KeyError, TypeError) as error:
            raise TrainError(f"{self}/config.json is not of this release: {error}") from error

    def read_version(self) -> str:
        """Id of the cache version it was trained on.

        Raises:
            TrainError: it cannot be read, or is another release's.
        """
        try:
            return str(self.read_json("config.json")["version"])
        except (KeyError, TypeError) as error:
            raise TrainError(f"{self}/config.json is not of this release: {error}") from error

    def read_provenance(self) -> Provenance:
        """What the embeddings it was trained on depend on.

        Raises:
            TrainError: it cannot be read, or is another release's.
        """
        try:
            return Provenance.from_json(self.read_json("config.json")["provenance"])
        except (KeyError, TypeError, CacheFormatError) as error:
            raise TrainError(f"{self}/config.json is not of this release: {error}") from error

    def append_history(self, line: dict[str, Any]) -> None:
        with self.history.open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def append_timing(self, line: dict[str, Any]) -> None:
        """Seconds go to a file of their own, so that the history of a resumed run equals an undisturbed one's."""
        with (self.path / "timings.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def read_timings(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "timings.jsonl").read_text().splitlines()]

    def read_history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.history.read_text().splitlines()] if self.history.exists() else []

    def cut_history(self, epochs: int) -> None:
        """Keep the first `epochs` lines: a resumed run writes the others anew."""
        # A line that a stopped run left unfinished is not JSON; it is not among the first `epochs`.
        kept = self.history.read_text().splitlines(keepends=True)[:epochs] if self.history.exists() else []
        temporary = self.history.with_name("history.jsonl.tmp")
        temporary.write_text("".join(kept))
        temporary.rename(self.history)


def _find_remote(run: str) -> BucketRun:
    remote = find_run(run)
    if remote is None:
        raise _no_run(run)
    return remote


def _no_run(run: str) -> TrainError:
    return TrainError(f"no run at {run}: train one first (`make train-head`), or check RUN")


def _numbered(base: str, name: str) -> re.Match[str] | None:
    return re.fullmatch(re.escape(base) + r"-(\d+)", name)
