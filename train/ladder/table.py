"""Summarise a ladder: one table, a plot of quality against cost, and a sentence on whether more training paid off.

Figures come from the rungs' metrics.json. Differences are paired: both models are scored on the same resampled scenes,
with the same draws as the rungs' own intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from cache_schema.cli.text import format_bytes
from extract.ranks.group import Ranks
from train.data.sets import Sets, read_sets
from train.errors import TrainError
from train.metrics.decisions import FloatArray
from train.metrics.figures import FIGURES, format_value
from train.metrics.intervals import intervals_to_json
from train.metrics.side_by_side import PairedDifference, format_estimate, format_interval, format_table
from train.runs.directory import RunDirectory
from train.runs.val_logits import load_val_logits

from .rungs import MLP, Record

COMPARED = ("f1_weighted", "map_macro")
_QUALITY = FIGURES["map_macro"]
FEW_SCENES = 20
"""Up to this many scenes percentile intervals are too narrow, see `train.metrics.intervals`."""


@dataclass(frozen=True, eq=False)
class Result:
    """A finished rung.

    Attributes:
        metrics: its metrics.json.
        probs: (n, C) float32 of the n validation tiles of the main figures.
        training_s: seconds of its epochs, validation included; 0 for a rung without epochs.
        device_bytes: peak memory of tensors on a GPU; None on a CPU.
    """

    record: Record
    metrics: dict[str, Any]
    probs: FloatArray
    training_s: float
    device_bytes: int | None

    @property
    def title(self) -> str:
        return self.record.rung.title

    @property
    def memory(self) -> int:
        """Return the peak bytes of the GPU if there is one, else of the host."""
        return self.record.peak_bytes if self.device_bytes is None else self.device_bytes


def summarise(ladder: RunDirectory, records: Sequence[Record]) -> tuple[dict[str, Any], str]:
    """Read the finished rungs' runs, cheapest first, compare them, and draw ladder.png.

    Returns:
        the table for ladder.json, and the text for people.

    Raises:
        TrainError: they were not scored on the same tiles.
        TileprobeError: the cache cannot be read.
    """
    runs = [RunDirectory.open(str(ladder.path / record.rung.name)) for record in records]
    config = runs[0].read_config()
    sets = read_sets(replace(config, test_cache=None, folds=0), Ranks.alone())
    results = [_read_result(run, record, sets) for run, record in zip(runs, records, strict=True)]
    rows = sets.val.rows.select(sets.counted)
    # Fine-tuning starts from the MLP head, so it has to beat it; without an MLP rung the cheapest is the reference.
    reference = next((result for result in results if result.record.rung.name == MLP), results[0])
    gains = {
        result.record.rung.name: PairedDifference.measure(
            result.probs, reference.probs, rows.labels, rows.scenes, seed=config.seed
        )
        for result in results
        if result is not reference
    }
    sentence = conclude(results, reference, gains)
    scenes = len(np.unique(rows.scenes))
    lines = [
        f"{len(rows):,} validation tiles of {scenes} scenes; each rung's best epoch was chosen on them",
        "figures [95 % intervals, bootstrap over scenes]; time is each rung's own, from start to report",
        *(
            [f"with {scenes} scenes intervals are too narrow: doubt a gain whose interval only just excludes 0"]
            if scenes <= FEW_SCENES
            else []
        ),
        "",
        *tabulate(results, reference, gains),
        "",
        sentence,
    ]
    draw_ladder(ladder.path / "ladder.png", results)
    table = {"reference": reference.record.rung.name, "table": table_to_json(results, gains), "sentence": sentence}
    return table, "\n".join(lines)


def _read_result(run: RunDirectory, record: Record, sets: Sets) -> Result:
    logits = load_val_logits(run, sets.val.rows)
    if run.read_version() != sets.train.version.id or run.read_json("split.json") != sets.split or logits is None:
        raise TrainError(
            f"{run} was scored on other tiles than the cache holds now: the cache changed between rungs: start a new "
            "ladder without --resume"
        )
    probs = logits[torch.from_numpy(sets.counted)].sigmoid().numpy()
    timings = run.read_timings()
    peaks = [line["device_peak_bytes"] for line in timings if "device_peak_bytes" in line]
    training_s = sum(line["train_s"] + line["val_s"] for line in timings if "train_s" in line)
    return Result(record, run.read_json("metrics.json"), probs, training_s, max(peaks, default=None))


def table_to_json(results: Sequence[Result], gains: Mapping[str, PairedDifference]) -> list[dict[str, Any]]:
    """Return the figures and cost of each rung as JSON values; `gains` holds those over the reference, by rung."""
    lines = []
    for result in results:
        gain = gains.get(result.record.rung.name)
        lines.append(
            {
                "name": result.record.rung.name,
                **{key: result.metrics[key] for key in (*COMPARED, "intervals")},
                "wall_s": result.record.wall_s,
                "training_s": result.training_s,
                "host_peak_bytes": result.record.peak_bytes,
                "device_peak_bytes": result.device_bytes,
                "over_reference": _gain_to_json(gain) if gain else None,
            }
        )
    return lines


def _gain_to_json(gain: PairedDifference) -> dict[str, Any]:
    intervals = intervals_to_json(gain.interval)
    return {
        "difference": {key: gain.difference[key] for key in COMPARED},
        "intervals": {key: intervals[key] for key in COMPARED},
    }


def conclude(results: Sequence[Result], reference: Result, gains: Mapping[str, PairedDifference]) -> str:
    """Say in one sentence what the best dearer rung gains in mAP over the reference, and at what price.

    If the interval holds 0, no gain is claimed. If another rung's gain is clear for less time, it is named too. Without
    a dearer rung the best of the others is compared with the reference.
    """
    after = results[[*results].index(reference) + 1 :]
    rivals = after or [result for result in results if result is not reference]
    if not rivals:
        return f"{reference.title} is the only rung: there is nothing to compare it with"
    best = max(rivals, key=lambda result: float(result.metrics[_QUALITY.key]))
    sentence = _describe_gain(best, reference, gains)
    clear = [result for result in after if gains[result.record.rung.name].interval[_QUALITY.key][0] > 0]
    cheapest = min(clear, key=lambda result: result.record.wall_s, default=best)
    if len(rivals) > 1:
        sentence += f"; it is the best of {len(rivals)} on these same tiles, which flatters it"
    if cheapest is not best:
        sentence += f"; {_describe_gain(cheapest, reference, gains)}"
    return sentence


def _describe_gain(result: Result, reference: Result, gains: Mapping[str, PairedDifference]) -> str:
    gain = gains[result.record.rung.name]
    difference, (low, high) = gain.difference[_QUALITY.key], gain.interval[_QUALITY.key]
    price = f"over the {reference.title} for {_format_times(result.record.wall_s / reference.record.wall_s)} the time"
    interval = format_interval((low, high), sign="+")
    size = f"{format_value(abs(difference))} {_QUALITY.title}"
    signed = f"{format_value(difference, sign='+')} {_QUALITY.title}"
    if np.isnan(low):
        return f"{result.title}: {signed} {price}, without an interval: it needs two validation scenes"
    if low > 0:
        return f"{result.title} gains {size} {interval} {price}"
    if high < 0:
        return f"{result.title} loses {size} {interval} {price}"
    return f"{result.title} shows no gain: {signed} {interval} {price}, and the interval holds 0"


def tabulate(results: Sequence[Result], reference: Result, gains: Mapping[str, PairedDifference]) -> list[str]:
    """Format a line a rung."""
    where = "GPU memory" if any(result.device_bytes is not None for result in results) else "memory"
    header = [
        "",
        *(FIGURES[key].title for key in COMPARED),
        f"{_QUALITY.title} over {reference.title}, paired",
        "time",
        "in epochs",
        f"peak {where}",
    ]
    rows = [header]
    for result in results:
        gain = gains.get(result.record.rung.name)
        resumed = f" ({len(result.record.legs)} starts)" if len(result.record.legs) > 1 else ""
        metrics = result.metrics
        rows.append(
            [
                result.title,
                *(format_estimate(metrics[key], metrics["intervals"][key]) for key in COMPARED),
                gain.format(_QUALITY.key) if gain else "-",
                f"{result.record.wall_s:,.0f} s{resumed}",
                f"{result.training_s:,.1f} s" if result.training_s else "-",
                format_bytes(result.memory),
            ]
        )
    return format_table(rows)


def _format_times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def draw_ladder(path: Path, results: Sequence[Result]) -> None:
    """Draw mAP with its interval against time (left) and against memory (right), and save it as PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(results)))
    for result, colour in zip(results, colours, strict=True):
        value, interval = result.metrics[_QUALITY.key], result.metrics["intervals"][_QUALITY.key] or [np.nan, np.nan]
        for axis, cost in zip(axes, (result.record.wall_s, result.memory / 2**30), strict=True):
            axis.vlines(cost, *interval, color=colour, linewidth=1.5)
            axis.plot(cost, value, "o", color=colour, label=result.title)
    axes[0].set_xscale("log")
    axes[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_xlabel("seconds, from start to report")
    axes[1].set_xlim(left=0)
    axes[1].set_xlabel("peak memory, GiB")
    axes[0].set_ylabel(f"validation {_QUALITY.title}, 95 % interval over scenes")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
