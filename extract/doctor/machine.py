"""Check the machine: packages, the device and its speed, and the limits for feed workers."""

import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires
from importlib.metadata import version as installed_version
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from extract.backbone.precision import DTYPES, Precision, choose_precision, multiplies_bf16
from extract.config import ExtractConfig
from extract.errors import ConfigError
from extract.ranks.group import Ranks, choose_device
from extract.tiles.feed import PREFETCHED_BATCHES

from .finding import Concern, Verdict

_DISTRIBUTION = "tileprobe"
_SHOWN = ("torch", "transformers", "zarr")
_SHARED_MEMORY = Path("/dev/shm")
_INSTALL = "install it again: remove .venv and run `make`, or `pip install --constraint constraints.txt -e .`"
_OPEN_FILES, _OPEN_FILES_A_WORKER = 128, 8
"""Measured: an extraction from a bucket failed with 64 open files and 2 workers, and ran with 100 and 8."""
_MATMUL = {"cpu": 1024, "cuda": 8192}
"""Side of the matrices that measure a device: large enough for full speed, small enough for a fraction of a second."""


def check_packages() -> Verdict[bool]:
    """Compare Python and every package with the requirements in pyproject.toml."""
    try:
        asked = [Requirement(text) for text in requires(_DISTRIBUTION) or ()]
        python = SpecifierSet(metadata(_DISTRIBUTION)["Requires-Python"] or "")
    except PackageNotFoundError:
        concern = Concern("warning", f"{_DISTRIBUTION} is not installed, so no version can be compared", _INSTALL)
        return Verdict(False, f"Python {platform.python_version()}", [concern])
    problems = list(_compare_versions(asked))
    if not python.contains(platform.python_version(), prereleases=True):
        problems.append(f"Python {platform.python_version()} is not {python}")
    shown = ", ".join(f"{name} {version}" for name in _SHOWN if (version := _find_version(name)))
    detail = f"Python {platform.python_version()}, {shown}"
    return Verdict(not problems, detail, [Concern("fail", problem, _INSTALL) for problem in problems])


def _compare_versions(asked: list[Requirement]) -> Iterator[str]:
    for requirement in asked:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _find_version(requirement.name)
        if found is None:
            yield f"{requirement.name} is missing"
        elif not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement.name} {found} is not {requirement.specifier}"


def _find_version(name: str) -> str | None:
    try:
        return installed_version(name)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Device:
    """The device that the backbone would run on.

    Attributes:
        ranks: the first rank of the extraction.
        precision: as asked, or the one `auto` selects.
        flop_s: floating-point operations per second of a matrix product in that precision, on one rank's share.
    """

    ranks: Ranks
    precision: Precision
    flop_s: float


def check_device(config: ExtractConfig, nproc: int | None) -> Verdict[Device]:
    """Find the device, its precision and its speed in a matrix product.

    Raises:
        ConfigError: CUDA is not available, fewer GPUs than ranks, or the device cannot compute.
    """
    world = nproc or (max(1, torch.cuda.device_count()) if config.device != "cpu" else 1)
    device = choose_device(config.device, 0, world)
    ranks = Ranks(0, world, world, device, dist.HashStore())
    precision = choose_precision(device) if config.precision == "auto" else config.precision
    concerns = []
    if device.type == "cpu" and config.device == "auto" and (gpu := _ask_driver("name")):
        what = f"this machine has {gpu}, but this torch ({torch.__version__}) does not see it"
        concerns.append(Concern("warning", what, "install the CUDA build of torch that fits the driver"))
    if precision == "bf16" and not multiplies_bf16(device):
        what = "this device has no bf16 instructions, so bf16 would be many times slower"
        concerns.append(Concern("warning", what, "use --precision float32 or auto"))
    if device.type == "cpu":
        torch.set_num_threads(ranks.cores)
    try:
        flop_s = measure_product(device, precision)
    except RuntimeError as error:  # no kernel for this GPU, an old driver, or no memory left
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{device.type} cannot compute ({reason}): free its memory, install the torch build for its driver, or use "
            "--device cpu"
        ) from error
    detail = f"{_describe_device(ranks)}; computes in {precision}, {flop_s / 1e12:.3g} TFLOP/s in a matrix product"
    return Verdict(Device(ranks, precision, flop_s), detail, concerns)


def _describe_device(ranks: Ranks) -> str:
    bf16 = "with" if multiplies_bf16(ranks.device) else "without"
    shared = f", shared by {ranks.world_size} ranks" if ranks.world_size > 1 else ""
    if ranks.device.type == "cpu":
        return f"CPU {platform.machine()} {bf16} bf16 products, {ranks.cores} cores a rank{shared}; no GPU"
    gpu = torch.cuda.get_device_properties(ranks.device)
    driver = _ask_driver("driver_version")
    return (
        f"{ranks.world_size} x {gpu.name} of {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}, "
        f"{bf16} bf16 products, driver {driver or 'unknown'}, CUDA {torch.version.cuda}; {ranks.cores} cores a rank"
    )


def _ask_driver(field: str) -> str | None:
    """Ask the NVIDIA driver about the first GPU; None without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        lines = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return lines.partition("\n")[0].strip() or None


def measure_product(device: torch.device, precision: Precision) -> float:
    """Measure floating-point operations per second of a square matrix product: the best of five, after a warm-up."""
    side = _MATMUL[device.type]
    a, b = (torch.rand(side, side, device=device, dtype=DTYPES[precision]) for _ in range(2))
    product, best = a @ b, float("inf")
    for _ in range(5):
        wait_for(device)
        started = time.perf_counter()
        torch.mm(a, b, out=product)
        wait_for(device)
        best = min(best, time.perf_counter() - started)
    return float(2 * side**3 / best)


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_open_files(workers: int) -> Verdict[int]:
    """Check that a rank may open enough files for its feed workers, whose batches arrive as shared-memory files."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _OPEN_FILES + _OPEN_FILES_A_WORKER * workers
    detail = f"a process may open {allowed:,} files and needs about {needed} (feed workers per rank: {workers})"
    few = Concern("warning", "too few open files are allowed", f"run `ulimit -n {max(4096, 2 * needed)}` first")
    return Verdict(allowed, detail, [few] if 0 <= allowed < needed else [])


def check_shared_memory(workers: int, ranks: int, batch_bytes: int) -> Verdict[int]:
    """Check that /dev/shm has room for waiting batches; the default in a container is 64 MiB.

    Args:
        workers: feed processes per rank.
        ranks: on this machine.
        batch_bytes: of one batch of tiles.
    """
    if not workers or not _SHARED_MEMORY.is_dir():
        return Verdict(0, "not needed: no batch is sent between processes" if not workers else "no /dev/shm here")
    free = shutil.disk_usage(_SHARED_MEMORY).free
    waiting = ranks * workers * (PREFETCHED_BATCHES + 1) * batch_bytes
    detail = f"{_SHARED_MEMORY} has {free / 2**20:,.0f} MiB free; waiting batches take {waiting / 2**20:,.0f}"
    remedy = "enlarge it (`docker run --shm-size 8g …`), or use fewer --workers or a smaller --batch-size"
    small = Concern("fail", "too little shared memory: feed workers would die", remedy)
    return Verdict(free, detail, [small] if waiting > free else [])
