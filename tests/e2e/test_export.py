"""What `export` writes, opened by transformers, safetensors and onnxruntime alone, and the way back into a cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import zarr
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoModel

import train.predict.export
from extract.backbone.checkpoint import find_checkpoint
from extract.backbone.dinov3 import Backbone
from tests.checkpoints import MEAN, STD, make_checkpoint
from tests.planted import Finished, extract_cache, fresh_seed, plant_tiles
from tests.planted import train as run_train
from train.model.classifier import Classifier, join_features
from train.predict.trained_model import LoadedRun
from train.runs.checkpoint import load_checkpoint, save_checkpoint

SIZE = 96  # not the checkpoint's own 64: an export must carry the run's
LAYERS = 2
FEATURES = 1e-5
LOGITS = 1e-4
FLOAT16 = 1e-3  # of a vector's norm
TRAINING = ("--epochs", 1, "--device", "cpu")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles, a checkpoint stored in float16, their cache, and three runs: a head, a linear one, and one fine-tuned from
    the first. The first and the last are exported."""
    root = tmp_path_factory.mktemp("export")
    seed = fresh_seed()
    # One layer stays frozen; what an export takes grows with every layer.
    checkpoint = make_checkpoint(root / "checkpoint", seed=seed, num_hidden_layers=LAYERS + 1)
    AutoModel.from_pretrained(checkpoint).half().save_pretrained(checkpoint)
    plant_tiles(root / "tiles", scenes=6, per_scene=5, seed=seed)
    extract_cache(root / "tiles", root / "cache", checkpoint, image_size=SIZE)
    for command, *options in (
        ("head", "--features", "cls+patch_mean"),
        ("head", "--head", "linear", "--run-dir", "runs/linear"),
        # Large steps: what was not put into the export must show.
        ("finetune", "--unfreeze", LAYERS, "--backbone-lr", 3e-3, "--workers", 0),
    ):
        done = run_train(root, command, "--cache", root / "cache", *TRAINING, *options)
        assert done.status == 0, done.err
    for run in ("finetune", "head"):
        done = run_train(root, "export", "--run-dir", f"runs/{run}")
        assert done.status == 0, done.err
        (root / f"{run}.out").write_text(done.out)
    return root


@pytest.fixture
def copy(work: Path, tmp_path: Path) -> Path:
    """The runs, without their exports, to be spoilt."""
    return Path(
        shutil.copytree(work / "runs", tmp_path / "runs", symlinks=True, ignore=shutil.ignore_patterns("export")).parent
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def open_classifier(work: Path, run: str) -> Classifier:
    """The classifier as training left it and as `predict` uses it, in float32."""
    loaded = LoadedRun.load(str(work / "runs" / run))
    base = find_checkpoint(str(work / "checkpoint"), SIZE)
    backbone = Backbone.load(base, precision="float32", device=torch.device("cpu"))
    return loaded.make_classifier(backbone, base.width, torch.device("cpu"))


def make_pixels(tiles: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(fresh_seed())
    return torch.randn(tiles, 3, SIZE, SIZE, generator=generator)


@torch.inference_mode()
def embed_by_transformers(path: Path, pixels: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    """CLS token and mean of the patches (after 4 registers), as a user of the library alone takes them."""
    out = AutoModel.from_pretrained(path, **options).eval()(pixels)
    return {"cls": out.pooler_output, "patch_mean": out.last_hidden_state[:, 5:].mean(dim=1)}


def assert_refused(result: Finished, message: str, *, left: Path) -> None:
    """One line, and nothing new in the run."""
    assert result.status == 1
    assert len(result.errors) == 1, result.err
    assert "Traceback" not in result.err
    assert message in result.errors[0]
    assert not [path for path in left.rglob("*") if path.name.startswith("export") or path.name.endswith(".tmp")]


# The backbone


def test_transformers_opens_the_fine_tuned_backbone(work: Path) -> None:
    pixels = make_pixels(3)
    export = work / "runs" / "finetune" / "export"
    found = embed_by_transformers(export, pixels)
    with torch.inference_mode():
        expected = open_classifier(work, "finetune").backbone(pixels)
    before = embed_by_transformers(work / "checkpoint", pixels, dtype=torch.float32)
    for name in ("cls", "patch_mean"):
        assert found[name].dtype == torch.float32
        assert float((found[name] - expected[name]).abs().max()) <= FEATURES
        assert float((found[name] - before[name]).abs().max()) > 100 * FEATURES  # or the test would prove nothing


def test_only_the_trained_tensors_differ_from_the_checkpoint_it_started_from(work: Path) -> None:
    """Bit for bit: frozen ones are the float16 values widened, trained ones the float32 masters of `best/`."""
    export = AutoModel.from_pretrained(work / "runs" / "finetune" / "export").state_dict()
    before = AutoModel.from_pretrained(work / "checkpoint", dtype=torch.float32).state_dict()
    best = load_checkpoint(work / "runs" / "finetune" / "best").tensors
    trained = {name.removeprefix("backbone.vit."): tensor for name, tensor in best.items() if "backbone" in name}
    assert export.keys() == before.keys()
    for name, tensor in export.items():
        assert torch.equal(tensor, trained.get(name, before[name])), name
    assert sum(not torch.equal(export[name], before[name]) for name in trained) > len(trained) // 2


def test_a_head_leaves_the_backbones_files_as_they_are(work: Path) -> None:
    export = work / "runs" / "head" / "export"
    for name in ("model.safetensors", "config.json"):
        assert (export / name).read_bytes() == (work / "checkpoint" / name).read_bytes()


@pytest.mark.parametrize("run", ["finetune", "head"])
def test_the_preprocessor_is_that_of_the_run(work: Path, run: str) -> None:
    settings = read(work / "runs" / run / "export" / "preprocessor_config.json")
    assert settings["size"] == {"height": SIZE, "width": SIZE}
    assert (settings["image_mean"], settings["image_std"]) == (list(MEAN), list(STD))
    assert settings["resample"] == 2
    assert settings["do_resize"] is settings["do_rescale"] is settings["do_normalize"] is True
    assert settings["rescale_factor"] == 1 / 255


@pytest.mark.parametrize("run", ["finetune", "head"])
def test_every_file_has_its_digest_and_none_names_this_machine(work: Path, run: str) -> None:
    export = work / "runs" / run / "export"
    digests = dict(line.split("  ")[::-1] for line in (export / "sha256").read_text().splitlines())
    expected = {"classifier.onnx", "head.json", "head.safetensors", "model.safetensors"}
    assert set(digests) == {*expected, "config.json", "preprocessor_config.json"}
    for name, digest in digests.items():
        assert hashlib.sha256((export / name).read_bytes()).hexdigest() == digest
    assert str(Path(train.predict.export.__file__).parent).encode() not in (export / "classifier.onnx").read_bytes()


# The head


@pytest.mark.parametrize("run", ["finetune", "head"])
def test_head_and_json_alone_give_the_runs_logits(work: Path, run: str) -> None:
    classifier = open_classifier(work, run)
    pixels = make_pixels(4)
    with torch.inference_mode():
        vectors = join_features(classifier.backbone(pixels), classifier.features)
        expected = classifier(pixels).numpy()
    export = work / "runs" / run / "export"
    head, t = read(export / "head.json"), load_file(export / "head.safetensors")
    assert head["features"] == ["cls", "patch_mean"]
    assert t["0.weight"].shape == (head["hidden"], head["width"])
    inputs = vectors.numpy().astype(np.float64)
    found = np.maximum(inputs @ t["0.weight"].T + t["0.bias"], 0) @ t["3.weight"].T + t["3.bias"]
    np.testing.assert_allclose(found, expected, atol=FEATURES)


@pytest.mark.parametrize("run", ["finetune", "head"])
def test_head_json_says_how_to_read_the_logits(work: Path, run: str) -> None:
    directory = work / "runs" / run
    head, meta = read(directory / "export" / "head.json"), read(directory / "best" / "checkpoint.json")
    names = ("features", "hidden", "dropout", "class_ids", "class_names", "reading", "temperature", "image_size")
    assert {name: head[name] for name in names} == {name: meta[name] for name in names}
    assert len(head["class_names"]) == 60
    assert head["reading"] == "type"
    assert head["thresholds"] == pytest.approx(meta["thresholds"])
    assert head["tuned"] is True
    assert head["trained"]["weights_sha256"] == find_checkpoint(str(work / "checkpoint")).hash_weights()
    weights = (directory / "export" / "model.safetensors").read_bytes()
    assert head["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert (head["trained"]["weights_sha256"] == head["weights_sha256"]) == (run == "head")


def test_a_linear_head_of_a_run_that_was_stopped(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: `--no-onnx` needs none of the packages, and `--out` may name directories that are not there."""
    best = load_checkpoint(copy / "runs" / "linear" / "best")
    save_checkpoint(copy / "runs" / "linear-001" / "best", best.tensors, replace(best.meta, thresholds=()))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = run_train(copy, "export", "--run-dir", "runs/linear", "--out", "new/there", "--no-onnx")
    assert done.status == 0, done.err
    assert "not tuned" in done.out
    assert sorted(path.name for path in (copy / "new").iterdir()) == ["there"]
    assert not (copy / "new" / "there" / "classifier.onnx").exists()
    head = read(copy / "new" / "there" / "head.json")
    assert (head["hidden"], head["tuned"], head["temperature"]) == (0, False, 1.0)
    assert head["thresholds"] == [0.5] * 60
    tensors = load_file(copy / "new" / "there" / "head.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"0.weight": (60, 64), "0.bias": (60,)}


# ONNX


@pytest.mark.parametrize("run", ["finetune", "head"])
def test_onnx_gives_torchs_logits_whatever_the_batch(work: Path, run: str) -> None:
    session = onnxruntime.InferenceSession(work / "runs" / run / "export" / "classifier.onnx")
    (given,), (asked,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("pixel_values", "tensor(float)", [3, SIZE, SIZE])
    assert (asked.name, asked.type, asked.shape[1:]) == ("logits", "tensor(float)", [60])
    classifier = open_classifier(work, run)
    for batch in (1, 2, 5):
        pixels = make_pixels(batch)
        with torch.inference_mode():
            expected = classifier(pixels).numpy()
        (found,) = session.run(None, {"pixel_values": pixels.numpy()})
        np.testing.assert_allclose(found, expected, atol=LOGITS * max(1, np.abs(expected).max()))


# The way back


def read_pixels(tile: Path) -> torch.Tensor:
    """(1, 3, SIZE, SIZE), by Pillow and PyTorch, none of the package's code."""
    image = torch.from_numpy(np.array(Image.open(tile).convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    image = torch.nn.functional.interpolate(image, (SIZE, SIZE), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (image - mean) / std


def test_a_cache_of_the_export_holds_the_fine_tuned_features_and_trains_a_head(work: Path, tmp_path: Path) -> None:
    export = work / "runs" / "finetune-001" / "export"
    cache = tmp_path / "cache"
    extract_cache(work / "tiles", cache, export)  # the image size comes from the export
    arrays: Any = zarr.open_group(str(cache / f"{read(cache / 'current')['version']}.zarr"), mode="r")
    backbone = open_classifier(work, "finetune").backbone
    with torch.inference_mode():
        expected = backbone(torch.cat([read_pixels(work / "tiles" / str(name)) for name in arrays["tile"][:]]))
    for name, vectors in expected.items():
        difference = np.linalg.norm(arrays[name][:].astype(np.float32) - vectors.numpy(), axis=1)
        assert (difference <= FLOAT16 * np.linalg.norm(vectors.numpy(), axis=1)).all()
    done = run_train(tmp_path, "head", "--cache", cache, *TRAINING)
    assert done.status == 0, done.err
    config = read(tmp_path / "runs" / "head" / "config.json")
    weights = hashlib.sha256((export / "model.safetensors").read_bytes()).hexdigest()
    assert config["provenance"]["weights_sha256"] == weights
    assert config["provenance"]["image_size"] == SIZE
    assert config["recorded"]["backbone"] == str(export)
    # The new head finds its backbone again, here where tiles are streamed.
    done = run_train(tmp_path, "predict", "--tiles", work / "tiles", "--workers", 0, "--device", "cpu")
    assert done.status == 0, done.err
    assert "30 tiles -> predictions.csv" in done.out


def test_a_backbone_named_by_a_runs_link_is_found_when_the_link_has_moved_on(work: Path, tmp_path: Path) -> None:
    """Fine-tuning an export a second time moves the very link that it was named by."""
    root = Path(shutil.copytree(work, tmp_path / "work", symlinks=True))
    cache = root / "again"
    extract_cache(root / "tiles", cache, Path("runs/finetune/export"))  # as the README says, in the run's directory
    options = ("finetune", "--cache", cache, "--unfreeze", 1, "--workers", 0, *TRAINING)
    done = run_train(root, *options, "--backbone", "runs/finetune/export")
    assert done.status == 0, done.err
    assert (root / "runs" / "finetune").readlink() == Path("finetune-002")
    recorded = read(root / "runs" / "finetune" / "config.json")["recorded"]["backbone"]
    assert recorded == "runs/finetune-001/export"
    done = run_train(root, *options, "--backbone", "checkpoint")
    assert "was made with BACKBONE=runs/finetune-001/export, not checkpoint" in done.errors[0]
    done = run_train(root, "export", "--no-onnx")
    assert done.status == 0, done.err
    assert "trained tensors merged into runs/finetune-001/export" in done.out


def test_a_cache_of_a_heads_export_is_the_cache_it_was_trained_on(work: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(work / "cache", tmp_path / "cache"))
    before = read(cache / "current")
    extract_cache(work / "tiles", cache, work / "runs" / "head" / "export")
    assert read(cache / "current") == before
    assert len(list(cache.glob("*.zarr"))) == 1


# What best/ holds


def test_best_holds_the_trained_layers_and_the_head_alone(work: Path) -> None:
    best = work / "runs" / "finetune" / "best"
    assert sorted(path.name for path in best.iterdir()) == ["checkpoint.json", "model.safetensors", "sha256"]
    tensors = load_file(best / "model.safetensors")
    kinds = {name.rsplit(".", 1)[0].split(".layer.")[-1].split(".")[0] for name in tensors if "backbone" in name}
    assert kinds == {"1", "2", "backbone"}  # the last two layers, and backbone.vit.norm
    vit = AutoModel.from_pretrained(work / "checkpoint")
    trained = sum(p.numel() for part in (*vit.model.layer[-LAYERS:], vit.norm) for p in part.parameters())
    head = sum(tensor.size for name, tensor in tensors.items() if name.startswith("head."))
    size = (best / "model.safetensors").stat().st_size
    assert 4 * (trained + head) <= size <= 4 * (trained + head) + 150 * len(tensors)  # a name and a shape each


# What is refused


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def move_backbone(copy: Path, **changes: Any) -> None:
    """Have the run believe that its backbone was in `copy`, and put a changed one there."""
    config, meta = copy / "runs" / "linear" / "config.json", copy / "runs" / "linear" / "best" / "checkpoint.json"
    shutil.copytree(read(config)["recorded"]["backbone"], copy / "checkpoint")
    text = meta.read_text().replace(json.dumps(read(meta)["backbone"]), json.dumps(str(copy / "checkpoint")))
    meta.write_text(text)
    digests = meta.with_name("sha256")
    lines = [line for line in digests.read_text().splitlines() if not line.endswith("checkpoint.json")]
    lines.append(f"{hashlib.sha256(text.encode()).hexdigest()}  checkpoint.json")
    digests.write_text("\n".join(lines) + "\n")
    if changes:
        path = copy / "checkpoint" / "preprocessor_config.json"
        path.write_text(json.dumps(read(path) | changes))


def lose_backbone(copy: Path) -> None:
    move_backbone(copy)
    shutil.rmtree(copy / "checkpoint")


def change_weights(copy: Path) -> None:
    move_backbone(copy)
    flip_byte(copy / "checkpoint" / "model.safetensors")


REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "no run": (lambda copy: shutil.rmtree(copy / "runs" / "linear-001"), (), "no run at runs/linear"),
    "damaged": (
        lambda copy: flip_byte(copy / "runs" / "linear" / "best" / "model.safetensors"),
        (),
        "model.safetensors does not match its sha256",
    ),
    "no best epoch": (lambda copy: shutil.rmtree(copy / "runs" / "linear" / "best"), (), "no checkpoint in"),
    "backbone gone": (lose_backbone, (), "which must still be there: no checkpoint at"),
    "other weights": (change_weights, (), "is not the backbone that runs/linear-001 was trained on (weights_sha256"),
    "other mean": (lambda copy: move_backbone(copy, image_mean=(0.5, 0.5, 0.5)), (), "trained on (mean: (0.43,"),
    "something there": (lambda copy: (copy / "kept").mkdir(), ("--out", "kept"), "kept exists and is not overwritten"),
    "no directory": (lambda copy: (copy / "file").write_text(""), ("--out", "file/new"), "cannot write file/new"),
    "out in a bucket": (
        lambda copy: None,
        ("--out", "gs://bucket/x"),
        "an export must be a local directory",
    ),
    "run in a bucket": (lambda copy: None, ("--run-dir", "gs://bucket/head"), "name one with --out"),
}


@pytest.mark.parametrize("spoil, options, message", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(
    copy: Path, spoil: Callable[[Path], object], options: tuple[str, ...], message: str
) -> None:
    spoil(copy)
    result = run_train(copy, "export", "--run-dir", "runs/linear", "--no-onnx", *options)
    assert_refused(result, message, left=copy / "runs")


@pytest.mark.parametrize("command", ["evaluate", "report", "export", "triage"])
def test_what_needs_the_run_itself_says_so_of_an_export(work: Path, command: str) -> None:
    options = ("--cache", work / "cache") if command == "evaluate" else ()
    done = run_train(work, command, "--run-dir", "runs/head/export", *options)
    assert done.status == 1
    (line,) = done.errors
    assert line == (
        "error: runs/head/export is an export, which `make predict` alone takes: RUN is the run it was made of, such "
        "as runs/finetune"
    )


def test_an_export_is_not_overwritten(work: Path) -> None:
    before = (work / "runs" / "head" / "export" / "sha256").read_bytes()
    done = run_train(work, "export", "--run-dir", "runs/head")
    assert (done.status, len(done.errors)) == (1, 1)
    assert "runs/head-001/export exists and is not overwritten" in done.errors[0]
    assert (work / "runs" / "head" / "export" / "sha256").read_bytes() == before


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_a_package_onnx_is_refused_before_any_work(
    copy: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what Python's import takes for "not to be found"
    result = run_train(copy, "export", "--run-dir", "runs/linear")
    assert_refused(result, f"not installed ({package}): pip install 'tileprobe[onnx]'", left=copy / "runs")


def test_what_does_not_compute_what_the_run_does_is_not_left(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.predict.export, "MAX_DIFFERENCE", -1.0)
    result = run_train(copy, "export", "--run-dir", "runs/finetune", "--no-onnx")
    assert_refused(result, "gives logits that differ from the run's by", left=copy / "runs")


def test_make_has_a_target() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "export", "VENV=", "RUN=runs/x", "ARGS=--no-onnx"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert "-m train export --run-dir 'runs/x' --no-onnx" in done.stdout
