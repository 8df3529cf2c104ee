"""What enters the trained layers, kept on a local disk: without augmentation of pixels it is the same in every epoch.

Of every version and depth there is one folder: `tokens`, each row's bits as the frozen layers gave them, in the order
of the table's rows and sparse, so that rows nobody asked for take no room; `done`, a byte a row, 1 once its tokens are
on the disk; `provenance.json`, what they depend on. Every machine of a job fills a folder of its own.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from cache_schema import Version
from extract.backbone import Backbone, Checkpoint
from extract.distributed import Ranks
from extract.precision import DTYPES

from .batches import Batch, take_share
from .blocks import map_ahead
from .errors import TrainError
from .memory import format_bytes
from .rows import LabelledCache
from .sampling import draw_epoch
from .streaming import Index

LARGE = 50 * 2**30
"""Bytes above which a user is asked first."""
_FLUSHED = 16
"""Batches after which what was computed is put on the disk for good."""
_AHEAD = 2


class PrefixCache:
    """Tokens (T, D) of a version's rows, in the dtype of the frozen layers.

    Args:
        scratch: folder that holds this one and those of other versions and depths.
        version: whose rows.
        checkpoint: its backbone.
        unfreeze: layers that are trained, and so come after the tokens.
    """

    def __init__(self, scratch: str, version: Version, checkpoint: Checkpoint, unfreeze: int) -> None:
        precision: Any = version.provenance.precision
        self.version = version.id
        self.dtype = DTYPES[precision]
        self._shape = (checkpoint.tokens, checkpoint.width)
        self.row_bytes = checkpoint.tokens * checkpoint.width * self.dtype.itemsize
        self._rows = version.layout.rows
        # The version stands for weights, image size, precision and the tiles themselves.
        self._provenance = {"version": version.id, "unfreeze": unfreeze, "tokens": self._shape, "dtype": precision}
        text = json.dumps(self._provenance, indent=2) + "\n"
        self.folder = Path(scratch) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._text = text

    def find_missing(self, rows: Index) -> Index:
        """Those of `rows` whose tokens are not there yet, ascending."""
        wanted: Index = np.unique(rows)
        missing: Index = wanted[self._read_done()[wanted] == 0]
        return missing

    def fill(self, rows: Index, compute: Callable[[list[Index]], Iterator[Tensor]], *, batch: int, ranks: Ranks) -> int:
        """Compute and keep what is missing; the ranks of a machine share the work.

        Args:
            rows: of the table, whose tokens are wanted.
            compute: from batches of rows to their tokens (b, T, D), in order.
            batch: rows at once.
            ranks: among them this one.

        Returns:
            how many rows this rank computed.

        Raises:
            TrainError: the disk is full, or cannot be written; what was kept stays.
        """
        local_rank = ranks.rank % ranks.local_world_size
        with _name_errors(self.folder):
            if local_rank == 0:
                self._lay_out()
        ranks.wait()
        missing = self.find_missing(rows)
        ranks.wait()  # nobody may mark a row before all have looked
        parts = np.split(missing, range(batch, len(missing), batch))
        mine = [part for part in parts[local_rank :: ranks.local_world_size] if len(part)]
        done = np.memmap(self.folder / "done", np.uint8, "r+")
        waiting: list[Index] = []
        with (
            _name_errors(self.folder),
            (self.folder / "tokens").open("rb+", buffering=0) as file,
            tqdm(total=len(missing), unit="tile", desc="prefix", disable=not ranks.is_main or not len(missing)) as bar,
        ):
            for part, tokens in zip(mine, compute(mine), strict=True):
                bits = tokens.cpu().contiguous().view(torch.uint8).view(len(part), -1).numpy()
                for row, value in zip(part.tolist(), bits, strict=True):
                    _write_all(file.fileno(), memoryview(value), row * self.row_bytes)
                waiting.append(part)
                bar.update(min(len(part) * ranks.local_world_size, bar.total - bar.n))
                if len(waiting) == _FLUSHED or part is mine[-1]:
                    os.fsync(file.fileno())  # a mark on a row that a power cut took would never be found out
                    done[np.concatenate(waiting)] = 1
                    waiting.clear()
            done.flush()
        ranks.wait()
        return sum(map(len, mine))

    def read(self, rows: Index) -> Tensor:
        """Tokens (len(rows), T, D) of rows that are done."""
        tokens = torch.empty(len(rows), *self._shape, dtype=self.dtype)
        np.take(self._tokens, rows, axis=0, out=tokens.view(torch.uint8).numpy().reshape(len(rows), self.row_bytes))
        return tokens

    @cached_property
    def _tokens(self) -> "np.memmap[Any, np.dtype[np.uint8]]":
        return np.memmap(self.folder / "tokens", np.uint8, "r", shape=(self._rows, self.row_bytes))

    def _read_done(self) -> npt.NDArray[np.uint8]:
        """(N,) 1 for rows whose tokens are there."""
        return np.fromfile(self.folder / "done", np.uint8) if self._is_whole() else np.zeros(self._rows, np.uint8)

    def _is_whole(self) -> bool:
        """Whether the folder's files are there and of the size they must have."""
        try:
            return (
                (self.folder / "provenance.json").read_text() == self._text
                and (self.folder / "done").stat().st_size == self._rows
                and (self.folder / "tokens").stat().st_size == self._rows * self.row_bytes
            )
        except FileNotFoundError:
            return False

    def _lay_out(self) -> None:
        """Make the files, unless they are there; provenance last, so that a folder with it has all of them."""
        if self._is_whole():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        with (self.folder / "tokens").open("wb") as file:
            file.truncate(self._rows * self.row_bytes)
        (self.folder / "done").write_bytes(bytes(self._rows))
        (self.folder / "provenance.json").write_text(self._text)


class PrefixTiles:
    """n labelled rows of a cache as tokens, for the layers that are trained.

    Args:
        cache: which rows, and their labels.
        prefix: in which all of them are done.
        ranks: among them this one.
        eval_batch: tiles per forward pass in evaluation.
    """

    def __init__(self, cache: LabelledCache, prefix: PrefixCache, ranks: Ranks, *, eval_batch: int) -> None:
        self.rows = cache.rows
        self._labels = torch.from_numpy(cache.rows.labels)
        self._prefix = prefix
        self._ranks = ranks
        self._eval_batch = eval_batch

    def __len__(self) -> int:
        return len(self.rows)

    def iterate_epoch(self, *, batch_size: int, seed: int, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This rank's share of every global batch, in the order in which tiles would be streamed."""
        order = draw_epoch(self.rows, seed, epoch)
        batches = order.split(batch_size)[first_step:] if len(order) else ()
        shares = [take_share(batch, self._ranks) for batch in batches]
        for batch, share, tokens in zip(batches, shares, self._read(shares), strict=True):
            yield Batch(tokens, self._labels[share].to(self._ranks.device), share, len(batch))

    @property
    def share(self) -> Tensor:
        """(m,) int64, the rows that this rank evaluates: every world_size-th."""
        return take_share(torch.arange(len(self)), self._ranks)

    def iterate_share(self) -> Iterator[Tensor]:
        """Tokens of the rows in `share`, unpadded."""
        return self._read([part for part in self.share.split(self._eval_batch) if len(part)])

    def _read(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        def read(number: int) -> Tensor:
            return self._prefix.read(self.rows.index[parts[number].numpy()])

        for tokens in map_ahead(read, range(len(parts)), _AHEAD):
            on_device = tokens.pin_memory() if self._ranks.device.type == "cuda" else tokens
            yield on_device.to(self._ranks.device, non_blocking=True)


def check_room(prefixes: Sequence[tuple[PrefixCache, Index]], *, agreed: bool) -> str:
    """Refuse, before anything is written, what the disk cannot hold or the user may not want.

    Args:
        prefixes: each with the rows of its table that are wanted.
        agreed: whether the user wants it however large it is.

    Returns:
        a line for the user: how much it takes, and where.

    Raises:
        TrainError: it does not fit, or takes more than 50 GiB and nobody agreed to that.
    """
    need = sum(len(prefix.find_missing(rows)) * prefix.row_bytes for prefix, rows in prefixes)
    scratch = prefixes[0][0].folder.parent
    above = next(folder for folder in (scratch, *scratch.absolute().parents) if folder.exists())
    free = shutil.disk_usage(above).free
    rows = sum(len(np.unique(rows)) for _, rows in prefixes)
    size = f"the prefix cache of {rows:,} tiles takes {format_bytes(need)} more in {scratch}"
    each = f"{format_bytes(prefixes[0][0].row_bytes)} a tile"
    if need > free:
        raise TrainError(
            f"{size} ({each}), where {format_bytes(free)} are free: make room, name another disk with --scratch, or "
            "train without --cache-prefix"
        )
    if need > LARGE and not agreed:
        raise TrainError(f"{size} ({each}), more than {format_bytes(LARGE)}: add --yes if that is meant")
    return f"{size}, {each}; {format_bytes(free)} are free. It may be removed when no run needs it any more"


def run_prefix(backbone: Backbone, pixels: Tensor, batch: int) -> Tensor:
    """Tokens (b, T, D) of b tiles, computed in a batch of the full size: another shape would round differently."""
    missing = batch - len(pixels)
    whole = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])]) if missing else pixels
    with torch.inference_mode():
        return backbone.run_prefix(whole)[: len(pixels)]


@contextmanager
def _name_errors(folder: Path) -> Iterator[None]:
    """Have what the disk refuses become one line for the user."""
    try:
        yield
    except OSError as error:
        raise TrainError(
            f"cannot write the prefix cache in {folder}: {error.strerror}: make room or access, name another disk with "
            "--scratch, or train without --cache-prefix; what it holds is kept"
        ) from error


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    # Not through a memory map: a full disk would end this process with a signal.
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
