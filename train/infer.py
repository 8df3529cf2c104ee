"""A trained run on a cache or on tiles: `evaluate` scores it, `predict` writes what it says of each tile."""

import csv
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from tqdm import tqdm

from cache_schema import LABEL_ID_COLUMNS, ProvenanceError, Status, TileTable, Version, open_cache
from cache_schema.layout import UInt8Array, UInt16Array
from extract.backbone import Backbone, Checkpoint, find_checkpoint
from extract.batch import make_requests
from extract.distributed import Ranks, join_ranks
from extract.feed import TileFeed
from extract.listing import list_tiles
from extract.source import open_source
from extract.transform import TileTransform

from .augment import SYMMETRIES, Views, average_views
from .checkpoint import CheckpointMeta, load_best
from .config import TrainConfig
from .decisions import Decisions
from .errors import CheckpointError, TrainError
from .evaluation import describe_evaluation, evaluate_rows
from .loop import load_tensors
from .model import Classifier, Head, join_features
from .rows import label_rows
from .rundir import RunDirectory
from .step import use_amp

_STREAM_BATCH = 32
_HEAD_ROWS = 8192

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Target:
    """What to run on: tiles of a bucket or directory, or rows of a cache. Exactly one of the two is set."""

    tiles: str | None
    cache: str | None

    def __post_init__(self) -> None:
        if (self.tiles is None) == (self.cache is None):
            raise TrainError("give either --tiles or --cache")


@dataclass(frozen=True, eq=False)
class Inference:
    """What a run says of N tiles, on rank 0.

    Attributes:
        tiles: where they lie, `gs://bucket/prefix` or a directory.
        table: the tiles.
        logits: (N, C) float32, NaN in rows without an embedding.
        label_ids: (N, 128) uint16, zeros where labels were not read.
        status: (N,) uint8, see `Status`.
    """

    tiles: str
    table: TileTable
    logits: FloatArray
    label_ids: UInt16Array
    status: UInt8Array


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """The best epoch of a run: its settings, what its tensors belong to, and the classifier without its backbone."""

    directory: RunDirectory
    config: TrainConfig
    meta: CheckpointMeta
    tensors: dict[str, torch.Tensor]

    @classmethod
    def load(cls, run: str) -> "LoadedRun":
        directory = RunDirectory.open(run)
        best = load_best(directory.path)
        return cls(directory, directory.read_config(), best.meta, best.tensors)

    @property
    def decisions(self) -> Decisions:
        """Fitted on the run's validation rows; untuned for a run that was stopped before its end."""
        if not self.meta.thresholds:
            return Decisions.untuned(len(self.meta.class_names))
        return Decisions(self.meta.temperature, np.asarray(self.meta.thresholds, np.float32))

    def find_checkpoint(self) -> Checkpoint:
        """The backbone it was trained on.

        Raises:
            CheckpointError: what lies there now has other weights.
        """
        checkpoint = find_checkpoint(self.meta.backbone, self.meta.image_size)
        if checkpoint.hash_weights() != self.meta.weights_sha256:
            raise CheckpointError(f"{checkpoint.path} is not the backbone this run was trained on: its weights differ")
        return checkpoint

    def make_classifier(self, backbone: Backbone | None, width: int, device: torch.device) -> Classifier:
        """The classifier with its trained tensors, in eval mode."""
        meta = self.meta
        if backbone is not None and meta.unfreeze:
            backbone.unfreeze_last(meta.unfreeze)
        head = Head(width * len(meta.features), len(meta.class_ids), hidden=meta.hidden, dropout=meta.dropout)
        classifier = Classifier(head, backbone, meta.features).to(device)
        load_tensors(classifier, self.tensors)
        return classifier.eval()


def run_evaluation(run: str, target: Target, *, tta: Views, device: str, workers: int | None) -> None:
    """Print the metrics of a run on labelled tiles: the same figures and per-class table as in training.

    Args:
        run: its directory or link.
        target: what to score it on; labels are read by the run's own rules.
        tta: `d4` averages each tile's logits over its eight symmetries.
        device, workers: as in training.
    """
    with join_ranks(device) as ranks:
        loaded = ranks.run_on_main(lambda: LoadedRun.load(run))
        inference = infer(loaded, target, ranks, workers=workers, labels=True, tta=tta)
        report = ranks.run_on_main(lambda: _score(loaded, inference, tta))
        if ranks.is_main:
            print(report)


def run_prediction(run: str, target: Target, out: Path, *, tta: Views, device: str, workers: int | None) -> None:
    """Write a CSV of probabilities and decisions for every tile, and the thresholds used beside it."""
    with join_ranks(device) as ranks:
        loaded = ranks.run_on_main(lambda: LoadedRun.load(run))
        inference = infer(loaded, target, ranks, workers=workers, labels=False, tta=tta)
        report = ranks.run_on_main(lambda: _write_predictions(loaded, inference, out, tta))
        if ranks.is_main:
            print(report)


def infer(
    loaded: LoadedRun, target: Target, ranks: Ranks, *, workers: int | None, labels: bool, tta: Views = "one"
) -> Inference | None:
    """Logits of every tile of the target, on rank 0; None on the others.

    A head on a cache of its own embeddings reads vectors; everything else streams tiles.

    Raises:
        TrainError: several views are asked for of vectors, which are of one.
        ProvenanceError: the vectors are of another backbone, size or precision than the run's.
    """
    if target.cache:
        version = ranks.run_everywhere(lambda: open_cache(str(target.cache)))
        if not loaded.meta.unfreeze:
            if tta != "one":
                raise TrainError(
                    f"--tta {tta} turns tiles, and {loaded.directory} reads a cache's vectors: use --tiles, or leave "
                    "--tta out"
                )
            return ranks.run_everywhere(lambda: _infer_cached(loaded, version, ranks))
        tiles, table = version.recorded.tiles, version.read_table()
    else:
        tiles = open_source(str(target.tiles)).url
        table = ranks.run_on_main(lambda: list_tiles(open_source(tiles), unlabelled=not labels).table)
    return _infer_streamed(loaded, table, tiles, ranks, workers=workers, labels=labels, tta=tta)


def _infer_cached(loaded: LoadedRun, version: Version, ranks: Ranks) -> Inference | None:
    """The head over all rows of a cache, on rank 0: too little work to share out."""
    meta, provenance = loaded.meta, version.provenance
    mine = (meta.weights_sha256, meta.image_size, meta.precision)
    if mine != (provenance.weights_sha256, provenance.image_size, provenance.precision):
        raise ProvenanceError(
            f"{version.root.url} holds embeddings of {version.recorded.backbone} at {provenance.image_size} px in "
            f"{provenance.precision}, the run is of {meta.backbone} at {meta.image_size} px in {meta.precision}: "
            "extract with the run's settings, or use --tiles"
        )
    if not ranks.is_main:
        return None
    values = version.read_rows()
    classifier = loaded.make_classifier(None, version.layout.width, ranks.device)
    pooled = {name: torch.from_numpy(values.pooled[name]) for name in meta.features}
    vectors = join_features(pooled, meta.features)
    with torch.inference_mode():
        logits = torch.cat([classifier(part.to(ranks.device)).float().cpu() for part in vectors.split(_HEAD_ROWS)])
    return Inference(version.recorded.tiles, version.read_table(), logits.numpy(), values.label_ids, values.status)


def _infer_streamed(
    loaded: LoadedRun, table: TileTable, tiles: str, ranks: Ranks, *, workers: int | None, labels: bool, tta: Views
) -> Inference | None:
    """Tiles end to end, each rank its share."""
    checkpoint = ranks.run_on_main(loaded.find_checkpoint)
    precision: Any = loaded.meta.precision
    backbone = Backbone.load(checkpoint, precision=precision, device=ranks.device)
    classifier = loaded.make_classifier(backbone, checkpoint.width, ranks.device)
    transform = TileTransform(checkpoint.image_size, checkpoint.mean, checkpoint.std)
    feed = TileFeed(open_source(tiles), workers=ranks.choose_workers(workers), pin_memory=ranks.device.type == "cuda")
    share = list(range(ranks.rank, len(table), ranks.world_size))
    requests = (
        make_requests(table, share[start : start + _STREAM_BATCH], labels=labels)
        for start in range(0, len(share), _STREAM_BATCH)
    )
    logits = np.full((len(table), len(loaded.meta.class_ids)), np.nan, np.float32)
    label_ids = np.zeros((len(table), LABEL_ID_COLUMNS), np.uint16)
    status = np.zeros(len(table), np.uint8)
    amp = use_amp(loaded.config, ranks)
    with tqdm(total=len(share), unit="tile", desc="predict", disable=not ranks.is_main) as bar:
        for batch in feed.read(requests):
            with torch.inference_mode(), torch.autocast(ranks.device.type, torch.bfloat16, enabled=amp):
                pixels = transform(batch.images, device=ranks.device, dtype=backbone.dtype)
                found = average_views(classifier, pixels) if tta == "d4" else classifier(pixels)
            logits[batch.rows] = found.float().cpu().numpy()
            logits[batch.rows[batch.status != Status.EMBEDDED]] = np.nan
            label_ids[batch.rows], status[batch.rows] = batch.label_ids, batch.status
            bar.update(len(batch))
    return _gather(Inference(tiles, table, logits, label_ids, status), ranks)


def _gather(mine: Inference, ranks: Ranks) -> Inference | None:
    """Put the ranks' interleaved shares together on rank 0."""
    share = slice(ranks.rank, None, ranks.world_size)
    parts: list[Any] = [None] * ranks.world_size
    own = (mine.logits[share], mine.label_ids[share], mine.status[share])
    dist.gather_object(own, parts if ranks.is_main else None, dst=0)
    if not ranks.is_main:
        return None
    for rank, part in enumerate(parts):
        where = slice(rank, None, ranks.world_size)
        mine.logits[where], mine.label_ids[where], mine.status[where] = part
    return mine


def _score(loaded: LoadedRun, inference: Inference | None, tta: Views) -> str:
    assert inference is not None
    data = loaded.config.data
    rows = label_rows(inference.table, inference.label_ids, inference.status, data, reading=loaded.meta.reading)
    if rows.class_names != loaded.meta.class_names:
        raise TrainError(
            f"{data.taxonomy} does not name the classes that {loaded.directory} was trained on: it has changed since, "
            "so give it back as it was"
        )
    counted = ~rows.empty if data.empty == "drop" else np.ones(len(rows), bool)
    if not counted.any():
        raise TrainError("no labelled tile shows a class of this run: there is nothing to score")
    evaluation = evaluate_rows(
        torch.from_numpy(inference.logits[rows.index]),
        rows,
        counted,
        loss=loaded.config.make_loss(),
        decisions=loaded.decisions,
    )
    notes = [
        *rows.notes,
        *_warn_of_training_tiles(loaded, inference.tiles, rows.tiles[counted]),
        *_describe_views(tta),
    ]
    return "\n".join([*notes, "", describe_evaluation(evaluation, per_class=True)])


def _warn_of_training_tiles(loaded: LoadedRun, tiles: str, names: npt.NDArray[np.str_]) -> list[str]:
    """A line for the user when some of the scored tiles are those the run was trained on."""
    trained_on = loaded.directory.read_json("config.json")["recorded"]["tiles"]
    if os.path.abspath(trained_on) != os.path.abspath(tiles):
        return []
    seen = len(set(loaded.directory.read_json("split.json")["train"]) & {str(name) for name in names})
    if not seen:
        return []
    return [f"warning: {seen:,} of the {len(names):,} tiles scored here trained this run: its figures flatter it"]


def _describe_views(tta: Views) -> list[str]:
    """A line for the user when several views of each tile were averaged."""
    if tta == "one":
        return []
    return [
        f"--tta {tta}: mean logits of {SYMMETRIES} flips and rotations of each tile; temperature and thresholds were "
        "fitted on one"
    ]


def _write_predictions(loaded: LoadedRun, inference: Inference | None, out: Path, tta: Views) -> str:
    """One row per tile: name, status, decided classes, then the calibrated probability of every class.

    With several views averaged, a column `tta` before the classes says so.
    """
    assert inference is not None
    names, decisions = loaded.meta.class_names, loaded.decisions
    probs, preds, thresholds = (
        decisions.calibrate(inference.logits),
        decisions.decide(inference.logits),
        decisions.thresholds,
    )
    used = {} if tta == "one" else {"tta": tta}
    sidecar = out.with_name(f"{out.stem}-thresholds.csv")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["tile", "status", "preds", *used, *names])
            for i, tile in enumerate(inference.table.tile.tolist()):
                decided = ";".join(names[c] for c in np.flatnonzero(preds[i]))
                # Every digit of a float32, so that comparing the two files gives the decisions.
                cells = ["" if math.isnan(p) else f"{p:.9g}" for p in probs[i].tolist()]
                writer.writerow([tile, Status(inference.status[i]).name.lower(), decided, *used.values(), *cells])
        with sidecar.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["class_id", "class", "threshold"])
            writer.writerows(zip(loaded.meta.class_ids, names, (f"{t:.9g}" for t in thresholds.tolist()), strict=True))
    except OSError as error:
        raise TrainError(f"cannot write {out}: {error.strerror}: choose another --out") from error
    skipped = int((inference.status != Status.EMBEDDED).sum())
    lines = [f"{len(preds):,} tiles -> {out} (probabilities and decisions; thresholds in {sidecar})"]
    if skipped:
        lines[0] += f"; {skipped:,} of them could not be read, see column status"
    return "\n".join([*lines, *_describe_views(tta)])
