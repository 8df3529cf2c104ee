"""`predict`: what a model says of each tile, written row by row while it is computed."""

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
from .output import FORMATS, Table, make_record
from .target import DEFAULT_OUT, Target
from .trained_model import TrainedModel, open_model

_MAX_NAMED = 10


def run_prediction(
    run: str, target: Target, out: str, *, tta: Views, device: str, workers: int | None
) -> dict[str, Any] | None:
    """Write probabilities and decisions for every tile, and the thresholds used beside them.

    Args:
        run: a run's directory, link or `gs://` address, or an export's directory.
        target: what to run on.
        out: `.csv`, `.jsonl` or `.geojson`; it and its thresholds are there whole, or not at all.
        tta: `d4` averages each tile's logits over its eight symmetries.
        device, workers: as in training.

    Returns:
        on the main rank the summary for a program.

    Raises:
        TileprobeError: whatever a user can mend, the outcome that no tile could be read among it; nothing is left.
        Stopped: SIGTERM or SIGINT came; nothing is left.
    """
    started = time.perf_counter()
    path = _check_out(out)
    asked = Asked.of("train predict", target, run=run, out=out, tta=tta)
    with stop_on_signals(), join_ranks(device, asked) as ranks, _tell_of_stop(ranks):
        model = ranks.run_on_main(lambda: open_model(run))
        task = Task.plan(model, target, ranks, labels=False, tta=tta)
        ranks.run_on_main(lambda: _prepare(task.inputs, path))
        for note in task.inputs.notes if ranks.is_main else ():
            print(note, flush=True)
        timing = Timing()
        summary = _predict(task, path, ranks, timing, tta=tta, workers=workers)
        timings: list[Timing] = [timing] * ranks.world_size
        dist.all_gather_object(timings, timing)
        if summary is None:
            return None
        elapsed = time.perf_counter() - started
        lines = summary.describe(model.meta.class_names)
        if task.version is None:
            lines += _describe_time(timings, ranks, workers, elapsed)
        print("\n".join([*lines, *describe_views(tta)]))
        return summary.collect(model.meta.class_names, timings, elapsed)


@contextmanager
def _tell_of_stop(ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except Stopped as stop:
        if ranks.is_main:
            print(f"stopped by {stop}: nothing is written", file=sys.stderr, flush=True)
        raise


def _check_out(out: str) -> Path:
    path = Path(DEFAULT_OUT if out == "-" else out)
    if "://" in out:
        raise TrainError(f"--out {out}: predictions are a local file, to be copied to a bucket afterwards")
    if path.suffix not in FORMATS:
        raise TrainError(f"--out {out}: its suffix chooses the format: .csv, .jsonl or .geojson")
    return path


def _prepare(inputs: Inputs, out: Path) -> None:
    """Find out before an hour is spent that what was asked for cannot be written.

    Raises:
        TrainError: GeoJSON of what has no place on the Earth; `out` cannot be written.
        RasterError: coordinates that cannot be turned into longitude and latitude.
    """
    remedy = f"write .csv or .jsonl instead of {out.name}"
    for part in inputs.parts:
        first = next(part.describe(rings=FORMATS[out.suffix].rings))
        if out.suffix == ".geojson" and first.window is None:
            tile = show_name(first.tile)
            raise TrainError(f"{tile} is a tile, which has no outline: cut GeoTIFFs with --window PIXELS, or {remedy}")
        if out.suffix == ".geojson" and first.ring is None:
            raise TrainError(f"{show_name(first.tile)} is of a raster without coordinate reference system: {remedy}")
    with _explain_refusal(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _temporary(out).touch()
        _temporary(out).unlink()


@dataclass
class Summary:
    """What was written.

    Attributes:
        out, thresholds: the files.
        tiles: rows.
        unreadable: of them, by reason.
        positives: (C,) decisions for each class.
        problems: the first few lines about unreadable tiles.
    """

    out: Path
    thresholds: Path
    tiles: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    positives: Any = 0
    problems: list[str] = field(default_factory=list)

    def note(self, part: Scored, preds: Any) -> None:
        self.tiles += len(part.status)
        self.unreadable.update(Status(code).reason for code in part.status[part.status != Status.EMBEDDED])
        self.positives = self.positives + preds.sum(axis=0)
        self.problems += part.problems[: _MAX_NAMED - len(self.problems)]

    def describe(self, names: tuple[str, ...]) -> list[str]:
        """Lines for the user."""
        skipped = self.unreadable.total()
        lines = [f"{self.tiles:,} tiles -> {self.out} (probabilities and decisions; thresholds in {self.thresholds})"]
        if skipped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.unreadable.items())
            lines[0] += f"; {skipped:,} of them could not be read, see column status: {reasons}"
            lines += [f"  {show_name(problem)}" for problem in self.problems]
        order = np.argsort(-self.positives, kind="stable")
        found = [f"{names[c]} {self.positives[c]:,}" for c in order.tolist() if self.positives[c]]
        lines.append(f"decided for: {show_first(found, limit=_MAX_NAMED) or 'no class of any tile'}")
        return lines

    def collect(self, names: tuple[str, ...], timings: list[Timing], elapsed: float) -> dict[str, Any]:
        """The same for a program."""
        seconds = max(timing.wall_s for timing in timings)
        return {
            "tiles": self.tiles,
            "unreadable": self.unreadable.total(),
            "reasons": dict(self.unreadable),
            "tiles_per_s": round(self.tiles / seconds, 1) if seconds else None,
            "seconds": round(elapsed, 3),
            "out": str(self.out),
            "thresholds": str(self.thresholds),
            "positives": dict(zip(names, self.positives.tolist(), strict=True)),
        }


def _describe_time(timings: list[Timing], ranks: Ranks, workers: int | None, elapsed: float) -> list[str]:
    on_cpu = ranks.device.type == "cpu"
    return [
        describe_speed(timings, elapsed),
        advise(timings, ranks.choose_workers(workers), ranks.cores, on_cpu=on_cpu, written="--out"),
    ]


def _predict(task: Task, out: Path, ranks: Ranks, timing: Timing, *, tta: Views, workers: int | None) -> Summary | None:
    """Compute and write, on rank 0; on the others compute."""
    parts = score(task, ranks, timing, workers=workers, tta=tta)
    if not ranks.is_main:
        for _ in parts:  # all of them go to rank 0
            pass
        return None
    summary = Summary(out, out.with_name(f"{out.stem}-thresholds.csv"))
    with _write_whole(summary.thresholds) as limits, _write_whole(out) as stream:
        _write_thresholds(limits, task.model)
        _write_rows(stream, task, parts, summary, timing, tta)
        if summary.tiles == summary.unreadable.total():
            raise TrainError(_describe_nothing(summary))
    return summary


def _write_rows(
    stream: TextIO, task: Task, parts: Iterator[Scored], summary: Summary, timing: Timing, tta: Views
) -> None:
    decisions, names = task.model.decisions, task.model.meta.class_names
    windows = any(isinstance(part, Scene) for part in task.inputs.parts)
    with _explain_refusal(summary.out):
        rows = FORMATS[summary.out.suffix](stream, Table(names, tta, windows))
    described = task.inputs.describe(rings=rows.rings)
    for part in parts:
        begun = time.perf_counter()
        probs, preds = decisions.calibrate(part.logits), decisions.decide(part.logits)
        with _explain_refusal(summary.out):
            for status, p, decided in zip(part.status.tolist(), probs, preds, strict=True):
                rows.write(make_record(next(described), Status(status), p, decided, names))
        summary.note(part, preds)
        timing.write_s += time.perf_counter() - begun
    with _explain_refusal(summary.out):
        rows.end()


def _describe_nothing(summary: Summary) -> str:
    ((reason, _),) = summary.unreadable.most_common(1)
    first = show_name(summary.problems[0].replace(": quarantined: ", " ")) if summary.problems else reason
    return f"none of {summary.tiles:,} tiles could be read, so nothing is written ({first}): check what was named"


@contextmanager
def _write_whole(path: Path) -> Iterator[TextIO]:
    """A temporary file that takes the place of `path` at the end, and goes if it does not come to that."""
    temporary = _temporary(path)
    with _explain_refusal(path):
        stream = temporary.open("w", newline="", encoding="utf-8")
    try:
        yield stream
        with _explain_refusal(path):
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
def _explain_refusal(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainError(f"cannot write {path}: {error.strerror}: make room or choose another --out") from error


def _write_thresholds(stream: TextIO, model: TrainedModel) -> None:
    writer = csv.writer(stream)
    writer.writerow(["class_id", "class", "threshold"])
    limits = [f"{threshold:.9g}" for threshold in model.decisions.thresholds.tolist()]
    writer.writerows(zip(model.meta.class_ids, model.meta.class_names, limits, strict=True))
