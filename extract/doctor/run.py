"""Run all checks of `python -m extract doctor` in order, and print each finding and a verdict."""

from collections.abc import Callable

from cache_schema.storage.place import is_bucket
from extract.ranks.signals import stop_on_signals
from extract.tiles.source import Source

from .cache import Pending, check_place, check_space, check_version
from .checkpoint import Weights, check_backbone
from .config import DoctorConfig
from .estimate import check_estimate, check_speed
from .finding import Examination, Finding, Known
from .machine import Device, check_device, check_open_files, check_packages, check_shared_memory
from .storage import Found, check_clock, check_credentials, check_layout, check_storage, find_server
from .tiles import Sample, check_label_ids, check_labels, check_sample, check_scenes

__all__ = ["DoctorConfig", "Finding", "examine", "run_doctor"]


def run_doctor(config: DoctorConfig) -> list[Finding]:
    """Run all checks, print each finding at once and a verdict at the end."""
    with stop_on_signals():
        findings = examine(config, lambda finding: print(finding, flush=True))
    failed = [finding.check for finding in findings if finding.status == "fail"]
    count = [sum(finding.status == status for finding in findings) for status in ("ok", "warning", "skipped")]
    verdict = f"this extraction cannot work yet: fix {', '.join(failed)}" if failed else "this extraction can work"
    print(f"{verdict} ({len(failed)} failed, {count[1]} warnings, {count[0]} ok, {count[2]} skipped)")
    return findings


def examine(config: DoctorConfig, say: Callable[[Finding], None]) -> list[Finding]:
    """Run all checks and pass each finding to `say` at once. A check that fails never stops the others."""
    run, exam = config.extract, Examination(say)
    exam.check("packages", check_packages)
    device = exam.check("device", lambda: check_device(run, config.nproc))
    backbone = exam.check("backbone", lambda: check_backbone(run.backbone, run.image_size, device.value))
    # The default CACHE depends on the backbone.
    url = Known("backbone", run.cache)
    if backbone.value:
        url = Known("backbone", run.cache_url(backbone.value.checkpoint.image_size))
    credentials = exam.check("credentials", lambda: check_credentials([run.tiles, url.value or ""]))
    source, found, sample = _examine_tiles(exam, config, credentials)
    place = exam.check(
        "cache place", lambda: check_place(url.get()), *([credentials] if is_bucket(url.value or "") else [])
    )
    pending = exam.check(
        "cache version",
        lambda: check_version(run, place.get(), source.get(), found.get(), backbone.get(), device.get()),
    )
    exam.check(
        "cache space",
        lambda: check_space(
            place.get(),
            pending.get(),
            backbone.get().checkpoint.width * len(run.pooled_arrays),
            at_least=found.get().at_least,
        ),
    )
    _examine_work(exam, config, device, backbone, found, sample, pending, url)
    return exam.findings


def _examine_tiles(
    exam: Examination, config: DoctorConfig, credentials: Known[bool]
) -> tuple[Known[Source], Known[Found], Known[Sample]]:
    """Run the checks of the tiles' storage and of the tiles."""
    run, in_bucket = config.extract, is_bucket(config.extract.tiles)
    source = exam.check("storage", lambda: check_storage(run.tiles), *([credentials] if in_bucket else []))
    if in_bucket:
        exam.check("clock", lambda: check_clock(find_server()), source)
    found = exam.check("layout", lambda: check_layout(source.get(), unlabelled=run.unlabelled))
    sample = exam.check(
        "sample", lambda: check_sample(source.get(), found.get(), config.sample, config.seed, run.max_quarantined)
    )
    exam.check("labels", lambda: check_labels(sample.get()))
    exam.check("label ids", lambda: check_label_ids(sample.get(), config.taxonomy))
    exam.check("scenes", lambda: check_scenes(found.get(), run.scene_regex))
    return source, found, sample


def _examine_work(
    exam: Examination,
    config: DoctorConfig,
    device: Known[Device],
    backbone: Known[Weights],
    found: Known[Found],
    sample: Known[Sample],
    pending: Known[Pending],
    url: Known[str],
) -> None:
    """Run the checks of limits, speed and cost."""
    run = config.extract

    def count_workers() -> int:
        return device.get().ranks.choose_workers(run.workers)

    exam.check("open files", lambda: check_open_files(count_workers()))
    exam.check(
        "shared memory",
        lambda: check_shared_memory(
            count_workers(), device.get().ranks.local_world_size, run.batch_size * sample.get().tile_bytes
        ),
    )
    speed = exam.check(
        "speed", lambda: check_speed(backbone.get(), device.get(), sample.get(), run.batch_size, count_workers())
    )
    exam.check(
        "estimate",
        lambda: check_estimate(
            found.get(),
            pending.get(),
            speed.get(),
            (run.tiles, url.get()),
            config.price_per_hour,
            arrays=len(run.pooled_arrays),
        ),
    )
