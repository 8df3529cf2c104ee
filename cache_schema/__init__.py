"""What a cache of embeddings is: layout, provenance, label ids, and the Zarr versions that hold them.

from cache_schema import Taxonomy, open_cache

version = open_cache("cache/train-vitl16-512")
rows = version.read_rows()                    # rows.pooled["cls"]: (N, D) float16, digests checked
labels = Taxonomy.xview().decode(rows.label_ids, "type").labels[rows.embedded]
"""

from .block import BlockValues
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
from .owner import own_version
from .provenance import Provenance, Recorded
from .root import CacheRoot, open_cache
from .table import NO_LABEL, TileTable
from .taxonomy import DecodedLabels, LabelIds, Taxonomy, format_histogram
from .version import CacheRows, Version

__all__ = [
    "LABEL_ID_COLUMNS",
    "NO_LABEL",
    "BlockValues",
    "CacheError",
    "CacheFormatError",
    "CacheNotFoundError",
    "CacheRoot",
    "CacheRows",
    "DecodedLabels",
    "IntegrityError",
    "LabelIds",
    "Layout",
    "OwnedError",
    "Provenance",
    "ProvenanceError",
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
