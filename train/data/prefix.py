"""Disk cache of the frozen prefix's activations, which are the same in every epoch unless pixels are augmented.

With `--views d4` there is one entry for each of a tile's eight views. Each version and depth has a folder with

    tokens             a slot per row and view with the bits from the frozen layers; sparse, unused rows take no room
    done               a byte per slot, 1 once its tokens are on the disk
    provenance.json    what the tokens depend on

Every machine of a job fills its own folder.
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

from .batches import StridedTiles, split_evenly
from .blocks import map_ahead, send
from .labels import LabelledCache
from .streaming import Index, StreamedTiles

LARGE = 50 * 2**30
"""Bytes above which the user must confirm with --yes."""
_FLUSHED = 16
"""Batches between two calls of fsync."""
_AHEAD = 2


class PrefixCache:
    """Tokens (T, D) of a version's rows, in the dtype of the frozen layers.

    Slot `row * views + symmetry` holds a row's tile in one of its views.

    Args:
        scratch: parent folder of the caches of all versions and depths.
        unfreeze: number of trained layers, which take the tokens as input.
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
        # The version id covers weights, image size, precision and tiles.
        provenance = {"version": version.id, "unfreeze": unfreeze, "views": views}
        self._text = json.dumps({**provenance, "tokens": self._shape, "dtype": precision}, indent=2) + "\n"
        self.folder = Path(scratch) / hashlib.sha256(self._text.encode()).hexdigest()[:16]

    def find_missing(self, slots: Index) -> Index:
        """Return the `slots` without tokens, ascending and unique."""
        wanted: Index = np.unique(slots)
        if not self._is_whole():
            return wanted
        missing: Index = wanted[np.fromfile(self.folder / "done", np.uint8)[wanted] == 0]
        return missing

    def fill(
        self, slots: Index, compute: Callable[[list[Index]], Iterator[Tensor]], *, batch: int, ranks: Ranks
    ) -> int:
        """Compute the missing tokens and write them; the ranks of a machine share the work.

        Args:
            compute: maps batches of slots to their tokens (b, T, D), in order.
            batch: slots per batch.

        Returns:
            the number of slots that this rank computed.

        Raises:
            TrainError: the disk is full or not writable; tokens written so far stay valid.
        """
        local_rank = ranks.rank % ranks.local_world_size
        with _name_errors(self.folder):
            if local_rank == 0:
                self._lay_out()
        ranks.wait()
        missing = self.find_missing(slots)
        ranks.wait()  # no rank may mark a slot before all ranks have read the marks
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
                    os.fsync(file.fileno())  # before marking: a mark on a slot lost in a power cut would go unnoticed
                    done[np.concatenate(waiting)] = 1
                    waiting.clear()
            done.flush()
        ranks.wait()
        return sum(map(len, mine))

    def read(self, slots: Index) -> Tensor:
        """Read the tokens (len(slots), T, D) of slots that are done."""
        tokens = torch.empty(len(slots), *self._shape, dtype=self.dtype)
        np.take(self._tokens, slots, axis=0, out=tokens.view(torch.uint8).numpy().reshape(len(slots), self.slot_bytes))
        return tokens

    @cached_property
    def _tokens(self) -> "np.memmap[Any, np.dtype[np.uint8]]":
        return np.memmap(self.folder / "tokens", np.uint8, "r", shape=(self._slots, self.slot_bytes))

    def _is_whole(self) -> bool:
        """Return whether all files exist with the right size and provenance."""
        try:
            return (
                (self.folder / "provenance.json").read_text() == self._text
                and (self.folder / "done").stat().st_size == self._slots
                and (self.folder / "tokens").stat().st_size == self._slots * self.slot_bytes
            )
        except FileNotFoundError:
            return False

    def _lay_out(self) -> None:
        """Create the files, unless they exist; provenance last, since it marks the folder as complete."""
        if self._is_whole():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        with (self.folder / "tokens").open("wb") as file:
            file.truncate(self._slots * self.slot_bytes)
        (self.folder / "done").write_bytes(bytes(self._slots))
        (self.folder / "provenance.json").write_text(self._text)


class PrefixTiles(StridedTiles):
    """n labelled rows of a cache as tokens, the input of the trained layers.

    Args:
        prefix: holds the tokens of all rows, and all views of those to train on.
        eval_batch: tiles per forward pass in evaluation.
    """

    def __init__(self, cache: LabelledCache, prefix: PrefixCache, ranks: Ranks, *, eval_batch: int) -> None:
        super().__init__(cache.rows, ranks)
        self._prefix = prefix
        self._eval_batch = eval_batch

    def _load_epoch(self, shares: Sequence[Tensor], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        turned = self._prefix.views > 1
        views = [draw_symmetries(share, seed, epoch) if turned else torch.zeros_like(share) for share in shares]
        tokens = self._read(shares, views)
        return ((part, self._labels[share].to(self._ranks.device)) for share, part in zip(shares, tokens, strict=True))

    def iterate_share(self) -> Iterator[Tensor]:
        parts = split_evenly(self.share, len(self), self._eval_batch, self._ranks)
        return self._read(parts, [torch.zeros_like(part) for part in parts])

    def _read(self, parts: Sequence[Tensor], symmetries: Sequence[Tensor]) -> Iterator[Tensor]:
        def read(number: int) -> Tensor:
            rows = self.rows.index[parts[number].numpy()]
            return self._prefix.read(rows * self._prefix.views + symmetries[number].numpy())

        return (send(tokens, self._ranks.device) for tokens in map_ahead(read, range(len(parts)), _AHEAD))


def plan_slots(prefix: PrefixCache, train: Sequence[Index], val: Sequence[Index]) -> Index:
    """List the slots to fill: every view of the training rows, and the unturned tiles of the validation rows."""
    views = np.arange(prefix.views)
    shown = [(rows[:, None] * prefix.views + views).ravel() for rows in train]
    return np.concatenate([*shown, *(rows * prefix.views for rows in val)])


def compute_slots(
    backbone: Backbone, tiles: StreamedTiles, slots: Sequence[Index], *, views: int, batch: int
) -> Iterator[Tensor]:
    """Yield tokens (b, T, D) for batches of slots; a tile is read once for all its views in a batch.

    Short batches are padded to the full size: another shape would round differently.
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
    """Refuse prefix caches that do not fit on the disk or that are large and not confirmed; write nothing.

    Args:
        prefixes: each with the slots to fill.
        agreed: whether the user confirmed a large cache.

    Returns:
        a line for the user with the size and the folder.

    Raises:
        TrainError: they do not fit, or take more than 50 GiB without confirmation.
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
        raise TrainError(f"{size} ({each}), more than {format_bytes(LARGE)}: add --yes to accept that")
    return f"{size}, {each}; {format_bytes(free)} are free. Remove it when no run needs it any more"


@contextmanager
def _name_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainError(
            f"cannot write the prefix cache in {folder}: {error.strerror}: make room or access, name another disk with "
            "--scratch, or train without --cache-prefix; its contents are kept"
        ) from error


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    # Not through a memory map: on a full disk that would kill the process with a signal.
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
