"""Errors of extraction. Every message names its remedy.

TileprobeError
└── ExtractError
    ├── ConfigError      options that cannot work
    ├── AgreementError   nodes of one job that do not belong together
    ├── SourceError      the bucket or directory of tiles
    │   ├── TransportError   reading kept failing: the block stays pending, the next run goes on
    │   └── TileGoneError    a listed object is no longer there
    ├── RasterError      a georeferenced raster
    ├── AnnotationError  a file of annotations
    ├── PlaceError       where tiles are written
    ├── BackboneError    the checkpoint
    └── RunError         a run that must not be sealed
        └── QuarantineError  too many of its tiles cannot be read
"""

from cache_schema import TileprobeError


class ExtractError(TileprobeError):
    """Something about extraction."""


class ConfigError(ExtractError):
    """Options that cannot work."""


class AgreementError(ExtractError):
    """Nodes of one job that do not belong together."""


class SourceError(ExtractError):
    """The bucket or directory of tiles."""


class TransportError(SourceError):
    """Reading kept failing past its deadline."""


class TileGoneError(SourceError):
    """A listed object is no longer there."""


class RasterError(ExtractError):
    """A georeferenced raster."""


class AnnotationError(ExtractError):
    """A file of annotations."""


class PlaceError(ExtractError):
    """Where tiles are written."""


class BackboneError(ExtractError):
    """The checkpoint."""


class RunError(ExtractError):
    """A run that must not be sealed."""


class QuarantineError(RunError):
    """Too many of its tiles cannot be read; the others are committed."""

    status = 3
