"""Errors of training. Every message names its remedy.

TileprobeError
└── TrainError
    ├── SplitError        scenes that cannot be split as asked
    ├── CheckpointError   a checkpoint that is damaged, missing, or another model's
    └── StepZeroError     streamed embeddings are not those of the cache
"""

from cache_schema import TileprobeError


class TrainError(TileprobeError):
    """Something about training."""


class SplitError(TrainError):
    """Scenes that cannot be split as asked."""


class CheckpointError(TrainError):
    """A checkpoint that is damaged, missing, or another model's."""


class StepZeroError(TrainError):
    """Streamed embeddings are not those of the cache."""
