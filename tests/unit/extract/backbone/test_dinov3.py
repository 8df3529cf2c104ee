"""The backbone against transformers' own forward pass, what trains of it, and checkpoints that are not right."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity
from transformers import AutoModel

from extract.backbone.checkpoint import find_checkpoint, follow_links
from extract.backbone.dinov3 import Backbone
from extract.errors import BackboneError
from tests.checkpoints import MEAN, STD, make_checkpoint
from tests.hub import HUB_ID, Answer, Hub, refuse
from tests.planted import fresh_seed

PROJECT_ROOT = Path(__file__).parents[4]

CPU = torch.device("cpu")
LAYERS, REGISTERS = 4, 4


@pytest.fixture(scope="module", params=["plain", "gated"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / request.param
    return make_checkpoint(path, seed=fresh_seed(), use_gated_mlp=request.param == "gated")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return shutil.copytree(plain, tmp_path / "checkpoint")


def load(path: Path, precision: Any = "float32") -> Backbone:
    return Backbone.load(find_checkpoint(str(path)), precision=precision, device=CPU)


def trained_of(backbone: Backbone) -> list[torch.nn.Parameter]:
    return [parameter for parameter in backbone.parameters() if parameter.requires_grad]


def draw_pixel_values(size: int = 64, batch: int = 3) -> torch.Tensor:
    torch.manual_seed(fresh_seed())
    return torch.randn(batch, 3, size, size)


# The forward pass


@pytest.mark.parametrize("size", [64, 96])
def test_pooled_equals_the_librarys_forward(checkpoint: Path, size: int) -> None:
    """Within 1e-5: the same operations in float32, in another order for the final norm."""
    pixels = draw_pixel_values(size)
    model = AutoModel.from_pretrained(checkpoint, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(pixels)
    patches = expected.last_hidden_state[:, -((size // 16) ** 2) :]
    assert expected.last_hidden_state.shape[1] == 1 + REGISTERS + patches.shape[1]
    with torch.no_grad():
        pooled = load(checkpoint)(pixels)
    torch.testing.assert_close(pooled["cls"], expected.pooler_output, rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled["patch_mean"], patches.mean(dim=1), rtol=0, atol=1e-5)


def test_patch_mean_leaves_out_cls_and_registers(checkpoint: Path) -> None:
    """They would move it by far more than the tolerance above."""
    pixels = draw_pixel_values()
    with torch.no_grad():
        tokens = AutoModel.from_pretrained(checkpoint).eval()(pixels).last_hidden_state
        patch_mean = load(checkpoint)(pixels)["patch_mean"]
    for first in (0, 1, REGISTERS):
        assert (tokens[:, first:].mean(dim=1) - patch_mean).abs().max() > 1e-3


def test_bf16_is_near_float32_and_pools_in_float32(checkpoint: Path) -> None:
    pixels = draw_pixel_values()
    with torch.no_grad():
        exact, rounded = load(checkpoint)(pixels), load(checkpoint, "bf16")(pixels)
    for name, vectors in rounded.items():
        assert vectors.dtype == torch.float32
        assert (vectors != vectors.bfloat16().float()).any()
        assert cosine_similarity(vectors, exact[name]).min() > 0.999


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_rope_frequencies_stay_float32(checkpoint: Path, precision: str) -> None:
    """Rounded to bf16 they would shift every position."""
    backbone = load(checkpoint, precision)
    frequencies = backbone.vit.rope_embeddings.inv_freq
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, load(checkpoint).vit.rope_embeddings.inv_freq, rtol=0, atol=0)
    assert (frequencies != frequencies.bfloat16().float()).any()
    assert backbone.dtype == {"float32": torch.float32, "bf16": torch.bfloat16}[precision]


def test_train_leaves_frozen_parts_in_eval(checkpoint: Path) -> None:
    """In training mode DINOv3 draws a jitter of its positions, which would make frozen features random."""
    backbone = load(checkpoint)
    pixels = draw_pixel_values()
    with torch.no_grad():
        before = backbone(pixels)["cls"]
        backbone.train()
        again = backbone(pixels)["cls"]
    assert not any(module.training for module in backbone.modules())
    torch.testing.assert_close(again, before, rtol=0, atol=0)
    backbone.unfreeze_last(2)
    backbone.train()
    training = {name for name, module in backbone.named_modules() if module.training}
    assert training
    assert all(name.startswith(("vit.model.layer.2", "vit.model.layer.3")) for name in training)
    with torch.no_grad():
        torch.testing.assert_close(backbone(pixels)["cls"], before, rtol=0, atol=1e-5)


def test_suffix_runs_in_float32_over_a_bf16_prefix(plain: Path) -> None:
    backbone = load(plain, "bf16")
    backbone.unfreeze_last(2)
    pixels = draw_pixel_values()
    assert backbone.run_prefix(pixels).dtype == torch.bfloat16
    assert {p.dtype for p in backbone.layers[-1].parameters()} == {torch.float32}
    assert {p.dtype for p in backbone.layers[0].parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert cosine_similarity(backbone(pixels)["cls"], load(plain)(pixels)["cls"]).min() > 0.999


# What trains


@pytest.mark.parametrize("layers", [1, 3, LAYERS])
def test_unfreeze_last_names_exactly_those_tensors(checkpoint: Path, layers: int) -> None:
    backbone = load(checkpoint)
    expected = {
        name
        for name, _ in Backbone.outline(find_checkpoint(str(checkpoint))).named_parameters()
        if name.startswith(tuple(f"vit.model.layer.{i}." for i in range(LAYERS - layers, LAYERS)))
        or name in ("vit.norm.weight", "vit.norm.bias")
    }
    names = backbone.unfreeze_last(layers)
    assert len(names) == len(set(names))
    assert set(names) == expected
    assert {name for name, parameter in backbone.named_parameters() if parameter.requires_grad} == expected
    assert len(expected) > 10 * layers


def test_gradients_reach_those_tensors_and_no_other(checkpoint: Path) -> None:
    backbone = load(checkpoint)
    names = set(backbone.unfreeze_last(2))
    sum(vectors.square().sum() for vectors in backbone(draw_pixel_values()).values()).backward()  # type: ignore[union-attr]
    assert {name for name, p in backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == names


@pytest.mark.parametrize("checkpointing", [False, True])
def test_cls_alone_is_that_of_the_whole_with_its_gradients(checkpoint: Path, checkpointing: bool) -> None:
    """The last layer leaves out what only other tokens need, and nothing that CLS needs.

    Within 1e-5 of the norm of all gradients: float32 sums of another order.
    """
    seed = fresh_seed()
    pixels, weights = draw_pixel_values(), torch.randn(64, generator=torch.Generator().manual_seed(seed))
    found = []
    for pooling in (("cls",), ("patch_mean", "cls")):
        backbone = load(checkpoint)
        backbone.unfreeze_last(2, checkpointing=checkpointing)
        backbone.train()
        pooled = backbone(pixels, pooling)
        assert tuple(pooled) == pooling
        (pooled["cls"] @ weights).square().sum().backward()
        found.append((pooled["cls"].detach(), torch.cat([p.grad.flatten() for p in trained_of(backbone)])))
    (alone, gradients), (whole, expected) = found
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-5)
    assert (gradients - expected).norm() < 1e-5 * expected.norm()


def test_an_unfrozen_backbone_is_let_go_when_the_last_name_is(checkpoint: Path) -> None:
    """No part refers to itself: a large model is not to stay in memory until garbage is collected."""
    backbone = load(checkpoint)
    backbone.unfreeze_last(2)
    held = [weakref.ref(layer) for layer in backbone.layers]
    gc.collect()
    gc.disable()
    try:
        del backbone
        assert [layer() for layer in held] == [None] * LAYERS
    finally:
        gc.enable()


def test_a_frozen_backbone_gives_the_same_bits_whatever_is_asked_for(checkpoint: Path) -> None:
    pixels, backbone = draw_pixel_values(), load(checkpoint)
    assert torch.equal(backbone(pixels, ("cls",))["cls"], backbone(pixels)["cls"])


def test_nothing_trains_before_it_is_asked(checkpoint: Path) -> None:
    backbone = load(checkpoint)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone(draw_pixel_values())["cls"].requires_grad


@pytest.mark.parametrize("layers", [-1, 0, LAYERS + 1])
def test_impossible_number_of_layers(plain: Path, layers: int) -> None:
    backbone = load(plain)
    with pytest.raises(BackboneError, match=rf"UNFREEZE={layers}: this backbone has {LAYERS} layers"):
        backbone.unfreeze_last(layers)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


# Checkpoints


def test_what_a_checkpoint_says(plain: Path) -> None:
    found = find_checkpoint(str(plain))
    assert (found.depth, found.width, found.image_size, found.mean, found.std) == (LAYERS, 64, 64, MEAN, STD)
    assert find_checkpoint(str(plain), 224).image_size == 224


@pytest.mark.parametrize("size, message", [
    (100, "IMAGE_SIZE 100 is not a multiple of the 16 px patch: try 96 or 112"),
    (10, "try 16 or 32"),
    (0, "IMAGE_SIZE 0 is not"),
    (-16, "try 16 or 32"),
])  # fmt: skip
def test_image_size_it_cannot_take(plain: Path, size: int, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        find_checkpoint(str(plain), size)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda path: (path / "config.json").unlink(), "no checkpoint at .*a directory with config.json"),
    "config cut": (lambda path: (path / "config.json").write_text("{"), "config.json cannot be read"),
    "config of a list": (lambda path: (path / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "another model": (lambda path: edit_json(path / "config.json", model_type="vit"), "'vit'.*must be a DINOv3 ViT"),
    "no patch size": (lambda path: edit_json(path / "config.json", patch_size=None), "patch_size"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), r"no model\*.safetensors: save the checkpoint"),
    "no preprocessor": (
        lambda path: (path / "preprocessor_config.json").unlink(),
        "preprocessor_config.json is missing: copy",
    ),
    "preprocessor without size": (
        lambda path: edit_json(path / "preprocessor_config.json", size={"shortest_edge": 64}),
        "height",
    ),
    "preprocessor of one channel": (
        lambda path: edit_json(path / "preprocessor_config.json", image_mean=[0.5]),
        "1 means and 3 deviations",
    ),
    "tensor missing": (
        lambda path: edit_weights(path, lambda tensors: tensors.pop("layer.3.norm1.weight")),
        r"leaves 1 tensors unfilled, such as model\.layer\.3\.norm1\.weight",
    ),
    "tensor of another shape": (
        lambda path: edit_weights(path, lambda tensors: tensors.update({"norm.weight": torch.zeros(32)})),
        r"leaves 1 tensors unfilled, such as norm\.weight",
    ),
    "weights of a shallower model": (
        lambda path: edit_json(path / "config.json", num_hidden_layers=5),
        r"unfilled, such as model\.layer\.4",
    ),
    "weights cut": (
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-100]),
        "cannot load",
    ),
    "weights empty": (lambda path: (path / "model.safetensors").write_bytes(b""), "cannot load"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint(copy: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(copy)
    with pytest.raises(BackboneError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_hash_of_weights_is_that_of_the_files_bytes(copy: Path) -> None:
    first = copy / "model.safetensors"
    digest = hashlib.sha256(first.read_bytes()).hexdigest()
    assert find_checkpoint(str(copy)).hash_weights() == digest
    edit_json(copy / "config.json", transformers_version="0")  # not the weights' concern
    assert find_checkpoint(str(copy)).hash_weights() == digest
    (copy / "head.safetensors").write_bytes(b"the head that an export lays beside it")
    assert find_checkpoint(str(copy)).hash_weights() == digest
    second = copy / "model-2.safetensors"
    second.write_bytes(first.read_bytes() + b"x")
    both = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (second, first)]  # by name: "-" before "."
    assert find_checkpoint(str(copy)).hash_weights() == hashlib.sha256("".join(both).encode()).hexdigest()


def test_one_changed_weight_changes_the_hash(copy: Path) -> None:
    before = find_checkpoint(str(copy)).hash_weights()
    edit_weights(copy, lambda tensors: tensors["norm.bias"][0].add_(1e-3))
    assert find_checkpoint(str(copy)).hash_weights() != before


def test_a_link_is_followed_and_any_other_name_stays(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    (copy.parent / "newest").symlink_to(copy)
    (copy.parent / "demo").symlink_to(copy)
    (copy.parent / "empty").mkdir()
    (copy.parent / "to-nothing").symlink_to("empty")
    assert follow_links("newest") == copy.name
    assert follow_links(str(copy.parent / "newest")) == str(copy)
    for name in (copy.name, f"./{copy.name}", str(copy), "demo", "vitl16", "org/model", "to-nothing"):
        assert follow_links(name) == name


# The hub

LICENCE = f"https://huggingface.co/{HUB_ID}"


ASKER = """
import json, os, sys
from extract.backbone.checkpoint import find_checkpoint, find_configuration
from extract.errors import BackboneError
for line in sys.stdin:
    function, environment = json.loads(line)
    os.environ.update(environment)
    try:
        found = globals()[function]("vitl16", 64)
        answer = ["path", str(found.path)] if function == "find_checkpoint" else [str(found[0].path), str(found[1])]
    except BackboneError as error:
        answer = ["error", str(error)]
    for name in environment:
        del os.environ[name]
    print(json.dumps(answer), flush=True)
"""


class Asker:
    """A process that looks for checkpoints on the hub: the hub's client reads its address when it is imported."""

    def __init__(self, hub: Hub, home: Path, env: dict[str, str]) -> None:
        self.hub = hub
        clean = {k: v for k, v in env.items() if not k.startswith(("HF_", "HUGGING"))}
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self.complaints = (home / "stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", ASKER],
            env=clean | settings,
            cwd=home,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
        )

    def ask(self, function: str = "find_checkpoint", /, **environment: str) -> list[str]:
        """`["path", where]`, of `find_configuration` `[where, bytes to download]`; or `["error", text]`."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([function, environment]) + "\n")
        self.process.stdin.flush()
        answer: list[str] = json.loads(self.process.stdout.readline() or '["crash", ""]')
        self.complaints.seek(0)
        assert self.complaints.read() == ""
        return answer

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(30)
        self.complaints.close()


@pytest.fixture(scope="module")
def asker(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    paths = [str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with Hub(plain).serve() as hub:
        asker = Asker(hub, tmp_path_factory.mktemp("home"), env)
        yield asker
        asker.close()


CANNOT_DOWNLOAD = [f"cannot download {HUB_ID}", "check the network", "set BACKBONE to the directory"]
REFUSALS: dict[str, tuple[Answer | None, Answer | None, dict[str, str], list[str]]] = {
    "gated, no token": (None, refuse(401, "GatedRepo", "Access is restricted."), {}, [LICENCE, "HF_TOKEN is not set"]),
    "gated, a token without access": (
        None,
        refuse(403, "GatedRepo", "Access is restricted."),
        {"HF_TOKEN": "hf_abcdefgh"},
        [LICENCE, "the token in HF_TOKEN has no access"],
    ),
    "gated from the first request": (refuse(403, "GatedRepo"), None, {}, [LICENCE, "HF_TOKEN is not set"]),
    "token not accepted": (
        refuse(401, "", "Invalid credentials in Authorization header"),
        None,
        {"HF_TOKEN": "hf_abcdefgh"},
        [HUB_ID, "does not accept the token in HF_TOKEN"],
    ),
    "private or missing": (refuse(401, "RepoNotFound"), None, {}, [f"no model {HUB_ID}", "HF_TOKEN", "BACKBONE"]),
    "missing": (refuse(404, "RepoNotFound"), None, {}, [f"no model {HUB_ID}", "BACKBONE"]),
    "hub out of order": (refuse(500), None, {}, CANNOT_DOWNLOAD),
    "connection breaks at the first request": ((0, {}, b""), None, {}, CANNOT_DOWNLOAD),
    "connection breaks in the download": (None, (0, {}, b""), {}, CANNOT_DOWNLOAD),
}


@pytest.mark.parametrize("function", ["find_checkpoint", "find_configuration"])
@pytest.mark.parametrize("api, file, token, words", REFUSALS.values(), ids=REFUSALS)
def test_hub_refuses(
    asker: Asker, api: Answer | None, file: Answer | None, token: dict[str, str], words: list[str], function: str
) -> None:
    asker.hub.answer_api, asker.hub.answer_file = api, file
    kind, text = asker.ask(function, **token)
    assert kind == "error", text
    assert "\n" not in text
    assert all(word in text for word in words), text
    assert "hf_abcdefgh" not in text


def test_hub_gives_and_is_then_not_needed(asker: Asker, plain: Path) -> None:
    """The server is not only good at refusing; and a question for the configuration leaves the weights there."""
    asker.hub.answer_api = asker.hub.answer_file = None
    path, missing = asker.ask("find_configuration")
    assert sorted(os.listdir(path)) == ["config.json", "preprocessor_config.json"]
    assert int(missing) == sum(path.stat().st_size for path in plain.iterdir())
    kind, path = asker.ask()
    assert kind == "path", path
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    asker.hub.answer_api = asker.hub.answer_file = refuse(500)
    assert asker.ask() == ["path", path]
    assert asker.ask("find_configuration") == [path, "0"]
    shutil.rmtree(Path(path).parents[1])


@pytest.mark.parametrize(
    "name", ["no-such-name", "./nowhere", "/no/where", "a/b/c", "bad name/x", "", ".", "org/.hidden"]
)
def test_names_that_can_be_no_checkpoint(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackboneError, match="no checkpoint at .*BACKBONE is vitl16, vit7b16, demo"):
        find_checkpoint(name)
