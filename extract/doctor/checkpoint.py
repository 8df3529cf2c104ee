"""Check the backbone: its configuration, and its weights or whether they can be downloaded."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from extract.backbone.checkpoint import Checkpoint, find_configuration
from extract.backbone.precision import DTYPES
from extract.errors import BackboneError
from extract.ranks.machine import find_free_memory

from .finding import Concern, Verdict
from .machine import Device

_HUB_BYTES_A_NUMBER = 4
"""The hub holds these models in float32."""


@dataclass(frozen=True)
class Weights:
    """A checkpoint and its size.

    Attributes:
        checkpoint: has no weight files while something must be downloaded.
        download: bytes to download from the hub.
        file_bytes: size of the weight files.
        numbers: number of parameters.
    """

    checkpoint: Checkpoint
    download: int
    file_bytes: int
    numbers: int


def check_backbone(name: str, image_size: int | None, device: Device | None) -> Verdict[Weights]:
    """Read the configuration, and the headers of local weight files or the hub's permission; load no weights.

    Args:
        device: device that the weights must fit on, if known.

    Raises:
        BackboneError: not found, gated, damaged, not a DINOv3 ViT, or an unsuitable image size.
    """
    checkpoint, download = find_configuration(name, image_size)
    if download:
        weights = Weights(checkpoint, download, download, download // _HUB_BYTES_A_NUMBER)
        where = f"the hub grants access; {download / 2**30:.1f} GiB to download"
    else:
        _refuse_missing_shards(checkpoint)
        files = checkpoint.weight_files
        numbers = sum(map(_count_numbers, files))
        weights = Weights(checkpoint, 0, sum(file.stat().st_size for file in files), numbers)
        where = f"{numbers / 1e6:,.1f} M parameters, {weights.file_bytes / 2**30:.2f} GiB in {checkpoint.path}"
    detail = (
        f"{name}: {checkpoint.depth} layers of width {checkpoint.width}, {checkpoint.image_size} px a side, "
        f"{checkpoint.tokens} tokens and {checkpoint.flop / 1e9:.3g} GFLOP per tile; {where}"
    )
    concerns = [*_judge_download(download), *(_judge_memory(weights, device) if device else [])]
    return Verdict(weights, detail, concerns)


def _count_numbers(file: Path) -> int:
    """Count the parameters in a weight file from its header, which must account for every byte of the file."""
    try:
        with safe_open(file, "pt") as tensors:
            return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"{file} is damaged or cut short ({error}): save or download it again") from error


def _refuse_missing_shards(checkpoint: Checkpoint) -> None:
    index = checkpoint.path / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        wanted = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BackboneError(f"{index} cannot be read ({type(error).__name__}): save or download it again") from error
    missing = sorted(wanted - {file.name for file in checkpoint.weight_files})
    if missing:
        raise BackboneError(
            f"{checkpoint.path} lacks {len(missing)} of {len(wanted)} weight files, such as {missing[0]}: "
            "save or download it again"
        )


def _judge_download(download: int) -> list[Concern]:
    from huggingface_hub.constants import HF_HUB_CACHE

    if not download:
        return []
    free = shutil.disk_usage(find_existing(Path(HF_HUB_CACHE))).free
    what = f"the weights do not fit: {free / 2**30:.1f} GiB are free for {HF_HUB_CACHE}"
    return [Concern("fail", what, "free space, or set HF_HOME to a larger disk")] if download > free else []


def find_existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _judge_memory(weights: Weights, device: Device) -> list[Concern]:
    """Check that the weights of every rank fit into memory, the minimum that a rank needs."""
    ranks, needed = device.ranks, weights.numbers * DTYPES[device.precision].itemsize
    free = find_free_memory() // ranks.local_world_size
    if ranks.device.type == "cuda":
        free = torch.cuda.mem_get_info(ranks.device)[0]
    if needed <= free:
        return []
    what = f"weights of {needed / 2**30:.1f} GiB do not fit into {free / 2**30:.1f} GiB of free memory"
    return [Concern("fail", what, "free memory, or choose a larger device or a smaller BACKBONE")]
