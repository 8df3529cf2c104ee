"""Errors a user can act on. Every message names its remedy; command lines print it without a traceback.

TileprobeError
├── CacheError
│   ├── CacheNotFoundError   no cache, or no finished version, at this place
│   ├── CacheFormatError     not a cache, or a format this program does not read
│   ├── IntegrityError       stored values contradict their digest, or cannot be stored at all
│   ├── OwnedError           another process writes to it
│   ├── ProvenanceError      the cache was made from something else than what is asked of it
│   └── StorageError         the disk or the bucket refuses
└── TaxonomyError            label ids that fit no class list, or two
"""


class TileprobeError(Exception):
    """Base of every error that ends a command with one line and `status`, see `command_line.STATUSES`."""

    status = 1


class CacheError(TileprobeError):
    """Something about a cache."""


class CacheNotFoundError(CacheError):
    """No cache, or no finished version, at this place."""


class CacheFormatError(CacheError):
    """Not a cache, or a format this program does not read."""


class IntegrityError(CacheError):
    """Stored values contradict their digest, or cannot be stored at all."""


class OwnedError(CacheError):
    """Another process writes to this version."""


class ProvenanceError(CacheError):
    """The cache was made from something else than what is asked of it."""


class StorageError(CacheError):
    """The disk or the bucket refuses."""


class TaxonomyError(TileprobeError):
    """Label ids that fit no class list, or two."""
