"""`python -m train sweep`: train a grid of configurations together, rank them, and write the winner as a run."""

import csv
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from extract.ranks.group import Ranks, join_ranks
from extract.ranks.same_job import Asked
from extract.ranks.signals import Stopped, stop_on_signals
from train.begin import open_run, write_settings
from train.config import TrainConfig
from train.data.cached import open_cached_tiles
from train.data.labels import can_look_up
from train.data.sets import Sets, read_sets
from train.errors import TrainError
from train.loop.assemble import make_head, make_meta
from train.loop.schedule import choose_batch_size
from train.loop.step import use_amp
from train.loop.validation import ValidationSet
from train.metrics.figures import FIGURES
from train.model.classifier import Classifier, Head
from train.run import finish_run
from train.runs.checkpoint import save_checkpoint
from train.runs.directory import RunDirectory

from .grid import Grid, describe_command
from .ranking import HeadResult, Ranked, cross_fit, format_ranking, rank_configurations
from .training import Folds, SweepPass, plan_passes


def run_sweep(base: TrainConfig, grid: Grid, seeds: int) -> None:
    """Train every configuration with every seed, rank them, and make a run directory with the winner.

    Args:
        base: settings that all share; its seed is the first one, and decides the split.
        seeds: number of seeds, counted up from the first.

    Raises:
        TileprobeError: something the user can fix.
        Stopped: SIGTERM or SIGINT came; complete heads are ranked and written first.
    """
    if seeds < 1:
        raise TrainError(f"--seeds {seeds}: at least 1")
    used = dict.fromkeys(name for config in grid.expand(base) for name in config.features.split("+"))
    base = replace(base, features="+".join(used))
    numbers = [replace(base, seed=base.seed + i).seed for i in range(seeds)]
    with stop_on_signals(), join_ranks(base.device, Asked.of("train sweep", base, grid, seeds=seeds)) as ranks:
        ranks.run_on_main(lambda: _refuse_several(ranks.world_size))
        run = None
        try:
            sets = read_sets(base, ranks)
            if not can_look_up(sets.train):
                raise TrainError(
                    "a sweep needs the vectors in memory, and they do not fit: give a larger --memory-budget, or "
                    "fewer --features"
                )
            base = replace(base, batch_size=choose_batch_size(len(sets.train.rows), base.batch_size))
            start = open_run(base, None, sets)
            run = start.run
            for line in (*sets.notes, *start.notes):
                ranks.say(line)
            if not base.val_cache:  # otherwise every seed would make its own split
                base = replace(base, data=replace(base.data, split_file=run.split_file))
            Sweep(grid.expand(base), numbers, sets, tuple(used), run, ranks).run()
        except Stopped as stop:
            ranked = run is not None and (run.path / "sweep.json").exists()
            what = f"{run}/sweep.json ranks the complete heads" if ranked else "no head was complete yet"
            print(f"stopped by {stop}: {what}", file=sys.stderr, flush=True)
            raise


def _refuse_several(world_size: int) -> None:
    if world_size > 1:
        raise TrainError(f"a sweep runs in one process, not {world_size}: leave NPROC unset")


class Sweep:
    """A sweep on sets that hold all `features` in use, written to an existing run directory."""

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        seeds: Sequence[int],
        sets: Sets,
        features: tuple[str, ...],
        run: RunDirectory,
        ranks: Ranks,
    ) -> None:
        self._configs, self._seeds, self._sets, self._run, self._ranks = configs, seeds, sets, run, ranks
        self._joined = features
        self._results: list[HeadResult] = []
        self._failed: list[TrainConfig] = []  # configurations whose head diverged
        self._stop: Stopped | None = None
        self._epochs = configs[0].epochs
        self._amp = use_amp(configs[0].amp, ranks.device)
        self._val = ValidationSet(open_cached_tiles(sets.val, ranks), sets.val.rows, sets.counted)
        self._folds = Folds.make(self._val, seeds[0], ranks.device)
        if not self._folds.support.any():
            raise TrainError("no validation tile shows any class: nothing can be ranked; give a larger VAL_CACHE")

    def run(self) -> None:
        """Train and rank the heads, and write the ranking and the winner's run."""
        self._train()
        ranked = rank_configurations(self._results, self._failed)
        if not ranked and self._stop is not None:
            raise self._stop
        if not ranked:
            raise TrainError(
                "a head of every configuration diverged: lower --lrs, or see on which tiles with `python -m train head`"
            )
        honest = cross_fit(ranked, self._folds.support)
        self._write(ranked, honest)
        print(f"\n{format_ranking(ranked)}", flush=True)
        self._finish(ranked[0])
        print("\n".join(self._describe(ranked, honest)), flush=True)
        if self._stop is not None:
            raise self._stop

    def _make_head(self, config: TrainConfig) -> Head:
        return make_head(make_meta(config, self._sets.train), self._sets.train.version.layout.width, config.seed)

    def _train(self) -> None:
        """Train pass after pass; if a signal comes, keep the heads of complete passes, or else of complete epochs."""
        train = open_cached_tiles(self._sets.train, self._ranks)
        passes = plan_passes(self._configs, self._seeds, self._make_head, self._ranks.device)
        heads = len(self._configs) * len(self._seeds)
        print(f"{len(self._configs)} configurations x {len(self._seeds)} seeds: {heads} heads, {len(passes)} passes")
        current = None
        with tqdm(
            total=heads * self._epochs * len(train),
            unit="tile x head",
            unit_scale=True,
            desc="sweep",
            disable=not self._ranks.draws_bars,
        ) as bar:
            try:
                for stacks in passes:
                    current = SweepPass(
                        stacks, train, self._val, self._folds, self._joined, self._make_head, amp=self._amp
                    )
                    current.train(bar)
                    self._collect(current)
            except Stopped as stop:
                self._stop = stop
                if not self._results and current is not None and current.epochs:
                    self._collect(current)
                    self._epochs = current.epochs

    def _collect(self, finished: SweepPass) -> None:
        """Collect a pass's results, with tensors of the first seed only, since the winner's run uses that seed."""
        found, lost = finished.collect(keep=finished.seed == self._seeds[0])
        self._results += found
        self._failed += lost

    def _write(self, ranked: Sequence[Ranked], honest: dict[str, float] | None) -> None:
        lines = [entry.to_json(i) for i, entry in enumerate(ranked, start=1)]
        whole: dict[str, Any] = {
            "configurations": len(self._configs),
            "seeds": list(self._seeds),
            "epochs": self._epochs,
            "complete": self._stop is None,
            "diverged": [describe_command(config) for config in self._failed],
            "cross_fitted": honest,
            "ranking": [
                {**line, "heads": [head.to_json() for head in entry.heads]}
                for line, entry in zip(lines, ranked, strict=True)
            ],
        }
        self._run.write_json("sweep.json", whole)
        with (self._run.path / "sweep.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, lines[0].keys())
            writer.writeheader()
            writer.writerows(lines)

    def _finish(self, winner: Ranked) -> None:
        """Complete the run with the winner's head of the first seed, not of its luckiest seed."""
        head = winner.heads[0]
        config = head.config
        assert head.tensors is not None
        meta = make_meta(config, self._sets.train)
        best = meta.at_epoch(head.best_epoch, head.figures["f1_weighted"], head.best_epoch)
        write_settings(self._run, config, self._sets.train.version)
        save_checkpoint(self._run.best, {f"head.{name}": tensor for name, tensor in head.tensors.items()}, best)
        classifier = Classifier(self._make_head(config), None, meta.features).to(self._ranks.device)
        own = read_sets(config, self._ranks)  # with the winner's features only
        finish_run(config, self._run, own, classifier, lambda cache: open_cached_tiles(cache, self._ranks), self._ranks)

    def _describe(self, ranked: Sequence[Ranked], honest: dict[str, float] | None) -> list[str]:
        """Return lines on how good the winner is, and the command that trains it alone."""
        lines = []
        if self._failed:
            lines.append(
                f"warning: {len(self._failed)} heads diverged, so {len(self._configs) - len(ranked)} configurations "
                "are not ranked: lower --lrs; sweep.json names them"
            )
        if self._stop is not None:
            lines.append(
                f"stopped by {self._stop}: {len(self._results)} of {len(self._configs) * len(self._seeds)} heads "
                f"are ranked, after {self._epochs} of {self._configs[0].epochs} epochs"
            )
        tried = f"the best of {len(ranked)} was chosen partly by luck, so its figures above are too high"
        if honest is None:
            lines.append(f"{tried}; with a single validation scene there is no way to tell by how much")
        else:
            lines.append(
                f"{tried}: when epoch and configuration are chosen on other scenes than those scored, they are "
                f"{', '.join(FIGURES[key].describe(value) for key, value in honest.items())} "
                f"(instead of {' and '.join(FIGURES[key].format(ranked[0].mean(key)) for key in honest)})"
            )
        return [
            *lines,
            f"all configurations: {self._run}/sweep.csv",
            f"the winner alone: {describe_command(ranked[0].config)}",
        ]
