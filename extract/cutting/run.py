"""Convert raw xView (large scenes and one GeoJSON) to the layout that extraction reads: `python -m extract tile`.

`plan` first counts what every scene will give, so that a dry run and a real run print the same. `workers` then cuts
scenes in several processes, each of which gets only its own scene's boxes.
"""

import sys
import time
from contextlib import closing
from typing import Any

from tqdm import tqdm

from extract.errors import RunError
from extract.ranks.group import shows_bars
from extract.ranks.machine import count_cores
from extract.ranks.signals import Stopped, stop_on_signals

from .config import TileConfig
from .output import open_place, own_place
from .plan import SETTINGS, TilePlan, check_settings, estimate_bytes, format_settings, make_plan
from .summary import describe_failures, describe_plan
from .workers import run_cutters


def run_tiling(config: TileConfig) -> dict[str, Any]:
    """Cut every scene that is not finished, and print the plan and the result.

    Returns:
        the plan in numbers, for programs: the contents of `out` afterwards, or those it would have after a dry run.

    Raises:
        TileprobeError: an error that a user can fix; finished scenes are kept.
        RunError: some scenes cannot be read; all others are finished.
        Stopped: SIGTERM or SIGINT arrived; finished scenes are kept and their number was printed.
    """
    place = open_place(config.out)
    done: list[str] = []
    check_settings(place, config.cutting)  # before writing a lock into a foreign directory
    with stop_on_signals():
        try:
            if config.dry_run:
                plan = make_plan(config, place)
                _say_dry(config, plan)
            else:
                with own_place(place):
                    plan = make_plan(config, place)
                    print(describe_plan(config, plan), flush=True)
                    if not check_settings(place, config.cutting):
                        place.write(SETTINGS, format_settings(config.cutting))
                    _cut(config, plan, done)
        except Stopped as stop:
            print(
                f"stopped by {stop}: {len(done):,} scenes are finished; the same command continues from there",
                file=sys.stderr,
                flush=True,
            )
            raise
    if plan.unreadable:
        print(describe_failures(plan.unreadable), flush=True)
        raise RunError(
            f"{len(plan.unreadable):,} of {len(plan.unreadable) + len(plan.scenes):,} scenes cannot be read: "
            "replace or remove them and run the same command again; finished scenes are kept"
        )
    return {
        "out": place.url,
        "scenes": len(plan.scenes),
        "scenes_cut": len(done),
        "tiles": sum(scene.count.tiles for scene in plan.scenes),
        "label_lines": sum(scene.count.lines for scene in plan.scenes),
        "scenes_without_features": plan.unlabelled,
        "scenes_without_file": sorted(plan.missing),
        "dropped_features": {defect.value: count for defect, count in plan.annotations.dropped.items()},
    }


def _say_dry(config: TileConfig, plan: TilePlan) -> None:
    size, sampled = estimate_bytes(plan)
    print(describe_plan(config, plan))
    print(
        f"dry run: nothing is written. {len(plan.to_do):,} scenes to cut, {len(plan.scenes) - len(plan.to_do):,} are "
        f"in {config.out} already; all images take about {size / 2**20:,.0f} MiB of PNG (from {sampled} tiles)",
        flush=True,
    )


def _cut(config: TileConfig, plan: TilePlan, done: list[str]) -> None:
    """Cut the unfinished scenes; append finished ones to `done` and record unreadable ones in the plan."""
    to_do = {scene.job.name: scene for scene in plan.to_do}
    before = len(plan.scenes) - len(to_do)
    started, tiles = time.perf_counter(), 0
    if to_do:
        total = sum(scene.count.tiles for scene in to_do.values())
        workers = min(config.workers or count_cores(), len(to_do))
        outcomes = run_cutters([scene.job for scene in to_do.values()], workers)
        with (
            tqdm(total=total, unit="tile", desc="tile", disable=not shows_bars()) as bar,
            closing(outcomes),
        ):
            for outcome in outcomes:
                scene = to_do[outcome.name]
                if outcome.done:
                    done.append(outcome.name)
                    tiles += scene.count.tiles
                else:
                    plan.scenes.remove(scene)
                    plan.unreadable[outcome.name] = outcome.error
                bar.update(scene.count.tiles)
    seconds = time.perf_counter() - started
    print(
        f"cut {len(done):,} scenes into {tiles:,} tiles in {seconds:.1f} s ({tiles / max(seconds, 1e-9):,.0f} "
        f"tiles/s); {before:,} existed before. Next: make extract TILES={config.out}",
        flush=True,
    )
