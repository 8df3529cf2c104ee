"""Caches of vectors with a planted linear signal: no tiles, no backbone."""

import numpy as np

from cache_schema import LABEL_ID_COLUMNS, BlockValues, CacheRoot, Status, TileTable

from .caches import make_provenance, make_recorded

CLASSES = 60


def plant_vectors(url: str, *, rows: int, width: int, seed: int, tiles_a_scene: int = 12) -> str:
    """A sealed cache: `cls`, a noisier `patch_mean`, and labels, as class ids, that follow `cls` by a linear rule."""
    rng = np.random.default_rng(seed)
    number = np.arange(rows)
    names = sorted(f"images/{row // tiles_a_scene:05}_{row % tiles_a_scene}.png" for row in range(rows))
    table = TileTable(
        tile=np.array(names, np.dtypes.StringDType()),
        size=1000 + number,
        crc32c=number.astype(np.uint32),
        generation=number,
        label_size=40 + number,
        label_crc32c=number.astype(np.uint32),
    )
    root = CacheRoot(url)
    version = root.create_version(table, make_provenance(width=width), make_recorded())
    rule, bias = rng.standard_normal((width, CLASSES)) / np.sqrt(width), np.linspace(0, -3, CLASSES)
    for block, part in enumerate(version.layout.block_slices()):
        count = part.stop - part.start
        vectors = rng.standard_normal((count, width)).astype(np.float32)
        noisier = vectors + rng.standard_normal(vectors.shape).astype(np.float32)
        label_ids = np.zeros((count, LABEL_ID_COLUMNS), np.uint16)
        label_ids[:, :CLASSES] = 3 * vectors @ rule + bias + rng.logistic(size=(count, CLASSES)) > 0
        pooled = {"cls": vectors.astype(np.float16), "patch_mean": noisier.astype(np.float16)}
        version.write_block(block, BlockValues(pooled, label_ids, np.full(count, Status.EMBEDDED, np.uint8)))
    version.seal()
    root.set_current(version.id)
    return url
