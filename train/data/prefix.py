"""What enters the trained layers, kept on a local disk: without augmentation of pixels it is the same in every epoch.

With `--views d4` each of a tile's eight views is. Of every version and depth there is one folder: `tokens`, each tile's
bits as the frozen layers gave them, in the order of the table's rows and sparse, so that rows nobody asked for take no
room; `done`, a byte for each, 1 once its tokens are on the disk; `provenance.json`, what they depend on. Every machine
of a job fills a folder of its own.
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
from cache_schema.cli.text import format_bytes
from extract.backbone.checkpoint import Checkpoint
from extract.backbone.dinov3 import Backbone
from extract.backbone.embed import pad_batch
from extract.backbone.precision import DTYPES
from extract.ranks.group import Ranks
from train.errors import TrainError
from train.model.augment import apply_symmetry, draw_symmetries

from .batches import Batch, share_epoch, split_evenly, take_share
from .blocks import map_ahead
from .labels import LabelledCache
from .streaming import Index, StreamedTiles

LARGE = 50 * 2**30
"""Bytes above which a user is asked first."""
_FLUSHED = 16
"""Batches after which what was computed is put on the disk for good."""
_AHEAD = 2


class PrefixCache:
    """Tokens (T, D) of a version's rows, in the dtype of the frozen layers.

    What is kept is counted in slots: slot `row * views + symmetry` holds a row's tile in one of its views.

    Args:
        scratch: folder that holds this one and those of other versions and depths.
        version: whose rows.
        checkpoint: its backbone.
        unfreeze: layers that are trained, and so come after the tokens.
        views: 1, or 8 for the symmetries of a tile.
    """

    def __init__(self, scratch: str, version: Version, checkpoint: Checkpoint, unfreeze: int, views: int = 1) -> None:
        precision: Any = version.provenance.precision
        self.version = version.id
        self.views = views
        self.dtype = DTYPES[precision]
        self._shape = (checkpoint.tokens, checkpoint.width)
        self.slot_bytes = checkpoint.tokens * checkpoint.width * self.dtype.itemsize
        self._slots = version.layout.rows * views
        # The version stands for weights, image size, precision and the tiles themselves.
        provenance = {"version": version.id, "unfreeze": unfreeze, "views": views}
        self._text = json.dumps({**provenance, "tokens": self._shape, "dtype": precision}, indent=2) + "\n"
        self.folder = Path(scratch) / hashlib.sha256(self._text.encode()).hexdigest()[:16]

    def find_missing(self, slots: Index) -> Index:
        """Those of `slots` whose tokens are not there yet, ascending."""
        wanted: Index = np.unique(slots)
        missing: Index = wanted[self._read_done()[wanted] == 0]
        return missing

    def fill(
        self, slots: Index, compute: Callable[[list[Index]], Iterator[Tensor]], *, batch: int, ranks: Ranks
    ) -> int:
        """Compute and keep what is missing; the ranks of a machine share the work.

        Args:
            slots: whose tokens are wanted.
            compute: from batches of slots to their tokens (b, T, D), in order.
            batch: slots at once.
            ranks: among them this one.

        Returns:
            how many slots this rank computed.

        Raises:
            TrainError: the disk is full, or cannot be written; what was kept stays.
        """
        local_rank = ranks.rank % ranks.local_world_size
        with _name_errors(self.folder):
            if local_rank == 0:
                self._lay_out()
        ranks.wait()
        missing = self.find_missing(slots)
        ranks.wait()  # nobody may mark a slot before all have looked
        parts = np.split(missing, range(batch, len(missing), batch))
        mine = [part for part in parts[local_rank :: ranks.local_world_size] if len(part)]
        done = np.memmap(self.folder / "done", np.uint8, "r+")
        waiting: list[Index] = []
        with (
            _name_errors(self.folder),
            (self.folder / "tokens").open("rb+", buffering=0) as file,
            tqdm(
                total=len(missing), unit="tile", desc="prefix", disable=not ranks.draws_bars or not len(missing)
            ) as bar,
        ):
            for part, tokens in zip(mine, compute(mine), strict=True):
                bits = tokens.cpu().contiguous().view(torch.uint8).view(len(part), -1).numpy()
                for slot, value in zip(part.tolist(), bits, strict=True):
                    _write_all(file.fileno(), memoryview(value), slot * self.slot_bytes)
                waiting.append(part)
                bar.update(min(len(part) * ranks.local_world_size, bar.total - bar.n))
                if len(waiting) == _FLUSHED or part is mine[-1]:
                    os.fsync(file.fileno())  # a mark on a slot that a power cut took would never be found out
                    done[np.concatenate(waiting)] = 1
                    waiting.clear()
            done.flush()
        ranks.wait()
        return sum(map(len, mine))

    def read(self, slots: Index) -> Tensor:
        """Tokens (len(slots), T, D) of slots that are done."""
        tokens = torch.empty(len(slots), *self._shape, dtype=self.dtype)
        np.take(self._tokens, slots, axis=0, out=tokens.view(torch.uint8).numpy().reshape(len(slots), self.slot_bytes))
        return tokens

    @cached_property
    def _tokens(self) -> "np.memmap[Any, np.dtype[np.uint8]]":
        return np.memmap(self.folder / "tokens", np.uint8, "r", shape=(self._slots, self.slot_bytes))

    def _read_done(self) -> npt.NDArray[np.uint8]:
        """(slots,) 1 for those whose tokens are there."""
        return np.fromfile(self.folder / "done", np.uint8) if self._is_whole() else np.zeros(self._slots, np.uint8)

    def _is_whole(self) -> bool:
        """Whether the folder's files are there and of the size they must have."""
        try:
            return (
                (self.folder / "provenance.json").read_text() == self._text
                and (self.folder / "done").stat().st_size == self._slots
                and (self.folder / "tokens").stat().st_size == self._slots * self.slot_bytes
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
            file.truncate(self._slots * self.slot_bytes)
        (self.folder / "done").write_bytes(bytes(self._slots))
        (self.folder / "provenance.json").write_text(self._text)


class PrefixTiles:
    """n labelled rows of a cache as tokens, for the layers that are trained.

    Args:
        cache: which rows, and their labels.
        prefix: in which all of them are done, those to train on in all its views.
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
        shares = share_epoch(
            self.rows, self._ranks, batch_size=batch_size, seed=seed, epoch=epoch, first_step=first_step
        )
        views = [self._draw(share, seed, epoch) for share, _ in shares]
        coming = self._read([share for share, _ in shares], views)
        for (share, size), tokens in zip(shares, coming, strict=True):
            yield Batch(tokens, self._labels[share].to(self._ranks.device), share, size)

    @property
    def share(self) -> Tensor:
        """(m,) int64, the rows that this rank evaluates: every world_size-th."""
        return take_share(torch.arange(len(self)), self._ranks)

    def iterate_share(self) -> Iterator[Tensor]:
        """Tokens of the rows in `share`, unpadded, their tiles as they are, in as many batches on every rank."""
        parts = split_evenly(self.share, len(self), self._eval_batch, self._ranks)
        return self._read(parts, [torch.zeros_like(part) for part in parts])

    def _draw(self, rows: Tensor, seed: int, epoch: int) -> Tensor:
        """(n,) int64, the view in which each row is shown in an epoch."""
        return draw_symmetries(rows, seed, epoch) if self._prefix.views > 1 else torch.zeros_like(rows)

    def _read(self, parts: Sequence[Tensor], symmetries: Sequence[Tensor]) -> Iterator[Tensor]:
        def read(number: int) -> Tensor:
            rows = self.rows.index[parts[number].numpy()]
            return self._prefix.read(rows * self._prefix.views + symmetries[number].numpy())

        for tokens in map_ahead(read, range(len(parts)), _AHEAD):
            on_device = tokens.pin_memory() if self._ranks.device.type == "cuda" else tokens
            yield on_device.to(self._ranks.device, non_blocking=True)


def plan_slots(prefix: PrefixCache, train: Sequence[Index], val: Sequence[Index]) -> Index:
    """Slots that are wanted: every view of the rows to train on, and the tile as it is of those to validate on."""
    views = np.arange(prefix.views)
    shown = [(rows[:, None] * prefix.views + views).ravel() for rows in train]
    return np.concatenate([*shown, *(rows * prefix.views for rows in val)])


def compute_slots(
    backbone: Backbone, tiles: StreamedTiles, slots: Sequence[Index], *, views: int, batch: int
) -> Iterator[Tensor]:
    """Tokens (b, T, D) of batches of slots, from tiles that are read once for all their views in a batch.

    Each is computed in a batch of the full size: another shape would round differently.
    """
    parts = [np.unique(part // views, return_inverse=True) for part in slots]
    for part, (_, where), pixels in zip(slots, parts, tiles.read_rows([rows for rows, _ in parts]), strict=True):
        shown = pixels[torch.from_numpy(where).to(pixels.device)]
        if views > 1:
            shown = apply_symmetry(shown, torch.from_numpy(part % views))
        with torch.inference_mode():
            tokens = backbone.run_prefix(pad_batch(shown, batch))
        yield tokens[: len(part)]


def check_room(prefixes: Sequence[tuple[PrefixCache, Index]], *, agreed: bool) -> str:
    """Refuse, before anything is written, what the disk cannot hold or the user may not want.

    Args:
        prefixes: each with the slots that are wanted.
        agreed: whether the user wants it however large it is.

    Returns:
        a line for the user: how much it takes, and where.

    Raises:
        TrainError: it does not fit, or takes more than 50 GiB and nobody agreed to that.
    """
    need = sum(len(prefix.find_missing(slots)) * prefix.slot_bytes for prefix, slots in prefixes)
    first = prefixes[0][0]
    scratch = first.folder.parent
    above = next(folder for folder in (scratch, *scratch.absolute().parents) if folder.exists())
    free = shutil.disk_usage(above).free
    tiles = sum(len(np.unique(slots // prefix.views)) for prefix, slots in prefixes)
    size = f"the prefix cache of {tiles:,} tiles takes {format_bytes(need)} more in {scratch}"
    each = f"{format_bytes(first.slot_bytes)} a tile"
    if first.views > 1:
        each = f"{format_bytes(first.slot_bytes)} for each of {first.views} views of a tile that trains"
    if need > free:
        raise TrainError(
            f"{size} ({each}), where {format_bytes(free)} are free: make room, name another disk with --scratch, or "
            "train without --cache-prefix"
        )
    if need > LARGE and not agreed:
        raise TrainError(f"{size} ({each}), more than {format_bytes(LARGE)}: add --yes if that is meant")
    return f"{size}, {each}; {format_bytes(free)} are free. It may be removed when no run needs it any more"


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
