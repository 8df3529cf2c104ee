"""Run `make demo`: the three targets on the demo bucket, then one table that compares their cost and their figures.

All figures are of the bucket's test part, whose scenes were used for neither training nor selection.
"""

import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cache_schema import Status, open_cache
from cache_schema.cli.settings import isolate
from cache_schema.layout import BoolArray
from extract.backbone.embed import TileEmbedder
from extract.backbone.provenance import find_cached_checkpoint
from extract.config import DEMO_ROOT
from extract.ranks.group import Ranks, join_ranks
from extract.ranks.signals import run_child
from extract.tiles.decode import decode_tile
from extract.tiles.feed import TileFeed
from extract.tiles.source import open_source
from train.data.labels import LabelledRows
from train.data.sets import Sets, read_sets
from train.data.streaming import request_batches
from train.loop.assemble import make_head, make_meta
from train.loop.finetune import TileStream
from train.loop.trainer import Trainer
from train.loop.validation import ValidationSet
from train.metrics.figures import FIGURES, KEY_FIGURES
from train.metrics.intervals import bootstrap_difference, bootstrap_intervals
from train.metrics.scores import compute_metrics
from train.metrics.side_by_side import format_estimate, format_interval, format_table
from train.model.classifier import Classifier
from train.predict.inference import FloatArray, infer
from train.predict.target import Target
from train.predict.trained_model import LoadedRun
from train.runs.directory import RunDirectory

from .config import TrainConfig
from .errors import TrainError
from .report import draw_tiles

TRAIN_CACHE, TEST_CACHE = str(DEMO_ROOT / "train"), str(DEMO_ROOT / "test")
RUNS = Path("runs/demo")
EPOCHS = 50
_SHOWN_TILES = 12


@dataclass(frozen=True)
class Step:
    """A finished command: its seconds, including the start of the process, and the lines it printed."""

    seconds: float
    output: list[str]


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the table: (n, C) probabilities of the test rows, and times in seconds, None if not applicable."""

    name: str
    probs: FloatArray
    setup_s: float | None
    epoch_s: float | None
    all_epochs: str


def run_demo(tiles: str, *, finetune_options: tuple[str, ...]) -> None:
    """Run every step on the bucket at `tiles`, which ends in a slash, and print the comparison.

    Raises:
        TrainError: a step failed; its own message says why.
    """
    for cache in (TRAIN_CACHE, TEST_CACHE):
        shutil.rmtree(cache, ignore_errors=True)  # so that the extraction is timed from the start
    extract = ["-m", "extract", "run", "--backbone", "demo"]
    extracted = _run_step([*extract, "--tiles", f"{tiles}train", "--cache", TRAIN_CACHE])
    _run_step([*extract, "--tiles", f"{tiles}test", "--cache", TEST_CACHE])
    again = _run_step([*extract, "--tiles", f"{tiles}train", "--cache", TRAIN_CACHE])
    train = ["--cache", TRAIN_CACHE, "--test-cache", TEST_CACHE]
    head = _run_step(["-m", "train", "head", "--run-dir", str(RUNS / "head"), "--epochs", str(EPOCHS), *train])
    finetune = ["-m", "train", "finetune", "--run-dir", str(RUNS / "finetune"), "--unfreeze", "3"]
    _run_step([*finetune, *finetune_options, *train])
    with join_ranks() as ranks:
        print(_compare(extracted, again, head, ranks))


def _run_step(arguments: list[str]) -> Step:
    """Run one command as the Makefile does, and print its output as it comes."""
    print(f"\n$ python {shlex.join(arguments)}", flush=True)
    started = time.perf_counter()
    command = [sys.executable, "-m", "extract.launch", "--standalone", *arguments]
    output = []
    with run_child(command, stdout=subprocess.PIPE, env=isolate(os.environ)) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            output.append(line.rstrip())
    if process.returncode:
        raise TrainError(f"`{shlex.join(arguments)}` ended with status {process.returncode}: see its message above")
    return Step(time.perf_counter() - started, output)


def _compare(extracted: Step, again: Step, head: Step, ranks: Ranks) -> str:
    head_run, tuned_run = RunDirectory.open(str(RUNS / "head")), RunDirectory.open(str(RUNS / "finetune"))
    sets = read_sets(head_run.read_config(), ranks)
    if sets.test is None:
        raise TrainError("the demo's head was trained without its test set: run `make demo` again")
    counted = ~sets.test.rows.empty
    rows = sets.test.rows.select(counted)
    frequency = np.broadcast_to(sets.train.rows.labels.mean(axis=0, dtype=np.float32), rows.labels.shape)
    head_probs, tuned_probs = (_predict(str(RUNS / name), rows, ranks) for name in ("head", "finetune"))
    streamed_s = _time_streamed_epoch(head_run.read_config(), sets, ranks)
    head_s, tuned_s = (
        statistics.median(line["train_s"] for line in run.read_timings()) for run in (head_run, tuned_run)
    )
    table = [
        Row("label frequency", np.asarray(frequency), None, None, "-"),
        Row("frozen, streamed", head_probs, 0.0, streamed_s, f"{_seconds(EPOCHS * streamed_s)} (50 x the epoch)"),
        Row(
            "frozen, cached",
            head_probs,
            extracted.seconds,
            head_s,
            f"{_seconds(extracted.seconds + head.seconds)} (run)",
        ),
        Row(
            "last 3 layers",
            tuned_probs,
            extracted.seconds + head.seconds,
            tuned_s,
            f"{_seconds(EPOCHS * tuned_s)} (50 x the epoch; {len(tuned_run.read_timings())} run)",
        ),
    ]
    picture = RUNS / "tiles.png"
    _draw_validation_tiles(sets, picture, ranks)
    zero = next((line for line in again.output if line.startswith("0 to do")), "the second extraction was not skipped")
    return "\n".join(
        [
            "",
            f"test: {len(rows)} tiles of {len(set(rows.scenes.tolist()))} held-out scenes, unused for training and "
            "selection",
            "figures [95 % intervals, bootstrap over scenes]",
            "",
            *_compare_models(table, rows),
            "",
            *_describe_gains(rows, np.asarray(frequency), head_probs, tuned_probs),
            "frozen, streamed is the original method, timed over one epoch: the same vectors, so the same figures",
            f"largest difference of streamed and cached vectors, over their norm: {_measure_difference(ranks):.1e}",
            f"second extraction: {zero}; {again.seconds:.0f} s including the start of the process",
            f"twelve validation tiles with truth and prediction: {picture}; reports: {head_run}/report.html, "
            f"{tuned_run}/report.html",
            "",
            "on your own bucket (gs://BUCKET/PREFIX holding images/NAME.png and labels/NAME.txt):",
            "  make extract TILES=gs://BUCKET/PREFIX LIMIT=500      # a trial, with an estimate for all tiles",
            "  make extract TILES=gs://BUCKET/PREFIX",
            "  make train-head",
            "  make finetune UNFREEZE=3",
            "  make predict RUN=runs/finetune TILES=gs://BUCKET/OTHER",
        ]
    )


def _predict(run: str, rows: LabelledRows, ranks: Ranks) -> FloatArray:
    """Return the (n, C) probabilities of a run for the test rows."""
    loaded = LoadedRun.load(run)
    found = infer(loaded, Target(None, TEST_CACHE), ranks, workers=None, labels=False)
    if found is None:
        raise TrainError("the demo compares its runs in a single process")
    return torch.from_numpy(found[1].logits[rows.index]).sigmoid().numpy()


def _time_streamed_epoch(config: TrainConfig, sets: Sets, ranks: Ranks) -> float:
    """Time one epoch of the original method, which runs the frozen backbone over every training tile; in seconds."""
    version = sets.train.version
    stream = TileStream(version, find_cached_checkpoint(version), ranks, workers=None)
    meta = make_meta(config, sets.train)
    head = make_head(meta, version.layout.width, config.seed)
    classifier = Classifier(head, stream.backbone, meta.features)
    run = RunDirectory.create(str(RUNS / "streamed"))
    tiles = stream.build(sets.train)
    few = sets.val.select(np.arange(len(sets.val.rows)) < version.recorded.batch_size)
    val = ValidationSet(stream.build(few), few.rows, np.ones(len(few.rows), bool))
    Trainer(classifier, tiles, val, replace(config, epochs=1), meta, run, ranks).fit(print)
    return float(run.read_timings()[0]["train_s"])


def _measure_difference(ranks: Ranks) -> float:
    """Embed the test tiles again; return the largest norm of a difference to the cache over the row's norm."""
    version = open_cache(TEST_CACHE)
    values, table = version.read_rows(), version.read_table()
    checkpoint = find_cached_checkpoint(version)
    stream = TileStream(version, checkpoint, ranks, workers=None)
    embedder = TileEmbedder.for_version(version, stream.backbone, checkpoint)
    feed = TileFeed(open_source(version.recorded.tiles), workers=ranks.choose_workers(None))
    largest = 0.0
    for batch in feed.read(request_batches(table, range(len(table)), version.recorded.batch_size)):
        good = batch.status == Status.EMBEDDED
        for name, vectors in embedder.embed(batch).items():
            cached = values.pooled[name][batch.rows][good].astype(np.float64)
            streamed = vectors.cpu().numpy()[good]
            difference = np.linalg.norm(streamed - cached, axis=1) / np.linalg.norm(cached, axis=1)
            largest = max(largest, float(difference.max(initial=0)))
    return largest


def _compare_models(table: list[Row], rows: LabelledRows) -> list[str]:
    """Format a line a model; a figure whose interval overlaps the interval in the line above is marked."""
    titles = [FIGURES[key].title for key in KEY_FIGURES]
    lines, above, overlapping = [["", *titles, "set-up", "an epoch", f"{EPOCHS} epochs"]], None, False
    for row in table:
        metrics = compute_metrics(row.probs, rows.labels, rows.class_names, loss=None)
        intervals = bootstrap_intervals(row.probs, rows.labels, rows.scenes)
        cells = []
        for key in KEY_FIGURES:
            overlaps = above is not None and row.probs is not table[1].probs and intervals[key][0] <= above[key][1]
            overlapping |= overlaps
            cells.append(format_estimate(metrics[key], intervals[key]) + (" ~" if overlaps else ""))
        lines.append([row.name, *cells, _seconds(row.setup_s), _seconds(row.epoch_s), row.all_epochs])
        above = intervals
    return [*format_table(lines), *(["~ interval overlaps that of the row above"] if overlapping else [])]


def _describe_gains(
    rows: LabelledRows, frequency: FloatArray, head_probs: FloatArray, tuned_probs: FloatArray
) -> list[str]:
    """Describe the paired differences: both models on the same resampled scenes."""
    lines = []
    for name, model, baseline in (
        ("cached head - label frequency", head_probs, frequency),
        ("last 3 layers - cached head", tuned_probs, head_probs),
    ):
        gains = bootstrap_difference(model, baseline, rows.labels, rows.scenes)
        parts = [f"{FIGURES[key].title} {format_interval(gain, sign='+')}" for key, gain in gains.items()]
        lines.append(f"{name}, paired: {', '.join(parts)}")
    return lines


def _draw_validation_tiles(sets: Sets, path: Path, ranks: Ranks) -> None:
    """Draw twelve validation tiles with their classes and the fine-tuned model's decisions."""
    loaded = LoadedRun.load(str(RUNS / "finetune"))
    counted = np.flatnonzero(sets.counted)
    rng = np.random.default_rng(0)
    picked: BoolArray = np.zeros(len(sets.val.rows), bool)
    picked[rng.choice(counted, min(_SHOWN_TILES, len(counted)), replace=False)] = True
    shown = sets.val.select(picked)
    stream = TileStream(shown.version, find_cached_checkpoint(shown.version), ranks, workers=0)
    classifier = loaded.make_classifier(stream.backbone, shown.version.layout.width, ranks.device)
    with torch.inference_mode():
        logits = torch.cat([classifier(pixels) for pixels in stream.build(shown).iterate_share()])
    preds = loaded.decisions.decide(logits.cpu().numpy())
    source = open_source(shown.version.recorded.tiles)
    images = [decode_tile(source.read(str(tile), 0)) for tile in shown.rows.tiles]
    draw_tiles(path, images, shown.rows, preds)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"
