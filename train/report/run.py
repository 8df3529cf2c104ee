"""Run `python -m train report`: write the report of a finished run again, with the parts that need cache and tiles."""

import csv
from itertools import islice

import numpy as np

from cache_schema import TileprobeError, Version, open_cache
from cache_schema.storage.place import is_bucket
from extract.tiles.listing import find_names
from extract.tiles.source import open_source
from train.errors import TrainError
from train.folds.triage import COLUMNS
from train.runs.directory import RunDirectory

from .analysis import choose_extremes
from .classes import count_of_a_kind
from .embeddings import LEAST_POINTS, make_map
from .facts import Evidence, Facts
from .page import MOST_DOUBTS, Extras, LeftOut, write_report
from .tiles import MOST_IMAGES, Thumbnail, read_thumbnails

DOUBTS = "doubts.csv"
_SHOWN_DOUBTS = 24


def run_report(run: str, *, images: bool) -> None:
    """Write report.html and model_card.md of a run, and print which parts are missing and why.

    Raises:
        TrainError: there is no run, it is in a bucket or unfinished, or a file cannot be read or written.
    """
    if is_bucket(run):
        raise TrainError(
            f"{run} is in a bucket: `gcloud storage cp -r` it to a directory, and give that as RUN; the report that "
            "the run wrote at its end is in the bucket"
        )
    directory = RunDirectory.open(run)
    facts = Facts.read(directory)
    extras = gather_extras(facts, images=images)
    try:
        write_report(directory, facts, extras)
    except OSError as error:
        raise TrainError(
            f"cannot write {directory}/report.html: {error.strerror}: free space or fix its permissions"
        ) from error
    size = (directory.path / "report.html").stat().st_size / 2**20
    print(f"{directory}/report.html ({size:.1f} MB, {len(extras.pictures):,} thumbnails), {directory}/model_card.md")
    for part in extras.left_out:
        print(f"left out: {part.part}: {part.why}")


def gather_extras(facts: Facts, *, images: bool) -> Extras:
    """Make thumbnails, map and doubts, as far as possible."""
    doubts, left_out = _read_doubts(facts)
    evidence = facts.evidence
    if evidence is None:
        why = LeftOut("thumbnails and map", facts.lacking)
        return Extras(doubts=doubts, left_out=[*left_out, why])
    pictures: dict[str, Thumbnail] = {}
    drawn = None
    try:
        version = _open_version(facts, evidence)
    except TileprobeError as error:
        return Extras(doubts=doubts, left_out=[*left_out, LeftOut("thumbnails and map", str(error))])
    try:
        if len(evidence) < LEAST_POINTS:
            raise TrainError(f"{len(evidence)} validation tiles are too few for a map")
        drawn = make_map(version, evidence.rows, facts.config.features, facts.config.seed)
    except TileprobeError as error:
        left_out.append(LeftOut("map of the embeddings", str(error)))
    if images:
        try:
            doubted = [line["tile"] for line in doubts[:_SHOWN_DOUBTS]]
            pictures, lacking = _read_tiles(facts, evidence, version, doubted)
            left_out += [LeftOut("some thumbnails", reason) for reason in lacking]
        except TileprobeError as error:
            left_out.append(LeftOut("thumbnails", str(error)))
    else:
        left_out.append(LeftOut("thumbnails", "--no-images"))
    return Extras(pictures, drawn, doubts, left_out)


def _open_version(facts: Facts, evidence: Evidence) -> Version:
    """Open the version that holds the validation rows.

    Raises:
        CacheError: it cannot be opened.
        TrainError: its rows are other tiles now.
    """
    cache, version_id = facts.val_cache
    version = open_cache(cache, version=version_id, allow_unsealed=facts.config.allow_unsealed)
    names = version.read_table().tile
    if len(evidence) and (evidence.rows.max() >= len(names) or (names[evidence.rows] != evidence.tiles).any()):
        raise TrainError(f"{cache} holds other tiles than the run validated on")
    return version


def _read_tiles(
    facts: Facts, evidence: Evidence, version: Version, doubted: list[str]
) -> tuple[dict[str, Thumbnail], list[str]]:
    """Read thumbnails of the best and worst tiles of every class, and of the tiles with doubted labels."""
    classes = facts.class_names
    most = count_of_a_kind(len(classes))
    shown = [
        int(evidence.rows[i])
        for c in range(len(classes))
        for i in choose_extremes(evidence.calibrated[:, c], evidence.labels[:, c], evidence.preds[:, c], most=most)
    ][: MOST_IMAGES - _SHOWN_DOUBTS]
    table = version.read_table()
    names = np.array(sorted(set(doubted)), np.dtypes.StringDType())
    rows = find_names(names, table.tile)
    return read_thumbnails(open_source(version.recorded.tiles), table, [*shown, *rows[rows >= 0].tolist()])


def _read_doubts(facts: Facts) -> tuple[list[dict[str, str]], list[LeftOut]]:
    """Read the first lines of doubts.csv in the run, or say how to make it."""
    path = facts.run.path / DOUBTS
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, strict=True)
            if reader.fieldnames != list(COLUMNS):
                raise ValueError("its header is not the one that `python -m train triage` writes")
            lines = list(islice(reader, MOST_DOUBTS))
        if any(None in line.values() or None in line for line in lines):
            raise ValueError("a line has too few or too many fields")
        for line in lines:
            for name in ("doubt", "out_of_fold_probability"):
                float(line[name])
    except FileNotFoundError:
        command = f"python -m train triage --run-dir {facts.run} --out {facts.run}/{DOUBTS}"
        why = f"no {DOUBTS} in the run: `{command}` makes it"
        return [], [] if facts.config.unfreeze else [LeftOut("label doubts", why)]
    except (OSError, ValueError, csv.Error) as error:
        return [], [LeftOut("label doubts", f"{path} cannot be read: {error}")]
    return lines, []
