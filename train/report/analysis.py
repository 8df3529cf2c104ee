"""Analyse probabilities and labels: curves, errors by co-occurrence, best and worst tiles."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import precision_recall_curve

from cache_schema.layout import BoolArray

from .facts import FloatArray

RECALLS = tuple(r / 10 for r in range(1, 11))
"""Recalls at which the page tabulates a curve's precision."""
_DRAWN_POINTS = 120
_LISTED = 5


@dataclass(frozen=True, eq=False)
class Curve:
    """Precision and recall of one class at every threshold, from the highest down to the first that finds all tiles.

    Attributes:
        recall, precision: (k,) float64, recall ascending; scikit-learn's, without its closing point at recall 0.
        operating: recall and precision at the threshold that `predict` uses.
    """

    recall: npt.NDArray[np.float64]
    precision: npt.NDArray[np.float64]
    operating: tuple[float, float]

    def thin(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return at most about 120 points, evenly spaced in recall, including the first and the last."""
        wanted = np.linspace(self.recall[0], self.recall[-1], _DRAWN_POINTS)
        kept = np.unique([*np.searchsorted(self.recall, wanted), len(self.recall) - 1])
        return self.recall[kept], self.precision[kept]

    def read_at(self, recall: float) -> float:
        """Return the precision at the highest threshold that reaches this recall."""
        # Recall is a count over a count: 0.3 of 10 positives is 3, whatever 0.3 is in binary.
        return float(self.precision[np.searchsorted(self.recall, recall - 1e-9)])


def draw_curve(probs: FloatArray, labels: BoolArray, preds: BoolArray) -> Curve | None:
    """Compute the curve of one class over n tiles; None if no tile shows it.

    Args:
        probs: (n,) float32; ranks the tiles.
        labels, preds: (n,) bool, truth and decisions.
    """
    if not labels.any():
        return None
    precision, recall, _ = precision_recall_curve(labels, probs.astype(np.float64))
    hits = int((labels & preds).sum())
    operating = (hits / int(labels.sum()), hits / max(int(preds.sum()), 1))
    recall, precision = recall[-2::-1], precision[-2::-1]
    whole = int(np.searchsorted(recall, recall[-1])) + 1
    return Curve(recall[:whole], precision[:whole], operating)


@dataclass(frozen=True)
class Companion:
    """Another class on the tiles with one kind of error.

    Attributes:
        column: the other class.
        shown, predicted: tiles with the error that show it, and for which it is predicted.
        shown_share, predicted_share: the same as shares of those tiles.
        shown_base, predicted_base: the same shares over all tiles.
    """

    column: int
    shown: int
    predicted: int
    shown_share: float
    predicted_share: float
    shown_base: float
    predicted_base: float


@dataclass(frozen=True)
class Companions:
    """One kind of error of one class: the number of tiles, and the classes more common there than elsewhere."""

    tiles: int
    classes: tuple[Companion, ...]


def list_companions(errors: BoolArray, labels: BoolArray, preds: BoolArray) -> list[Companions]:
    """List, for each class, the other classes on the tiles where it is wrong.

    Args:
        errors: (n, C) bool: tiles where the class is missed (shown, not predicted), or a false alarm (the reverse).
        labels, preds: (n, C) bool, truth and decisions.

    Returns:
        C entries, each with at most five classes: those whose share exceeds that of all tiles the most, as truth or as
        prediction; ties in column order.
    """
    # Counts of tiles are whole numbers far below 2^24, so a product in float32 is exact.
    wrong = errors.T.astype(np.float32)
    shown, predicted = (np.rint(wrong @ side).astype(np.int64) for side in (labels, preds))
    tiles, rows = errors.sum(axis=0), max(len(errors), 1)
    shown_base, predicted_base = labels.sum(axis=0) / rows, preds.sum(axis=0) / rows
    found = []
    for c, count in enumerate(tiles.tolist()):
        if not count:
            found.append(Companions(0, ()))
            continue
        shares = shown[c] / count, predicted[c] / count
        excess = np.maximum(shares[0] - shown_base, shares[1] - predicted_base)
        excess[c] = 0
        order = [d for d in np.argsort(-excess, kind="stable")[:_LISTED].tolist() if excess[d] > 0]
        columns = (shown[c], predicted[c], *shares, shown_base, predicted_base)
        found.append(Companions(count, tuple(Companion(d, *(column[d].item() for column in columns)) for d in order)))
    return found


def list_swaps(labels: BoolArray, preds: BoolArray, *, top: int = 15) -> list[tuple[int, int, int]]:
    """List the most common pairs of a missed class and a falsely predicted class on the same tile.

    Returns:
        (missed column, predicted column, tiles), most tiles first; ties in column order.
    """
    together = np.rint((labels & ~preds).T.astype(np.float32) @ (preds & ~labels)).astype(np.int64)
    order = np.argsort(-together, axis=None, kind="stable")[:top]
    missed, predicted = np.unravel_index(order, together.shape)
    pairs = zip(missed.tolist(), predicted.tolist(), together[missed, predicted].tolist(), strict=True)
    return [pair for pair in pairs if pair[2]]


@dataclass(frozen=True)
class Extremes:
    """Tiles of one class, as indices into the evidence.

    Attributes:
        found: show it and it is predicted, highest probability first.
        missed: show it and it is not predicted, lowest probability first.
        false: do not show it and it is predicted, highest probability first.
    """

    found: tuple[int, ...]
    missed: tuple[int, ...]
    false: tuple[int, ...]

    def __iter__(self) -> Iterator[int]:
        return iter((*self.found, *self.missed, *self.false))


def choose_extremes(probs: FloatArray, labels: BoolArray, preds: BoolArray, *, most: int) -> Extremes:
    """Choose the best and the worst tiles of one class, at most `most` of each kind, ties in row order.

    Args:
        probs: (n,) float32.
        labels, preds: (n,) bool, truth and decisions.
    """

    def pick(chosen: BoolArray, keys: FloatArray) -> tuple[int, ...]:
        rows = np.flatnonzero(chosen)
        return tuple(rows[np.argsort(keys[rows], kind="stable")][:most].tolist())

    return Extremes(pick(labels & preds, -probs), pick(labels & ~preds, probs), pick(~labels & preds, -probs))
