"""The map of embeddings: its sample and its groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from train.report.embeddings import MOST_OF_A_BLOCK, MOST_POINTS, draw_sample, make_map


def test_a_sample_is_bounded_by_block(rng: np.random.Generator) -> None:
    rows = np.sort(rng.choice(200_000, 20_000, replace=False))
    chosen = draw_sample(rows, 256, seed=3)
    assert len(chosen) == MOST_POINTS == len(set(chosen.tolist()))
    assert np.bincount(rows[chosen] // 256).max() <= MOST_OF_A_BLOCK
    assert np.array_equal(chosen, draw_sample(rows, 256, seed=3))
    assert not np.array_equal(chosen, draw_sample(rows, 256, seed=4))
    assert np.array_equal(draw_sample(rows[:1500], 256, seed=3), np.arange(1500))


def test_a_map_keeps_groups_together(tmp_path: Path, rng: np.random.Generator) -> None:
    from cache_schema import LABEL_ID_COLUMNS, open_cache
    from tests.caches import write_rows

    centres = 8 * rng.normal(size=(3, 16))
    group = rng.integers(0, 3, 90)
    vectors = centres[group] + rng.normal(size=(90, 16))
    tiles = np.array([f"images/{i:03}_0.png" for i in range(90)])
    url = write_rows(str(tmp_path / "cache"), tiles, {"cls": vectors}, np.zeros((90, LABEL_ID_COLUMNS)))
    rows = np.arange(5, 90)
    made = make_map(open_cache(url), rows, "cls", seed=0)
    assert np.array_equal(made.chosen, np.arange(85))
    distance = np.linalg.norm(made.points[:, None] - made.points, axis=2)
    np.fill_diagonal(distance, np.inf)
    nearest = distance.argmin(axis=1)
    assert (group[rows][nearest] == group[rows]).mean() > 0.95
    again = make_map(open_cache(url), rows, "cls", seed=0)
    assert np.array_equal(made.points, again.points)
    assert "85 validation tiles" in made.method
