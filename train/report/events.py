"""Write the TensorBoard events of a run."""

from torch.utils.tensorboard import SummaryWriter

from train.runs.directory import RunDirectory


def write_events(run: RunDirectory) -> None:
    """Write every figure of the history, by epoch, into `tensorboard/`."""
    with SummaryWriter(str(run.path / "tensorboard")) as writer:
        for line in run.read_history():
            for name, value in line.items():
                if name != "epoch" and value is not None:
                    writer.add_scalar(name, value, line["epoch"])
