"""Make the sections on each class: its curve, its errors, its best and worst tiles, and its points in the map."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.metrics.figures import FIGURES

from . import plots
from .analysis import RECALLS, choose_extremes, draw_curve, list_companions, list_swaps
from .embeddings import EmbeddingMap
from .facts import Evidence, Facts, join_names
from .summary import rank_classes
from .tiles import MOST_IMAGES, Thumbnail

_MOST_OF_A_KIND = 3
_MAP_COLOURS = 8


def count_of_a_kind(classes: int) -> int:
    """Return how many tiles of each of the three kinds to show for a class, so that there are at most 600 in all."""
    return max(1, min(_MOST_OF_A_KIND, MOST_IMAGES // (3 * max(classes, 1))))


def make_classes(facts: Facts, pictures: Mapping[str, Thumbnail]) -> list[dict[str, Any]]:
    """Collect for each class, by falling support, its figures, curve, errors and tiles."""
    evidence = facts.evidence
    assert evidence is not None
    labels, preds, names = evidence.labels, evidence.preds, facts.class_names
    missed, false = (list_companions(errors, labels, preds) for errors in (labels & ~preds, ~labels & preds))
    most = count_of_a_kind(len(names))
    made = []
    for row in rank_classes(facts.metrics["per_class"]):
        c = row["column"]
        curve = draw_curve(evidence.probs[:, c], labels[:, c], preds[:, c])
        extremes = choose_extremes(evidence.calibrated[:, c], labels[:, c], preds[:, c], most=most)
        kinds = (
            ("Found", "found", extremes.found),
            ("Missed", "missed", extremes.missed),
            ("False alarm", "false", extremes.false),
        )
        drawn = None
        if curve is not None:
            text = (
                f"Precision-recall curve of {row['name']}: {FIGURES['ap'].describe(row['ap'])}; the decision has "
                f"recall {curve.operating[0]:.2f} and precision {curve.operating[1]:.2f}."
            )
            drawn = plots.draw_precision_recall(*curve.thin(), curve.operating, text)
        made.append(
            {
                **row,
                "plot": drawn,
                "at": [] if curve is None else [curve.read_at(recall) for recall in RECALLS],
                "errors": [("missed", missed[c]), ("falsely predicted", false[c])],
                "tiles": [
                    (kind, style, [_make_tile(evidence, names, i, c, pictures) for i in chosen])
                    for kind, style, chosen in kinds
                    if chosen
                ],
            }
        )
    return made


def _make_tile(
    evidence: Evidence, names: Sequence[str], i: int, c: int, pictures: Mapping[str, Thumbnail]
) -> dict[str, Any]:
    tile = str(evidence.tiles[i])
    truth, said = (join_names(names, side[i]) for side in (evidence.labels, evidence.preds))
    return {
        "name": tile,
        "picture": pictures.get(tile),
        "prob": float(evidence.calibrated[i, c]),
        "truth": truth,
        "said": said,
    }


def name_swaps(facts: Facts) -> list[tuple[str, str, int]]:
    """List the most common pairs: missed class, falsely predicted class, tiles."""
    assert facts.evidence is not None
    names = facts.class_names
    return [(names[c], names[d], tiles) for c, d, tiles in list_swaps(facts.evidence.labels, facts.evidence.preds)]


def make_map_section(facts: Facts, drawn: EmbeddingMap) -> dict[str, Any]:
    """Make the map, coloured by each tile's rarest class, with truth and decision of each point for every class."""
    evidence = facts.evidence
    assert evidence is not None
    names = facts.class_names
    labels, preds = evidence.labels[drawn.chosen], evidence.preds[drawn.chosen]
    support = evidence.labels.sum(axis=0)
    rarest = np.where(labels.any(axis=1), np.where(labels, support, support.max() + 1).argmin(axis=1), -1)
    counts = np.bincount(rarest[rarest >= 0], minlength=len(names))
    coloured = [c for c in np.argsort(-counts, kind="stable")[:_MAP_COLOURS].tolist() if counts[c]]
    kind = {c: f"k{i}" for i, c in enumerate(coloured)}
    titles = [
        f"{evidence.tiles[i]}: {join_names(names, row)}" for i, row in zip(drawn.chosen.tolist(), labels, strict=True)
    ]
    text = (
        f"Map of {len(titles):,} validation tiles: near points have similar vectors. The choice above sets the colours."
    )
    codes = labels.astype(np.int8) + 2 * preds
    return {
        "plot": plots.draw_map(drawn.points, [kind.get(c, "kx") for c in rarest.tolist()], titles, text),
        "method": drawn.method,
        "legend": [(names[c], kind[c], int(counts[c])) for c in coloured],
        "others": int(len(rarest) - counts[coloured].sum()),
        "classes": [
            (names[c], "".join(map(str, codes[:, c].tolist())))
            for c in np.argsort(-support, kind="stable").tolist()
            if codes[:, c].any()
        ],
    }
