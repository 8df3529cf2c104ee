"""`extract doctor` on healthy tiles, and with one thing broken at a time: which check says so, how, and the status."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from google.cloud import storage

from cache_schema.cli.command import DONE, FOUND
from extract.__main__ import run as run_command_line
from tests.checkpoints import make_checkpoint
from tests.hub import Hub, refuse
from tests.planted import Finished, extract_cache, fresh_seed, plant_tiles, run_here
from tests.proxy import Proxy
from tests.tiles import list_tree, upload

SCENES, PER_SCENE = 8, 4
CHECKS = [
    *("packages", "device", "backbone", "credentials", "storage", "layout", "sample", "labels", "label ids", "scenes"),
    *("cache place", "cache version", "cache space", "open files", "shared memory", "speed", "estimate"),
]


@dataclass(frozen=True)
class Report:
    """What the doctor said: a finding by its check's name, and the status."""

    findings: dict[str, dict[str, str]]
    status: int

    def states(self) -> dict[str, str]:
        """Status by check, of those that are not ok."""
        return {name: f["status"] for name, f in self.findings.items() if f["status"] != "ok"}


def read_report(finished: Finished) -> Report:
    assert "Traceback" not in finished.err
    assert not finished.errors
    found = json.loads(finished.out)["checks"]
    for finding in found:
        assert list(finding) == ["check", "status", "detail", "remedy"]
        assert bool(finding["remedy"]) == (finding["status"] != "ok"), finding
        assert "\n" not in finding["detail"] + finding["remedy"], finding
    failed = any(finding["status"] == "fail" for finding in found)
    assert finished.status == (FOUND if failed else DONE)
    return Report({finding["check"]: finding for finding in found}, finished.status)


@dataclass(frozen=True)
class Patient:
    """Healthy tiles and a checkpoint, in a folder of a test's own."""

    root: Path

    @property
    def tiles(self) -> Path:
        return self.root / "tiles"

    @property
    def backbone(self) -> Path:
        return self.root / "small"

    def examine(self, *options: object, tiles: object = None, backbone: object = None) -> Report:
        where = ("--tiles", tiles or self.tiles, "--backbone", backbone or self.backbone)
        arguments = ("doctor", *where, "--device", "cpu", "--json", *options)
        before = list_tree(self.root)
        report = read_report(run_here(run_command_line, self.root, *arguments))
        assert list_tree(self.root) == before  # nothing is left behind
        return report


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, seed = tmp_path_factory.mktemp("healthy"), fresh_seed()
    plant_tiles(root / "tiles", scenes=SCENES, per_scene=PER_SCENE, seed=seed)
    make_checkpoint(root / "small", seed=seed)
    return root


@pytest.fixture
def patient(healthy: Path, tmp_path: Path) -> Patient:
    """A copy that a test may harm; file times stay, which stand for bytes."""
    shutil.copytree(healthy, tmp_path / "own")
    return Patient(tmp_path / "own")


def read_objects(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_healthy_directory(patient: Patient) -> None:
    report = patient.examine("--price-per-hour", 3600, "--workers", 1)
    assert report.states() == {}
    assert list(report.findings) == CHECKS
    details = {name: finding["detail"] for name, finding in report.findings.items()}
    assert "32 tiles to embed of 32, 32 labels" in details["layout"]
    assert details["sample"].startswith("24 of 24 tiles drawn (--seed 0) are images: 64 x 64 px; PNG RGB; ")
    assert details["label ids"].startswith("type ids, ")
    assert details["scenes"] == "8 scenes of 4 to 4 tiles, such as s00, s01, s02"
    assert details["cache place"].startswith("cache/own-small-64 ") or "tiles-small-64 can be" in details["cache place"]
    assert "4 layers of width 64, 64 px a side, 21 tokens" in details["backbone"]
    # A price of 3,600 an hour is one a second: 32 tiles at the rate that was measured.
    rate = float(re.match(r"([\d,.]+) tiles/s", details["speed"])[1].replace(",", ""))  # type: ignore[index]
    size = sum(len(data) for data in read_objects(patient.tiles).values())
    cost = re.fullmatch(
        r"32 tiles and ([\d.]+) MiB to read: about \d+ s .*, ([\d.]+) at 3600 an hour", details["estimate"]
    )
    assert cost, details["estimate"]
    assert float(cost[1]) == pytest.approx(size / 2**20, abs=0.051)
    assert float(cost[2]) == pytest.approx(32 / rate, abs=0.006, rel=0.01)


def test_lines_for_people(patient: Patient) -> None:
    (patient.tiles / "images/odd\x1b[31m.bmp").write_bytes(b"")
    common = ("doctor", "--tiles", patient.tiles, "--device", "cpu", "--backbone")
    finished = run_here(run_command_line, patient.root, *common, patient.backbone)
    lines = finished.out.splitlines()
    assert finished.status == 0
    assert [line.split(maxsplit=1)[1].partition(":")[0] for line in lines if line[0] in "owfs"] == CHECKS
    number = next(i for i, line in enumerate(lines) if line.startswith("warning  layout: 1 objects under images/ are"))
    assert lines[number + 1] == "         -> convert them to PNG, JPEG or TIFF, or remove them"
    assert lines[-1] == "this extraction can work (0 failed, 1 warnings, 16 ok, 0 skipped)"
    assert "\x1b" not in finished.out
    finished = run_here(run_command_line, patient.root, *common, "./nowhere")
    assert finished.status == FOUND
    assert finished.out.splitlines()[-1].startswith("this extraction cannot work yet: fix backbone (1 failed, 1 warn")
    assert "Traceback" not in finished.err


# One thing broken at a time

Harm = Callable[[Path], object]


def each(pattern: str, change: Callable[[Path], object], *, first: int = 10**6) -> Harm:
    def harm(root: Path) -> None:
        for path in sorted(root.glob(pattern))[:first]:
            change(path)

    return harm


def shares_a_label(root: Path) -> None:
    shutil.copy(root / "tiles/images/s00_0.png", root / "tiles/images/s00_0.jpg")


def nothing(root: Path) -> None: ...


NO_IMAGE = each("tiles/images/*", lambda path: path.write_bytes(b"no image"))
ONE_NO_IMAGE = each("tiles/images/*", lambda path: path.write_bytes(b"no image"), first=1)
ALL = ("--sample", "32")
AFTER_LAYOUT = {"sample", "labels", "label ids", "scenes", "cache version", "cache space", "shared memory", "speed"}
AFTER_BACKBONE = {"cache place", "cache version", "cache space", "speed", "estimate"}
TRUNCATE = each("small/model.safetensors", lambda path: os.truncate(path, path.stat().st_size - 9))
INDEX = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}})

BROKEN: dict[str, tuple[Harm, tuple[str, ...], str, str, str, str, set[str]]] = {
    # harm, options, check, status, detail, remedy, skipped
    "no directory": (
        lambda root: shutil.rmtree(root / "tiles"), (), "storage", "fail", "no directory .*/tiles", "check TILES",
        AFTER_LAYOUT | {"layout", "estimate"},
    ),
    "no images/": (
        lambda root: (root / "tiles/images").rename(root / "tiles/pictures"), (), "layout", "fail",
        "no objects under .*/tiles/images/", "TILES must hold images/ and labels/, but holds labels, pictures",
        AFTER_LAYOUT | {"estimate"},
    ),
    "nothing": (
        each("tiles/*", shutil.rmtree), (), "layout", "fail", "no objects", "but is empty",
        AFTER_LAYOUT | {"estimate"},
    ),
    "no labels/": (
        lambda root: shutil.rmtree(root / "tiles/labels"), (), "layout", "fail", "none has its labels/NAME.txt",
        "--unlabelled", AFTER_LAYOUT | {"estimate"},
    ),
    "images of another kind": (
        each("tiles/images/*", lambda path: path.rename(path.with_suffix(".bmp"))), (), "layout", "fail",
        r"32 objects under .*, but none is PNG, JPEG or TIFF \(\.bmp 32\)", "convert them",
        AFTER_LAYOUT | {"estimate"},
    ),
    "a label missing": (
        each("tiles/labels/*", Path.unlink, first=1), (), "layout", "warning", r"1 tiles have no label .*s00_0\.txt",
        "--unlabelled", set(),
    ),
    "a tile missing": (
        each("tiles/images/*", Path.unlink, first=1), (), "layout", "warning", r"1 label files have no .*s00_0\.txt",
        "all tiles were uploaded", set(),
    ),
    "names that clash": (
        shares_a_label, (), "layout", "warning", r"1 label files belong to several tiles .*s00_0\.txt",
        "a unique name", set(),
    ),
    "no tile an image": (
        NO_IMAGE, (), "sample", "fail", "24 of 24 tiles would be quarantined: .*cannot be decoded as an image",
        "fix or remove .*--max-quarantined 0.01", set(),
    ),
    "a tile no image, of all": (
        ONE_NO_IMAGE, ALL, "sample", "fail", r"1 of 32 tiles would be quarantined: images/s00_0\.png", "fix", set(),
    ),
    "a tile no image, and allowed": (
        ONE_NO_IMAGE, (*ALL, "--max-quarantined", "0.1"), "sample", "warning", "1 of 32", "fix", set(),
    ),
    "boxes in pixels": (
        each("tiles/labels/*", lambda path: path.write_text("73 .5 .5 .1 .1\n" + 3 * "73 9 20 3 3\n")), (),
        "labels", "fail", "75.0% of lines are malformed.*txt:2", "id cx cy w h", set(),
    ),
    "a line malformed": (
        each("tiles/labels/s00_0.txt", lambda path: path.write_text("11 0.5\n")), ALL, "labels", "warning",
        r"% of lines are malformed.*s00_0\.txt:1", "training refuses", set(),
    ),
    "mixed label ids": (
        each("tiles/labels/*", lambda path: path.write_text("48 .5 .5 .1 .1\n73 .5 .5 .1 .1\n")), (), "label ids",
        "fail", "type ids and class ids are mixed .*48:24 73:24", "--label-ids", set(),
    ),
    "label ids that may be either": (
        each("tiles/labels/*", lambda path: path.write_text("18 .5 .5 .1 .1\n")), (), "label ids", "warning",
        "every id is both", "--label-ids", set(),
    ),
    "no label at all": (
        each("tiles/labels/*", lambda path: path.write_text("")), (), "label ids", "warning", "no label id in a sample",
        "larger --sample", set(),
    ),
    "no such class list": (
        nothing, ("--taxonomy", "none.csv"), "label ids", "fail", "cannot read the class list none.csv", ".", set(),
    ),
    "scenes that do not match": (
        nothing, ("--scene-regex", r"^(?P<scene>x.+)$"), "scenes", "fail", "32 tile names do not fit .*s00_0",
        "a pattern whose group", set(),
    ),
    "few scenes": (
        each("tiles/*/s0[4-9]_*", Path.unlink), (), "scenes", "fail", "a split by scene needs 5; 4 scenes",
        "--scene-regex .*VAL_CACHE", set(),
    ),
    "a scene a tile": (
        nothing, ("--scene-regex", "^(?P<scene>.+)$"), "scenes", "warning", "every tile is its own scene",
        "--scene-regex", set(),
    ),
    "image size": (
        nothing, ("--image-size", "100"), "backbone", "fail", "IMAGE_SIZE 100 is not a multiple", "try 96 or 112",
        AFTER_BACKBONE,
    ),
    "no checkpoint": (
        lambda root: shutil.rmtree(root / "small"), (), "backbone", "fail", "no checkpoint at", "BACKBONE is vitl16",
        AFTER_BACKBONE,
    ),
    "no configuration": (
        each("small/preprocessor_config.json", lambda path: path.write_text("{")), (), "backbone", "fail",
        "preprocessor_config.json cannot be read", "save the checkpoint again", AFTER_BACKBONE,
    ),
    "weights cut short": (
        TRUNCATE, (), "backbone", "fail", "model.safetensors is damaged or cut short", "save or download it again",
        AFTER_BACKBONE,
    ),
    "a shard missing": (
        lambda root: (root / "small/model.safetensors.index.json").write_text(INDEX), (), "backbone", "fail",
        r"lacks 1 of 2 weight files, such as model-00002\.safetensors", "download it again", AFTER_BACKBONE,
    ),
    "a cache in a file": (
        lambda root: (root / "file").write_text(""), ("--cache", "file"), "cache place", "fail",
        "file: Not a directory", "check CACHE", {"cache version", "cache space", "estimate"},
    ),
    "a cache that may not be written": (
        nothing, ("--cache", "/proc/nowhere"), "cache place", "fail", "/proc/nowhere: ", "check CACHE",
        {"cache version", "cache space", "estimate"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("harm, options, check, status, detail, remedy, skipped", BROKEN.values(), ids=BROKEN)
def test_one_thing_broken(
    patient: Patient,
    harm: Harm,
    options: tuple[str, ...],
    check: str,
    status: str,
    detail: str,
    remedy: str,
    skipped: set[str],
) -> None:
    harm(patient.root)
    report = patient.examine(*options)
    assert re.search(detail, report.findings[check]["detail"]), report.findings[check]
    assert re.search(remedy, report.findings[check]["remedy"]), report.findings[check]
    assert report.states() == {check: status} | dict.fromkeys(skipped, "skipped")
    assert list(report.findings) == CHECKS
    assert report.status == (FOUND if status == "fail" else DONE)


def test_tiles_without_labels_are_asked_for(patient: Patient) -> None:
    shutil.rmtree(patient.tiles / "labels")
    report = patient.examine("--unlabelled")
    assert report.states() == {"label ids": "warning"}


def test_a_device_that_is_not_there(patient: Patient) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    report = patient.examine("--device", "cuda")
    assert report.findings["device"]["status"] == "fail"
    assert "--device cpu" in report.findings["device"]["remedy"]
    later = {"cache version", "cache space", "open files", "shared memory", "speed", "estimate"}
    assert report.states() == {"device": "fail"} | dict.fromkeys(later, "skipped")


def test_options_that_cannot_work_are_one_line(patient: Patient) -> None:
    for options, line in {
        ("--tiles", ""): "TILES is not set",
        ("--tiles", "x", "--sample", "0"): "--sample 0",
        ("--tiles", "x", "--nproc", "0"): "--nproc 0: at least 1 rank",
        ("--tiles", "x", "--price-per-hour", "nan"): "--price-per-hour nan",
        ("--tiles", "x", "--batch-size", "999"): "--batch-size 999",
        ("--tiles", "x", "--cache", "gs://me:secret@bucket/x"): "CACHE is a URL with a user or password in it",
        ("--tiles", "gs://me:secret@bucket/x"): "TILES is a URL with a user or password in it",
    }.items():
        finished = run_here(run_command_line, patient.root, "doctor", *options)
        assert finished.status == 1
        assert re.fullmatch(rf"error: {line}.*\n", finished.err), finished.err
        assert "secret" not in finished.err + finished.out


# Buckets


def test_a_bucket_is_read_as_often_as_was_estimated(patient: Patient, bucket: storage.Bucket, proxy: Proxy) -> None:
    upload(bucket, read_objects(patient.tiles), "sets/train/")
    tiles, cache = f"gs://{bucket.name}/sets/train", f"gs://{bucket.name}/caches/a"
    report = patient.examine("--cache", cache, tiles=tiles)
    assert report.states() == {}
    assert "clock" in report.findings
    assert report.findings["credentials"]["detail"].startswith("anonymous: STORAGE_EMULATOR_HOST is set")
    assert "a test object was created and removed" in report.findings["cache place"]["detail"]
    assert not list(bucket.list_blobs(prefix="caches/"))
    estimate = re.search(r"([\d,]+) reads and ([\d,]+) lists and writes", report.findings["estimate"]["detail"])
    assert estimate
    proxy.asked.clear()
    extract_cache(tiles, cache, patient.backbone)
    reads = [path for path in proxy.asked if any(Proxy.reads(path, suffix) for suffix in (".png", ".txt"))]
    lists = [path for path in proxy.asked if "prefix=sets" in path]
    chunks = [blob.name for blob in bucket.list_blobs(prefix="caches/")]
    blocks = [name for name in chunks if re.search(r"/(cls|patch_mean|label_ids|status|commit)/c/", name)]
    assert int(estimate[1]) == len(reads)
    assert int(estimate[2]) == len(lists) + len(blocks)


def test_a_bucket_with_things_broken(patient: Patient, bucket: storage.Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(bucket, {"sets/train/images/a_1.png": b"", "sets/other.txt": b""})
    missing = patient.examine(tiles="gs://no-such-bucket/x")
    assert missing.findings["storage"]["status"] == "fail"
    assert missing.findings["storage"]["remedy"] == "check the name in TILES"
    wrong = patient.examine(tiles=f"gs://{bucket.name}/sets")
    assert wrong.findings["layout"]["status"] == "fail"
    assert {"train", "other.txt"} <= set(re.findall(r"[\w.]+", wrong.findings["layout"]["remedy"]))
    place = patient.examine("--cache", "gs://no-such-bucket/x")
    assert place.states() == {"cache place": "fail"} | dict.fromkeys(
        ("cache version", "cache space", "estimate"), "skipped"
    )
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr("extract.doctor.storage.DEADLINE_S", 0.5)
    unreachable = patient.examine(tiles=f"gs://{bucket.name}/sets/train")
    assert unreachable.findings["storage"]["status"] == "fail"
    assert "check the network" in unreachable.findings["storage"]["remedy"]
    assert {name for name, state in unreachable.states().items() if state == "skipped"} == (
        AFTER_LAYOUT | {"clock", "layout", "estimate"}
    )


def test_no_credentials(patient: Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "CLOUDSDK_CONFIG"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    report = patient.examine(tiles="gs://some-bucket/x")
    assert report.findings["credentials"]["status"] == "fail"
    assert "gcloud auth application-default login" in report.findings["credentials"]["remedy"]
    assert report.findings["storage"]["status"] == "skipped"
    assert "`credentials`" in report.findings["storage"]["detail"]
    assert patient.examine("--cache", "gs://some-bucket/x").states() == {
        "credentials": "fail",
        **dict.fromkeys(("cache place", "cache version", "cache space", "estimate"), "skipped"),
    }


# The hub


def test_a_gated_backbone(patient: Patient, python_env: dict[str, str]) -> None:
    """The hub's client reads its address when it is imported, hence a process of its own."""
    hub = Hub(patient.backbone)
    hub.answer_file = refuse(401, "GatedRepo", "Access is restricted.")
    env = {name: value for name, value in python_env.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(patient.root / "home")}
    command = [sys.executable, "-m", "extract", "doctor", "--tiles", "tiles", "--device", "cpu", "--json"]
    with hub.serve():
        result = subprocess.run(
            command, env=env, cwd=patient.root, capture_output=True, text=True, timeout=120, check=False
        )
    report = read_report(Finished(result.returncode, result.stdout, result.stderr))
    assert report.states() == {"backbone": "fail"} | dict.fromkeys(AFTER_BACKBONE, "skipped")
    assert "is gated and HF_TOKEN is not set" in report.findings["backbone"]["detail"]
    for word in ("accept its licence at https://huggingface.co/facebook/dinov3-vitl16", "set HF_TOKEN"):
        assert word in report.findings["backbone"]["remedy"]
