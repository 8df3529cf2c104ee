"""Run all checks of `python -m extract doctor` in order, and print each finding and a verdict."""

from cache_schema.storage.place import is_bucket
from extract.ranks.signals import stop_on_signals

from .cache import check_place, check_space, check_version
from .checkpoint import check_backbone
from .config import DoctorConfig
from .estimate import check_estimate, check_speed
from .finding import Examination, Finding, Known
from .machine import check_device, check_open_files, check_packages, check_shared_memory
from .storage import check_clock, check_credentials, check_layout, check_storage, find_server
from .tiles import check_label_ids, check_labels, check_sample, check_scenes


def run_doctor(config: DoctorConfig) -> list[Finding]:
    """Run all checks, print each finding at once and a verdict at the end."""
    exam = Examination(lambda finding: print(finding, flush=True))
    with stop_on_signals():
        _examine(exam, config)
    findings = exam.findings
    failed = [finding.check for finding in findings if finding.status == "fail"]
    count = [sum(finding.status == status for finding in findings) for status in ("ok", "warning", "skipped")]
    verdict = f"this extraction cannot work yet: fix {', '.join(failed)}" if failed else "this extraction can work"
    print(f"{verdict} ({len(failed)} failed, {count[1]} warnings, {count[0]} ok, {count[2]} skipped)")
    return findings


def _examine(exam: Examination, config: DoctorConfig) -> None:
    run, arrays = config.extract, len(config.extract.pooled_arrays)
    exam.check("packages", check_packages)
    device = exam.check("device", lambda: check_device(run, config.nproc))
    backbone = exam.check("backbone", lambda: check_backbone(run.backbone, run.image_size, device.value))
    # The default CACHE depends on the backbone.
    url = Known("backbone", run.cache)
    if backbone.value:
        url = Known("backbone", run.cache_url(backbone.value.checkpoint.image_size))

    credentials = exam.check("credentials", lambda: check_credentials([run.tiles, url.value or ""]))
    tiles_in_bucket, cache_in_bucket = is_bucket(run.tiles), is_bucket(url.value or "")
    source = exam.check("storage", lambda: check_storage(run.tiles), *([credentials] if tiles_in_bucket else []))
    if tiles_in_bucket:
        exam.check("clock", lambda: check_clock(find_server()), source)
    found = exam.check("layout", lambda: check_layout(source.get(), unlabelled=run.unlabelled))
    sample = exam.check(
        "sample", lambda: check_sample(source.get(), found.get(), config.sample, config.seed, run.max_quarantined)
    )
    exam.check("labels", lambda: check_labels(sample.get()))
    exam.check("label ids", lambda: check_label_ids(sample.get(), config.taxonomy))
    exam.check("scenes", lambda: check_scenes(found.get(), run.scene_regex))

    place = exam.check("cache place", lambda: check_place(url.get()), *([credentials] if cache_in_bucket else []))
    pending = exam.check(
        "cache version",
        lambda: check_version(run, place.get(), source.get(), found.get(), backbone.get(), device.get()),
    )

    def count_numbers() -> int:
        return backbone.get().checkpoint.width * arrays

    def count_workers() -> int:
        return device.get().ranks.choose_workers(run.workers)

    def count_batch_bytes() -> int:
        return run.batch_size * sample.get().tile_bytes

    exam.check(
        "cache space",
        lambda: check_space(place.get(), pending.get(), count_numbers(), at_least=found.get().at_least),
    )
    exam.check("open files", lambda: check_open_files(count_workers()))
    exam.check(
        "shared memory",
        lambda: check_shared_memory(count_workers(), device.get().ranks.local_world_size, count_batch_bytes()),
    )
    speed = exam.check(
        "speed", lambda: check_speed(backbone.get(), device.get(), sample.get(), run.batch_size, count_workers())
    )
    exam.check(
        "estimate",
        lambda: check_estimate(
            found.get(), pending.get(), speed.get(), (run.tiles, url.get()), config.price_per_hour, arrays=arrays
        ),
    )
