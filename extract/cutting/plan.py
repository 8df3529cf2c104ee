"""What a tiling is asked to do, and what it will give: counted from headers and boxes, before a pixel is read."""

import json
from collections import defaultdict
from collections.abc import Iterator
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
    """A scene that can be cut: how, what it gives, and whether that is there already."""

    job: SceneJob
    count: SceneCount
    done: bool


@dataclass
class TilePlan:
    """All of a tiling.

    Attributes:
        annotations: what the labels hold.
        scenes: those that can be cut, by name.
        unreadable: scenes whose file cannot be opened: name, reason.
        missing: scenes without a file: name, boxes.
        unlabelled: names of scenes that no feature names.
        other_files: in the directory, passed over.
        gone: scenes of this place whose file is not in the directory any more.
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
        """Scenes that are not there yet."""
        return [scene for scene in self.scenes if not scene.done]


def make_plan(config: TileConfig, place: Objects) -> TilePlan:
    """Look at everything, write nothing.

    Raises:
        ConfigError: no directory, no scenes, two files of one scene, or labels of other scenes altogether.
        AnnotationError: the labels cannot be read.
        PlaceError: the place holds tiles of other settings, or of something else.
    """
    files, other_files = _list_scenes(config.images)
    check_settings(place, config.cutting)
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
    """What the place is told about how its scenes were cut."""
    return json.dumps({"version": 1, **asdict(cutting)}).encode() + b"\n"


def check_settings(place: Objects, cutting: Cutting) -> bool:
    """Whether the place knows these settings already; False for one that has none.

    Raises:
        PlaceError: it was cut with others, or holds tiles that were not cut here.
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
    """Bytes of all images, from the middle tile of a few scenes; and how many tiles that was. A raster that cannot be
    read there is left out: cutting it will say so."""
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
    """Scene name to raster, and how many other files there were."""
    try:
        entries = sorted(Path(directory).iterdir())
    except OSError as error:
        raise ConfigError(f"cannot list {directory}: {error.strerror}: IMAGES is a directory of .tif files") from error
    files: dict[str, Path] = {}
    other = 0
    for path in entries:
        # An archive made on a Mac brings ._1052.tif along, which is no picture.
        if path.suffix.lower() not in RASTER_SUFFIXES or path.name.startswith("."):
            other += 1
        elif not path.name.isprintable():  # bytes that are no text, a line break: no name for an object of a bucket
            raise ConfigError(f"{str(path)!r} has a name that cannot be that of a tile: rename it")
        elif files.setdefault(name_scene(path.name), path) != path:
            raise ConfigError(f"{files[path.stem]} and {path.name} are one scene by their names: remove one")
    if not files:
        raise ConfigError(f"no .tif files in {directory}: IMAGES is a directory of them, such as train_images")
    return files, other


def _list_there(place: Objects) -> dict[str, set[str]]:
    """Objects of an earlier tiling by scene: marks, labels and images."""
    there: dict[str, set[str]] = defaultdict(set)
    for name in place.list_dir(DONE):
        there[name.rpartition(".")[0]].add(f"{DONE}/{name}")
    for folder in ("labels", "images"):
        for name in place.list_dir(folder):
            there[name.rpartition(".")[0].rsplit("_", 2)[0]].add(f"{folder}/{name}")
    return there


def _plan_scene(config: TileConfig, name: str, path: Path, boxes: Boxes | None, there: set[str]) -> ScenePlan:
    labelled = boxes is not None
    stat = read_stat(path)
    job = SceneJob(name, path, stat, np.empty((0, 5)) if boxes is None else boxes, labelled, config.cutting, config.out)
    with Raster(path) as raster:
        height, width = raster.height, raster.width
    wanted = {job.mark}
    for tile in _name_tiles(job, height, width):
        wanted |= {f"images/{tile}.png", f"labels/{tile}.txt"} if labelled else {f"images/{tile}.png"}
    done = wanted == there
    old = () if done else tuple(item for item in there if item not in wanted or not item.startswith("images/"))
    return ScenePlan(replace(job, old=old), count_scene(job, height, width), done)


def _name_tiles(job: SceneJob, height: int, width: int) -> Iterator[str]:
    for window in list_windows(height, width, job.cutting):
        yield name_tile(job.name, window)
