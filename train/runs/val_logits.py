"""Save and load the validation logits of a run's best epoch."""

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.data.labels import LabelledRows
from train.errors import CheckpointError

from .directory import RunDirectory

VAL_LOGITS = "val_logits.safetensors"


def save_val_logits(run: RunDirectory, rows: LabelledRows, logits: Tensor) -> None:
    """Write the (n, C) float32 logits of the best epoch, with the n table rows (int64) and (n, C) labels (bool).

    Raises:
        CheckpointError: the file cannot be written.
    """
    temporary = run.path / f"{VAL_LOGITS}.tmp"
    try:
        labels = torch.from_numpy(np.ascontiguousarray(rows.labels))
        save_file({"rows": torch.from_numpy(rows.index), "logits": logits.contiguous(), "labels": labels}, temporary)
        temporary.rename(run.path / VAL_LOGITS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {run.path / VAL_LOGITS}: {error}: make room, then continue with --resume"
        ) from error


def load_val_logits(run: RunDirectory, rows: LabelledRows) -> Tensor | None:
    """Load the (n, C) float32 logits of a run; None if it has none for exactly these rows and as many classes."""
    try:
        kept = load_file(run.path / VAL_LOGITS)
    except (OSError, SafetensorError):
        return None
    fits = np.array_equal(kept["rows"].numpy(), rows.index) and kept["logits"].shape == rows.labels.shape
    return kept["logits"] if fits else None
