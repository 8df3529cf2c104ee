"""Two ranks that are told to stop or not, each in its own way; `stopping.py SEEN` writes there what rank 0 saw."""

import json
import signal
import sys
import time
from pathlib import Path

from extract.ranks.group import Ranks, join_ranks
from extract.ranks.signals import Stopped, stop_on_signals

FOREVER_S = 1000
WRITE_S = 1


def stop_in(ranks: Ranks, patience_s: float, work_left: float, written: Path) -> bool:
    """Be told to stop while something is written for `work_left` seconds; whether rank 1 had written when it was left.

    What is written ends whatever comes, as a block's does.
    """
    try:
        with stop_on_signals(), ranks.stop_together(patience_s):
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                time.sleep(work_left)
                (written / str(ranks.rank)).touch()
    except Stopped:
        return (written / "1").exists()
    raise AssertionError("the signal was lost")


def see(folder: Path) -> dict[str, bool]:
    seen = {}
    with join_ranks("cpu") as ranks:
        for name in ("told", "done", "untold"):
            written = folder / name
            if ranks.is_main:
                written.mkdir()
            ranks.wait()
            if ranks.is_main:
                seen[name] = stop_in(ranks, 2 * WRITE_S if name == "untold" else FOREVER_S, 0, written)
            elif name == "told":
                stop_in(ranks, FOREVER_S, WRITE_S, written)
            else:
                with ranks.stop_together():
                    while name == "untold" and not (written / "go").exists():
                        time.sleep(0.05)
                    (written / "1").touch()
            (written / "go").touch()
            ranks.wait()
        return seen if ranks.is_main else {}


if __name__ == "__main__":
    if seen := see(Path(sys.argv[1])):
        (Path(sys.argv[1]) / "seen.json").write_text(json.dumps(seen))
