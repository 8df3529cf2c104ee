"""A reader of caches written from cache_schema/README.md alone: no project code, no Zarr library.

It keeps the format honest: what that text does not say, this cannot read.
"""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

DTYPES = {"float16": "<f2", "uint8": "u1", "uint16": "<u2", "uint32": "<u4", "int64": "<i8"}
TABLE = {"tile": "string", "size": "int64", "crc32c": "uint32", "generation": "int64"}
TABLE |= {"label_size": "int64", "label_crc32c": "uint32"}


@dataclass
class PlainCache:
    """One version: what it says, what it holds, and which rows are valid."""

    version: str
    attributes: dict[str, Any]
    arrays: dict[str, Any]
    commits: list[bytes]
    valid: list[bool]


def read_cache(cache: Path) -> PlainCache:
    """The version in use, everything recomputed; raises ValueError when anything contradicts the text."""
    version = json.loads((cache / "current").read_text("utf-8"))["version"]
    group = cache / f"{version}.zarr"
    metadata = json.loads((group / "zarr.json").read_text("utf-8"))
    expect((metadata["zarr_format"], metadata["node_type"]), (3, "group"))
    about = metadata["attributes"]["tileprobe"]
    expect(set(about), {"format", "rows", "block_rows", "provenance", "recorded"})
    expect(about["format"], 1)
    rows, block_rows, width = about["rows"], about["block_rows"], about["provenance"]["width"]
    expect(block_rows, 4096 if rows > 1_000_000 else 256)
    blocks = math.ceil(rows / block_rows)
    pooling = about["provenance"]["pooling"]

    chunk = min(rows, 65536)
    shapes: dict[str, tuple[tuple[int, ...], str, tuple[int, ...], Any]] = {}
    shapes |= dict.fromkeys(pooling, ((rows, width), "float16", (block_rows, width), "NaN"))
    shapes["label_ids"] = ((rows, 128), "uint16", (block_rows, 128), 0)
    shapes["status"] = ((rows,), "uint8", (block_rows,), 0)
    shapes["commit"] = ((blocks, 32), "uint8", (1, 32), 0)
    shapes["seal"] = ((32,), "uint8", (32,), 0)
    shapes |= {name: ((rows,), kind, (chunk,), "" if kind == "string" else 0) for name, kind in TABLE.items()}
    expect({path.name for path in group.iterdir() if path.is_dir()}, set(shapes))
    arrays = {name: read_array(group / name, *shape) for name, shape in shapes.items()}

    expect(compute_version_id(about["provenance"], arrays), version)
    commits, valid = [], []
    for block in range(blocks):
        part = slice(block * block_rows, min((block + 1) * block_rows, rows))
        stream = b"".join(arrays[name][part].tobytes() for name in [*pooling, "label_ids", "status"])
        commits.append(hashlib.sha256(stream).digest())
        agrees = commits[-1] == arrays["commit"][block].tobytes()
        valid += [agrees and status == 1 for status in arrays["status"][part].tolist()]
    columns = ["size", "crc32c", "generation", "label_size", "label_crc32c"]
    seal = hashlib.sha256(digest_table(arrays, columns) + arrays["commit"].tobytes()).digest()
    expect(arrays["seal"].tobytes(), seal)
    return PlainCache(version, about, arrays, commits, valid)


def compute_version_id(provenance: dict[str, Any], table: dict[str, Any]) -> str:
    def number(value: float) -> str:
        return repr(float(value))

    def text(value: Any) -> str:
        if isinstance(value, list):
            return "[" + ",".join(number(x) if isinstance(x, (int, float)) else text(x) for x in value) + "]"
        return json.dumps(value)

    members = {**provenance, "format": 1}
    ingredients = "{" + ",".join(f'"{name}":{text(members[name])}' for name in sorted(members)) + "}"
    identity = digest_table(table, ["size", "crc32c", "label_size", "label_crc32c"])
    return hashlib.sha256(ingredients.encode("ascii") + identity).hexdigest()[:20]


def digest_table(table: dict[str, Any], columns: list[str]) -> bytes:
    names = [name.encode() for name in table["tile"]]
    expect(names, sorted(set(names)))
    stream = struct.pack("<Q", len(names)) + b"".join(struct.pack("<I", len(name)) + name for name in names)
    return hashlib.sha256(stream + b"".join(table[column].tobytes() for column in columns)).digest()


def read_array(folder: Path, shape: tuple[int, ...], kind: str, chunk: tuple[int, ...], fill: Any) -> Any:
    metadata = json.loads((folder / "zarr.json").read_text("utf-8"))
    expect((metadata["zarr_format"], metadata["node_type"]), (3, "array"))
    expect(metadata["shape"], list(shape))
    expect(metadata["data_type"], kind)
    expect(metadata["fill_value"], fill)
    expect(metadata["chunk_grid"], {"name": "regular", "configuration": {"chunk_shape": list(chunk)}})
    expect(metadata["chunk_key_encoding"], {"name": "default", "configuration": {"separator": "/"}})
    expect(metadata["storage_transformers"], [])
    to_bytes, checksum = metadata["codecs"]
    expect(checksum, {"name": "crc32c"})
    expect(to_bytes["name"], "vlen-utf8" if kind == "string" else "bytes")
    if kind in ("float16", "uint16", "uint32", "int64"):
        expect(to_bytes["configuration"], {"endian": "little"})

    grid = [range(math.ceil(length / part)) for length, part in zip(shape, chunk, strict=True)]
    if kind == "string":
        names = [decode_names(read_chunk(folder, place)) for place in product(*grid)]
        return [name for part in names for name in part][: shape[0]]
    padded = np.empty([len(steps) * part for steps, part in zip(grid, chunk, strict=True)], DTYPES[kind])
    for place in product(*grid):
        where = tuple(slice(i * part, (i + 1) * part) for i, part in zip(place, chunk, strict=True))
        padded[where] = np.frombuffer(read_chunk(folder, place), DTYPES[kind]).reshape(chunk)
    return padded[tuple(slice(length) for length in shape)]


def read_chunk(folder: Path, place: tuple[int, ...]) -> bytes:
    raw = folder.joinpath("c", *map(str, place)).read_bytes()
    data, stored = raw[:-4], struct.unpack("<I", raw[-4:])[0]
    expect(google_crc32c.value(data), stored)
    return data


def decode_names(data: bytes) -> list[str]:
    """vlen-utf8: a count, then length and bytes of each, all lengths u32le."""
    (count,) = struct.unpack_from("<I", data)
    names, at = [], 4
    for _ in range(count):
        (length,) = struct.unpack_from("<I", data, at)
        names.append(data[at + 4 : at + 4 + length].decode("utf-8"))
        at += 4 + length
    return names


def expect(found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"{found!r}, not {expected!r}")
