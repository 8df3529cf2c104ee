"""`python -m train predict`: write a model's probabilities and decisions for each tile as they are computed."""

import csv
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch.distributed as dist

from cache_schema import Status
from cache_schema.cli.text import show_first, show_name
from extract.ranks.group import Ranks, join_ranks
from extract.ranks.same_job import Asked
from extract.ranks.signals import Stopped, stop_on_signals
from extract.timing import Timing, advise, describe_speed
from train.errors import TrainError
from train.model.augment import Views

from .inference import Scored, Task, describe_views, score
from .inputs import Inputs, Scene
from .output import FORMATS
from .target import DEFAULT_OUT, Target
from .trained_model import TrainedModel, open_model

_MAX_NAMED = 10


def run_prediction(
    run: str, target: Target, out: str, *, tta: Views, device: str, workers: int | None
) -> dict[str, Any] | None:
    """Write probabilities and decisions for every tile to `out`, and the thresholds to a file next to it.

    Both files are written completely or not at all.

    Args:
        run: a run's directory, link or `gs://` URL, or an export's directory.
        out: a `.csv`, `.jsonl` or `.geojson` file.
        tta: `d4` averages each tile's logits over its eight symmetries.

    Returns:
        on the main rank the summary as JSON values; None on other ranks.

    Raises:
        TileprobeError: something the user can fix, including that no tile was readable.
        Stopped: SIGTERM or SIGINT came.
    """
    started = time.perf_counter()
    path = _check_out(out)
    asked = Asked.of("train predict", target, run=run, out=out, tta=tta)
    with stop_on_signals(), join_ranks(device, asked) as ranks, _report_stop(ranks):
        model = ranks.run_on_main(lambda: open_model(run))
        task = Task.plan(model, target, ranks, labels=False, tta=tta)
        ranks.run_on_main(lambda: _prepare(task.inputs, path))
        for note in task.inputs.notes if ranks.is_main else ():
            print(note, flush=True)
        timing = Timing()
        summary = _predict(task, path, ranks, timing, workers)
        timings: list[Timing] = [timing] * ranks.world_size
        dist.all_gather_object(timings, timing)
        if summary is None:
            return None
        elapsed = time.perf_counter() - started
        lines = summary.describe()
        if task.version is None:
            on_cpu, count = ranks.device.type == "cpu", ranks.choose_workers(workers)
            lines.append(describe_speed(timings, elapsed))
            lines.append(advise(timings, count, ranks.cores, on_cpu=on_cpu, written="--out"))
        print("\n".join([*lines, *describe_views(tta)]))
        return summary.collect(timings, elapsed)


@contextmanager
def _report_stop(ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except Stopped as stop:
        if ranks.is_main:
            print(f"stopped by {stop}: nothing is written", file=sys.stderr, flush=True)
        raise


def _check_out(out: str) -> Path:
    path = Path(DEFAULT_OUT if out == "-" else out)
    if "://" in out:
        raise TrainError(f"--out {out}: predictions must be a local file; copy it to a bucket afterwards")
    if path.suffix not in FORMATS:
        raise TrainError(f"--out {out}: the suffix must be .csv, .jsonl or .geojson")
    return path


def _prepare(inputs: Inputs, out: Path) -> None:
    """Check before any work that `out` can be written in its format.

    Raises:
        TrainError: GeoJSON is asked for inputs without geographic coordinates, or `out` cannot be written.
        RasterError: coordinates cannot be converted to longitude and latitude.
    """
    remedy = f"write .csv or .jsonl instead of {out.name}"
    for part in inputs.parts:
        first = next(part.describe(rings=FORMATS[out.suffix].rings))
        if out.suffix == ".geojson" and first.window is None:
            tile = show_name(first.tile)
            raise TrainError(f"{tile} is a tile, which has no outline: cut GeoTIFFs with --window PIXELS, or {remedy}")
        if out.suffix == ".geojson" and first.ring is None:
            raise TrainError(f"{show_name(first.tile)} is of a raster without coordinate reference system: {remedy}")
    with _explain_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _temporary(out).touch()
        _temporary(out).unlink()


@dataclass
class Summary:
    """What was written.

    Attributes:
        out, thresholds: the files.
        unreadable: number of rows without a prediction, by reason.
        positives: (C,) positive decisions per class.
        problems: the first few lines about unreadable tiles.
    """

    out: Path
    thresholds: Path
    names: tuple[str, ...]
    tiles: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    positives: Any = 0
    problems: list[str] = field(default_factory=list)

    def add(self, part: Scored, preds: Any) -> None:
        self.tiles += len(part.status)
        self.unreadable.update(Status(code).reason for code in part.status[part.status != Status.EMBEDDED])
        self.positives = self.positives + preds.sum(axis=0)
        self.problems += part.problems[: _MAX_NAMED - len(self.problems)]

    def describe(self) -> list[str]:
        """Return lines for the user."""
        skipped = self.unreadable.total()
        lines = [f"{self.tiles:,} tiles -> {self.out} (probabilities and decisions; thresholds in {self.thresholds})"]
        if skipped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.unreadable.items())
            lines[0] += f"; {skipped:,} of them could not be read, see column status: {reasons}"
            lines += [f"  {show_name(problem)}" for problem in self.problems]
        order = np.argsort(-self.positives, kind="stable")
        found = [f"{self.names[c]} {self.positives[c]:,}" for c in order.tolist() if self.positives[c]]
        lines.append(f"positive: {show_first(found, limit=_MAX_NAMED) or 'no class on any tile'}")
        return lines

    def collect(self, timings: list[Timing], elapsed: float) -> dict[str, Any]:
        """Return the summary as JSON values."""
        seconds = max(timing.wall_s for timing in timings)
        return {
            "tiles": self.tiles,
            "unreadable": self.unreadable.total(),
            "reasons": dict(self.unreadable),
            "tiles_per_s": round(self.tiles / seconds, 1) if seconds else None,
            "seconds": round(elapsed, 3),
            "out": str(self.out),
            "thresholds": str(self.thresholds),
            "positives": dict(zip(self.names, self.positives.tolist(), strict=True)),
        }


def _predict(task: Task, out: Path, ranks: Ranks, timing: Timing, workers: int | None) -> Summary | None:
    """Compute on all ranks, and write on rank 0."""
    parts = score(task, ranks, timing, workers=workers)
    if not ranks.is_main:
        for _ in parts:  # yields nothing: all parts go to rank 0
            pass
        return None
    summary = Summary(out, out.with_name(f"{out.stem}-thresholds.csv"), task.model.meta.class_names)
    with _write_atomically(summary.thresholds) as limits, _write_atomically(out) as stream:
        _write_thresholds(limits, task.model)
        _write_rows(stream, task, parts, summary, timing)
        if summary.tiles == summary.unreadable.total():
            ((reason, _),) = summary.unreadable.most_common(1)
            first = show_name(summary.problems[0].replace(": quarantined: ", " ")) if summary.problems else reason
            raise TrainError(
                f"none of {summary.tiles:,} tiles could be read, so nothing is written ({first}): check the inputs"
            )
    return summary


def _write_rows(stream: TextIO, task: Task, parts: Iterator[Scored], summary: Summary, timing: Timing) -> None:
    decisions = task.model.decisions
    windows = any(isinstance(part, Scene) for part in task.inputs.parts)
    rows = FORMATS[summary.out.suffix](stream, summary.names, task.tta, windows)
    with _explain_errors(summary.out):
        rows.begin()
    described = task.inputs.describe(rings=rows.rings)
    for part in parts:
        begun = time.perf_counter()
        probs, preds = decisions.calibrate(part.logits), decisions.decide(part.logits)
        with _explain_errors(summary.out):
            for status, p, decided in zip(part.status.tolist(), probs, preds, strict=True):
                rows.write(next(described), Status(status), p, decided)
        summary.add(part, preds)
        timing.write_s += time.perf_counter() - begun
    with _explain_errors(summary.out):
        rows.end()


@contextmanager
def _write_atomically(path: Path) -> Iterator[TextIO]:
    """Provide a temporary file that is renamed to `path` on success, and removed on failure."""
    temporary = _temporary(path)
    with _explain_errors(path):
        stream = temporary.open("w", newline="", encoding="utf-8")
    try:
        yield stream
        with _explain_errors(path):
            stream.flush()
            os.fsync(stream.fileno())
            temporary.rename(path)
    finally:
        with suppress(OSError):  # a full disk
            stream.close()
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")


@contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainError(f"cannot write {path}: {error.strerror}: make room or choose another --out") from error


def _write_thresholds(stream: TextIO, model: TrainedModel) -> None:
    writer = csv.writer(stream)
    writer.writerow(["class_id", "class", "threshold"])
    limits = [f"{threshold:.9g}" for threshold in model.decisions.thresholds.tolist()]
    writer.writerows(zip(model.meta.class_ids, model.meta.class_names, limits, strict=True))
