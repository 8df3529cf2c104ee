"""Errors of training. Every message names its remedy.

TileprobeError
└── TrainError
    ├── SplitError        the split that was asked for is impossible
    ├── CheckpointError   a checkpoint is damaged, missing, or of another model
    └── StepZeroError     streamed embeddings differ from the cache's
"""

from cache_schema import TileprobeError


class TrainError(TileprobeError):
    """Base of the errors of training."""


class SplitError(TrainError):
    """The split that was asked for is impossible."""


class CheckpointError(TrainError):
    """A checkpoint is damaged, missing, or of another model."""


class StepZeroError(TrainError):
    """Streamed embeddings differ from the cache's."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
