"""Collect what embeddings depend on (provenance), and what is recorded with it."""

import platform
from importlib.metadata import version as installed_version
from typing import Any

import torch

from cache_schema import Provenance, ProvenanceError, Recorded, Version
from extract.tiles.source import Source

from .checkpoint import Checkpoint, find_checkpoint
from .onednn import choose_attention
from .pooling import count_tokens_read
from .precision import DTYPES, Precision
from .transform import RESAMPLING

_LIBRARIES = ("torch", "transformers", "pillow", "kornia-rs", "zarr", "numpy")


def make_provenance(checkpoint: Checkpoint, precision: Precision, pooling: tuple[str, ...]) -> Provenance:
    """Return what embeddings of this checkpoint depend on; reads and hashes the weight files.

    Args:
        pooling: names of the pooled arrays, of `POOLINGS`.

    Raises:
        BackboneError: there is no pooling of one of the names.
    """
    count_tokens_read(pooling)
    return Provenance(
        weights_sha256=checkpoint.hash_weights(),
        depth=checkpoint.depth,
        width=checkpoint.width,
        image_size=checkpoint.image_size,
        mean=checkpoint.mean,
        std=checkpoint.std,
        resampling=RESAMPLING,
        pooling=pooling,
        precision=precision,
    )


def find_cached_checkpoint(
    version: Version, backbone: str | None = None, *, remedy: str = "run `make extract` again"
) -> Checkpoint:
    """Find the checkpoint that made a version.

    Args:
        backbone: name or directory where it is now; None for what the version recorded.
        remedy: for the message, what to do if another checkpoint is found there.

    Raises:
        ProvenanceError: the checkpoint found there has other weights or settings.
    """
    checkpoint = find_checkpoint(backbone or version.recorded.backbone, version.provenance.image_size)
    differences = find_other_ingredients(version.provenance, checkpoint)
    if differences:
        raise ProvenanceError(f"{checkpoint.path} is not what made {version.url} ({'; '.join(differences)}): {remedy}")
    return checkpoint


def find_other_ingredients(provenance: Provenance, checkpoint: Checkpoint) -> list[str]:
    """Return one line for each ingredient in which a checkpoint differs from what made these embeddings.

    Precision and pooling are settings of the extraction, not of the checkpoint: both are taken from the provenance.
    """
    precision: Any = provenance.precision
    return provenance.differences(make_provenance(checkpoint, precision, provenance.pooling))


def record_environment(
    backbone: str, source: Source, batch_size: int, device: torch.device, precision: str
) -> Recorded:
    """Describe the environment in which embeddings are computed."""
    cuda = device.type == "cuda"
    return Recorded(
        backbone=backbone,
        tiles=source.url,
        identity=source.identity,
        batch_size=batch_size,
        attention=choose_attention(device, DTYPES[precision]),
        hardware=torch.cuda.get_device_name(device) if cuda else f"CPU {platform.machine()}",
        libraries={name: installed_version(name) for name in _LIBRARIES},
    )
