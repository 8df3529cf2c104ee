"""A rank that joins the same job several times, each time as something else: what it is asked, its versions, its clock.

`at_odds.py CASES`: a JSON list with, for each time, one object for each rank:
`{"arguments": ["extract", "run", …], "versions": {"torch": "1.0"}, "clock_s": 300}`, all but the first optional.
Each command is run for real, and ends as commands do but for the process itself, which goes on till the last.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

import extract.ranks.same_job
from cache_schema import TileprobeError
from extract.ranks.group import ToldByMainError, exit_with

_rendezvous, _installed, _time = dist.rendezvous, extract.ranks.same_job.installed_version, time.time


def run_case(number: int, me: dict[str, Any], *, last: bool) -> None:
    def set_apart(*args: Any, **options: Any) -> Iterator[tuple[dist.Store, int, int]]:
        """A process group leaves its keys in torchrun's store, and the next must not find them."""
        store, rank, world_size = next(_rendezvous(*args, **options))
        yield dist.PrefixStore(str(number), store), rank, world_size

    versions, clock_s = me.get("versions", {}), me.get("clock_s", 0)
    package, *arguments = me["arguments"]
    main = importlib.import_module(f"{package}.__main__").main
    with (
        patch.object(dist, "rendezvous", set_apart),
        patch.object(extract.ranks.same_job, "installed_version", lambda name: versions.get(name) or _installed(name)),
        patch.object(time, "time", lambda: _time() + clock_s),
    ):
        try:
            main(arguments, prog_name=f"python -m {package}", standalone_mode=False)
        except TileprobeError as error:
            if isinstance(error, ToldByMainError) and not last:
                print(f"told: {error}", flush=True)  # without the wait of a rank that ends
                return
            exit_with(error)


def run_cases(cases: list[list[dict[str, Any]]], rank: int) -> None:
    for number, case in enumerate(cases):
        last = number == len(cases) - 1
        with nullcontext() if last else suppress(SystemExit):
            run_case(number, case[rank], last=last)


if __name__ == "__main__":
    run_cases(json.loads(sys.argv[1]), int(os.environ["RANK"]))
