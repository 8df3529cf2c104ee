"""Run a command on the demo bucket."""

import os
from collections.abc import Sequence
from pathlib import Path

from extract.config import DEMO_ROOT
from extract.ranks.signals import run_child


def run_with_demo_bucket(command: Sequence[str]) -> int:
    """Generate the demo bucket if needed, run `command` while it is served, and return the command's exit status.

    Every `demo://` in the command becomes `gs://tileprobe-demo/`, or the directory with the same objects if the server
    has no binary for this platform.
    """
    from .bucket import generate_bucket
    from .server import DEMO_BUCKET, find_server_binary, serve_bucket

    print(
        "demo: TILES, CACHE and BACKBONE are not set, so this runs on a generated bucket with a stand-in backbone; "
        f"everything it writes lies under {DEMO_ROOT} and runs/demo",
        flush=True,
    )
    directory = Path(DEMO_ROOT, "bucket")
    generate_bucket(directory)
    if find_server_binary() is None:
        print(f"demo: no storage server for this platform: tiles are read from {directory} instead", flush=True)
        return _run(command, f"{directory}/", {})
    with serve_bucket(directory, log=DEMO_ROOT / "server.log", bucket=DEMO_BUCKET) as url:
        return _run(command, f"gs://{DEMO_BUCKET}/", {"STORAGE_EMULATOR_HOST": url})


def _run(command: Sequence[str], tiles: str, environment: dict[str, str]) -> int:
    arguments = [part.replace("demo://", tiles) for part in command]
    with run_child(arguments, env={**os.environ, **environment}) as child:
        pass
    return child.returncode
