"""`predict`: what a model says of each tile, as CSV, JSON lines or GeoJSON, written row by row while it is computed."""

import csv
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

import numpy as np
import torch.distributed as dist

from cache_schema import Status
from extract.distributed import Ranks, join_ranks
from extract.inputs import Described, Inputs, Scene
from extract.stop import Stopped, stop_on_signals
from extract.summary import Timing, advise, describe_speed, show_first, show_name

from .augment import Views
from .errors import TrainError
from .infer import Scored, Target, Task, describe_views, score
from .trained import TrainedModel, open_model

DEFAULT_OUT = "predictions.csv"
_BOUNDS = ("left", "top", "right", "bottom")
_MAX_NAMED = 10


def run_prediction(
    run: str, target: Target, out: str, *, tta: Views, device: str, workers: int | None, as_json: bool = False
) -> None:
    """Write probabilities and decisions for every tile, and the thresholds used beside them.

    Args:
        run: a run's directory, link or `gs://` address, or an export's directory.
        target: what to run on.
        out: `.csv`, `.jsonl` or `.geojson`; it and its thresholds are there whole, or not at all.
        tta: `d4` averages each tile's logits over its eight symmetries.
        device, workers: as in training.
        as_json: print the summary as one JSON object, and nothing else on stdout.

    Raises:
        TileprobeError: whatever a user can mend, the outcome that no tile could be read among it; nothing is left.
        Stopped: SIGTERM or SIGINT came; nothing is left.
    """
    started = time.perf_counter()
    path = _check_out(out)
    with stop_on_signals(), join_ranks(device) as ranks, _tell_of_stop(ranks):
        model = ranks.run_on_main(lambda: open_model(run))
        task = Task.plan(model, target, ranks, labels=False, tta=tta)
        ranks.run_on_main(lambda: _prepare(task.inputs, path))
        for note in task.inputs.notes if ranks.is_main else ():
            print(note, file=sys.stderr if as_json else sys.stdout, flush=True)
        timing = Timing()
        summary = _predict(task, path, ranks, timing, tta=tta, workers=workers)
        timings: list[Timing] = [timing] * ranks.world_size
        dist.all_gather_object(timings, timing)
        if ranks.is_main:
            assert summary is not None
            elapsed = time.perf_counter() - started
            lines = summary.describe(model.meta.class_names)
            if task.version is None:
                lines += _describe_time(timings, ranks, workers, elapsed)
            figures = summary.collect(model.meta.class_names, timings, elapsed)
            print(json.dumps(figures, ensure_ascii=False) if as_json else "\n".join([*lines, *describe_views(tta)]))


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
    if path.suffix not in _FORMATS:
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
        first = next(part.describe(rings=_FORMATS[out.suffix].rings))
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
        rows = _FORMATS[summary.out.suffix](stream, _Table(names, tta, windows))
    described = task.inputs.describe(rings=rows.rings)
    for part in parts:
        begun = time.perf_counter()
        probs, preds = decisions.calibrate(part.logits), decisions.decide(part.logits)
        with _explain_refusal(summary.out):
            for status, p, decided in zip(part.status.tolist(), probs, preds, strict=True):
                rows.write(_make_record(next(described), Status(status), p, decided, names))
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


class _Record(NamedTuple):
    """A row; `probs` in every digit of a float32, so that comparing with thresholds gives the decisions."""

    described: Described
    status: Status
    probs: list[str]
    decided: list[str]

    @property
    def bounds(self) -> dict[str, int]:
        """The window's first and last-but-one pixels' edges in its raster; nothing for a tile."""
        window = self.described.window
        if window is None:
            return {}
        edges = (window.left, window.top, window.left + window.width, window.top + window.height)
        return dict(zip(_BOUNDS, edges, strict=True))


def _make_record(described: Described, status: Status, probs: Any, preds: Any, names: tuple[str, ...]) -> _Record:
    cells = ["" if math.isnan(p) else f"{p:.9g}" for p in probs.tolist()]
    return _Record(described, status, cells, [names[c] for c in np.flatnonzero(preds)])


@dataclass(frozen=True)
class _Table:
    """What all rows have in common: class names, views, and whether there are windows among them."""

    names: tuple[str, ...]
    tta: Views
    windows: bool

    @property
    def used(self) -> dict[str, str]:
        return {} if self.tta == "one" else {"tta": self.tta}


class _Format(Protocol):
    rings: bool
    """Whether it wants the outline of windows."""

    def __init__(self, stream: TextIO, table: _Table) -> None:
        """Write what comes first."""

    def write(self, record: _Record) -> None:
        """Write a row."""

    def end(self) -> None:
        """Write what comes last."""


class _Csv:
    """A row per tile: name, status, decided classes, then the calibrated probability of every class.

    Before the classes come a column `tta` if several views were averaged, and the edges of windows if there are any.
    """

    rings = False

    def __init__(self, stream: TextIO, table: _Table) -> None:
        self._writer, self._table = csv.writer(stream), table
        self._bounds = _BOUNDS if table.windows else ()
        self._writer.writerow(["tile", "status", "preds", *table.used, *self._bounds, *table.names])

    def write(self, record: _Record) -> None:
        start = [record.described.tile, record.status.name.lower(), ";".join(record.decided)]
        bounds = [record.bounds.get(name, "") for name in self._bounds]
        self._writer.writerow([*start, *self._table.used.values(), *bounds, *record.probs])

    def end(self) -> None:
        pass


class _JsonLines:
    """An object per tile: tile, status, preds (names), probs (by name), and of a window its edges and outline."""

    rings = True

    def __init__(self, stream: TextIO, table: _Table) -> None:
        self._stream, self._table = stream, table

    def write(self, record: _Record) -> None:
        value = {**_begin_object(record, self._table), "probs": _read_probs(record, self._table)}
        if record.described.window is not None:
            value |= {"window": record.bounds, "ring": record.described.ring}
        self._stream.write(_dump(value) + "\n")

    def end(self) -> None:
        pass


class _GeoJson:
    """RFC 7946: a polygon per window, with the columns of the CSV as its properties."""

    rings = True

    def __init__(self, stream: TextIO, table: _Table) -> None:
        taken = {"tile", "status", "reason", "preds", "tta", *_BOUNDS} & set(table.names)
        if taken:
            raise TrainError(f"a class is called {min(taken)!r}, as a property of GeoJSON is: write .jsonl instead")
        self._stream, self._table, self._rows = stream, table, 0
        stream.write('{"type": "FeatureCollection", "features": [')

    def write(self, record: _Record) -> None:
        probs = _read_probs(record, self._table) or dict.fromkeys(self._table.names)
        feature = {
            "type": "Feature",
            "id": record.described.tile,
            "geometry": {"type": "Polygon", "coordinates": [record.described.ring]},
            "properties": {**_begin_object(record, self._table), **record.bounds, **probs},
        }
        self._stream.write(("," if self._rows else "") + "\n" + _dump(feature))
        self._rows += 1

    def end(self) -> None:
        self._stream.write("\n]}\n")


def _begin_object(record: _Record, table: _Table) -> dict[str, Any]:
    read = record.status == Status.EMBEDDED
    return {
        "tile": record.described.tile,
        "status": record.status.name.lower(),
        **({} if read else {"reason": record.status.reason}),
        "preds": record.decided if read else None,
        **table.used,
    }


def _read_probs(record: _Record, table: _Table) -> dict[str, float] | None:
    if record.status != Status.EMBEDDED:
        return None
    return {name: float(cell) for name, cell in zip(table.names, record.probs, strict=True)}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


_FORMATS: dict[str, type[_Format]] = {".csv": _Csv, ".jsonl": _JsonLines, ".geojson": _GeoJson}
