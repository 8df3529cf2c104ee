"""torchrun, one rank per GPU and ending quietly: `python -m extract.launch TORCHRUN-OPTIONS -m extract run …`.

torchrun answers a rank's non-zero status with its own traceback, which would bury the one line a rank printed for
its user. Everything else is torchrun's: rendezvous, restarts, signals. A job of one rank has nobody to meet: it runs in
this very process, and PyTorch is loaded once, not twice.
"""

import logging
import os
import runpy
import signal
import sys


def main() -> None:
    """Run torchrun with this process's arguments; exit with the status of the first rank that failed."""
    try:
        _launch()
    except KeyboardInterrupt:  # before torchrun answers signals, above all while torch is imported
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _launch() -> None:
    # A connection that ends is a warning to PyTorch's C++ part, here and in the ranks, with a stack trace of its own.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError
    from torch.distributed.run import parse_args, run

    for name in ("torch.distributed.run", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
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
        # With one store for launcher and ranks, torch 2.13 gives its address to those of the first round alone; a node
        # that joins later waits for it until all fail (dynamic_rendezvous.py, next_rendezvous).
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: rank {rank} was ended by {_name_signal(-failure.exitcode)}", file=sys.stderr)
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


def _name_signal(number: int) -> str:
    return signal.Signals(number).name


if __name__ == "__main__":
    main()
