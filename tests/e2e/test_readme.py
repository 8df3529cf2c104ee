"""Run every command of the texts on small test data, or at least expand it with make and parse its options.

A command that no line of `RULES` covers fails. `make` itself expands each target; the command it would start then runs
in this process, without torchrun, which saves ten seconds per command. `test_make_starts_what_it_prints` runs one
command without that shortcut.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from rasterio.transform import from_origin
from torch.distributed.run import parse_args

import cache_schema.__main__
import extract.__main__
import tests.benchmarks.__main__
import tests.faults.soak
import train.__main__
from tests.checkpoints import make_checkpoint
from tests.markdown import PACKAGES, ROOT, TEXTS, read_blocks, read_prose, read_section
from tests.planted import Finished, plant_tiles, run_here
from tests.raw_xview import make_raw_xview, write_geotiff
from tests.tiles import upload

GROUPS: dict[str, click.Command] = {
    "cache_schema": cache_schema.__main__.main,
    "extract": extract.__main__.main,
    "train": train.__main__.main,
    "tests.benchmarks": tests.benchmarks.__main__.main,
    "tests.faults.soak": tests.faults.soak.main,
}
RUNNERS = {"cache_schema": cache_schema.__main__.run, "extract": extract.__main__.run, "train": train.__main__.run}
EPOCHS = "--epochs 2 --device cpu"
STREAMED = "--device cpu --workers 0"


@dataclass(frozen=True)
class Rule:
    """How to test the commands that match.

    Attributes:
        pattern: regular expression for the whole command.
        extra: options added for the small test data.
        parsed: why the command is only parsed; None runs it.
        status: allowed exit statuses.
    """

    pattern: str
    extra: str = ""
    parsed: str | None = None
    status: tuple[int, ...] = (0,)


RULES = (
    Rule("make demo", parsed="3.5 minutes; its parts have tests of their own"),
    Rule("make (ladder|test|check|bench|soak|help-all)( .*)?", parsed="minutes, or many processes"),
    Rule(
        "make (tile|extract|export|finetune|predict|report|doctor)",
        parsed="names the target; it is run with its variables",
    ),
    Rule("make .* RDZV=.*", parsed="wants two machines"),
    Rule("make finetune UNFREEZE=(20|40) .*", parsed="more layers than the stand-in has; test_shards.py runs it"),
    Rule("make tile .*", extra="--size 128 --stride 128"),
    Rule("make extract .*", extra=STREAMED),
    Rule("make train-head( .*)?", extra=EPOCHS),
    Rule("make sweep( .*)?", extra=f"{EPOCHS} --seeds 1 --lrs 1e-3 --losses bce --heads linear"),
    Rule("make finetune( .*)?", extra=f"--epochs 1 {STREAMED}"),
    Rule("make (predict|evaluate)( .*)?", extra=STREAMED),
    Rule("make report .*"),
    Rule("make doctor .*", extra="--device cpu"),
    Rule("python -m train triage --run-dir runs/head --out runs/head/doubts.csv", extra="--device cpu"),
    Rule("make export .*", extra="--no-onnx"),
    Rule("make (info|help)"),
    Rule("python -m extract verify-sample .*", parsed="embeds rows again; test_verify_sample.py runs it"),
    Rule("python -m cache_schema diff .*", status=(0, 1, 3)),
    Rule("python -m cache_schema (info|verify|gc)( .*)?"),
    Rule("python -m train triage", parsed="is run with its options"),
    Rule("python -m train head …", parsed="stands for what a sweep prints"),
    Rule("python -m extract.demo.pretrain", parsed="trains the stand-in backbone: 8 minutes"),
    Rule(r"gcloud auth application-default login|pip-audit .*|sha256sum -c sha256|\.ci/run", parsed="other programs"),
    Rule("python -m cache_schema …", parsed="stands for the commands of the table below it"),
)
PROGRAMS = ("make ", "python ", "gcloud ", "pip", "sha256sum", ".ci/", "git ")


def read_commands(text: str) -> Iterator[str]:
    """Commands of a text in their order: lines of its `sh` blocks, then code within its prose that is one."""
    for block in read_blocks(text):
        if block.language == "sh":
            for line in block.text.splitlines():
                yield shlex.join(shlex.split(line, comments=True))
    for code in re.findall(r"`([^`]+)`", read_prose(text)):
        if code.startswith(PROGRAMS):
            yield " ".join(code.split())


def find_rule(command: str) -> Rule | None:
    return next((rule for rule in RULES if re.fullmatch(rule.pattern, command)), None)


def gather_commands() -> dict[str, str]:
    """Each command once, in the order of the texts, with the first text that shows it."""
    found: dict[str, str] = {}
    for text in TEXTS:
        for command in read_commands(text):
            found.setdefault(command, text)
    return found


COMMANDS = gather_commands()


def expand(command: str, cwd: Path, extra: str = "") -> list[list[str]]:
    """The command lines that a command comes down to, as argument lists: of a make target, what make would start."""
    words = shlex.split(command)
    if words[0] != "make":
        return [words + shlex.split(extra)]
    given = [word for word in words[1:] if not word.startswith("ARGS=")]
    args = " ".join(word.removeprefix("ARGS=") for word in words[1:] if word.startswith("ARGS="))
    make = ["make", "-n", "-s", "-f", str(ROOT / "Makefile"), "VENV=", *given, f"ARGS={args} {extra}"]
    done = subprocess.run(make, cwd=cwd, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("python3 -m")]


def clean_environment() -> dict[str, str]:
    """An environment in which `python3` is this one and the project is importable, and no make is above."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT)}


def split_launchers(words: list[str]) -> tuple[str, list[str]]:
    """Module and arguments of the program itself, behind the demo's server and torchrun, whose options are parsed."""
    module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    if module == "extract" and arguments[:2] == ["demo", "--"]:
        return split_launchers(arguments[2:])
    if module == "extract.launch":
        found = parse_args(arguments)
        assert found.module
        return found.training_script, found.training_script_args
    return module, arguments


def parse_command(module: str, arguments: list[str]) -> None:
    """Have click read the arguments as it would: options exist, values are of their type."""
    group = GROUPS[module]
    context = group.make_context(module, list(arguments))
    if isinstance(group, click.Group):
        name, command, rest = group.resolve_command(context, context._protected_args + context.args)
        assert command is not None
        command.make_context(str(name), rest, parent=context)


def read_classes() -> str:
    return next(block.text for block in read_blocks("train/README.md") if block.text.startswith("class_id"))


@pytest.fixture(scope="module")
def work(gcs_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory: the bucket the texts name, on the real server; `vitl16` and `my-backbone`, which are tiny."""
    root = tmp_path_factory.mktemp("readme")
    bucket = storage.Client(project="tests", credentials=AnonymousCredentials()).create_bucket("bucket")
    make_raw_xview(root, size=256)  # train_images, xView_train.geojson: what `make tile` cuts
    features = root / "xView_train.geojson"  # one unknown id is above 1 % of so few
    features.write_text(features.read_text().replace('"type_id": 99', '"type_id": 73'))
    plant_tiles(root / "tiles", scenes=8, per_scene=6, seed=7, empty=2)
    plant_tiles(root / "other", scenes=2, per_scene=5, seed=8, prefix="o")
    shutil.copytree(root / "other" / "images", root / "more")
    shutil.copy(root / "more" / "o00_1.png", root / "a.png")
    pixels = np.random.default_rng(9).integers(0, 256, (600, 700, 3), dtype=np.uint8)
    write_geotiff(root / "scene.tif", pixels, "EPSG:32633", from_origin(500_000, 5_000_000, 0.3, 0.3))
    for place, prefix in (("other", "other/"), ("tiles", "dota/train/")):
        objects = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in (root / place).glob("*/*")}
        if "dota" in prefix:  # names and ids as DOTA's tools write them, of the three classes of classes.csv
            objects = {re.sub(r"(\w+)_(\d)\.", r"\1__1__0___\2.", name): data for name, data in objects.items()}
            for name in (name for name in objects if name.startswith("labels/")):
                objects[name] = re.sub(rb"(?m)^\d+", lambda found: b"%d" % (int(found[0]) % 3), objects[name])
        upload(bucket, objects, prefix)
    make_checkpoint(root / "vitl16", seed=7)
    shutil.copytree(root / "vitl16", root / "my-backbone")
    (root / "classes.csv").write_text(read_classes())
    return root


@pytest.fixture(scope="module")
def finished(work: Path) -> dict[str, Finished]:
    """What each command left that is run, in the order of the texts, as a reader would go on."""
    left = {}
    # The first lines of the README show tiles that its second step cuts.
    for command, text in sorted(COMMANDS.items(), key=lambda item: not item[0].startswith("make tile")):
        rule = find_rule(command)
        if rule is None or rule.parsed:
            continue
        for words in expand(stand_in(command, work), work, rule.extra):
            module, arguments = split_launchers(words)
            done = run_here(RUNNERS[module], work, *arguments)
            assert done.status in rule.status, f"{command} ({text}): {done.err[-2000:]}"
            left[command] = done
    return left


def stand_in(command: str, work: Path) -> str:
    """The command with caches for placeholders, and with the tiny checkpoint's own image size."""
    last = work / "cache" / "last"
    command = re.sub(r"\b(CACHE|OTHER)\b(?!=)", last.read_text().strip() if last.exists() else "none", command)
    command = command.replace("TILES=…", "TILES=tiles").replace("K", "20") if "…" in command else command
    return f"{command} IMAGE_SIZE=64" if command.startswith(("make extract", "make doctor")) else command


def test_every_command_is_covered() -> None:
    assert len(COMMANDS) > 30, "the texts are read"
    assert [command for command in COMMANDS if find_rule(command) is None] == []
    unused = [rule.pattern for rule in RULES if not any(find_rule(command) is rule for command in COMMANDS)]
    assert unused == [], "rules for commands that no text shows"


def test_every_block_says_what_it_is() -> None:
    known = {"sh", "python", "text", "diff", "mermaid", "toml"}
    blocks = [block for text in TEXTS if text != "cache_schema/README.md" for block in read_blocks(text)]
    assert [block.where for block in blocks if block.language not in known] == []


def test_commands_do_what_the_texts_say(work: Path, finished: dict[str, Finished]) -> None:
    assert len(finished) >= 18
    assert "sealed" in finished["make info"].out
    assert "is sound" in finished["python -m cache_schema verify CACHE"].out
    assert "mAP" in finished["make train-head"].out
    assert "10 tiles -> predictions.csv" in finished["make predict RUN=runs/finetune TILES=gs://bucket/other"].out
    assert "baseball diamond" in (work / "runs" / "head" / "report.html").read_text(), "the DOTA head is the newest"
    trial = "make extract TILES=gs://bucket/xview_tiled/train BACKBONE=vitl16 NPROC=8 LIMIT=500"
    assert "tiles: about" in finished[trial].out, "ends with an estimate"


@pytest.mark.parametrize("command", [command for command in COMMANDS if (find_rule(command) or RULES[0]).parsed])
def test_other_commands_are_parsed(command: str, work: Path) -> None:
    """make knows the target and its variables, and the program the options; other programs have other tests."""
    if "…" in command or not command.startswith(("make", "python")):
        return
    for words in expand(stand_in(command, work), work):
        module, arguments = split_launchers(words)
        if module in GROUPS:
            parse_command(module, arguments)
        else:
            assert importlib.util.find_spec(module), f"{command} starts {module}"


def test_make_starts_what_it_prints(work: Path, finished: dict[str, Finished]) -> None:
    """Run one command without the shortcut: make, torchrun, the program."""
    command = ["make", "-f", str(ROOT / "Makefile"), "VENV=", "predict", "NPROC=1", "TILES=other", f"ARGS={STREAMED}"]
    done = subprocess.run(command, cwd=work, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "10 tiles -> predictions.csv" in done.stdout


# Options and messages that the texts quote


def find_commands() -> Iterator[tuple[str, click.Command]]:
    for module, group in GROUPS.items():
        yield module, group
        for name, command in getattr(group, "commands", {}).items():
            yield f"{module} {name}", command


def test_every_option_the_texts_name_exists() -> None:
    known = {
        name
        for _, command in find_commands()
        for param in command.get_params(click.Context(command))
        for name in (*param.opts, *param.secondary_opts)
    }
    for text in TEXTS:
        for code in re.findall(r"`([^`]+)`", read_prose(text)):
            if code.startswith(("--", "ARGS=")):
                for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code):
                    assert option in known, f"{text}: {code}"


def read_messages(package: str) -> list[str]:
    """Return every string of a package, with NUL for each placeholder."""
    messages = []
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                messages.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
    return messages


def read_troubleshooting(package: str) -> list[str]:
    section = read_section(f"{package}/README.md", "Troubleshooting")
    return re.findall(r"^\| `(.+?)` \| .+ \| .+ \|$", section, re.MULTILINE)


@pytest.mark.parametrize("package", PACKAGES)
def test_troubleshooting_quotes_what_the_package_prints(package: str) -> None:
    messages = read_messages(package)
    for quoted in read_troubleshooting(package):
        pattern = re.compile(".+".join(map(re.escape, quoted.strip("… ").split("…"))), re.DOTALL)
        assert any(pattern.search(message) for message in messages), f"nothing in {package} prints {quoted}"


def test_troubleshooting_covers_the_common_messages() -> None:
    assert sum(len(read_troubleshooting(package)) for package in PACKAGES) >= 45


def test_every_dependency_is_explained() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[\[<>=]", name)[0] for name in wanted} - {"tileprobe"}
    explained = re.findall(r'^    "([\w-]+)[^"]*",  # \w+', text, re.MULTILINE)
    assert names - set(explained) == set()


def test_every_link_leads_somewhere() -> None:
    """Files exist, and headings that a link names after `#` exist in them, as GitHub spells them."""
    for text in TEXTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", read_prose(text)):
            if target.startswith("https://"):
                continue
            name, _, heading = target.partition("#")
            path = (ROOT / text).parent / name if name else ROOT / text
            assert path.exists(), f"{text}: {target}"
            if heading:
                headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
                spelled = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}
                assert heading in spelled, f"{text}: {target}"


def test_every_target_of_the_help_is_in_the_readme() -> None:
    listed = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, env=clean_environment(), capture_output=True, text=True
    ).stdout
    targets = re.findall(r"^  make ([a-z-]+)", listed, re.MULTILINE)
    assert len(targets) >= 9
    text = (ROOT / "README.md").read_text()
    assert [target for target in targets if f"make {target}" not in text] == []
