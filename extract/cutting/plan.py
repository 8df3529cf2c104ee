"""Plan a tiling: count what it will give from headers and boxes, before any pixel is read."""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cache_schema.storage.objects import Objects
from extract.errors import ConfigError, PlaceError, RasterError
from extract.ranks.group import shows_bars
from extract.tiles.raster import RASTER_SUFFIXES, Raster

from .annotations import Annotations, Boxes, name_scene, read_annotations
from .config import Cutting, TileConfig
from .cut import DONE, SceneCount, SceneJob, count_scene, encode_png, list_windows, name_tile, read_stat

SETTINGS = "tiling/settings.json"
_SAMPLED_SCENES = 8


@dataclass(frozen=True)
class ScenePlan:
    """A readable scene: its job, the tiles it gives, and whether they exist already."""

    job: SceneJob
    count: SceneCount
    done: bool


@dataclass
class TilePlan:
    """The plan of a whole tiling.

    Attributes:
        annotations: the contents of the label file.
        scenes: the readable ones, sorted by name.
        unreadable: reason by name, for scenes whose file cannot be opened.
        missing: number of boxes by name, for scenes with features but without a file.
        unlabelled: names of scenes without features.
        other_files: number of files in the directory that are not scenes.
        gone: scenes in the output whose file is no longer in the directory.
    """

    annotations: Annotations
    scenes: list[ScenePlan] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    unlabelled: list[str] = field(default_factory=list)
    other_files: int = 0
    gone: list[str] = field(default_factory=list)

    @property
    def to_do(self) -> list[ScenePlan]:
        """Return the scenes that are not finished."""
        return [scene for scene in self.scenes if not scene.done]


def make_plan(config: TileConfig, place: Objects) -> TilePlan:
    """Plan the tiling from the input and the output, without writing anything.

    Raises:
        ConfigError: no directory, no scenes, two files of one scene, or labels that fit none of the scenes.
        AnnotationError: the labels cannot be read.
    """
    files, other_files = _list_scenes(config.images)
    annotations = read_annotations(config.labels)
    missing = {name: len(boxes) for name, boxes in annotations.boxes.items() if name not in files}
    if len(missing) == len(annotations.boxes):
        raise ConfigError(
            f"no feature of {config.labels} names a file of {config.images}: "
            f"check IMAGES and LABELS (image_id is a file's name, such as {min(files)}.tif)"
        )
    plan = TilePlan(annotations, missing=missing, other_files=other_files)
    there = _list_there(place)
    plan.gone = sorted(set(there) - set(files))
    for name, path in tqdm(sorted(files.items()), unit="scene", desc="scenes", leave=False, disable=not shows_bars()):
        boxes = annotations.boxes.get(name)
        if boxes is None:
            plan.unlabelled.append(name)
        try:
            plan.scenes.append(_plan_scene(config, name, path, boxes, there.get(name, set())))
        except RasterError as error:
            plan.unreadable[name] = str(error)
    return plan


def format_settings(cutting: Cutting) -> bytes:
    """Return the settings object of an output."""
    return json.dumps({"version": 1, **asdict(cutting)}).encode() + b"\n"


def check_settings(place: Objects, cutting: Cutting) -> bool:
    """Return whether the output has these settings; False for a new output.

    Raises:
        PlaceError: it was cut with other settings, or holds tiles not cut by this command.
    """
    found = place.read(SETTINGS)
    if found and found.data == format_settings(cutting):
        return True
    if found:
        try:
            settings = json.loads(found.data).items()
            before = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings)
        except (ValueError, AttributeError):
            before = "unreadable"
        raise PlaceError(
            f"{place.url} was cut with other settings ({before.removeprefix('--version 1, ')}): "
            "give the same, or choose another OUT"
        )
    if any(True for folder in ("images", "labels") for _ in place.list_dir(folder)):
        raise PlaceError(f"{place.url} holds tiles that were not cut by this command: choose another OUT")
    return False


def estimate_bytes(plan: TilePlan) -> tuple[float, int]:
    """Estimate the bytes of all images from the middle tile of a few scenes.

    Returns:
        the bytes, and the number of tiles measured. A tile that cannot be read is skipped: cutting will report it.
    """
    chosen = plan.scenes[:: max(1, len(plan.scenes) // _SAMPLED_SCENES)][:_SAMPLED_SCENES]
    sizes = []
    for scene in chosen:
        try:
            with Raster(scene.job.path) as raster:
                grid = list(list_windows(raster.height, raster.width, scene.job.cutting))
                sizes.append(len(encode_png(raster.read(grid[len(grid) // 2]))))
        except RasterError:
            continue
    return float(np.mean(sizes or [0])) * sum(scene.count.tiles for scene in plan.scenes), len(sizes)


def _list_scenes(directory: str) -> tuple[dict[str, Path], int]:
    """Return the rasters by scene name, and the number of other files."""
    try:
        entries = sorted(Path(directory).iterdir())
    except OSError as error:
        raise ConfigError(f"cannot list {directory}: {error.strerror}: IMAGES is a directory of .tif files") from error
    files: dict[str, Path] = {}
    other = 0
    for path in entries:
        # Archives made on a Mac contain ._1052.tif, which is not an image.
        if path.suffix.lower() not in RASTER_SUFFIXES or path.name.startswith("."):
            other += 1
        elif not path.name.isprintable():  # undecodable bytes or a line break cannot name an object in a bucket
            raise ConfigError(f"{str(path)!r} has characters not allowed in tile names: rename it")
        elif files.setdefault(name_scene(path.name), path) != path:
            raise ConfigError(f"{files[path.stem]} and {path.name} name the same scene: remove one")
    if not files:
        raise ConfigError(f"no .tif files in {directory}: IMAGES is a directory of them, such as train_images")
    return files, other


def _list_there(place: Objects) -> dict[str, set[str]]:
    """Return the objects of an earlier tiling by scene: marks, labels and images."""
    there: dict[str, set[str]] = defaultdict(set)
    for folder, numbers in ((DONE, 0), ("labels", 2), ("images", 2)):
        for name in place.list_dir(folder):
            there[name.rpartition(".")[0].rsplit("_", numbers)[0]].add(f"{folder}/{name}")
    return there


def _plan_scene(config: TileConfig, name: str, path: Path, boxes: Boxes | None, there: set[str]) -> ScenePlan:
    labelled = boxes is not None
    stat = read_stat(path)
    job = SceneJob(name, path, stat, np.empty((0, 5)) if boxes is None else boxes, labelled, config.cutting, config.out)
    with Raster(path) as raster:
        height, width = raster.height, raster.width
    wanted = {job.mark}
    for window in list_windows(height, width, job.cutting):
        tile = name_tile(name, window)
        wanted |= {f"images/{tile}.png", f"labels/{tile}.txt"} if labelled else {f"images/{tile}.png"}
    done = wanted == there
    old = () if done else tuple(item for item in there if item not in wanted or not item.startswith("images/"))
    return ScenePlan(replace(job, old=old), count_scene(job, height, width), done)
