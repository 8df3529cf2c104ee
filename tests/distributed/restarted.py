"""A rank that leaves a mark in the group's store and fails; restarted, it says whether it found one."""

import os
import sys

from extract.ranks.group import join_ranks

with join_ranks("cpu") as ranks:
    print("found" if ranks.store.check(["mark"]) else "nothing", flush=True)
    ranks.store.set("mark", "left by the attempt before")
    sys.exit(0 if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1" else 1)
