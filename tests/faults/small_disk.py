"""An extraction onto a file system that is too small, then read-only, then roomy: `python -m tests.faults.small_disk`.

Run inside a mount namespace of its own, where it may mount what it likes:
`unshare --user --map-root-user --mount python -m tests.faults.small_disk FOLDER`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from cache_schema import TileprobeError
from tests.caches import get_all
from tests.checkpoints import make_checkpoint
from tests.tiles import draw_objects, write_directory

from .network import extract_in_small_blocks


def mount(disk: Path, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(disk)], check=True, timeout=20)


def main(folder: Path) -> None:
    seed = 5
    write_directory(folder / "tiles", draw_objects(np.random.default_rng(seed), 300, size=32))
    backbone = make_checkpoint(folder / "backbone", seed=seed, image_size=32)
    undisturbed = extract_in_small_blocks(str(folder / "tiles"), folder / "undisturbed", backbone)
    disk = folder / "disk"
    disk.mkdir()
    mount(disk, "size=200k")
    for options in ((), ("remount", "ro"), ("remount", "rw", "size=64M")):
        if options:
            mount(disk, *options)
        try:
            extract_in_small_blocks(str(folder / "tiles"), disk / "vectors", backbone)
        except TileprobeError as error:
            print(f"error: {error}", flush=True)
    left, wanted = get_all(str(disk / "vectors")), get_all(undisturbed)
    differing = sorted(key for key in left.keys() | wanted.keys() if left.get(key) != wanted.get(key))
    assert not differing, differing
    print("equal", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
