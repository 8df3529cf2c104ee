"""The hub's refusals are one line with a remedy, and what it gave is not asked for again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from extract.backbone.checkpoint import find_checkpoint
from extract.errors import BackboneError
from tests.hub import HUB_ID, Answer, Hub, refuse

PROJECT_ROOT = Path(__file__).parents[4]


# The hub

LICENCE = f"https://huggingface.co/{HUB_ID}"


ASKER = """
import json, os, sys
from extract.backbone.checkpoint import find_checkpoint, find_configuration
from extract.errors import BackboneError
for line in sys.stdin:
    function, environment = json.loads(line)
    os.environ.update(environment)
    try:
        found = globals()[function]("vitl16", 64)
        answer = ["path", str(found.path)] if function == "find_checkpoint" else [str(found[0].path), str(found[1])]
    except BackboneError as error:
        answer = ["error", str(error)]
    for name in environment:
        del os.environ[name]
    print(json.dumps(answer), flush=True)
"""


class Asker:
    """A process that looks for checkpoints on the hub: the hub's client reads its address when it is imported."""

    def __init__(self, hub: Hub, home: Path, env: dict[str, str]) -> None:
        self.hub = hub
        clean = {k: v for k, v in env.items() if not k.startswith(("HF_", "HUGGING"))}
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self.complaints = (home / "stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", ASKER],
            env=clean | settings,
            cwd=home,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
        )

    def ask(self, function: str = "find_checkpoint", /, **environment: str) -> list[str]:
        """`["path", where]`, of `find_configuration` `[where, bytes to download]`; or `["error", text]`."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([function, environment]) + "\n")
        self.process.stdin.flush()
        answer: list[str] = json.loads(self.process.stdout.readline() or '["crash", ""]')
        self.complaints.seek(0)
        assert self.complaints.read() == ""
        return answer

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(30)
        self.complaints.close()


@pytest.fixture(scope="module")
def asker(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    paths = [str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with Hub(plain).serve() as hub:
        asker = Asker(hub, tmp_path_factory.mktemp("home"), env)
        yield asker
        asker.close()


CANNOT_DOWNLOAD = [f"cannot download {HUB_ID}", "check the network", "set BACKBONE to the directory"]
REFUSALS: dict[str, tuple[Answer | None, Answer | None, dict[str, str], list[str]]] = {
    "gated, no token": (None, refuse(401, "GatedRepo", "Access is restricted."), {}, [LICENCE, "HF_TOKEN is not set"]),
    "gated, a token without access": (
        None,
        refuse(403, "GatedRepo", "Access is restricted."),
        {"HF_TOKEN": "hf_abcdefgh"},
        [LICENCE, "the token in HF_TOKEN has no access"],
    ),
    "gated from the first request": (refuse(403, "GatedRepo"), None, {}, [LICENCE, "HF_TOKEN is not set"]),
    "token not accepted": (
        refuse(401, "", "Invalid credentials in Authorization header"),
        None,
        {"HF_TOKEN": "hf_abcdefgh"},
        [HUB_ID, "does not accept the token in HF_TOKEN"],
    ),
    "private or missing": (refuse(401, "RepoNotFound"), None, {}, [f"no model {HUB_ID}", "HF_TOKEN", "BACKBONE"]),
    "missing": (refuse(404, "RepoNotFound"), None, {}, [f"no model {HUB_ID}", "BACKBONE"]),
    "hub out of order": (refuse(500), None, {}, CANNOT_DOWNLOAD),
    "connection breaks at the first request": ((0, {}, b""), None, {}, CANNOT_DOWNLOAD),
    "connection breaks in the download": (None, (0, {}, b""), {}, CANNOT_DOWNLOAD),
}


@pytest.mark.parametrize("function", ["find_checkpoint", "find_configuration"])
@pytest.mark.parametrize("api, file, token, words", REFUSALS.values(), ids=REFUSALS)
def test_hub_refuses(
    asker: Asker, api: Answer | None, file: Answer | None, token: dict[str, str], words: list[str], function: str
) -> None:
    asker.hub.answer_api, asker.hub.answer_file = api, file
    kind, text = asker.ask(function, **token)
    assert kind == "error", text
    assert "\n" not in text
    assert all(word in text for word in words), text
    assert "hf_abcdefgh" not in text


def test_hub_gives_and_is_then_not_needed(asker: Asker, plain: Path) -> None:
    """The server is not only good at refusing; and a question for the configuration leaves the weights there."""
    asker.hub.answer_api = asker.hub.answer_file = None
    path, missing = asker.ask("find_configuration")
    assert sorted(os.listdir(path)) == ["config.json", "preprocessor_config.json"]
    assert int(missing) == sum(path.stat().st_size for path in plain.iterdir())
    kind, path = asker.ask()
    assert kind == "path", path
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    asker.hub.answer_api = asker.hub.answer_file = refuse(500)
    assert asker.ask() == ["path", path]
    assert asker.ask("find_configuration") == [path, "0"]
    shutil.rmtree(Path(path).parents[1])


@pytest.mark.parametrize(
    "name", ["no-such-name", "./nowhere", "/no/where", "a/b/c", "bad name/x", "", ".", "org/.hidden"]
)
def test_names_that_can_be_no_checkpoint(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackboneError, match="no checkpoint at .*BACKBONE is vitl16, vit7b16, demo"):
        find_checkpoint(name)
