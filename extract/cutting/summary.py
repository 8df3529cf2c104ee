"""Describe a tiling to its user: scenes, features, boxes and labels, and what is left out and why."""

import re

from cache_schema.cli.text import show_first, show_name
from cache_schema.taxonomy import Taxonomy

from .annotations import Defect
from .config import TileConfig
from .cut import SceneCount
from .plan import TilePlan

_READ_AS_ONE = re.compile(r".+_\d+")
_INDENT = "\n" + " " * 10


def describe_plan(config: TileConfig, plan: TilePlan) -> str:
    """Describe, in several lines, the raw data and the tiles it will give."""
    total = SceneCount()
    for scene in plan.scenes:
        total.add(scene.count)
    return "\n".join(
        f"{name:10}{_INDENT.join(lines)}"
        for name, lines in (
            ("scenes", _describe_scenes(config, plan)),
            ("features", _describe_features(config, plan)),
            ("boxes", _describe_boxes(config, plan, total)),
            ("tiles", _describe_tiles(config, plan, total)),
        )
    )


def describe_failures(failed: dict[str, str]) -> str:
    """List the first ten scenes that cannot be read, with the reasons."""
    lines = [f"\n  {show_name(name)}: {show_name(reason)}" for name, reason in sorted(failed.items())]
    return f"{len(failed):,} scenes cannot be read:{show_first(lines, separator='', limit=10)}"


def _describe_scenes(config: TileConfig, plan: TilePlan) -> list[str]:
    lines = [f"{len(plan.scenes) + len(plan.unreadable):,} in {config.images}"]
    if plan.other_files:
        lines[0] += f"; {plan.other_files:,} other files are skipped"
    if plan.missing:
        lines.append(f"{len(plan.missing):,} with features but without a file, skipped: {_name(sorted(plan.missing))}")
    if plan.unlabelled:
        lines.append(
            f"{len(plan.unlabelled):,} without features: their tiles get no label files, since they may never have "
            f"been annotated: {_name(plan.unlabelled)}"
        )
    if plan.gone:
        lines.append(f"{len(plan.gone):,} in {config.out} whose file is gone; tiles are kept: {_name(plan.gone)}")
    joined = [scene.job.name for scene in plan.scenes if _READ_AS_ONE.fullmatch(scene.job.name)]
    if joined:
        lines.append(
            rf"{len(joined):,} whose names end in _DIGITS, such as {show_name(joined[0])}: extract and train read the "
            r"digits as a tile's number unless they get --scene-regex '^(?P<scene>.+)_\d+_\d+$'"
        )
    return lines


def _describe_features(config: TileConfig, plan: TilePlan) -> list[str]:
    annotations = plan.annotations
    lines = [f"{annotations.features:,} in {config.labels}"]
    for defect in Defect:
        if annotations.dropped[defect]:
            example = show_name(annotations.examples[defect])
            lines.append(f"{annotations.dropped[defect]:,} dropped: {defect.value} (such as {example})")
    if plan.missing:
        lines.append(f"{sum(plan.missing.values()):,} dropped: their scene has no file")
    unreadable = sum(len(annotations.boxes.get(name, ())) for name in plan.unreadable)
    if unreadable:
        lines.append(f"{unreadable:,} dropped: their scene cannot be read")
    return lines


def _describe_boxes(config: TileConfig, plan: TilePlan, total: SceneCount) -> list[str]:
    share = f"{100 * config.cutting.min_visibility:g} %"
    lines = [f"{sum(len(scene.job.boxes) for scene in plan.scenes):,}"]
    for number, what in (
        (total.outside, "dropped: outside their scene"),
        (total.unseen, f"dropped: no tile shows {share} of them"),
        (total.over_edge, "clipped at the edge of their scene"),
    ):
        if number:
            lines.append(f"{number:,} {what}")
    return lines


def _describe_tiles(config: TileConfig, plan: TilePlan, total: SceneCount) -> list[str]:
    cutting = config.cutting
    lines = [f"{total.tiles:,} of {cutting.size} px, {cutting.stride} px apart"]
    if total.small:
        lines[0] += f"; {total.small:,} are smaller, because their scene is"
    without = sum(scene.count.tiles for scene in plan.scenes if not scene.job.labelled)
    lines.append(f"{total.lines:,} label lines; {total.empty:,} tiles with an empty label, {without:,} without one")
    if total.cut_off:
        share = f"{100 * cutting.min_visibility:g} %"
        lines.append(f"{total.cut_off:,} times a box is left out of a tile that shows less than {share} of it")
    known = set(Taxonomy.xview().type_ids or ())
    unknown = {label_id: number for label_id, number in sorted(total.raw_ids.items()) if label_id not in known}
    if unknown:
        ids = show_first([f"{label_id} ({number:,})" for label_id, number in unknown.items()])
        lines.append(f"{sum(unknown.values()):,} of the lines keep ids that are not xView types: {ids}")
    return lines


def _name(scenes: list[str]) -> str:
    return show_first([show_name(scene) for scene in scenes])
