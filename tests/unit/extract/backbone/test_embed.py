"""Batches to vectors: padding that changes nothing, NaN where there is no tile."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cache_schema import LABEL_ID_COLUMNS, Status
from extract.backbone.checkpoint import find_checkpoint
from extract.backbone.dinov3 import Backbone
from extract.backbone.embed import TileEmbedder
from extract.backbone.pooling import POOLINGS
from extract.backbone.precision import Precision
from extract.tiles.batch import TileBatch
from tests.checkpoints import make_checkpoint
from tests.planted import fresh_seed
from tests.tiles import draw_pixels

BATCH = 8


@pytest.fixture(scope="module", params=["float32", "bf16"])
def embedder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TileEmbedder:
    checkpoint = find_checkpoint(str(make_checkpoint(tmp_path_factory.mktemp("c") / "checkpoint")))
    precision: Precision = request.param
    backbone = Backbone.load(checkpoint, precision=precision, device=torch.device("cpu"))
    return TileEmbedder(backbone, checkpoint, BATCH, tuple(POOLINGS))


def make_batch(images: np.ndarray | list[np.ndarray], status: list[int] | None = None) -> TileBatch:
    tensors = torch.from_numpy(images) if isinstance(images, np.ndarray) else [torch.from_numpy(i) for i in images]
    n = len(images)
    return TileBatch(
        rows=np.arange(n),
        images=tensors,
        status=np.array(status or [Status.EMBEDDED] * n, np.uint8),
        label_ids=np.zeros((n, LABEL_ID_COLUMNS), "<u2"),
        label_lines=0,
        problems=(),
        fetch_s=0,
        decode_s=0,
    )


@pytest.fixture
def images() -> np.ndarray:
    rng = np.random.default_rng(fresh_seed())
    return np.stack([draw_pixels(rng, 80, 80) for _ in range(BATCH)])


@pytest.mark.parametrize("n", [1, 5, BATCH - 1])
def test_padding_changes_no_bit_of_a_row(embedder: TileEmbedder, images: np.ndarray, n: int) -> None:
    """A short batch equals the first rows of a full one: every forward has one shape."""
    full, short = embedder.embed(make_batch(images)), embedder.embed(make_batch(images[:n]))
    for name in POOLINGS:
        assert short[name].shape == (n, 64)
        assert short[name].dtype == torch.float16
        np.testing.assert_array_equal(short[name], full[name][:n])


def test_every_forward_has_one_shape(embedder: TileEmbedder, images: np.ndarray) -> None:
    shapes = []
    handle = embedder.backbone.vit.embeddings.register_forward_pre_hook(
        lambda _, inputs: shapes.append(inputs[0].shape)
    )
    for n in (1, 3, BATCH):
        embedder.embed(make_batch(images[:n]))
    handle.remove()
    assert shapes == [(BATCH, 3, 64, 64)] * 3


def test_rows_without_a_tile_are_nan_and_disturb_no_other(embedder: TileEmbedder, images: np.ndarray) -> None:
    status = [Status.EMBEDDED] * BATCH
    for row, bad in ((0, Status.UNDECODABLE), (3, Status.OVER_LIMIT), (4, Status.GONE), (7, Status.CHECKSUM_MISMATCH)):
        status[row] = bad
    embedded = np.array(status) == Status.EMBEDDED
    blanked = np.where(embedded[:, None, None, None], images, 0).astype(np.uint8)
    vectors, expected = embedder.embed(make_batch(blanked, list(status))), embedder.embed(make_batch(images))
    for name in POOLINGS:
        assert vectors[name][torch.from_numpy(~embedded)].isnan().all()
        np.testing.assert_array_equal(vectors[name][embedded], expected[name][embedded])


def test_tiles_of_mixed_sizes(embedder: TileEmbedder, images: np.ndarray) -> None:
    rng = np.random.default_rng(fresh_seed())
    odd = draw_pixels(rng, 33, 70)
    vectors = embedder.embed(make_batch([images[0], odd, images[1]]))
    for name in POOLINGS:
        np.testing.assert_array_equal(vectors[name][[0, 2]], embedder.embed(make_batch(images[:2]))[name])
        np.testing.assert_array_equal(vectors[name][1], embedder.embed(make_batch(odd[None]))[name][0])


def test_different_tiles_have_different_vectors(embedder: TileEmbedder, images: np.ndarray) -> None:
    """Or every test of agreement would pass on constants."""
    for vectors in embedder.embed(make_batch(images)).values():
        assert len(np.unique(vectors, axis=0)) == BATCH
