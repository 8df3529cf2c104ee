"""Run torchrun with one rank per GPU, and without its traceback: `python -m extract.launch OPTIONS -m extract run …`.

If a rank fails, torchrun prints its own traceback, which would hide the rank's one line for the user. Rendezvous,
restarts and signals are torchrun's. A job of one rank runs in this process, so PyTorch is loaded once.
"""

import logging
import os
import runpy
import signal
import socket
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store
    from torch.distributed.launcher import LaunchConfig

MEET_S = 300
"""Seconds that nodes wait for each other, unless --rdzv-conf says otherwise."""
_GO = "go"
_HEARD_S = 2


def main() -> None:
    """Run torchrun with this process's arguments; exit with the status of the first rank that failed."""
    try:
        _launch()
    except KeyboardInterrupt:  # before torchrun handles signals, mostly while torch is imported
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _launch() -> None:
    # PyTorch's C++ code adds a stack trace to a failed connection, which would hide the one line about it here. In a
    # rank its errors are kept: those of NCCL, for example, may be the only information.
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = level or "FATAL"
    import torch

    os.environ["TORCH_CPP_LOG_LEVEL"] = level or "ERROR"
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError
    from torch.distributed.run import config_from_args, parse_args, run

    for name in ("torch.distributed.elastic", *logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.run", "torch.distributed.elastic")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    options = sys.argv[1:]
    if not any(option.startswith("--nproc") for option in options):
        options = [f"--nproc-per-node={max(1, torch.cuda.device_count())}", *options]
    args = parse_args(options)
    if args.standalone and args.module and (args.nproc_per_node, args.max_restarts) == ("1", 0):
        sys.argv = [args.training_script, *args.training_script_args]
        runpy.run_module(args.training_script, run_name="__main__", alter_sys=True)
        return
    least, _, most = args.nnodes.partition(":")
    if most not in ("", least):
        # With one store for launcher and ranks, torch 2.13 gives its address only to the nodes of the first round; a
        # node that joins later waits for it until all fail (dynamic_rendezvous.py, next_rendezvous).
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    args.rdzv_conf = ",".join([f"timeout={MEET_S},join_timeout={MEET_S}", *filter(None, [args.rdzv_conf])])
    try:
        config, *_ = config_from_args(args)
        met = meet(config) if args.rdzv_endpoint and not args.standalone else None
        run(args)
        del met  # not earlier: torchrun uses the same server
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except RendezvousClosedError:
        sys.exit(f"error: the job at {args.rdzv_endpoint} is over, or has failed on another node, which has said why")
    except (RendezvousError, DistError):
        sys.exit(
            f"error: the nodes of this job ({args.nnodes}) did not all meet at {args.rdzv_endpoint}, or one was lost: "
            "see what the others say, check RDZV, NNODES and that the port is open between them, then start all again"
        )


def meet(config: "LaunchConfig") -> "Store":
    """Wait for the other nodes; end every node with one line if NNODES or the numbers of nodes clash.

    torchrun alone would wait for nodes that nobody starts, or form a job without some that were started. Only the node
    itself is told if it comes after all nodes that the first one expects, or if NNODES is a range.

    Returns:
        the store in which they met; torchrun uses the same one as long as this reference is kept.
    """
    from torch.distributed import PrefixStore

    server = _open_store(config)
    store = PrefixStore(f"meeting/{config.run_id}", server)
    ranged = config.min_nodes < config.max_nodes
    clash = _find_clash(store, config, f"{config.min_nodes}:{config.max_nodes}" if ranged else str(config.max_nodes))
    if clash or (not ranged and store.add("arrived", 1) == config.max_nodes):
        # The first verdict counts, or some nodes would start and others not.
        stands = store.compare_set("verdict", "", clash or _GO).decode()
        verdict = clash or stands
    elif ranged:
        verdict = _GO
    else:
        patience = config.rdzv_configs["timeout" if config.rdzv_backend == "static" else "join_timeout"]
        store.wait(["verdict"], timedelta(seconds=int(patience)))
        verdict = store.get("verdict").decode()
    if verdict != _GO:
        time.sleep(_HEARD_S)  # the other nodes may still read from this process
        sys.exit(f"error: {verdict}")
    return server


def _find_clash(store: "Store", config: "LaunchConfig", nnodes: str) -> str:
    """Return one line on how this node clashes with those that came before it; empty if it does not."""
    node, host = config.rdzv_configs.get("rank"), config.local_addr or socket.gethostname()
    first = store.compare_set("nnodes", "", f"{nnodes} on {host}").decode()
    if first.split()[0] != nnodes:
        return f"NNODES differs: it is {first}, {nnodes} on {host}: start every node with the same"
    if node is None:
        return ""
    if node >= config.max_nodes:
        return f"NODE_RANK={node} on {host} is not below NNODES={nnodes}: number the nodes from 0 up"
    holder = store.compare_set(f"node/{node}", "", host).decode()  # the same host if the node was started again
    return "" if holder == host else f"NODE_RANK={node} is both {holder} and {host}: number the nodes from 0 up"


def _open_store(config: "LaunchConfig") -> "Store":
    """Open the store that torchrun opens too, on the node that hosts it and on the others."""
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    if config.rdzv_backend == "static":
        host, port = parse_rendezvous_endpoint(config.rdzv_endpoint, default_port=-1)
        patience = timedelta(seconds=int(config.rdzv_configs["timeout"]))
        hosts = config.rdzv_configs["rank"] == 0
        return TCPStore(host, port, is_master=hosts, timeout=patience, multi_tenant=True, wait_for_workers=False)
    told = {"min_nodes": config.min_nodes, "max_nodes": config.max_nodes, **config.rdzv_configs}
    _, store = create_backend(RendezvousParameters("c10d", config.rdzv_endpoint, config.run_id, **told))
    return store


if __name__ == "__main__":
    main()
