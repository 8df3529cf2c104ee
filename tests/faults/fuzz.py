"""Sound images and labels, mutated at random: each decodes, or is refused with a reason; nothing crashes, hangs or
grows. `python -m tests.faults.fuzz SAMPLES OUTCOMES` is the process that may crash."""

from __future__ import annotations

import faulthandler
import resource
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cache_schema import LABEL_ID_COLUMNS
from extract.tiles.decode import MAX_PIXELS, UndecodableTileError, decode_tile
from extract.tiles.labels import parse_labels
from tests.tiles import draw_pixels, encode, encode_png

PROJECT_ROOT = Path(__file__).parents[2]
KEPT = PROJECT_ROOT / "runs" / "fuzz"
"""Where bytes that did not survive go."""
BATCH = 500
HANG_S = 20
MEMORY = 1536 * 2**20
"""Bytes of address space that decoding may take beyond what the process had: 24 for each pixel of the limit."""

Rng = np.random.Generator
Mutation = Callable[[Rng, bytes], bytes]


@dataclass(frozen=True)
class Sample:
    """A mutated file, and the kind it was."""

    kind: str
    data: bytes


# Images


def _encode(rng: Rng, size: tuple[int, int], mode: str, container: str, **options: Any) -> bytes:
    image = Image.fromarray(draw_pixels(rng, *size))
    if mode == "I;16":
        return encode(Image.fromarray(rng.integers(0, 2**16, size, np.uint16)), container, **options)
    return encode(image.convert(mode), container, **options)


def _encode_rgb_16(rng: Rng, size: tuple[int, int]) -> bytes:
    rows = b"".join(b"\0" + rng.bytes(6 * size[1]) for _ in range(size[0]))
    return encode_png((size[1], size[0], 16, 2), rows)


IMAGES: dict[str, Callable[[Rng, tuple[int, int]], bytes]] = {
    "PNG, RGB": lambda rng, size: _encode(rng, size, "RGB", "PNG"),
    "PNG, RGBA": lambda rng, size: _encode(rng, size, "RGBA", "PNG"),
    "PNG, 16-bit grey": lambda rng, size: _encode(rng, size, "I;16", "PNG"),
    "PNG, 16-bit RGB": _encode_rgb_16,
    "PNG, palette": lambda rng, size: _encode(rng, size, "P", "PNG", transparency=1),
    "PNG, grey": lambda rng, size: _encode(rng, size, "L", "PNG"),
    "JPEG": lambda rng, size: _encode(rng, size, "RGB", "JPEG"),
    "JPEG, progressive": lambda rng, size: _encode(rng, size, "RGB", "JPEG", progressive=True),
    "JPEG, CMYK": lambda rng, size: _encode(rng, size, "CMYK", "JPEG"),
    "TIFF": lambda rng, size: _encode(rng, size, "RGB", "TIFF"),
    "TIFF, LZW": lambda rng, size: _encode(rng, size, "RGB", "TIFF", compression="tiff_lzw"),
    "TIFF, deflate": lambda rng, size: _encode(rng, size, "L", "TIFF", compression="tiff_adobe_deflate"),
}


def draw_image(rng: Rng) -> Sample:
    """A valid image of some kind with one to three mutations; most PNGs get right checksums again."""
    kind = str(rng.choice(list(IMAGES)))
    size = (int(rng.integers(1, 40)), int(rng.integers(1, 40)))
    data = IMAGES[kind](rng, size)
    for _ in range(rng.choice([1, 1, 2, 3])):
        mutate = _ALIKE[rng.integers(len(_ALIKE))] if rng.random() < 0.7 else _resize
        data = mutate(rng, data)
    return Sample(kind, mend_checksums(data) if rng.random() < 0.7 else data)


def _flip(rng: Rng, data: bytes) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(0, len(data), rng.integers(1, 9)) if data else ():
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _truncate(rng: Rng, data: bytes) -> bytes:
    return data[: rng.integers(0, len(data) + 1)]


def _splice(rng: Rng, data: bytes) -> bytes:
    """Take a piece out, or put another in its place: of the same file, or of random bytes."""
    start, end = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    start, end = (start, min(end, start + 64)) if rng.random() < 0.5 else (start, end)
    other = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    piece = [b"", data[slice(*other)], rng.bytes(int(rng.integers(1, 64)))][rng.integers(3)]
    return data[:start] + piece + data[end:]


def _overwrite(rng: Rng, data: bytes) -> bytes:
    """Write a number that programs trip over, in some width and byte order: a length, an offset, a count, a type."""
    code = str(rng.choice(["B", "<H", ">H", "<I", ">I"]))
    largest = 256 ** struct.calcsize(code) - 1
    number = int(rng.choice([0, 1, 2, largest, largest - 1, largest // 2, largest // 2 + 1, len(data) % largest]))
    place = int(rng.integers(0, min(len(data), 200) if rng.random() < 0.5 else len(data))) if data else 0
    return data[:place] + struct.pack(code, number) + data[place + struct.calcsize(code) :]


def _edit_chunk_length(rng: Rng, data: bytes) -> bytes:
    """Another length for one PNG chunk; of other files, any number."""
    chunks = list(_find_chunks(data))
    if not chunks:
        return _overwrite(rng, data)
    place, length = chunks[rng.integers(len(chunks))]
    changed = [length + int(rng.integers(-8, 9)), int(rng.integers(2**32)), 0][rng.integers(3)]
    return data[:place] + struct.pack(">I", changed % 2**32) + data[place + 4 :]


def _resize(rng: Rng, data: bytes) -> bytes:
    """Another width or height, and for PNG perhaps another kind of pixel, in the header."""
    number = int(2 ** rng.uniform(0, 32 if rng.random() < 0.3 else 13))
    if data.startswith(b"\x89PNG") and len(data) > 33:
        if rng.random() < 0.3:
            return data[:24] + bytes([int(rng.choice([1, 2, 4, 8, 16])), int(rng.choice([0, 2, 3, 4, 6]))]) + data[26:]
        place = 16 + 4 * int(rng.integers(2))
        return data[:place] + struct.pack(">I", min(number, 2**32 - 1)) + data[place + 4 :]
    if data.startswith(b"\xff\xd8"):
        frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        place = frame + 5 + 2 * int(rng.integers(2))
        return data[:place] + struct.pack(">H", number % 2**16) + data[place + 2 :] if frame > 0 else data
    tag = struct.pack("<HH", 256 + int(rng.integers(2)), 4)
    place = data.find(tag) + 8
    return data[:place] + struct.pack("<I", min(number, 2**32 - 1)) + data[place + 4 :] if place > 8 else data


_ALIKE: list[Mutation] = [_flip, _truncate, _splice, _overwrite, _edit_chunk_length]


def _find_chunks(data: bytes) -> Iterator[tuple[int, int]]:
    """Where PNG chunks begin, as far as their lengths lead, and the lengths."""
    place = 8 if data.startswith(b"\x89PNG") else len(data)
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        yield place, length
        place += 12 + length


def mend_checksums(data: bytes) -> bytes:
    """Right checksums for a PNG's chunks, so that damage gets past the first door."""
    changed = bytearray(data)
    for place, length in _find_chunks(data):
        end = place + 8 + length
        if end + 4 <= len(data):
            changed[end : end + 4] = struct.pack(">I", zlib.crc32(data[place + 4 : end]))
    return bytes(changed)


def fuzz_images(count: int, seed: int) -> list[dict[str, Any]]:
    """Decode `count` mutated images: a row `{fault, tried, survived}` per kind."""
    rng = np.random.default_rng(seed)
    samples = [draw_image(rng) for _ in range(count)]
    outcomes = decode_all(samples)
    _keep(f"image-{seed}", [(i, s.data, o) for i, (s, o) in enumerate(zip(samples, outcomes, strict=True))])
    return _count("image bytes fuzzed", [sample.kind for sample in samples], outcomes)


def decode_all(samples: Sequence[Sample]) -> list[str]:
    """`decoded`, `refused: REASON` or `failed: WHY` for each, from processes that a crash may take with it."""
    outcomes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        while len(outcomes) < len(samples):
            batch = samples[len(outcomes) : len(outcomes) + BATCH]
            outcomes += _decode_batch(batch, Path(folder))
    return outcomes


def _decode_batch(samples: Sequence[Sample], folder: Path) -> list[str]:
    """Outcomes up to the first sample that ended the process, that one included."""
    given, told = folder / "samples", folder / "outcomes"
    given.write_text("".join(f"{sample.data.hex()}\n" for sample in samples))
    told.write_text("")
    command = [sys.executable, "-m", "tests.faults.fuzz", str(given), str(told)]
    finished = subprocess.run(
        command, cwd=PROJECT_ROOT, stderr=subprocess.PIPE, text=True, timeout=60 + HANG_S * len(samples), check=False
    )
    outcomes = told.read_text().splitlines()
    if len(outcomes) < len(samples):
        outcomes.append(f"failed: process ended with {finished.returncode}: {finished.stderr[-500:]}")
    return outcomes


def _decode_file(given: Path, told: Path) -> None:
    """Decode every sample of a file, a line of outcome at a time; what hangs ends the process."""
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + MEMORY,) * 2)
    with given.open() as samples, told.open("w") as outcomes:
        for line in samples:
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            outcomes.write(f"{_decode(bytes.fromhex(line))}\n")
            outcomes.flush()
            faulthandler.cancel_dump_traceback_later()


def _decode(data: bytes) -> str:
    try:
        image = decode_tile(data)
    except UndecodableTileError as error:
        reason = str(error)
        sound = reason and "MemoryError" not in reason and error.status.quarantined
        return f"{'refused' if sound else 'failed'}: {reason!r}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error)!r}"
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not 0 < image.size <= 3 * MAX_PIXELS:
        return f"failed: {image.dtype} {image.shape}"
    image.max()  # reads all of it: memory that is not there would end the process
    return "decoded"


# Labels

_WORDS = [b"18", b"73", b"0.5", b".5", b"1e-3", b"1", b"0", b"nan", b"-inf", b"-1", b"1e999", b"\xd9\xa1", b"0x1", b"+"]
_ENDS = [b"\n", b"\n", b"\n", b"\r\n", b"\r", b"\n\n", b"", b"\0", b"\x0b", b"\x0c", b"\x85"]


def draw_labels(rng: Rng) -> bytes:
    """A label file of up to 40 lines, sound ones and words at random, with up to three mutations."""
    text = b"\xef\xbb\xbf" if rng.random() < 0.1 else b""
    for _ in range(rng.integers(0, 40)):
        words = [_WORDS[i] for i in rng.integers(0, len(_WORDS), rng.integers(0, 8))]
        sound = b"%d %.6f %.6f %.6f %.6f" % (rng.integers(0, 140), *rng.random(4))
        text += (sound if rng.random() < 0.6 else b" ".join(words)) + _ENDS[rng.integers(len(_ENDS))]
    for _ in range(rng.integers(0, 4)):
        text = [_flip, _truncate, _splice, _overwrite][rng.integers(4)](rng, text)
    return text


def fuzz_labels(count: int, seed: int) -> list[dict[str, Any]]:
    """Parse `count` mutated label files: a row `{fault, tried, survived}`."""
    rng = np.random.default_rng(seed)
    texts = [draw_labels(rng) for _ in range(count)]
    outcomes = [parse(text) for text in texts]
    _keep(f"labels-{seed}", [(i, text, outcome) for i, (text, outcome) in enumerate(zip(texts, outcomes, strict=True))])
    return _count("label file fuzzed", [""] * count, outcomes)


def parse(text: bytes) -> str:
    """`parsed`, or `failed: WHY`: nothing raised, every line with content counted once, malformed ones numbered."""
    lines = list(enumerate(text.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1))
    content = {number for number, line in lines if line.strip(b" \t\r")}
    not_five = {number for number, line in lines if number in content and len(line.split()) != 5}
    try:
        parsed = parse_labels(text)
        checks = {
            "lines": parsed.lines == len(content),
            "sum": int(parsed.counts.sum()) == parsed.lines,
            "malformed": not_five <= set(parsed.malformed) <= content,
            "order": sorted(set(parsed.malformed)) == [*parsed.malformed],
            "last column": len(parsed.malformed) <= parsed.counts[LABEL_ID_COLUMNS - 1],
        }
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error)!r}"
    wrong = [name for name, holds in checks.items() if not holds]
    return f"failed: {', '.join(wrong)}" if wrong else "parsed"


# What came of it


def _count(fault: str, kinds: Sequence[str], outcomes: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for kind in sorted(set(kinds)):
        mine = [outcome for outcome, of in zip(outcomes, kinds, strict=True) if of == kind]
        survived = sum(not outcome.startswith("failed") for outcome in mine)
        rows.append({"fault": f"{fault}: {kind}" if kind else fault, "tried": len(mine), "survived": survived})
    return rows


def _keep(name: str, tried: Sequence[tuple[int, bytes, str]]) -> None:
    """Write the bytes of what failed beside each other, and say where."""
    for number, data, outcome in tried:
        if outcome.startswith("failed"):
            KEPT.mkdir(parents=True, exist_ok=True)
            (KEPT / f"{name}-{number}").write_bytes(data)
            print(f"{KEPT / f'{name}-{number}'}: {outcome}", file=sys.stderr)


if __name__ == "__main__":
    _decode_file(Path(sys.argv[1]), Path(sys.argv[2]))
