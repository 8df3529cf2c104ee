"""tileprobe by kubetorch: an extraction, or a training, on the GPUs of several pods, started from where this file lies.

Copy this file beside the project, edit the settings below, and with a kubeconfig of a cluster that has kubetorch
(`pip install 'kubetorch[client]'` here, its controller there):

    python on_kubetorch.py extract run --tiles gs://BUCKET/xview_tiled/train --cache gs://BUCKET/cache/train-vitl16-512
    python on_kubetorch.py train finetune --cache gs://BUCKET/cache/train-vitl16-512 --run-dir gs://BUCKET/runs/finetune

kubetorch brings up the pods and says to each who its peers are; torchrun does the rest, as everywhere.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME = "tileprobe"
PROJECT = Path.cwd()
NODES, GPUS = 2, 8
SERVICE_ACCOUNT = "tileprobe"  # bound to a Google account that may use the bucket: workload identity, no key
PORT = 29400


def work(arguments: list[str]) -> int:
    """On each pod: one rank per GPU, under a launcher that meets those of the other pods; its exit status.

    Args:
        arguments: a module and its arguments, such as `["extract", "run", "--tiles", …]`.
    """
    import os
    import subprocess
    import sys

    # kubetorch's names for one process a pod: RANK is the pod's, WORLD_SIZE the number of pods.
    nodes, node, first = (os.environ[name] for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR"))
    meet = ["--rdzv-backend=static", f"--node-rank={node}", f"--rdzv-endpoint={first}:{PORT}", f"--rdzv-id={first}"]
    launch = [sys.executable, "-m", "extract.launch", f"--nnodes={nodes}", *meet]
    return subprocess.run([*launch, "-m", *arguments], check=False).returncode


def describe_compute(secrets: Sequence[str] = ()) -> Any:
    """The pods, as a `kubetorch.Compute` of NODES workers with one process each; nothing is started.

    Args:
        secrets: names of kubetorch's secrets; they are looked up in the cluster at once.
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
        shared_memory_limit="16Gi",  # tiles on their way from the feed to the ranks
        secrets=list(secrets),
        launch_timeout=1200,
    ).distribute("pytorch", workers=NODES, num_proc=1)


if __name__ == "__main__":
    import kubetorch

    statuses = kubetorch.fn(work, name=NAME).to(describe_compute(["huggingface"]))(sys.argv[1:])
    sys.exit(max(statuses))
