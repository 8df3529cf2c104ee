"""`train finetune` as its user runs it: which tensors change, what step 0 prints, and what it refuses."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import train.loop.assemble
from cache_schema import Taxonomy
from tests.checkpoints import make_checkpoint
from tests.e2e.train.recompute import TOLERANCE, assert_refused, names_shown, open_arrays, read, read_lines, snapshot
from tests.planted import extract_cache, fresh_seed
from tests.planted import train as run_train
from train.loop.trainer import Trainer


class RecordingTrainer(Trainer):
    """Notes every tensor of the classifier, and what its frozen part gives, before and after training."""

    seen: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
    frozen: tuple[torch.Tensor, torch.Tensor]

    def fit(self, note: Any) -> None:
        before, features = self._note()
        super().fit(note)
        after, features_after = self._note()
        type(self).seen, type(self).frozen = (before, after), (features, features_after)

    def _note(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        tensors = [*self.classifier.named_parameters(), *self.classifier.named_buffers()]
        pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        assert self.classifier.backbone is not None
        with torch.no_grad():
            frozen = self.classifier.backbone.run_prefix(pixels)
        return {name: tensor.detach().clone() for name, tensor in tensors}, frozen


@pytest.mark.parametrize("unfreeze", [3, 1, 4])
def test_exactly_the_asked_tensors_change(
    work: Path, made: Path, monkeypatch: pytest.MonkeyPatch, unfreeze: int
) -> None:
    monkeypatch.setattr(train.loop.assemble, "Trainer", RecordingTrainer)
    arguments = ("--cache", made / "cache", "--unfreeze", unfreeze, "--epochs", 2, "--workers", 0, "--device", "cpu")
    result = run_train(work, "finetune", *arguments)
    assert result.status == 0, result.err
    before, after = RecordingTrainer.seen
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    depth = 4
    layer = re.compile(r"backbone\.vit\.(?:model\.)?layer\.(\d+)\.")
    in_layers = {name: int(match[1]) for name in before if (match := layer.match(name))}
    assert set(in_layers.values()) == set(range(depth))
    expected = {name for name, number in in_layers.items() if number >= depth - unfreeze}
    assert len(expected) > 15 * unfreeze  # of the others some weights may have no names, see extract/backbone/onednn.py
    expected |= {"backbone.vit.norm.weight", "backbone.vit.norm.bias"}
    expected |= {f"head.{name}" for name in ("0.weight", "0.bias", "3.weight", "3.bias")}
    assert changed == expected
    assert torch.equal(*RecordingTrainer.frozen)
    # It began with the checkpoint's own weights and the best cached head, and last/ holds what it ended with.
    stored = load_file(made / "checkpoint" / "model.safetensors")
    for name, tensor in before.items():
        short = name.removeprefix("backbone.vit.")
        for candidate in (short, short.removeprefix("model.")):
            if candidate in stored:
                np.testing.assert_array_equal(tensor.numpy(), stored[candidate])
                break
        else:
            assert name.startswith("head.") or "rope" in name or "inv_freq" in name, name
    head = load_file(work / "runs" / "head" / "best" / "model.safetensors")
    for name, value in head.items():
        np.testing.assert_array_equal(before[name].numpy(), value)
    last = load_file(work / "runs" / "finetune" / "last" / "model.safetensors")
    assert set(last) == expected
    for name, value in last.items():
        np.testing.assert_array_equal(after[name].numpy(), value)
    assert f"training {len(expected) - 4} tensors" in result.out


def test_fine_tuning_goes_on_with_a_linear_head_and_another_loss(made: Path, tmp_path: Path) -> None:
    """The head's shape is the checkpoint's, whatever the options say; the loss is the one asked for."""
    run_options = ("--cache", made / "cache", "--epochs", 1, "--device", "cpu")
    head = run_train(tmp_path, "head", *run_options, "--head", "linear", "--loss", "bce")
    assert head.status == 0, head.err
    finetune = run_train(tmp_path, "finetune", *run_options, "--workers", 0, "--unfreeze", 1, "--loss", "asymmetric")
    assert finetune.status == 0, finetune.err
    runs = tmp_path / "runs"
    for name in ("head", "finetune"):
        tensors = load_file(runs / name / "best" / "model.safetensors")
        assert {key for key in tensors if key.startswith("head.")} == {"head.0.weight", "head.0.bias"}
    config = read(runs / "finetune" / "config.json")["config"]
    assert (config["head"], config["loss"]) == ("linear", "asymmetric")
    names, labels = names_shown(made / "tiles", read(runs / "head" / "split.json")["val"])
    arrays = open_arrays(made / "cache")
    row_of = {str(name): row for row, name in enumerate(arrays["tile"][:])}
    t = load_file(runs / "head" / "best" / "model.safetensors")
    logits = arrays["cls"][:][[row_of[name] for name in names]].astype(float) @ t["head.0.weight"].T + t["head.0.bias"]
    entropy = np.logaddexp(0, np.where(labels, -logits, logits)).mean()
    assert read(runs / "head" / "metrics.json")["loss"] == pytest.approx(entropy, abs=TOLERANCE)
    used = run_train(tmp_path, "predict", "--run-dir", "runs/head", "--cache", made / "cache", "--device", "cpu")
    assert used.status == 0, used.err


def test_finetuning_starts_from_the_head_and_says_so(trained: Path) -> None:
    out = (trained / "finetune.out").read_text()
    best = read(trained / "runs" / "head" / "best" / "checkpoint.json")["epoch"]
    assert f"head starts from runs/head-001, best epoch {best}; validates on the split of that run" in out
    assert read(trained / "runs" / "head" / "split.json") == read(trained / "runs" / "finetune" / "split.json")
    match = re.search(r"step 0: (\d+) rows streamed again differ from the cache by at most (\S+) of their norm", out)
    assert match
    assert float(match[2]) <= 1e-3
    match = re.search(r"step 0: in training precision their median cosine is (\S+)", out)
    assert match
    assert float(match[1]) >= 0.999
    match = re.search(r"step 0: mAP of the starting head: cached (\S+), streamed (\S+)\n", out)
    assert match
    expected = read_lines(trained / "runs" / "head" / "history.jsonl")[best - 1]["map_macro"]
    assert float(match[1]) == pytest.approx(expected, abs=1e-4)
    # Vectors go through float16 into the cache only: in a ranking of some 20 tiles two may change places.
    assert float(match[2]) == pytest.approx(expected, abs=0.06)
    config = read(trained / "runs" / "finetune" / "config.json")["config"]
    assert (config["lr"], config["backbone_lr"], config["unfreeze"]) == (1e-4, 1e-5, 3)


def test_a_head_that_does_not_fit_is_refused(work: Path, made: Path) -> None:
    before = snapshot(work / "runs")
    arguments = ("finetune", "--cache", made / "cache", "--workers", 0, "--device", "cpu", "--epochs", 1)
    fine_tuned = ("--head-run", "runs/finetune")
    assert_refused(run_train(work, *arguments, *fine_tuned), "3 unfrozen layers.*make train-head")
    assert_refused(run_train(work, *arguments, "--head-run", "runs/nowhere"), "no run at runs/nowhere")
    taxonomy = work / "classes.csv"
    names = Taxonomy.xview().names
    taxonomy.write_text("class_id,type_id,name\n" + "".join(f"{i},{i + 40},{n} 2\n" for i, n in enumerate(names)))
    split = ("--split-file", work / "runs" / "head" / "split.json", "--taxonomy", taxonomy, "--label-ids", "type")
    assert_refused(run_train(work, *arguments, *split), "TaxonomyError|label lines are ignored|classes")
    exclude = ("--split-file", work / "runs" / "head" / "split.json", "--exclude", "48")
    assert_refused(run_train(work, *arguments, *exclude), "the head knows 60 classes, this run 59")
    assert snapshot(work / "runs") == before


def test_more_layers_than_there_are_is_an_error(work: Path, made: Path) -> None:
    before = snapshot(work / "runs")
    for unfreeze in (5, -1):
        arguments = ("--cache", made / "cache", "--unfreeze", unfreeze, "--workers", 0, "--device", "cpu")
        assert_refused(run_train(work, "finetune", *arguments), f"UNFREEZE={unfreeze}: .* has 4 layers")
    assert snapshot(work / "runs") == before


def test_unfreezing_nothing_is_the_cached_path(made: Path, tmp_path: Path) -> None:
    same = (
        "--cache",
        made / "cache",
        "--epochs",
        2,
        "--lr",
        1e-3,
        "--batch-size",
        8,
        "--warmup",
        0.1,
        "--device",
        "cpu",
    )
    assert run_train(tmp_path, "head", *same).status == 0
    result = run_train(tmp_path, "finetune", "--unfreeze", 0, *same)
    assert result.status == 0, result.err
    assert "step 0" not in result.out
    histories = [(tmp_path / "runs" / run / "history.jsonl").read_bytes() for run in ("head", "finetune")]
    assert histories[0] == histories[1]
    assert all(
        name.startswith("head.") for name in load_file(tmp_path / "runs" / "finetune" / "last" / "model.safetensors")
    )


def test_the_gated_mlp_of_the_7b_fine_tunes(made: Path, tmp_path: Path) -> None:
    backbone = make_checkpoint(tmp_path / "gated", seed=fresh_seed(), use_gated_mlp=True)
    cache = extract_cache(made / "val-tiles", tmp_path / "cache", backbone, precision="bf16")
    few = ("--scene-regex", r"(?P<scene>\d_\d)$", "--workers", 0, "--device", "cpu")
    result = run_train(tmp_path, "finetune", "--cache", cache, "--unfreeze", 2, "--epochs", 1, *few)
    assert result.status == 0, result.err
    assert "no cached head to start from: the head starts at random" in result.out
    tensors = load_file(tmp_path / "runs" / "finetune" / "best" / "model.safetensors")
    assert sum("gate_proj.weight" in name for name in tensors) == 2
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}


def test_step_zero_refuses_vectors_of_other_weights(made: Path, tmp_path: Path) -> None:
    """Another checkpoint's vectors under this one's name, as if the store had been written by hand."""
    cache = Path(shutil.copytree(made / "cache", tmp_path / "cache"))
    other = extract_cache(
        made / "tiles", tmp_path / "other", make_checkpoint(tmp_path / "checkpoint", seed=fresh_seed()),
    )  # fmt: skip
    version, foreign = (read(Path(path) / "current")["version"] for path in (cache, other))
    for name in ("cls", "patch_mean", "commit"):
        shutil.rmtree(cache / f"{version}.zarr" / name)
        shutil.copytree(tmp_path / "other" / f"{foreign}.zarr" / name, cache / f"{version}.zarr" / name)
    arguments = ("--cache", cache, "--epochs", 1, "--workers", 0, "--device", "cpu")
    result = run_train(tmp_path, "finetune", *arguments)
    assert_refused(result, "streamed embeddings differ from the cache's by .* of their norm")
    assert not (tmp_path / "runs" / "finetune" / "best").exists()


def test_other_weights_in_the_checkpoints_place_are_refused(made: Path, tmp_path: Path) -> None:
    backbone = Path(shutil.copytree(made / "checkpoint", tmp_path / "checkpoint"))
    cache = extract_cache(made / "tiles", tmp_path / "cache", backbone)
    assert run_train(tmp_path, "head", "--cache", cache, "--epochs", 1, "--device", "cpu").status == 0
    make_checkpoint(backbone, seed=fresh_seed())
    before = snapshot(tmp_path / "runs")
    result = run_train(tmp_path, "finetune", "--cache", cache, "--workers", 0, "--device", "cpu")
    assert_refused(result, "is not what made .*weights_sha256.*make extract")
    # A run on tiles needs that backbone; on the cache it does not.
    assert_refused(run_train(tmp_path, "evaluate", "--tiles", made / "tiles", "--workers", 0), "its weights differ")
    assert run_train(tmp_path, "evaluate", "--cache", cache, "--device", "cpu").status == 0
    assert snapshot(tmp_path / "runs") == before


@pytest.mark.parametrize("side", ["train", "val"])
@pytest.mark.parametrize("what", ["tile changed", "tile gone", "label changed"])
def test_tiles_that_are_not_the_caches_are_refused(
    work: Path, made: Path, tmp_path: Path, side: str, what: str
) -> None:
    tiles = Path(shutil.copytree(made / "tiles", tmp_path / "tiles"))  # modification times are kept
    cache = extract_cache(tiles, tmp_path / "cache", made / "checkpoint")
    assert run_train(work, "head", "--cache", cache, "--epochs", 1, "--device", "cpu").status == 0
    names, _ = names_shown(tiles, read(work / "runs" / "head" / "split.json")[side])
    victim, label = tiles / names[-1], tiles / "labels" / f"{Path(names[-1]).stem}.txt"
    if what == "tile changed":
        data = bytearray(victim.read_bytes())
        data[-20] ^= 1  # the same size: only its time tells
        victim.write_bytes(data)
    elif what == "tile gone":
        victim.unlink()
    else:
        label.write_text("")
    before = snapshot(work / "runs")
    result = run_train(work, "finetune", "--cache", cache, "--workers", 0, "--device", "cpu")
    expected = "1 tiles gone, 0 changed" if what == "tile gone" else "0 tiles gone, 1 changed"
    assert_refused(result, f"{expected} .*{re.escape(names[-1])}.*make extract")
    assert snapshot(work / "runs") == before
