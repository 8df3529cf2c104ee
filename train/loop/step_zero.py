"""Step 0 of fine-tuning: check that streamed embeddings equal the cached ones.

A cached embedding and a streamed one must be the same, so training embeds some cached rows again before it begins.
"""

import numpy as np
import torch

from cache_schema import Status, Version
from cache_schema.layout import Float16Array
from extract.backbone.checkpoint import Checkpoint
from extract.backbone.dinov3 import Backbone
from extract.backbone.embed import TileEmbedder
from extract.backbone.provenance import record_environment
from extract.tiles.feed import TileFeed
from extract.tiles.source import Source
from train.data.streaming import request_batches
from train.errors import StepZeroError

MAX_RELATIVE_DIFFERENCE = 1e-3
MIN_MEDIAN_COSINE = 0.999
_ROWS = 128


def choose_block(version: Version) -> int:
    """Return the block whose rows are compared: the one in the middle, since the first and last may be special."""
    return version.layout.blocks // 2


class StepZero:
    """Compares cached rows that form whole batches of the extraction: a batch of another shape moves its vectors."""

    def __init__(self, version: Version, source: Source, feed: TileFeed, checkpoint: Checkpoint) -> None:
        self._version = version
        self._source = source
        self._feed = feed
        self._checkpoint = checkpoint
        batch = version.recorded.batch_size
        self._block = choose_block(version)
        block = version.layout.block_slice(self._block)
        self._rows = range(block.start, min(block.start + max(batch, _ROWS // batch * batch), block.stop))

    def check_reproduction(self, backbone: Backbone) -> str:
        """Embed the rows in the precision of the cache.

        Returns:
            a line for the user.

        Raises:
            StepZeroError: a row differs by more than 1e-3 of its norm; the message names what differs from the
                extraction.
        """
        stored, streamed = self._embed(backbone)
        difference = float(np.max(np.linalg.norm(streamed - stored, axis=1) / np.linalg.norm(stored, axis=1)))
        if not difference <= MAX_RELATIVE_DIFFERENCE:
            now = record_environment(
                self._checkpoint.name,
                self._source,
                self._version.recorded.batch_size,
                backbone.device,
                self._version.provenance.precision,
            )
            causes = self._version.recorded.differences(now) or ["nothing that is recorded"]
            raise StepZeroError(
                f"streamed embeddings differ from the cache's by {difference:.1e} of their norm, more than "
                f"{MAX_RELATIVE_DIFFERENCE:.0e}; what differs from the extraction: {'; '.join(causes)}: "
                "run `make extract` into another CACHE on this machine"
            )
        return (
            f"step 0: {len(stored)} rows streamed again differ from the cache by at most {difference:.1e} of their norm"
        )

    def check_training_precision(self, backbone: Backbone, *, amp: bool) -> str:
        """Embed the rows as training will: with float32 master weights, and under autocast if training uses it.

        Returns:
            a line for the user.

        Raises:
            StepZeroError: the median cosine with the cache is below 0.999.
        """
        with torch.autocast(backbone.device.type, torch.bfloat16, enabled=amp):
            stored, streamed = self._embed(backbone)
        norms = np.linalg.norm(stored, axis=1) * np.linalg.norm(streamed, axis=1)
        cosine = float(np.median(np.sum(stored * streamed, axis=1) / norms))
        if not cosine >= MIN_MEDIAN_COSINE:
            raise StepZeroError(
                f"embeddings in training precision have a median cosine of {cosine:.5f} with the cache's, below "
                f"{MIN_MEDIAN_COSINE}: train with --no-amp, or extract with --precision float32"
            )
        return f"step 0: in training precision their median cosine is {cosine:.6f}"

    def _embed(self, backbone: Backbone) -> tuple[np.ndarray, np.ndarray]:
        """Return stored and streamed vectors of the embedded rows, each (n, width x pooled arrays) float64."""
        version, table = self._version, self._version.read_table()
        batch = version.recorded.batch_size
        embedder = TileEmbedder.for_version(version, backbone, self._checkpoint)
        streamed = []
        keep: list[bool] = []
        values, first = version.read_block(self._block), self._rows.start
        for tiles in self._feed.read(request_batches(table, self._rows, batch)):
            # Skip tiles that have changed: this run does not use them, as those it uses were checked before.
            embedded = (values.status[tiles.rows - first] == Status.EMBEDDED) & (tiles.status == Status.EMBEDDED)
            vectors = {name: pooled.cpu().numpy() for name, pooled in embedder.embed(tiles).items()}
            streamed.append(_join(vectors, version.layout.pooling))
            keep += embedded.tolist()
        stored = _join(
            {name: array[: len(self._rows)] for name, array in values.pooled.items()}, version.layout.pooling
        )
        if not any(keep):
            raise StepZeroError(
                f"none of {len(keep):,} tiles to compare with the cache can be read as it was: run `make extract` again"
            )
        return stored[keep], np.concatenate(streamed)[keep]


def _join(pooled: dict[str, Float16Array], pooling: tuple[str, ...]) -> np.ndarray:
    return np.concatenate([pooled[name] for name in pooling], axis=1).astype(np.float64)
