"""Run one training, from a cache to a run directory.

The cached path (`unfreeze` 0) and the streamed one differ in two things only: where a batch comes from, and whether the
classifier holds a backbone. Split, loop, metrics, checkpoints and report are the same.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from extract.ranks.group import Ranks, join_ranks
from extract.ranks.same_job import Asked
from extract.ranks.signals import Stopped, stop_on_signals
from train.data.memory import agree_on_budget
from train.data.rare import find_rarest
from train.data.sets import Sets, read_sets
from train.folds.cross_validation import cross_validate
from train.loop.assemble import MakeTiles, prepare_training
from train.loop.determinism import deterministic_algorithms
from train.loop.schedule import choose_batch_size
from train.loop.step import use_amp
from train.loop.validation import predict_logits
from train.metrics.baselines import Comparison, compare
from train.metrics.evaluation import describe_evaluation, evaluate_rows
from train.metrics.plain_run import compare_with_plain
from train.model.classifier import Classifier
from train.model.shards import load_tensors
from train.runs.checkpoint import LoadedCheckpoint, load_best, save_checkpoint
from train.runs.directory import RunDirectory
from train.runs.resume import load_last
from train.runs.val_logits import save_val_logits

from .begin import Start, open_run, resolve_config
from .config import TrainConfig
from .errors import CheckpointError


def run_training(config: TrainConfig) -> dict[str, Any] | None:
    """Train as configured and leave a run directory.

    Returns:
        on the main rank `run`, its place, `best_epoch`, and the content of its `metrics` and `test_metrics` files.

    Raises:
        TileprobeError: an error that the user can fix; no earlier run is touched.
        Stopped: SIGTERM or SIGINT came; one line says from where a resumed run continues.
    """
    command = "train finetune" if config.unfreeze else "train head"
    with stop_on_signals(), join_ranks(config.device, Asked.of(command, config)) as ranks:
        start = None
        try:
            resolved, head, notes = ranks.run_on_main(lambda: resolve_config(config))
            config = resolved.on_node_of(config)
            config = replace(config, memory_budget=config.memory_budget or agree_on_budget(ranks))
            sets = read_sets(config, ranks)
            config = replace(config, batch_size=choose_batch_size(len(sets.train.rows), config.batch_size))
            start = ranks.run_on_main(lambda: open_run(config, head, sets), tell=Start.outline)
            for line in (*sets.notes, *notes, *start.notes):
                ranks.say(line)
            with deterministic_algorithms(config.deterministic):
                return _train(config, start, head, sets, ranks)
        except Stopped as stop:
            if ranks.is_main:
                print(_describe_stop(stop, start, config.epochs), file=sys.stderr, flush=True)
            raise


def _train(
    config: TrainConfig, start: Start, head: LoadedCheckpoint | None, sets: Sets, ranks: Ranks
) -> dict[str, Any] | None:
    trainer, make_tiles = prepare_training(config, start.run, sets, ranks, head=None if start.resume else head)
    if start.resume is not None:
        trainer.restore(start.resume)
    trainer.fit(ranks.say)
    folds = cross_validate(config, sets.whole, start.run, ranks) if sets.whole else None
    lines = folds.describe() if folds else ()
    return finish_run(config, start.run, sets, trainer.classifier, make_tiles, ranks, lines)


def finish_run(
    config: TrainConfig,
    run: RunDirectory,
    sets: Sets,
    classifier: Classifier,
    make_tiles: MakeTiles,
    ranks: Ranks,
    folds: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Score the best epoch on validation and test set, complete its checkpoint, write the report, print the summary.

    Returns:
        as `run_training`.
    """
    best = ranks.run_on_main(lambda: load_best(run.path), tell=LoadedCheckpoint.outline)
    load_tensors(classifier, best.tensors, ranks)
    amp = use_amp(config.amp, ranks.device)
    val_logits = predict_logits(classifier, make_tiles(sets.val), ranks, amp=amp)
    test_logits = None
    if sets.test is not None:
        test_logits = predict_logits(classifier, make_tiles(sets.test), ranks, amp=amp)
    if val_logits is None:
        return None
    others = Comparison() if config.unfreeze else compare(sets, ranks.device, config.seed)
    rarest = tuple(find_rarest(sets.train.rows.labels, sets.val.rows.labels[sets.counted]).tolist())
    loss = config.make_loss()
    val = evaluate_rows(val_logits, sets.val.rows, sets.counted, loss=loss, rarest=rarest, seed=config.seed)
    fitted = val.decisions
    meta = replace(best.meta, thresholds=tuple(map(float, fitted.thresholds)), temperature=fitted.temperature)
    save_checkpoint(run.best, best.tensors, meta)
    save_val_logits(run, sets.val.rows, val_logits)
    results = {f"validation, best epoch {best.meta.epoch}": replace(val, baselines=others.val)}
    if sets.test is not None and test_logits is not None:
        test = evaluate_rows(test_logits, sets.test.rows, sets.counted_test, loss=loss, decisions=fitted, rarest=rarest)
        results["test, scored once"] = replace(test, baselines=others.test)
    written = dict(zip(("metrics", "test_metrics"), (each.to_json() for each in results.values()), strict=False))
    for name, metrics in written.items():
        run.write_json(f"{name}.json", metrics)
    if others.audit:
        run.write_json("audit.json", asdict(others.audit))
    from .report import write_events, write_report  # importing them takes a second, which only rank 0 needs to spend

    write_events(run)
    write_report(run)
    run.finish()
    for title, evaluation in results.items():
        print(f"\n{title}\n{describe_evaluation(evaluation)}")
    for line in (*folds, *others.notes, *compare_with_plain(run, config, sets, val_logits)):
        print(line)
    print(f"\nrun: {run} (best/, metrics.json, report.html, model_card.md)", flush=True)
    return {"run": str(run), "best_epoch": best.meta.epoch, **written}


def _describe_stop(stop: Stopped, start: Start | None, epochs: int) -> str:
    if start is None:
        return f"stopped by {stop} before the run began"
    try:
        meta = load_last(start.run.path)[0].meta
        saved, begun = meta.epoch, meta.begun.steps
    except CheckpointError:
        saved = begun = 0
    steps = f" and {begun:,} steps of the next" if begun else ""
    return (
        f"stopped by {stop}: {saved} of {epochs} epochs{steps} of {start.run} are saved; --resume continues from there"
    )
