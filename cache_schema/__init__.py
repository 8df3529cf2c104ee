"""Read and write caches of embeddings: layout, provenance, label ids, and the Zarr versions that hold them.

from cache_schema import open_cache

cache = open_cache("cache/train-vitl16-512")
x = cache["cls"][cache.usable]                # (n, D) float16, digests checked
y = cache.labels[cache.usable]                # (n, C) bool, columns named by cache.classes
"""

from cache_schema.upkeep.lock import own_version

from .block import BlockValues
from .cache import Cache, Embeddings, open_cache
from .errors import (
    CacheError,
    CacheFormatError,
    CacheNotFoundError,
    IntegrityError,
    OwnedError,
    ProvenanceError,
    StorageError,
    TaxonomyError,
    TileprobeError,
)
from .layout import LABEL_ID_COLUMNS, Layout, Status
from .provenance import Provenance, Recorded
from .root import CacheRoot
from .table import NO_LABEL, TileTable
from .taxonomy import LabelIds, RawLabels, Taxonomy, format_histogram
from .version import Version

__all__ = [
    "LABEL_ID_COLUMNS",
    "NO_LABEL",
    "BlockValues",
    "Cache",
    "CacheError",
    "CacheFormatError",
    "CacheNotFoundError",
    "CacheRoot",
    "Embeddings",
    "IntegrityError",
    "LabelIds",
    "Layout",
    "OwnedError",
    "Provenance",
    "ProvenanceError",
    "RawLabels",
    "Recorded",
    "Status",
    "StorageError",
    "Taxonomy",
    "TaxonomyError",
    "TileTable",
    "TileprobeError",
    "Version",
    "format_histogram",
    "open_cache",
    "own_version",
]
