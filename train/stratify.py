"""Whole scenes shared out among sides so that each side gets its share of every class.

Scenes go one by one, those of the rarest class first, to the side that most lacks what they show: the iterative
stratification of Sechidis, Tsoumakas, Vlahavas: "On the Stratification of Multi-Label Data" (ECML PKDD 2011), with
scenes in the place of examples. A scene brings many classes at once, so single scenes then change sides for as long
as that brings the shares closer.
"""

import numpy as np
import numpy.typing as npt

from cache_schema.layout import BoolArray

_ROUNDS = 3
"""Times each scene may change sides; the shares hardly move after that."""
_ABSENT = 4.0
"""What a class costs that a side does not show, times that side's share, beside squared differences of shares: there it
can be neither learnt nor measured, and learning counts for more."""


def share_out(
    scenes: npt.NDArray[np.str_], labels: BoolArray, shares: npt.NDArray[np.float64], seed: int
) -> npt.NDArray[np.intp]:
    """The side of each row, of K: whole scenes, each side with about its share of the tiles and of every class.

    Args:
        scenes: (n,) scene of each row, of at least K scenes.
        labels: (n, C) bool.
        shares: (K,) of each side, adding up to 1.
        seed: of the order among scenes that are alike in their rarest class.

    Returns:
        (n,) integers 0..K-1; no side is empty. The order of the rows makes no difference.
    """
    names, scene_of, sizes = np.unique(scenes, return_inverse=True, return_counts=True)
    counts = np.zeros((len(names), labels.shape[1]), np.int64)
    np.add.at(counts, scene_of, labels)
    totals = counts.sum(axis=0)
    counts, totals = counts[:, totals > 0], totals[totals > 0]
    rarest = np.where(counts > 0, totals, len(scenes) + 1).min(axis=1, initial=len(scenes) + 1)
    order = np.lexsort([np.random.default_rng(seed).permutation(len(names)), rarest])
    sides = _assign(np.column_stack([counts, sizes]), shares, order)
    return np.asarray(sides[scene_of])


def _assign(
    counts: npt.NDArray[np.int64], shares: npt.NDArray[np.float64], order: npt.NDArray[np.intp]
) -> npt.NDArray[np.intp]:
    """(S,) side of each scene, from (S, Q) counts, the last of which is its tiles."""
    totals = counts.sum(axis=0)
    # Tiles weigh as much as all classes together.
    weights = np.append(np.ones(len(totals) - 1), max(1, len(totals) - 1))
    absent = np.repeat(_ABSENT * shares[:, None], len(totals), axis=1)
    held = np.zeros((len(shares), len(totals)), np.int64)
    sides = np.full(len(counts), -1)

    def choose(scene: np.intp) -> int:
        """The side where the scene costs least: only what it shows makes a difference."""
        shown = np.flatnonzero(counts[scene])
        has, gained = held[:, shown], counts[scene, shown] / totals[shown]
        lacking = shares[:, None] - has / totals[shown]
        cost = (gained * (gained - 2 * lacking)) @ weights[shown]
        return int(np.argmin(cost - np.where(has == 0, absent[:, shown], 0).sum(axis=1)))

    for _ in range(1 + _ROUNDS):
        before = sides.copy()
        for scene in order:
            if sides[scene] >= 0:
                held[sides[scene]] -= counts[scene]
            sides[scene] = choose(scene)
            held[sides[scene]] += counts[scene]
        if np.array_equal(sides, before):
            break
        absent[:, -1] = np.inf  # from here on no side is without a tile
    return sides
