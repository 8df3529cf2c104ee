"""The demo's scenes, labels and bucket: what they promise, seen from outside."""

import csv
import hashlib
from collections import Counter
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from extract.demo.abstract import PRETRAIN
from extract.demo.bucket import ARTEFACT_ID, UNKNOWN_ID, format_labels, generate_bucket
from extract.demo.classes import DEMO
from extract.demo.scenes import MIN_VISIBLE, TILE_SIZE, Box, Scene, cut_tiles, draw_scene
from extract.demo.sprites import Sprite, stamp
from extract.demo.vocabulary import Vocabulary

TRAIN_SCENES, TEST_SCENES = 8, 2


@pytest.mark.parametrize("vocabulary", [DEMO, PRETRAIN], ids=lambda v: v.name)
def test_a_scene_is_a_function_of_vocabulary_and_number(vocabulary: Vocabulary) -> None:
    first, again, other = (draw_scene(vocabulary, number, size=512) for number in (3, 3, 4))
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert first.boxes == again.boxes
    assert (first.pixels != other.pixels).mean() > 0.5
    assert first.boxes != other.boxes


def test_vocabularies_share_no_class_and_no_random_stream() -> None:
    assert not {c.name for c in DEMO.classes} & {c.name for c in PRETRAIN.classes}
    assert not {c.draw for c in DEMO.classes} & {c.draw for c in PRETRAIN.classes}
    assert len(PRETRAIN.classes) == 24
    bare = [Vocabulary(v.name, ()) for v in (DEMO, PRETRAIN)]
    demo, pretrain = (draw_scene(v, 0, size=256) for v in bare)
    assert (demo.pixels != pretrain.pixels).mean() > 0.5


def test_demo_classes_are_xview_classes_by_type_id() -> None:
    with resources.files("cache_schema").joinpath("xview_classes.csv").open() as file:
        names = {int(row["type_id"]): row["name"] for row in csv.DictReader(file)}
    assert len(DEMO.classes) >= 12
    assert {c.label_id: c.name for c in DEMO.classes}.items() <= names.items()
    assert UNKNOWN_ID not in names
    assert ARTEFACT_ID in (75, 82)


def test_boxes_lie_where_objects_were_drawn() -> None:
    """One object on plain ground at a time, in a tile or across a border: labels against the pixels that changed."""
    rng = np.random.default_rng(0)
    whole = 0
    for wanted in DEMO.classes:
        for x, y in rng.uniform(40, 2 * TILE_SIZE - 40, (6, 2)):
            sprite = replace(wanted.draw(rng), height=0.0)
            for tile in _draw_alone(sprite, x, y, rng.uniform(0, 6)):
                box = _read_box(format_labels(tile))
                rows, columns = np.nonzero((tile.pixels != 128).any(axis=2))
                drawn = np.array((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
                # A corner that covers less than a percent of a pixel leaves it as it was.
                tolerance = 1.6
                inwards = (drawn - box) * (1, 1, -1, -1)
                assert inwards.min() >= -tolerance, wanted.name
                if box.min() > 0 and box.max() < TILE_SIZE:  # else the object may be narrower where the border cuts it
                    assert inwards.max() <= tolerance, wanted.name
                    whole += 1
    assert whole >= 3 * len(DEMO.classes)


def _draw_alone(sprite: Sprite, x: float, y: float, angle: float) -> list[Scene]:
    """Tiles of plain ground that show enough of the one object on it."""
    pixels = np.full((2 * TILE_SIZE, 2 * TILE_SIZE, 3), 128, np.float32)
    boxes = (Box(18, *stamp(pixels, sprite, x, y, angle, sun=0.0)),)
    return [tile for _, _, tile in cut_tiles(Scene(np.rint(pixels).astype(np.uint8), boxes)) if tile.boxes]


def _read_box(line: str) -> npt.NDArray[np.float64]:
    """Left, top, right, bottom in pixels, rounded as the label is."""
    x, y, width, height = (float(value) * TILE_SIZE for value in line.split()[1:])
    return np.array((x - width / 2, y - height / 2, x + width / 2, y + height / 2)).round(3)


def test_tiles_keep_what_they_show_enough_of() -> None:
    pixels = np.zeros((TILE_SIZE, 2 * TILE_SIZE, 3), np.uint8)
    share = MIN_VISIBLE
    # 20 px wide, of which the right tile shows just enough, then just too little
    cases = {TILE_SIZE - 20 * (1 - share) + 0.1: True, TILE_SIZE - 20 * (1 - share) - 0.1: False}
    for left, kept in cases.items():
        tiles = [t for _, _, t in cut_tiles(Scene(pixels, (Box(18, left, 10, left + 20, 20),)))]
        assert len(tiles[0].boxes) == 1
        assert tiles[0].boxes[0].x1 == TILE_SIZE
        assert len(tiles[1].boxes) == kept


def test_small_objects_are_common() -> None:
    boxes = [box for number in range(3) for box in draw_scene(DEMO, number).boxes]
    sides = np.array([max(box.x1 - box.x0, box.y1 - box.y0) for box in boxes])
    assert ((sides >= 4) & (sides <= 20)).mean() > 1 / 3


def test_some_tiles_are_empty_and_most_are_not() -> None:
    tiles = [tile for number in range(6) for _, _, tile in cut_tiles(draw_scene(DEMO, number))]
    empty = sum(not tile.boxes for tile in tiles)
    assert 1 <= empty <= 0.1 * len(tiles)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "bucket"
    generate_bucket(directory, TRAIN_SCENES, TEST_SCENES)
    return directory


@pytest.mark.parametrize("part, scenes", [("train", TRAIN_SCENES), ("test", TEST_SCENES)])
def test_every_tile_of_the_bucket_has_labels(bucket: Path, part: str, scenes: int) -> None:
    images, labels = ({path.stem for path in (bucket / part / kind).iterdir()} for kind in ("images", "labels"))
    assert images == labels
    assert len(images) == 16 * scenes
    assert len({name.split("_")[0] for name in images}) == scenes


def test_parts_share_no_scene_and_no_picture(bucket: Path) -> None:
    scenes, pictures = (
        [{read(path) for path in (bucket / part / "images").iterdir()} for part in ("train", "test")]
        for read in (lambda path: path.stem.split("_")[0], lambda path: hashlib.sha256(path.read_bytes()).digest())
    )
    assert not scenes[0] & scenes[1]
    assert not pictures[0] & pictures[1]


def test_labels_are_strict_yolo(bucket: Path) -> None:
    known = {c.label_id for c in DEMO.classes}
    for path in (bucket / "test" / "labels").iterdir():
        for line in path.read_text().splitlines():
            label_id, *box = line.split()
            x, y, width, height = map(float, box)
            assert int(label_id) in known
            assert width > 0
            assert height > 0
            for centre, side in ((x, width), (y, height)):
                assert centre - side / 2 >= -1e-6
                assert centre + side / 2 <= 1 + 1e-6


def test_special_cases_occur_exactly_once(bucket: Path) -> None:
    ids = {part: Counter[int]() for part in ("train", "test")}
    unreadable = dict.fromkeys(("train", "test"), 0)
    for part in ids:
        for path in (bucket / part / "labels").iterdir():
            ids[part].update(int(line.split()[0]) for line in path.read_text().splitlines())
        for path in (bucket / part / "images").iterdir():
            try:
                with Image.open(path) as image:
                    image.load()
                    assert image.size == (TILE_SIZE, TILE_SIZE)
                    assert image.mode == "RGB"
            except OSError:
                unreadable[part] += 1
    assert unreadable == {"train": 1, "test": 0}
    strangers = {part: set(ids[part]) - {c.label_id for c in DEMO.classes} for part in ids}
    assert strangers == {"train": {ARTEFACT_ID, UNKNOWN_ID}, "test": set()}
    assert ids["train"][ARTEFACT_ID] == ids["train"][UNKNOWN_ID] == 1


def test_generating_again_changes_nothing_and_gives_the_same_elsewhere(bucket: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in bucket.rglob("*")}
    generate_bucket(bucket, TRAIN_SCENES, TEST_SCENES)
    assert {path: path.stat().st_mtime_ns for path in bucket.rglob("*")} == before
    generate_bucket(tmp_path / "again", 1, 1)
    for path in (tmp_path / "again" / "test").rglob("*.*"):
        assert path.read_bytes() == (bucket / path.relative_to(tmp_path / "again")).read_bytes()


def test_another_size_replaces_a_bucket_but_nothing_else(tmp_path: Path) -> None:
    generate_bucket(tmp_path / "bucket", 1, 1)
    generate_bucket(tmp_path / "bucket", 2, 1)
    assert len(list((tmp_path / "bucket" / "train" / "images").iterdir())) == 32
    precious = tmp_path / "mine" / "train" / "images" / "a.png"
    precious.parent.mkdir(parents=True)
    precious.touch()
    with pytest.raises(FileExistsError, match="mine is not a demo bucket"):
        generate_bucket(tmp_path / "mine", 1, 1)
    assert precious.exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
