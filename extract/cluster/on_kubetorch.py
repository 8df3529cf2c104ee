"""Run an extraction or a training on the GPUs of several pods with kubetorch, started from this machine.

Copy this file into the project's directory and edit the settings below. You need a kubeconfig of a cluster with
kubetorch's controller, and `pip install 'kubetorch[client]'` here. Then:

    python on_kubetorch.py extract run --tiles gs://BUCKET/xview_tiled/train --cache gs://BUCKET/cache/train-vitl16-512
    python on_kubetorch.py train finetune --cache gs://BUCKET/cache/train-vitl16-512 --run-dir gs://BUCKET/runs/finetune

kubetorch starts the pods and tells each one its peers; torchrun does the rest, as on any cluster.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME = "tileprobe"
PROJECT = Path.cwd()
NODES, GPUS = 2, 8
SERVICE_ACCOUNT = "tileprobe"  # bound to a Google account with access to the bucket: workload identity, no key
PORT = 29400


def work(arguments: list[str]) -> int:
    """Run one rank per GPU of this pod, in a job with the other pods, and return the launcher's exit status.

    Args:
        arguments: a module and its arguments, such as `["extract", "run", "--tiles", …]`.
    """
    import os
    import subprocess
    import sys

    # With one process per pod, kubetorch's RANK is the pod's number and WORLD_SIZE the number of pods.
    nodes, node, first = (os.environ[name] for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR"))
    meet = ["--rdzv-backend=static", f"--node-rank={node}", f"--rdzv-endpoint={first}:{PORT}", f"--rdzv-id={first}"]
    launch = [sys.executable, "-m", "extract.launch", f"--nnodes={nodes}", *meet]
    return subprocess.run([*launch, "-m", *arguments], check=False).returncode


def describe_compute(secrets: Sequence[str] = ()) -> Any:
    """Describe the pods as a `kubetorch.Compute` of NODES workers with one process each, without starting them.

    Args:
        secrets: names of kubetorch's secrets, which kubetorch looks up in the cluster immediately.
    """
    import kubetorch as kt

    image = (
        kt.images.python("3.12")
        .copy(str(PROJECT), dest=NAME)
        .run_bash(f"$KT_PIP_INSTALL_CMD --constraint {NAME}/constraints.txt ./{NAME}")
    )
    return kt.Compute(
        gpus=GPUS,
        image=image,
        service_account_name=SERVICE_ACCOUNT,
        shared_memory_limit="16Gi",  # tiles passed from the feed to the ranks
        secrets=list(secrets),
        launch_timeout=1200,
    ).distribute("pytorch", workers=NODES, num_proc=1)


if __name__ == "__main__":
    import kubetorch

    statuses = kubetorch.fn(work, name=NAME).to(describe_compute(["huggingface"]))(sys.argv[1:])
    sys.exit(max(statuses))
