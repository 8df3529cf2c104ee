"""Compare a sweep with the same configurations trained one after the other."""

import time
from dataclasses import replace

from tqdm import tqdm

from extract.ranks.group import Ranks, join_ranks
from tests.caches import plant_cache
from train.config import DataConfig, HeadName, TrainConfig
from train.data.batches import Tiles
from train.data.cached import open_cached_tiles
from train.data.sets import Sets, read_sets
from train.loop.assemble import make_head, make_meta
from train.loop.schedule import choose_batch_size
from train.loop.step import use_amp
from train.loop.trainer import Trainer
from train.loop.validation import ValidationSet
from train.model.classifier import Classifier, Head
from train.runs.directory import RunDirectory
from train.sweep.grid import Grid
from train.sweep.training import Folds, SweepPass, plan_passes

from .fixtures import Fixtures
from .measure import Bound, Figure, divide_rounds

ROWS, WIDTH, CLASSES, EPOCHS = 15_360, 1024, 60, 2
ROUNDS = 2
GRID = "3e-4,1e-3,3e-3,1e-2", "0.01,0.03,0.1,0.3", "bce,focal:0.65:2,focal:0.5:1,asymmetric"
BOUNDS: dict[HeadName, float] = {"mlp": 1.2, "linear": 3.0}


def measure_sweep(fixtures: Fixtures) -> list[Figure]:
    """Measure 64 configurations of each head: reading batches, training, and scoring every epoch, without set-up."""
    cache = plant_cache(str(fixtures.directory / "sweep-cache"), ROWS, width=WIDTH, classes=CLASSES)
    base = TrainConfig(
        cache=cache,
        run=str(fixtures.directory / "run"),
        epochs=EPOCHS,
        device="cpu",
        data=DataConfig(label_ids="class"),
    )
    with join_ranks("cpu") as ranks:
        sets = read_sets(base, ranks)
        base = replace(base, batch_size=choose_batch_size(len(sets.train.rows), base.batch_size))
        return [_compare(base, head, sets, ranks) for head in BOUNDS]


def _compare(base: TrainConfig, head: HeadName, sets: Sets, ranks: Ranks) -> Figure:
    """Run, in each round, the whole sweep and a sample of the single runs."""
    lrs, decays, losses = GRID
    configs = Grid(lrs=lrs, weight_decays=decays, losses=losses, features="cls", heads=head).expand(base)
    train = open_cached_tiles(sets.train, ranks)
    val = ValidationSet(open_cached_tiles(sets.val, ranks), sets.val.rows, sets.counted)
    together, alone = [], []
    with tqdm(total=len(configs) + ROUNDS, desc=f"sweep, {head}", unit="run") as bar:
        for i in range(ROUNDS):
            together.append(_time_sweep(configs, train, val, sets, ranks))
            bar.update()
            seconds = 0.0
            for config in configs[i::ROUNDS]:
                seconds += _time_alone(config, train, val, sets, ranks)
                bar.update()
            alone.append(seconds * ROUNDS)
    return Figure(
        f"sweep of {len(configs)} {head} heads over the same runs one after the other",
        Bound(">=", BOUNDS[head]),
        divide_rounds(alone, together),
        detail=f"{len(train):,} x {WIDTH} vectors, {EPOCHS} epochs, batch {base.batch_size}; {ranks.cores} cores; each "
        f"single run once, a {ROUNDS}nd of them a round; epochs with their validation, without set-up and report",
    )


def _time_sweep(configs: list[TrainConfig], train: Tiles, val: ValidationSet, sets: Sets, ranks: Ranks) -> float:
    def fresh(config: TrainConfig) -> Head:
        return make_head(make_meta(config, sets.train), WIDTH, config.seed)

    started = time.perf_counter()
    folds = Folds.make(val, configs[0].seed, ranks.device)
    with tqdm(disable=True) as bar:
        for stacks in plan_passes(configs, [configs[0].seed], fresh, ranks.device):
            sweep = SweepPass(stacks, train, val, folds, ("cls",), fresh, amp=use_amp(configs[0].amp, ranks.device))
            sweep.train(bar)
            sweep.collect(keep=True)
    return time.perf_counter() - started


def _time_alone(config: TrainConfig, train: Tiles, val: ValidationSet, sets: Sets, ranks: Ranks) -> float:
    meta = make_meta(config, sets.train)
    classifier = Classifier(make_head(meta, WIDTH, config.seed), None, meta.features)
    trainer = Trainer(classifier, train, val, config, meta, RunDirectory.create(config.run), ranks)
    started = time.perf_counter()
    trainer.fit(print)
    return time.perf_counter() - started
