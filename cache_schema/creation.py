"""A new version: its group, its arrays, its tile table. README.md beside this file is the normative text."""

from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec

from .layout import (
    ATTRIBUTE,
    DIGEST_BYTES,
    FORMAT_VERSION,
    LABEL_ID_COLUMNS,
    LABEL_IDS_DTYPE,
    POOLED_DTYPE,
    STATUS_DTYPE,
    TABLE_CHUNK_ROWS,
    Layout,
    Status,
    choose_block_rows,
)
from .provenance import Provenance, Recorded
from .table import COLUMN_DTYPES, TileTable

Dims = tuple[str, ...]
"""Names of an array's axes: what xarray wants, and nothing here reads."""


def create_arrays(store: Store, path: str, table: TileTable, provenance: Provenance, recorded: Recorded) -> None:
    """All arrays of a version, the table filled in; `commit` last, since its presence says that creation finished.

    What an interrupted creation left at `path` is removed.
    """
    rows = len(table)
    layout = Layout(rows, provenance.width, provenance.pooling, choose_block_rows(rows))
    attributes = {
        "format": FORMAT_VERSION,
        "rows": rows,
        "block_rows": layout.block_rows,
        "provenance": provenance.to_json(),
        "recorded": recorded.to_json(),
    }
    group = zarr.create_group(store, path=path, overwrite=True, attributes={ATTRIBUTE: attributes})

    def create(name: str, dims: Dims, shape: tuple[int, ...], dtype: Any, chunks: tuple[int, ...], fill: Any) -> Any:
        return group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            fill_value=fill,
            filters=None,
            compressors=[Crc32cCodec()],
            dimension_names=dims,
            config={"order": "C", "write_empty_chunks": True},
        )

    vector, counts, digests = ("tile", "embedding"), ("tile", "raw_id"), ("block", "digest")
    for name in layout.pooling:
        create(name, vector, (rows, layout.width), POOLED_DTYPE, (layout.block_rows, layout.width), np.nan)
    create("label_ids", counts, (rows, LABEL_ID_COLUMNS), LABEL_IDS_DTYPE, (layout.block_rows, LABEL_ID_COLUMNS), 0)
    create("status", ("tile",), (rows,), STATUS_DTYPE, (layout.block_rows,), int(Status.PENDING))
    chunk = min(rows, TABLE_CHUNK_ROWS)
    create("tile", ("tile",), (rows,), str, (chunk,), "")[:] = table.tile
    for name, dtype in COLUMN_DTYPES.items():
        create(name, ("tile",), (rows,), dtype, (chunk,), 0)[:] = getattr(table, name)
    create("seal", ("digest",), (DIGEST_BYTES,), np.dtype("u1"), (DIGEST_BYTES,), 0)
    create("commit", digests, (layout.blocks, DIGEST_BYTES), np.dtype("u1"), (1, DIGEST_BYTES), 0)
