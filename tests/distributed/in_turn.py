"""Several `python -m train` commands in one torchrun job, since starting one costs more than what it is to compute.

`in_turn.py '[["head", "--epochs", "2"], ["finetune"]]'`; a command `read` stands for `read_between`.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from tests.distributed.read_between import read_between
from train.__main__ import main

rendezvous = dist.rendezvous


def run_in_turn(commands: list[list[str]]) -> None:
    for number, arguments in enumerate(commands):
        set_apart(str(number))
        if arguments[0] == "read":
            read_between(*arguments[1:])
        else:
            main(arguments, prog_name="python -m train", standalone_mode=False)


def set_apart(name: str) -> None:
    """A process group leaves its keys in torchrun's store, and the next must not find them."""

    def set_apart_by_name(*args: Any, **options: Any) -> Iterator[tuple[dist.Store, int, int]]:
        store, rank, world_size = next(rendezvous(*args, **options))
        yield dist.PrefixStore(name, store), rank, world_size

    dist.rendezvous = set_apart_by_name


if __name__ == "__main__":
    run_in_turn(json.loads(sys.argv[1]))
