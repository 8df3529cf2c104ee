"""The lowest rung of a ladder, a run without training: predict what the nearest training tiles show."""

import time
from dataclasses import replace

import torch

from cache_schema.layout import BoolArray
from extract.ranks.group import join_ranks
from extract.ranks.same_job import Asked
from extract.ranks.signals import stop_on_signals
from train.begin import open_run
from train.config import TrainConfig
from train.data.labels import LabelledCache, LabelledRows, can_look_up
from train.data.memory import agree_on_budget, report_device_peak
from train.data.sets import read_sets
from train.errors import TrainError
from train.metrics.baselines import NEAREST
from train.metrics.decisions import FloatArray
from train.metrics.figures import FIGURES
from train.metrics.intervals import bootstrap_intervals, intervals_to_json
from train.metrics.neighbours import find_neighbours
from train.metrics.scores import Metrics, compute_metrics
from train.runs.val_logits import save_val_logits


def run_neighbours(config: TrainConfig) -> None:
    """Score the ten nearest neighbours on the rows that a head of these settings is scored on, and write a run.

    The run directory holds everything that rungs are compared by, but no checkpoint.
    """
    with stop_on_signals(), join_ranks(config.device, Asked.of("train neighbours", config)) as ranks:
        config = replace(config, memory_budget=config.memory_budget or agree_on_budget(ranks))
        sets = read_sets(config, ranks)
        if not can_look_up(sets.train, sets.val):
            raise TrainError(
                "nearest neighbours need the vectors in memory, and they do not fit: give a larger --memory-budget, or "
                "leave neighbours out of --rungs"
            )
        run = open_run(config, None, sets).run
        for line in sets.notes:
            ranks.say(line)

        def guess(cache: LabelledCache) -> FloatArray:
            """Return probabilities (n, C)."""
            found = find_neighbours(cache, sets.train, k=NEAREST, threshold=1.0, device=ranks.device, seed=config.seed)
            return found.vote(sets.train.rows.labels)

        started = time.perf_counter()
        probs = guess(sets.val)
        run.append_timing({"search_s": time.perf_counter() - started, **report_device_peak(ranks.device)})
        # Exact both ways: a share of 0 becomes -inf and 0 again, 0.5 becomes 0 and 0.5 again, and ties stay ties.
        save_val_logits(run, sets.val.rows, torch.from_numpy(probs).logit())
        metrics = _score(probs, sets.val.rows, sets.counted, config.seed)
        if sets.test is not None:
            test = _score(guess(sets.test), sets.test.rows, sets.counted_test, config.seed)
            run.write_json("test_metrics.json", test)
        run.write_json("metrics.json", metrics)
        shown = ", ".join(FIGURES[key].describe(metrics[key]) for key in ("map_macro", "f1_weighted"))
        print(f"\n{shown}\nrun: {run}", flush=True)


def _score(probs: FloatArray, rows: LabelledRows, counted: BoolArray, seed: int) -> Metrics:
    """Compute figures at threshold 0.5, and intervals, on the rows where `counted` (n,) is true."""
    probs, rows = probs[counted], rows.select(counted)
    metrics = compute_metrics(probs, rows.labels, rows.class_names, loss=None)
    if metrics["map_macro"] is None:
        raise TrainError("no validation tile shows any class: nothing can be scored; give a larger VAL_CACHE")
    intervals = bootstrap_intervals(probs, rows.labels, rows.scenes, seed=seed)
    return {**metrics, "intervals": intervals_to_json(intervals)}
