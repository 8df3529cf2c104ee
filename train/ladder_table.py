"""What a ladder found: one table, a plot of quality against cost, and a sentence that says whether it was worth it.

Figures are those of the rungs' own metrics.json. Differences are paired: both models are scored on the same resampled
scenes, the very draws that the rungs' own intervals come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .baselines import FloatArray
from .errors import TrainError
from .intervals import Interval, bootstrap_difference, intervals_to_json
from .memory import format_bytes
from .rows import LabelledRows
from .rundir import RunDirectory
from .rungs import MLP, Record
from .sets import Sets, read_sets
from .siblings import load_val_logits

FIGURES = (("f1_weighted", "weighted F1"), ("map_macro", "mAP"))
_QUALITY = "map_macro"


@dataclass(frozen=True, eq=False)
class Result:
    """A finished rung.

    Attributes:
        record: how it was run.
        metrics: its metrics.json.
        probs: (n, C) float32 of the n validation tiles that count.
        device_bytes: most memory of tensors on a GPU; None on a CPU.
    """

    record: Record
    metrics: dict[str, Any]
    probs: FloatArray
    device_bytes: int | None

    @property
    def title(self) -> str:
        return self.record.rung.title

    @property
    def memory(self) -> int:
        """Bytes that are scarce: the GPU's, where there is one."""
        return self.record.peak_bytes if self.device_bytes is None else self.device_bytes


@dataclass(frozen=True)
class Gain:
    """A rung less the reference: by figure the difference and its paired interval."""

    difference: dict[str, float]
    interval: dict[str, Interval]

    @property
    def is_clear(self) -> bool:
        """Whether mAP is higher beyond its interval."""
        return self.interval[_QUALITY][0] > 0

    def to_json(self) -> dict[str, Any]:
        return {"difference": self.difference, "intervals": intervals_to_json(self.interval)}


@dataclass(frozen=True, eq=False)
class Summary:
    """Results cheapest first; `gains` are over the reference rung, whose own is left out; `text` is for people."""

    results: tuple[Result, ...]
    reference: Result
    gains: dict[str, Gain]
    sentence: str
    text: str

    def to_json(self) -> dict[str, Any]:
        keys = (*(key for key, _ in FIGURES), "intervals")
        table = []
        for result in self.results:
            gain = self.gains.get(result.record.rung.name)
            table.append(
                {
                    "name": result.record.rung.name,
                    **{key: result.metrics[key] for key in keys},
                    "wall_s": result.record.wall_s,
                    "host_peak_bytes": result.record.peak_bytes,
                    "device_peak_bytes": result.device_bytes,
                    "over_reference": gain.to_json() if gain else None,
                }
            )
        return {"reference": self.reference.record.rung.name, "table": table, "sentence": self.sentence}


def summarise(ladder: RunDirectory, records: Sequence[Record]) -> Summary:
    """Read what finished rungs left, compare them, and draw ladder.png.

    Raises:
        TrainError: they are not of the same tiles.
        TileprobeError: the cache cannot be read.
    """
    runs = [RunDirectory.open(str(ladder.path / record.rung.name)) for record in records]
    config = runs[0].read_config()
    sets = read_sets(replace(config, test_cache=None, folds=0))
    results = tuple(_read_result(run, record, sets) for run, record in zip(runs, records, strict=True))
    rows = sets.val.rows.select(sets.counted)
    # What layers start from is what they have to beat; without it the cheapest.
    reference = next((result for result in results if result.record.rung.name == MLP), results[0])
    gains = {
        result.record.rung.name: measure_gain(result, reference, rows, config.seed)
        for result in results
        if result is not reference
    }
    sentence = conclude(results, reference, gains)
    lines = [
        f"{len(rows):,} validation tiles of {len(np.unique(rows.scenes))} scenes; each rung's best epoch was chosen on "
        "them",
        "figures [95 % intervals, bootstrap over scenes]; time is each rung's own, its start included, extraction not",
        "",
        *tabulate(results, reference, gains),
        "",
        sentence,
    ]
    draw_ladder(ladder.path / "ladder.png", results)
    return Summary(results, reference, gains, sentence, "\n".join(lines))


def _read_result(run: RunDirectory, record: Record, sets: Sets) -> Result:
    logits = load_val_logits(run, sets.val.rows)
    if run.read_version() != sets.train.version.id or run.read_json("split.json") != sets.split or logits is None:
        raise TrainError(
            f"{run} is not of the tiles that the cache holds now: it changed while the ladder was climbed: start a new "
            "ladder without --resume"
        )
    probs = logits[torch.from_numpy(sets.counted)].sigmoid().numpy()
    peaks = [line["device_peak_bytes"] for line in run.read_timings() if "device_peak_bytes" in line]
    return Result(record, run.read_json("metrics.json"), probs, max(peaks, default=None))


def measure_gain(result: Result, reference: Result, rows: LabelledRows, seed: int) -> Gain:
    """What a rung gains over another on n validation rows; `seed` is that of the rungs' own intervals."""
    interval = bootstrap_difference(result.probs, reference.probs, rows.labels, rows.scenes, seed=seed)
    keys = [key for key, _ in FIGURES]
    difference = {key: result.metrics[key] - reference.metrics[key] for key in keys}
    return Gain(difference, {key: interval[key] for key in keys})


def conclude(results: Sequence[Result], reference: Result, gains: dict[str, Gain]) -> str:
    """One sentence: what the best dearer rung gains in mAP over the reference, and at what price.

    Where the interval holds 0 no gain is claimed. Where a cheaper rung's gain is clear, it is named as well. Without
    a dearer rung the best of the cheaper ones is put beside the reference.
    """
    after = results[[*results].index(reference) + 1 :]
    rivals = after or [result for result in results if result is not reference]
    if not rivals:
        return f"{reference.title} stands alone: there is nothing to compare it with"
    best = max(rivals, key=lambda result: float(result.metrics[_QUALITY]))
    sentence = _describe_gain(best, reference, gains)
    clear = [result for result in after if gains[result.record.rung.name].is_clear]
    cheapest = min(clear, key=lambda result: result.record.wall_s, default=best)
    if cheapest is not best:
        sentence += f"; {_describe_gain(cheapest, reference, gains)}"
    if len(rivals) > 1:
        sentence += f" ({best.title} has the highest mAP of {len(rivals)} rungs on these very tiles, which flatters it)"
    return sentence


def _describe_gain(result: Result, reference: Result, gains: dict[str, Gain]) -> str:
    gain = gains[result.record.rung.name]
    difference, (low, high) = gain.difference[_QUALITY], gain.interval[_QUALITY]
    price = f"over the {reference.title} for {_format_times(result.record.wall_s / reference.record.wall_s)} the time"
    interval = f"[{low:+.3f}, {high:+.3f}]"
    if np.isnan(low):
        return f"{result.title}: {difference:+.3f} mAP {price}, without an interval: it needs two validation scenes"
    if low > 0:
        return f"{result.title} gains {difference:.3f} mAP {interval} {price}"
    if high < 0:
        return f"{result.title} loses {-difference:.3f} mAP {interval} {price}"
    return f"{result.title} shows no gain: {difference:+.3f} mAP {interval} {price}, and the interval holds 0"


def tabulate(results: Sequence[Result], reference: Result, gains: dict[str, Gain]) -> list[str]:
    """Aligned lines, a rung each."""
    where = "GPU memory" if any(result.device_bytes is not None for result in results) else "memory"
    header = ["", *(title for _, title in FIGURES), f"mAP over {reference.title}, paired", "time", f"peak {where}"]
    lines = [header]
    for result in results:
        gain = gains.get(result.record.rung.name)
        resumed = f" ({len(result.record.legs)} starts)" if len(result.record.legs) > 1 else ""
        lines.append(
            [
                result.title,
                *(_format_figure(result.metrics[key], result.metrics["intervals"][key]) for key, _ in FIGURES),
                _format_figure(gain.difference[_QUALITY], gain.to_json()["intervals"][_QUALITY], "+") if gain else "-",
                f"{result.record.wall_s:,.0f} s{resumed}",
                format_bytes(result.memory),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _format_figure(value: float, interval: Sequence[float] | None, sign: str = "") -> str:
    spread = "n/a" if interval is None else f"{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}"
    return f"{value:{sign}.3f} [{spread}]"


def _format_times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def draw_ladder(path: Path, results: Sequence[Result]) -> None:
    """Save mAP with its interval against time on the left, against memory on the right, as PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    quality = [result.metrics[_QUALITY] for result in results]
    for axis, title, costs in (
        (axes[0], "seconds", [result.record.wall_s for result in results]),
        (axes[1], "peak memory, GiB", [result.memory / 2**30 for result in results]),
    ):
        axis.plot(costs, quality, color="#9aa4b0", linewidth=1, zorder=1)
        for result, cost, value in zip(results, costs, quality, strict=True):
            low, high = result.metrics["intervals"][_QUALITY] or (value, value)
            axis.vlines(cost, low, high, color="#1f5fa8", linewidth=1.5)
            axis.plot(cost, value, "o", color="#1f5fa8")
            axis.annotate(result.title, (cost, value), xytext=(5, 5), textcoords="offset points", fontsize=8)
        axis.set_xscale("log")
        axis.set_xlabel(title)
    axes[0].set_ylabel("validation mAP, 95 % interval over scenes")
    figure.savefig(path, dpi=110)
    plt.close(figure)
