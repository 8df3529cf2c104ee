"""Reading a local cache needs numpy and zarr, nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.caches import fill_cache

BLOCK = """
import importlib.abc, runpy, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
"""
# Not google_crc32c: Zarr itself needs it, for its crc32c codec.
HEAVY = {"torch", "google", "sklearn", "transformers", "PIL", "tqdm", "requests", "safetensors"}


def run(env: dict[str, str], blocked: set[str], code: str) -> subprocess.CompletedProcess[str]:
    program = BLOCK.format(names=blocked) + code
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)


def test_reading_needs_only_numpy_and_zarr(tmp_path: Path, python_env: dict[str, str]) -> None:
    fill_cache(str(tmp_path), 300)
    code = f"""
from cache_schema import Taxonomy, open_cache
rows = open_cache({str(tmp_path)!r}).read_rows()
print(rows.embedded.sum(), len(Taxonomy.xview()))
"""
    done = run(python_env, HEAVY | {"click"}, code)
    assert (done.stdout, done.stderr) == ("273 60\n", "")


@pytest.mark.parametrize("command", ["info", "verify"])
def test_commands_need_click_besides(tmp_path: Path, python_env: dict[str, str], command: str) -> None:
    fill_cache(str(tmp_path), 300)
    code = f"sys.argv[1:] = [{command!r}, {str(tmp_path)!r}]; runpy.run_module('cache_schema', run_name='__main__')"
    done = run(python_env, HEAVY, code)
    assert done.returncode == 0, done.stderr
    assert "273 embedded" in done.stdout


def test_the_blockade_holds(python_env: dict[str, str]) -> None:
    for module in ("cache_schema.storage.gcs_store", "torch"):
        done = run(python_env, HEAVY, f"import {module}")
        assert "is blocked" in done.stderr
