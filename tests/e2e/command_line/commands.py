"""The command lines in this process, and what they leave."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cache_schema.__main__ import run as run_cache_schema
from cache_schema.cli.command import Group
from extract.__main__ import run as run_extract
from tests.planted import Finished, run_here

GROUPS: dict[str, Group] = {
    name: importlib.import_module(f"{name}.__main__").main for name in ("cache_schema", "extract", "train")
}
COMMANDS = [
    pytest.param(group, command, id=f"{group.name} {command.name}")
    for group in GROUPS.values()
    for command in group.commands.values()
    if not command.hidden
]
LAUNCH = ("extract.launch", "--standalone", "--nproc-per-node")
QUICK = ("--device", "cpu", "--epochs", 2)


def extract(cwd: Path, *arguments: object) -> Finished:
    return run_here(run_extract, cwd, *arguments)


def cache_schema(cwd: Path, *arguments: object) -> Finished:
    return run_here(run_cache_schema, cwd, *arguments)


def snapshot(root: Path) -> dict[str, tuple[int, bytes | str]]:
    """Every file, folder and link below `root`: when it changed, and what it holds."""
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mtime_ns,
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "",
        )
        for path in sorted(root.rglob("*"))
    }


def read_json(text: str) -> Any:
    """JSON proper: Python would take NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)
