"""Errors of extraction. Every message names its remedy.

TileprobeError
└── ExtractError
    ├── ConfigError      options are invalid
    ├── AgreementError   nodes of one job do not match
    ├── SourceError      tiles cannot be listed or read
    │   ├── TransportError   reading kept failing; the block stays pending and the next run retries it
    │   └── TileGoneError    a listed object no longer exists
    ├── RasterError      a georeferenced raster cannot be used
    ├── AnnotationError  an annotation file cannot be used
    ├── PlaceError       tiles cannot be written
    ├── BackboneError    a checkpoint cannot be used
    └── RunError         a run must not be sealed
        └── QuarantineError  too many of its tiles are unreadable
"""

from cache_schema import TileprobeError


class ExtractError(TileprobeError):
    """Base of the errors of extraction."""


class ConfigError(ExtractError):
    """Options are invalid."""


class AgreementError(ExtractError):
    """Nodes of one job do not match."""


class SourceError(ExtractError):
    """Tiles cannot be listed or read."""


class TransportError(SourceError):
    """Reading kept failing past its deadline."""


class TileGoneError(SourceError):
    """A listed object no longer exists."""


class RasterError(ExtractError):
    """A georeferenced raster cannot be used."""


class AnnotationError(ExtractError):
    """An annotation file cannot be used."""


class PlaceError(ExtractError):
    """Tiles cannot be written."""


class BackboneError(ExtractError):
    """A checkpoint cannot be used."""


class RunError(ExtractError):
    """A run must not be sealed."""


class QuarantineError(RunError):
    """Too many tiles of a run are unreadable; the others are committed."""

    status = 3
