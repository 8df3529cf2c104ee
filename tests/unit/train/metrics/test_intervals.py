"""Bootstrap scores against scikit-learn on weighted and on materially repeated rows; intervals against theory."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from tests.seeds import fresh_seed
from train.metrics import intervals
from train.metrics.figures import KEY_FIGURES
from train.metrics.intervals import bootstrap_difference, bootstrap_intervals, score_resamples
from train.metrics.scores import compute_metrics


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(fresh_seed())


def draw(
    rng: np.random.Generator, rows: int = 400, classes: int = 6, scenes: int = 40, decimals: int = 7
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A fair model on classes that every resample holds."""
    labels = rng.random((rows, classes)) < 0.3
    probs = np.round(np.clip(0.2 * labels + 0.8 * rng.random((rows, classes)), 0, 1), decimals).astype(np.float32)
    return probs, labels, rng.permutation(np.arange(rows) % scenes)


def width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


@pytest.mark.parametrize("decimals", [1, 7])
@pytest.mark.parametrize("chunk", [1, 10**6])
def test_map_equals_scikit_learn_with_sample_weights(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, decimals: int, chunk: int
) -> None:
    monkeypatch.setattr(intervals, "_CHUNK_CELLS", chunk * 40)
    probs, labels, scenes = draw(rng, decimals=decimals)
    labels[:, 2] = False
    labels[:, 3] = scenes == 7  # absent from about a third of the resamples
    weights = rng.multinomial(40, np.full(40, 1 / 40), size=12)
    weights[0, 7] = 0
    scores = score_resamples(probs, labels, scenes, weights)["map_macro"]
    for score, weight in zip(scores, weights, strict=True):
        weight_of_row = weight[scenes]
        present = [c for c in range(6) if labels[weight_of_row > 0, c].any()]
        expected = [
            average_precision_score(labels[:, c], probs[:, c].astype(np.float64), sample_weight=weight_of_row)
            for c in present
        ]
        assert score == pytest.approx(np.mean(expected), abs=1e-9)


def test_scores_equal_scikit_learn_on_repeated_rows(rng: np.random.Generator) -> None:
    probs, labels, scenes = draw(rng)
    labels[:, 2] = False
    labels[:, 3] = scenes == 7
    preds = probs >= 0.4
    weights = rng.multinomial(40, np.full(40, 1 / 40), size=12)
    weights[0, 7] = 0
    scores = score_resamples(probs, labels, scenes, weights, preds=preds)
    for r, weight in enumerate(weights):
        rows = np.repeat(np.arange(400), weight[scenes])
        present = np.flatnonzero(labels[rows].any(axis=0))
        truth, decided = labels[rows][:, present], preds[rows][:, present]
        assert scores["f1_macro"][r] == pytest.approx(f1_score(truth, decided, average="macro"), abs=1e-9)
        assert scores["f1_weighted"][r] == pytest.approx(f1_score(truth, decided, average="weighted"), abs=1e-9)
        ap = average_precision_score(truth, probs[rows][:, present].astype(np.float64), average="macro")
        assert scores["map_macro"][r] == pytest.approx(ap, abs=1e-9)


def test_every_scene_once_is_the_point_estimate(rng: np.random.Generator) -> None:
    probs, labels, scenes = draw(rng, decimals=2)
    labels[:, 1] = False
    scores = score_resamples(probs, labels, scenes, np.ones((1, 40)))
    point = compute_metrics(probs, labels, list("abcdef"), loss=0.0)
    assert {key: scores[key][0] for key in KEY_FIGURES} == pytest.approx(
        {key: point[key] for key in KEY_FIGURES}, abs=1e-9
    )


def test_interval_contains_the_point_estimate(rng: np.random.Generator) -> None:
    probs, labels, scenes = draw(rng)
    point = compute_metrics(probs, labels, list("abcdef"), loss=0.0)
    found = bootstrap_intervals(probs, labels, scenes)
    assert tuple(found) == KEY_FIGURES
    for key, (low, high) in found.items():
        assert low < point[key] < high


def test_interval_equals_the_percentiles_of_resampled_rows(rng: np.random.Generator) -> None:
    """The whole procedure done naively, with other random numbers: ends agree to the noise of 2,000 resamples."""
    probs, labels, scenes = draw(rng)
    rows_of = [np.flatnonzero(scenes == scene) for scene in range(40)]
    naive = []
    for _ in range(2000):
        rows = np.concatenate([rows_of[scene] for scene in rng.integers(0, 40, 40)])
        hits, marked = (labels & (probs >= 0.5))[rows].sum(0), labels[rows].sum(0) + (probs >= 0.5)[rows].sum(0)
        naive.append((2 * hits / marked).mean())
    expected = np.quantile(naive, [0.05, 0.95])
    low, high = bootstrap_intervals(probs, labels, scenes, resamples=2000, level=0.9)["f1_macro"]
    # The standard error of a 5 % quantile of 2,000 draws is about a twentieth of a standard deviation (of which the
    # interval spans 3.3); 0.1 of the interval is over four of the difference.
    assert (low, high) == pytest.approx(tuple(expected), abs=0.1 * (expected[1] - expected[0]))


def test_interval_narrows_with_more_scenes(rng: np.random.Generator) -> None:
    few = bootstrap_intervals(*draw(rng, rows=200, scenes=20))
    many = bootstrap_intervals(*draw(rng, rows=3200, scenes=320))
    for key in KEY_FIGURES:
        # Sixteen times the scenes should quarter the width; half leaves room for the noise of either.
        assert width(many[key]) < 0.5 * width(few[key])


def test_interval_widens_with_level(rng: np.random.Generator) -> None:
    data = draw(rng)
    for key in KEY_FIGURES:
        assert width(bootstrap_intervals(*data, level=0.99)[key]) > width(bootstrap_intervals(*data, level=0.8)[key])


def test_copies_of_a_tile_within_a_scene_add_no_certainty(rng: np.random.Generator) -> None:
    """Eight copies of each tile in its scene leave every score of every resample, so the intervals, as they were."""
    probs, labels, scenes = draw(rng)
    once = bootstrap_intervals(probs, labels, scenes)
    eight = bootstrap_intervals(*(np.repeat(array, 8, axis=0) for array in (probs, labels, scenes)))
    for key in KEY_FIGURES:
        assert eight[key] == pytest.approx(once[key], abs=1e-9)


def test_seed_repeats_and_row_order_does_not_matter(rng: np.random.Generator) -> None:
    probs, labels, scenes = draw(rng)
    names = np.array([f"scene {scene}" for scene in scenes])
    first = bootstrap_intervals(probs, labels, names, seed=5)
    order = rng.permutation(len(probs))
    again = bootstrap_intervals(probs[order], labels[order], names[order], seed=5)
    for key in KEY_FIGURES:
        assert again[key] == pytest.approx(first[key], abs=1e-12)
    assert bootstrap_intervals(probs, labels, names, seed=6) != first


def test_difference_is_paired(rng: np.random.Generator) -> None:
    probs, labels, scenes = draw(rng)
    same = bootstrap_difference(probs, probs, labels, scenes)
    assert same == dict.fromkeys(KEY_FIGURES, (0.0, 0.0))
    nearly = np.clip(probs + 0.01 * rng.random(probs.shape), 0, 1).astype(np.float32)
    own, difference = bootstrap_intervals(probs, labels, scenes), bootstrap_difference(nearly, probs, labels, scenes)
    for key in KEY_FIGURES:
        assert width(difference[key]) < 0.5 * width(own[key])


def test_difference_is_model_minus_baseline(rng: np.random.Generator) -> None:
    probs, labels, scenes = draw(rng)
    better = np.clip(probs + 0.4 * labels - 0.2, 0, 1)
    gain = bootstrap_difference(better, probs, labels, scenes)
    loss = bootstrap_difference(probs, better, labels, scenes)
    for key in KEY_FIGURES:
        assert 0 < gain[key][0] < gain[key][1]
        assert loss[key] == pytest.approx((-gain[key][1], -gain[key][0]), abs=1e-12)


def test_difference_uses_each_model_s_own_decisions(rng: np.random.Generator) -> None:
    _, labels, scenes = draw(rng)
    found, missed = np.where(labels, 0.9, 0.1), np.where(labels, 0.4, 0.1)
    difference = bootstrap_difference(found, missed, labels, scenes)
    assert difference["f1_macro"] == difference["f1_weighted"] == (1.0, 1.0)
    assert difference["map_macro"] == (0.0, 0.0)


def test_resamples_without_positives_are_skipped(rng: np.random.Generator) -> None:
    labels = np.zeros((40, 2), bool)
    labels[:10, 0] = True  # scene 0 only, which every fourth resample or so misses
    scenes = np.repeat(np.arange(4), 10)
    found = bootstrap_intervals(np.where(labels, 0.9, 0.1), labels, scenes)
    assert found == {key: pytest.approx((1.0, 1.0), abs=1e-12) for key in KEY_FIGURES}


@pytest.mark.parametrize("case", ["one scene", "no positives", "no rows"])
def test_nothing_known_about_the_spread_gives_nan(rng: np.random.Generator, case: str) -> None:
    probs, labels, scenes = draw(rng)
    if case == "one scene":
        scenes[:] = 3
    elif case == "no positives":
        labels[:] = False
    else:
        probs, labels, scenes = probs[:0], labels[:0], scenes[:0]
    for low, high in bootstrap_intervals(probs, labels, scenes).values():
        assert np.isnan(low)
        assert np.isnan(high)


def test_a_small_set_takes_under_two_seconds_and_a_large_one_under_200_mb(rng: np.random.Generator) -> None:
    data = draw(rng, rows=640, classes=60, scenes=100)
    start = time.process_time()  # of all threads, and blind to what else the machine does
    bootstrap_intervals(*data)
    assert time.process_time() - start < 2.0  # 0.1 to 0.3 measured
    tracemalloc.start()
    bootstrap_intervals(*draw(rng, rows=40_000, classes=1, scenes=300))  # 12,000 thresholds: 96 MB an array at once
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


def test_unsound_input_is_refused(rng: np.random.Generator) -> None:
    probs, labels, scenes = draw(rng)
    with pytest.raises(ValueError, match="must be"):
        bootstrap_intervals(probs, labels, scenes[:-1])
    with pytest.raises(ValueError, match="labels must be bool"):
        bootstrap_intervals(probs, labels.astype(np.int64), scenes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="preds must be bool"):
        score_resamples(probs, labels, scenes, np.ones((1, 40)), preds=labels[:-1])
    with pytest.raises(ValueError, match="same rows"):
        bootstrap_difference(probs, probs[:-1], labels, scenes)
    with pytest.raises(ValueError, match="level within"):
        bootstrap_intervals(probs, labels, scenes, level=95)
    with pytest.raises(ValueError, match="resamples must be positive"):
        bootstrap_intervals(probs, labels, scenes, resamples=0)
    probs[0, 0] = np.nan
    with pytest.raises(ValueError, match="hold NaN"):
        bootstrap_intervals(probs, labels, scenes)
