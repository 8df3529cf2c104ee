"""Curves, errors, swaps and extremes against plain loops and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve

from tests.unit.train.report.made_up import draw_decisions
from train.report.analysis import choose_extremes, draw_curve, list_companions, list_swaps


def test_curves_and_their_area_are_scikit_learns(rng: np.random.Generator) -> None:
    for _ in range(10):
        probs, labels, preds = draw_decisions(rng, int(rng.integers(5, 900)), 1)
        labels[0] = True
        curve = draw_curve(probs[:, 0], labels[:, 0], preds[:, 0])
        assert curve is not None
        precision, recall, _ = precision_recall_curve(labels[:, 0], probs[:, 0].astype(float))
        points = set(zip(recall.tolist(), precision.tolist(), strict=True))
        assert set(zip(curve.recall.tolist(), curve.precision.tolist(), strict=True)) <= points
        area = float((np.diff(curve.recall, prepend=0) * curve.precision).sum())
        assert area == pytest.approx(average_precision_score(labels[:, 0], probs[:, 0]), abs=1e-9)
        drawn = curve.thin()
        assert len(drawn[0]) <= 121
        assert (drawn[0][0], drawn[0][-1]) == (curve.recall[0], 1)
        assert set(zip(drawn[0].tolist(), drawn[1].tolist(), strict=True)) <= points
        hits = (labels & preds).sum()
        assert curve.operating == (hits / labels.sum(), hits / max(preds.sum(), 1))
    assert draw_curve(probs[:, 0], np.zeros(len(probs), bool), preds[:, 0]) is None


def test_classes_on_tiles_with_errors_are_counted_by_hand(rng: np.random.Generator) -> None:
    _, labels, preds = draw_decisions(rng, 90, 7)
    for errors in (labels & ~preds, ~labels & preds):
        found = list_companions(errors, labels, preds)
        assert len(found) == 7
        for c, companions in enumerate(found):
            tiles = [t for t in range(90) if errors[t, c]]
            assert companions.tiles == len(tiles)
            excess = {}
            for d in set(range(7)) - {c} if tiles else ():
                shares = [sum(side[t, d] for t in tiles) / len(tiles) for side in (labels, preds)]
                excess[d] = max(shares[0] - labels[:, d].mean(), shares[1] - preds[:, d].mean())
            wanted = sorted((d for d in excess if excess[d] > 1e-12), key=lambda d: -excess[d])[:5]
            assert sorted(n.column for n in companions.classes) == sorted(wanted)
            excesses = [
                max(n.shown_share - n.shown_base, n.predicted_share - n.predicted_base) for n in companions.classes
            ]
            for n, found_excess in zip(companions.classes, excesses, strict=True):
                assert n.shown == sum(labels[t, n.column] for t in tiles)
                assert n.predicted == sum(preds[t, n.column] for t in tiles)
                assert found_excess == pytest.approx(excess[n.column])
            assert excesses == sorted(excesses, reverse=True)


def test_swaps_are_counted_by_hand(rng: np.random.Generator) -> None:
    _, labels, preds = draw_decisions(rng, 120, 6)
    counts = {
        (c, d): sum(labels[t, c] and not preds[t, c] and preds[t, d] and not labels[t, d] for t in range(120))
        for c in range(6)
        for d in range(6)
    }
    found = list_swaps(labels, preds, top=9)
    assert found == sorted(((c, d, n) for (c, d), n in counts.items() if n), key=lambda p: (-p[2], p[0], p[1]))[:9]


def test_extremes_are_the_first_and_last_in_order(rng: np.random.Generator) -> None:
    probs, labels, preds = (side[:, 0] for side in draw_decisions(rng, 200, 1))
    found = choose_extremes(probs, labels, preds, most=4)
    rows = range(200)
    for chosen, kind, key in (
        (found.found, labels & preds, -probs),
        (found.missed, labels & ~preds, probs),
        (found.false, ~labels & preds, -probs),
    ):
        assert list(chosen) == sorted((r for r in rows if kind[r]), key=lambda r: (key[r], r))[:4]
