"""Generate the demo's bucket: PNG tiles and YOLO labels cut from synthetic scenes, the same on every machine.

    train/images/0007_1_3.png  train/labels/0007_1_3.txt     test/images/…  test/labels/…

The training part has the faults of real buckets: tiles without objects, one unreadable tile, one label with the id of
an annotation artefact, and one with an unknown id.
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
from .scenes import TILE_SIZE, Scene, cut_tiles, draw_scene

TRAIN_SCENES = 112
TEST_SCENES = 40
ARTEFACT_ID = 75
UNKNOWN_ID = 99

_VERSION = 2
"""Increase it with every change to the content: buckets of another version are generated again."""
_DONE = "generated.json"
_FIRST_TEST_SCENE = 5000
_PNG_LEVEL = 1


def generate_bucket(directory: Path, train_scenes: int = TRAIN_SCENES, test_scenes: int = TEST_SCENES) -> None:
    """Write the demo bucket into `directory`, unless it is there already. Uses every core.

    Args:
        directory: created if missing, replaced if it holds a demo bucket of another version or size. It gets its name
            only once complete, with `train/` and `test/`, each with `images/` and `labels/`.
        train_scenes, test_scenes: number of scenes, of 16 tiles each; no scene is in both parts.

    Raises:
        FileExistsError: the directory holds something else.
    """
    recipe = json.dumps({"version": _VERSION, "train_scenes": train_scenes, "test_scenes": test_scenes}) + "\n"
    if _is_generated(directory, recipe):
        return
    if directory.exists() and not (directory / _DONE).is_file():
        raise FileExistsError(f"{directory} is not a demo bucket: remove it, or choose another directory")
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
            if not _is_generated(directory, recipe):  # else another process finished first
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
    # Spawn: forking is unsafe if the caller has threads.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(_write_scene, *zip(*jobs, strict=True), chunksize=4))


def _write_scene(part: Path, number: int) -> None:
    """Write the tiles and labels of one scene, named `scene_row_column`."""
    for row, column, tile in cut_tiles(draw_scene(DEMO, number)):
        name = f"{number:04d}_{row}_{column}"
        image = Image.fromarray(tile.pixels)
        image.save(part / "images" / f"{name}.png", compress_level=_PNG_LEVEL)
        (part / "labels" / f"{name}.txt").write_text(format_labels(tile))


def format_labels(tile: Scene) -> str:
    """Format boxes as YOLO lines, `id cx cy w h` in shares of the tile's side."""
    lines = []
    for box in tile.boxes:
        values = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2, box.x1 - box.x0, box.y1 - box.y0)
        lines.append(" ".join([str(box.label_id), *(f"{value / TILE_SIZE:.6f}" for value in values)]) + "\n")
    return "".join(lines)


def _spoil(train: Path) -> None:
    """Add one of each fault of real buckets to the training part, after its first third."""
    labels = sorted((train / "labels").iterdir())
    labelled = [path for path in labels if path.stat().st_size][len(labels) // 3 :]
    unreadable = train / "images" / f"{labelled[0].stem}.png"
    unreadable.write_bytes(unreadable.read_bytes()[:5000])
    for label, label_id in ((labelled[5], ARTEFACT_ID), (labelled[9], UNKNOWN_ID)):
        text = label.read_text()
        box = text.splitlines()[-1].partition(" ")[2]
        label.write_text(f"{text}{label_id} {box}\n")
