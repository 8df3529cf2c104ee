"""What a cached embedding depends on, and the version id that results from it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from .errors import CacheFormatError
from .layout import FORMAT_VERSION


@dataclass(frozen=True)
class Provenance:
    """Everything that changes the values of an embedding; each field is part of the version id.

    Attributes:
        weights_sha256: of the bytes of the checkpoint's weight files (tensor names change between library releases).
        depth: transformer layers.
        width: D, the embedding's length.
        image_size: effective pixels a side after resizing.
        mean, std: per channel, on pixels scaled to 0..1.
        resampling: how tiles are resized.
        pooling: names of the pooled arrays.
        precision: dtype of the weights in the forward pass, `bf16` or `float32`.
    """

    weights_sha256: str
    depth: int
    width: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resampling: str
    pooling: tuple[str, ...]
    precision: str

    def version_id(self, table_digest: bytes) -> str:
        """Return the id of the version that holds this table's tiles with this provenance (20 hex digits)."""
        ingredients = {"format": FORMAT_VERSION, **asdict(self)}
        for name in ("mean", "std"):  # 0 and 0.0 are equal numbers with different JSON
            ingredients[name] = [float(x) for x in ingredients[name]]
        text = json.dumps(ingredients, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode() + table_digest).hexdigest()[:20]

    def differences(self, other: "Provenance") -> list[str]:
        """List the fields that differ, a line each: `name: value of self, not value of other`."""
        return _list_differences(self, other, [field.name for field in fields(self)])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read exactly the known fields, and check their types.

        Raises:
            CacheFormatError: a field is missing, unknown or of another type.
        """
        raw = _exact_fields(cls, value, "provenance")
        for name in ("mean", "std"):
            three = isinstance(raw[name], list | tuple) and len(raw[name]) == 3
            _require(three and all(type(x) in (int, float) for x in raw[name]), f"provenance.{name} is not 3 numbers")
            raw[name] = tuple(raw[name])
        names = raw["pooling"]
        some = isinstance(names, list | tuple) and names and all(isinstance(x, str) and x for x in names)
        _require(bool(some) and len(set(names)) == len(names), "provenance.pooling is not a list of distinct names")
        raw["pooling"] = tuple(names)
        return cls(**raw)


@dataclass(frozen=True)
class Recorded:
    """Circumstances of an extraction. A difference causes a warning, not another version.

    Attributes:
        backbone: the name that it was loaded by.
        tiles: where the tiles were read, `gs://bucket/prefix` or a directory.
        identity: what stands for a tile's bytes in the table, `crc32c` (bucket) or `mtime` (local files).
        batch_size: tiles per forward pass; resuming keeps it, since the shape of a batch changes the last digits.
        attention: attention backend.
        hardware: device name.
        libraries: version by package.
    """

    backbone: str
    tiles: str
    identity: str
    batch_size: int
    attention: str
    hardware: str
    libraries: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read exactly the known fields, like `Provenance.from_json`."""
        raw = _exact_fields(cls, value, "recorded")
        libraries = raw["libraries"]
        texts = isinstance(libraries, dict) and all(isinstance(text, str) for text in libraries.values())
        _require(texts, "recorded.libraries is not a version by package")
        return cls(**raw)

    def differences(self, other: "Recorded") -> list[str]:
        """List the differing entries that change how an embedding is rounded, a line each."""
        return _list_differences(self, other, ["attention", "hardware", "libraries", "batch_size"])


def _list_differences(a: Any, b: Any, names: Sequence[str]) -> list[str]:
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in names}
    return [f"{name}: {left}, not {right}" for name, (left, right) in pairs.items() if left != right]


def _exact_fields(cls: type[Provenance] | type[Recorded], value: Any, where: str) -> dict[str, Any]:
    """Return the fields of `value`, after checking that they are exactly those of `cls`, texts and counts by type."""
    known = {field.name for field in fields(cls)}
    found = set(value) if isinstance(value, dict) else set()
    _require(found == known, f"{where}: missing {sorted(known - found)}, unknown {sorted(found - known)}")
    for field in fields(cls):
        given = value[field.name]
        if field.type is str:
            _require(isinstance(given, str), f"{where}.{field.name} is not a string")
        elif field.type is int:  # and so is True
            _require(type(given) is int and given > 0, f"{where}.{field.name} is not a positive integer")
    return dict(value)


def _require(condition: bool, why: str) -> None:
    if not condition:
        raise CacheFormatError(
            f"{why}: the cache was written by another release of this program, or is damaged: "
            "remove it and run `make extract` again"
        )
