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
from matplotlib.ticker import LogLocator, NullFormatter

from cache_schema.cli.text import format_bytes
from extract.ranks.group import Ranks
from train.data.labels import LabelledRows
from train.data.sets import Sets, read_sets
from train.errors import TrainError
from train.metrics.decisions import FloatArray
from train.metrics.intervals import Interval, bootstrap_difference, intervals_to_json
from train.runs.directory import RunDirectory
from train.runs.val_logits import load_val_logits

from .rungs import MLP, Record

FIGURES = (("f1_weighted", "weighted F1"), ("map_macro", "mAP"))
_QUALITY = "map_macro"
FEW_SCENES = 20
"""Up to which percentile intervals are too narrow, see `intervals`."""


@dataclass(frozen=True, eq=False)
class Result:
    """A finished rung.

    Attributes:
        record: how it was run.
        metrics: its metrics.json.
        probs: (n, C) float32 of the n validation tiles that count.
        training_s: seconds of its epochs, validation included; 0 for one that has none.
        device_bytes: most memory of tensors on a GPU; None on a CPU.
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
                    "training_s": result.training_s,
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
    sets = read_sets(replace(config, test_cache=None, folds=0), Ranks.alone())
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
    scenes = len(np.unique(rows.scenes))
    lines = [
        f"{len(rows):,} validation tiles of {scenes} scenes; each rung's best epoch was chosen on them",
        "figures [95 % intervals, bootstrap over scenes]; time is each rung's own, from start to report",
        *(
            [f"with {scenes} scenes intervals are too narrow: doubt a gain that they only just show"]
            if scenes <= FEW_SCENES
            else []
        ),
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
    timings = run.read_timings()
    peaks = [line["device_peak_bytes"] for line in timings if "device_peak_bytes" in line]
    training_s = sum(line["train_s"] + line["val_s"] for line in timings if "train_s" in line)
    return Result(record, run.read_json("metrics.json"), probs, training_s, max(peaks, default=None))


def measure_gain(result: Result, reference: Result, rows: LabelledRows, seed: int) -> Gain:
    """What a rung gains over another on n validation rows; `seed` is that of the rungs' own intervals."""
    interval = bootstrap_difference(result.probs, reference.probs, rows.labels, rows.scenes, seed=seed)
    keys = [key for key, _ in FIGURES]
    difference = {key: result.metrics[key] - reference.metrics[key] for key in keys}
    return Gain(difference, {key: interval[key] for key in keys})


def conclude(results: Sequence[Result], reference: Result, gains: dict[str, Gain]) -> str:
    """One sentence: what the best dearer rung gains in mAP over the reference, and at what price.

    Where the interval holds 0 no gain is claimed. Where another rung's gain is clear for less time, it is named as
    well. Without a dearer rung the best of the others is put beside the reference.
    """
    after = results[[*results].index(reference) + 1 :]
    rivals = after or [result for result in results if result is not reference]
    if not rivals:
        return f"{reference.title} stands alone: there is nothing to compare it with"
    best = max(rivals, key=lambda result: float(result.metrics[_QUALITY]))
    sentence = _describe_gain(best, reference, gains)
    clear = [result for result in after if gains[result.record.rung.name].is_clear]
    cheapest = min(clear, key=lambda result: result.record.wall_s, default=best)
    if len(rivals) > 1:
        sentence += f"; the best of {len(rivals)} on these very tiles, which flatters it"
    if cheapest is not best:
        sentence += f"; {_describe_gain(cheapest, reference, gains)}"
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
    header = [
        "",
        *(title for _, title in FIGURES),
        f"mAP over {reference.title}, paired",
        "time",
        "in epochs",
        f"peak {where}",
    ]
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
                f"{result.training_s:,.1f} s" if result.training_s else "-",
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
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(results)))
    for result, colour in zip(results, colours, strict=True):
        value, interval = result.metrics[_QUALITY], result.metrics["intervals"][_QUALITY] or [np.nan, np.nan]
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
    axes[0].set_ylabel("validation mAP, 95 % interval over scenes")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
