"""The demo's bucket: PNG tiles and YOLO labels cut from synthetic scenes, the same on every machine.

    train/images/0007_1_3.png  train/labels/0007_1_3.txt     test/images/…  test/labels/…

The training part has what real buckets have: tiles without objects, one tile that cannot be read, one label with the
id of an annotation artefact, one with an id that is no class at all.
"""

import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from .classes import DEMO
from .scenes import TILE_SIZE, Box, Scene, cut_tiles, draw_scene

TRAIN_SCENES = 112
TEST_SCENES = 40
ARTEFACT_ID = 75
UNKNOWN_ID = 99

_VERSION = 2
"""Raise it with every change to what is drawn or written: buckets of another version are made anew."""
_DONE = "generated.json"
_FIRST_TEST_SCENE = 5000
_PNG_LEVEL = 1


def generate_bucket(directory: Path, train_scenes: int = TRAIN_SCENES, test_scenes: int = TEST_SCENES) -> None:
    """Write the demo bucket into `directory`, or do nothing when it is there already. Uses every core.

    Args:
        directory: made when missing, replaced when it holds a demo bucket of another version or size. It appears under
            its name once complete, and then holds `train/` and `test/`, each with `images/` and `labels/`.
        train_scenes, test_scenes: scenes of 16 tiles; no scene is in both parts.

    Raises:
        FileExistsError: the directory holds something else.
    """
    recipe = json.dumps({"version": _VERSION, "train_scenes": train_scenes, "test_scenes": test_scenes}) + "\n"
    if _is_generated(directory, recipe):
        return
    if directory.exists() and not (directory / _DONE).is_file():
        raise FileExistsError(f"{directory} is no demo bucket: remove it, or choose another place")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as temporary:
        made = Path(temporary, "made")
        _write_parts(
            made, {"train": range(train_scenes), "test": range(_FIRST_TEST_SCENE, _FIRST_TEST_SCENE + test_scenes)}
        )
        _spoil(made / "train")
        (made / _DONE).write_text(recipe)
        shutil.rmtree(directory, ignore_errors=True)
        try:
            made.rename(directory)
        except OSError:
            if not _is_generated(directory, recipe):  # otherwise another process was faster
                raise


def _is_generated(directory: Path, recipe: str) -> bool:
    done = directory / _DONE
    return done.is_file() and done.read_text() == recipe


def _write_parts(directory: Path, parts: dict[str, range]) -> None:
    """Draw every scene of every part, on all cores."""
    for part in parts:
        for kind in ("images", "labels"):
            (directory / part / kind).mkdir(parents=True)
    jobs = [(directory / part, number) for part, numbers in parts.items() for number in numbers]
    # Spawned, not forked: the caller may have threads.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(_write_scene, *zip(*jobs, strict=True), chunksize=4))


def _write_scene(part: Path, number: int) -> None:
    """The tiles of one scene, named `scene_row_column`."""
    for row, column, tile in cut_tiles(draw_scene(DEMO, number)):
        name = f"{number:04d}_{row}_{column}"
        image = Image.fromarray(tile.pixels)
        image.save(part / "images" / f"{name}.png", compress_level=_PNG_LEVEL)
        (part / "labels" / f"{name}.txt").write_text(format_labels(tile))


def format_labels(tile: Scene) -> str:
    """YOLO lines, `id cx cy w h` as shares of the tile's side."""
    return "".join(f"{box.label_id} {_format_box(box)}\n" for box in tile.boxes)


def _format_box(box: Box) -> str:
    centre_x, centre_y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    values = (centre_x, centre_y, box.x1 - box.x0, box.y1 - box.y0)
    return " ".join(f"{value / TILE_SIZE:.6f}" for value in values)


def _spoil(train: Path) -> None:
    """Put one of each fault that real buckets have into the training part, away from its first scene."""
    labels = sorted((train / "labels").iterdir())
    labelled = [path for path in labels if path.stat().st_size][len(labels) // 3 :]
    unreadable = train / "images" / f"{labelled[0].stem}.png"
    unreadable.write_bytes(unreadable.read_bytes()[:5000])
    _repeat_last_box(labelled[5], ARTEFACT_ID)
    _repeat_last_box(labelled[9], UNKNOWN_ID)


def _repeat_last_box(label: Path, label_id: int) -> None:
    """Add a line: the last one's box under another id."""
    text = label.read_text()
    box = text.splitlines()[-1].partition(" ")[2]
    label.write_text(f"{text}{label_id} {box}\n")
