"""A run's directory: numbered, never overwritten, and a link to the newest."""

import json
import os
import re
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .errors import TrainError


class RunDirectory:
    """The files one run leaves; see the README for what each holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "best"
        self.last = path / "last"
        self.history = path / "history.jsonl"

    @classmethod
    def create(cls, link: str) -> "RunDirectory":
        """Make `runs/head-004` for the link `runs/head` and point the link at it.

        Raises:
            TrainError: `link` is a directory, not a link, or nothing can be written there.
        """
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
    def open(cls, run: str) -> "RunDirectory":
        """An existing run, by its link or its own name.

        Raises:
            TrainError: there is none.
        """
        if not Path(run, "config.json").is_file():
            raise TrainError(f"no run at {run}: train one first (`make train-head`), or check RUN")
        return cls(Path(os.path.realpath(run)))

    def __str__(self) -> str:
        return os.path.relpath(self.path)

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


def _numbered(base: str, name: str) -> re.Match[str] | None:
    return re.fullmatch(re.escape(base) + r"-(\d+)", name)
