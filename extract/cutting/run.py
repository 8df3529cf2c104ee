"""`python -m extract tile`: raw xView, large scenes and one GeoJSON, to the bucket layout that extraction reads.

What every scene will give is counted first (`tile_plan`), so that a dry run and a real one say the same. Scenes are
then cut in several processes (`cutters`), each told its own scene's boxes and nothing else.
"""

import os
import sys
import time
from contextlib import closing
from typing import Any

from tqdm import tqdm

from extract.errors import RunError
from extract.ranks.group import shows_bars
from extract.ranks.signals import Stopped, stop_on_signals

from .config import TileConfig
from .output import open_place, own_place
from .plan import SETTINGS, TilePlan, check_settings, estimate_bytes, format_settings, make_plan
from .summary import describe_failures, describe_plan
from .workers import run_cutters


def run_tiling(config: TileConfig) -> dict[str, Any]:
    """Cut every scene that is not there yet, and say what became of all of them.

    Returns:
        the plan in numbers, for a program: what `out` holds afterwards, or would hold after a dry run.

    Raises:
        TileprobeError: whatever a user can mend; finished scenes stay.
        RunError: all was done but what cannot be read, which was named.
        Stopped: SIGTERM or SIGINT came; finished scenes stay, and one line has said how many.
    """
    place = open_place(config.out)
    done: list[str] = []
    check_settings(place, config.cutting)  # before a lock is put where it does not belong
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
                f"stopped by {stop}: {len(done):,} scenes were finished and stay; the same command goes on from there",
                file=sys.stderr,
                flush=True,
            )
            raise
    if plan.unreadable:
        print(describe_failures(plan.unreadable), flush=True)
        raise RunError(
            f"{len(plan.unreadable):,} of {len(plan.unreadable) + len(plan.scenes):,} scenes cannot be read: "
            "get them again or remove them, and give the same command; finished scenes stay"
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
        f"in {config.out} already; all images are about {size / 2**20:,.0f} MiB of PNG (from {sampled} tiles)",
        flush=True,
    )


def _cut(config: TileConfig, plan: TilePlan, done: list[str]) -> None:
    """Cut what is to do; names of finished scenes go to `done`, those that cannot be read to the plan."""
    to_do = {scene.job.name: scene for scene in plan.to_do}
    before = len(plan.scenes) - len(to_do)
    started, tiles = time.perf_counter(), 0
    if to_do:
        total = sum(scene.count.tiles for scene in to_do.values())
        workers = min(config.workers or _count_cores(), len(to_do))
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
        f"tiles/s); {before:,} were there before. Next: make extract TILES={config.out}",
        flush=True,
    )


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
