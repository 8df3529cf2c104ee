"""Errors that a user can act on. Every message names its remedy; command lines print it without a traceback.

TileprobeError
├── CacheError
│   ├── CacheNotFoundError   no cache, or no finished version, at this URL
│   ├── CacheFormatError     not a cache, or in a format that this program does not read
│   ├── IntegrityError       stored values do not match their digest, or cannot be stored
│   ├── OwnedError           another process is writing to it
│   ├── ProvenanceError      the cache was made from other weights or settings than requested
│   └── StorageError         the disk or the bucket cannot be read or written
└── TaxonomyError            label ids match no class list, or more than one
"""


class TileprobeError(Exception):
    """Base of all errors that end a command with one line and `status`, see `cli.command.STATUSES`."""

    status = 1


class CacheError(TileprobeError):
    """Base of all errors about a cache."""


class CacheNotFoundError(CacheError):
    """No cache, or no finished version, at this URL."""


class CacheFormatError(CacheError):
    """Not a cache, or in a format that this program does not read."""


class IntegrityError(CacheError):
    """Stored values do not match their digest, or cannot be stored."""


class OwnedError(CacheError):
    """Another process is writing to this version."""


class ProvenanceError(CacheError):
    """The cache was made from other weights or settings than requested."""


class StorageError(CacheError):
    """The disk or the bucket cannot be read or written."""


class TaxonomyError(TileprobeError):
    """Label ids match no class list, or more than one."""
