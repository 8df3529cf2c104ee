"""List odd inputs that a bucket may hold, and the expected result of each; `extract/README.md` shows the table."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from cache_schema import LABEL_ID_COLUMNS, Status
from extract.tiles.labels import MAX_LABEL_BYTES
from tests.tiles import draw_pixels, encode, encode_png

HEIGHT, WIDTH = 40, 56
LAST = LABEL_ID_COLUMNS - 1
LABEL = b"18 0.5 0.5 0.1 0.1\n"
LINES = 1_000_000

Pixels = npt.NDArray[np.uint8]
Drawn = tuple[bytes, Pixels | None]
"""A file, and the RGB pixels that its embedding must be of, where they are known exactly."""


@dataclass(frozen=True)
class OddInput:
    """One row: a tile that is odd in its bytes, its label or its name, and valid otherwise.

    Attributes:
        kind: `image`, `label` or `name`.
        what: the oddity, in words.
        rule: the result, in words; a test compares it with the fields below.
        name: the tile's name below `images/`.
        draw: draws the image.
        label: the bytes of its label.
        status: expected status of its row in the cache.
        counts: expected instances per raw id.
        malformed: expected number of malformed label lines.
    """

    kind: str
    what: str
    rule: str
    name: str
    draw: Callable[[np.random.Generator], Drawn]
    label: bytes = LABEL
    status: Status = Status.EMBEDDED
    counts: dict[int, int] = field(default_factory=lambda: {18: 1})
    malformed: int = 0

    @property
    def markdown(self) -> str:
        return f"| {self.kind} | {self.what} | {self.rule} |"


def rgb(rng: np.random.Generator, height: int = HEIGHT, width: int = WIDTH) -> Drawn:
    pixels = draw_pixels(rng, height, width)
    return encode(Image.fromarray(pixels)), pixels


def jpeg(rng: np.random.Generator, mode: str = "RGB") -> Drawn:
    return encode(Image.fromarray(draw_pixels(rng, HEIGHT, WIDTH)).convert(mode), "JPEG"), None


def truncated(rng: np.random.Generator) -> Drawn:
    data, _ = rgb(rng)
    return data[: len(data) * 2 // 3], None


def corrupt(rng: np.random.Generator) -> Drawn:
    """A byte of the compressed pixels is another; the chunk's checksum tells."""
    data = bytearray(rgb(rng)[0])
    data[data.index(b"IDAT") + 100] ^= 0xFF
    return bytes(data), None


def bomb(rng: np.random.Generator) -> Drawn:
    """A million zeros, compressed to a kilobyte, behind a header that announces 1.2 GB of them."""
    return encode_png((20_000, 20_000, 8, 2), bytes(1_000_000)), None


def grey(rng: np.random.Generator, bits: int = 8) -> Drawn:
    values = rng.integers(0, 2**bits, (HEIGHT, WIDTH)).astype(f"u{bits // 8}")
    return encode(Image.fromarray(values)), np.repeat((values >> (bits - 8)).astype(np.uint8)[:, :, None], 3, axis=2)


def alpha(rng: np.random.Generator) -> Drawn:
    pixels = draw_pixels(rng, HEIGHT, WIDTH, 4)
    return encode(Image.fromarray(pixels)), np.ascontiguousarray(pixels[:, :, :3])


def palette(rng: np.random.Generator) -> Drawn:
    index = rng.integers(0, 256, (HEIGHT, WIDTH), np.uint8)
    colours = rng.integers(0, 256, (256, 3), np.uint8)
    image = Image.frombytes("P", (WIDTH, HEIGHT), index.tobytes())
    image.putpalette(colours.tobytes())
    return encode(image), colours[index]


def pages(rng: np.random.Generator) -> Drawn:
    first, *others = (draw_pixels(rng, HEIGHT, WIDTH) for _ in range(3))
    return encode(Image.fromarray(first), "TIFF", save_all=True, append_images=map(Image.fromarray, others)), first


def float_tiff(rng: np.random.Generator) -> Drawn:
    return encode(Image.fromarray(rng.random((HEIGHT, WIDTH), np.float32)), "TIFF"), None


def gif(rng: np.random.Generator) -> Drawn:
    stream = io.BytesIO()
    Image.fromarray(draw_pixels(rng, HEIGHT, WIDTH)).save(stream, "GIF")
    return stream.getvalue(), None


EMBEDDED, UNDECODABLE, OVER_LIMIT = Status.EMBEDDED, Status.UNDECODABLE, Status.OVER_LIMIT

_IMAGES: list[tuple[str, str, Callable[[np.random.Generator], Drawn], Status, str]] = [
    ("truncated", ".png", truncated, UNDECODABLE, ""),
    ("corrupt: a byte of the pixels changed", ".png", corrupt, UNDECODABLE, ""),
    ("0 bytes", ".png", lambda rng: (b"", None), UNDECODABLE, ""),
    ("JPEG named `.png`", ".png", jpeg, EMBEDDED, "bytes decide, not the name"),
    ("text named `.png`", ".png", lambda rng: (b"<html>404 Not Found</html>", None), UNDECODABLE, ""),
    ("random bytes", ".png", lambda rng: (rng.bytes(5000), None), UNDECODABLE, ""),
    ("GIF named `.png`", ".png", gif, UNDECODABLE, "PNG, JPEG and TIFF are read"),
    ("decompression bomb", ".png", bomb, OVER_LIMIT, "the header says so, and no pixel is unpacked"),
    ("CMYK JPEG", ".jpg", lambda rng: jpeg(rng, "CMYK"), EMBEDDED, "by the plain formula, ignoring colour profiles"),
    ("16-bit grey", ".png", lambda rng: grey(rng, 16), EMBEDDED, "high byte of each value"),
    ("32-bit float TIFF", ".tif", float_tiff, UNDECODABLE, "its values have no known range"),
    ("palette", ".png", palette, EMBEDDED, "colours looked up"),
    ("grey", ".png", grey, EMBEDDED, "repeated in three channels"),
    ("alpha", ".png", alpha, EMBEDDED, "alpha dropped"),
    ("TIFF of several pages", ".tif", pages, EMBEDDED, "first page"),
    ("1 x 1", ".png", lambda rng: rgb(rng, 1, 1), EMBEDDED, "resized like any other"),
    ("very wide: 20,000 x 3", ".png", lambda rng: rgb(rng, 3, 20_000), EMBEDDED, "resized like any other"),
]

_LABELS: list[tuple[str, bytes, dict[int, int], int, str]] = [
    ("random bytes", bytes(range(1, 256)).replace(b"\n", b""), {LAST: 1}, 1, ""),
    (
        f"over {MAX_LABEL_BYTES // 2**20} MiB",
        LABEL * (MAX_LABEL_BYTES // len(LABEL) + 1),
        {LAST: 1},
        1,
        "counted as one malformed line, not read",
    ),
    ("`nan`", b"18 nan 0.5 0.1 0.1\n" + LABEL, {18: 1, LAST: 1}, 1, ""),
    ("`inf`", b"18 inf 0.5 0.1 0.1\n" + LABEL, {18: 1, LAST: 1}, 1, ""),
    ("negative number", b"18 -0.5 0.5 0.1 0.1\n" + LABEL, {18: 1, LAST: 1}, 1, ""),
    ("negative id", b"-18 0.5 0.5 0.1 0.1\n" + LABEL, {18: 1, LAST: 1}, 1, ""),
    ("number above 1, such as pixels", b"18 120 40 15 15\n" + LABEL, {18: 1, LAST: 1}, 1, ""),
    ("id above 126", b"4000 0.5 0.5 0.1 0.1\n" + LABEL, {18: 1, LAST: 1}, 0, "counted as an unknown class"),
    ("missing column", b"18 0.5 0.5 0.1\n" + LABEL, {18: 1, LAST: 1}, 1, ""),
    ("extra column", b"18 0.5 0.5 0.1 0.1 0.9\n" + LABEL, {18: 1, LAST: 1}, 1, ""),
    ("non-ASCII digits", "١٨ 0.5 0.5 0.1 0.1\n".encode() + LABEL, {18: 1, LAST: 1}, 1, ""),
    ("UTF-16", LABEL.decode().rstrip().encode("utf-16"), {LAST: 1}, 1, ""),
    ("CRLF line ends", LABEL.replace(b"\n", b"\r\n") * 2, {18: 2}, 0, "accepted"),
    ("byte order mark", b"\xef\xbb\xbf" + LABEL, {18: 1}, 0, "accepted"),
    ("blank lines", b"\n \t\n\n" + LABEL + b"\r\n" + LABEL, {18: 2}, 0, "skipped"),
    ("empty", b"", {}, 0, "a tile that shows nothing"),
    (f"{LINES:,} lines", b"18 0 0 0 0\n" * LINES, {18: 65_535}, 0, "a count stops at 65,535"),
]

_NAMES: list[tuple[str, str]] = [
    ("spaces", " a tile  1 .png"),
    ("composed accent (NFC)", "caf\u00e9.png"),
    ("decomposed accent (NFD)", "cafe\u0301.png"),
    ("outside the BMP", "東京😀.png"),
    ("`..` parts", "../../../escaped.png"),
    ("`.` parts", "./here.png"),
    ("looks absolute: double slash", "/tmp/absolute.png"),
    ("percent signs", "100%25%2e%2e%2F.png"),
    ("newline", "two\nlines.png"),
    ("terminal escape sequence", "red\x1b[31m.png"),
    ("`#`", "a#b.png"),
    ("`?` and `&`", "a?b&c=d.png"),
    ("backslash", "..\\..\\a.png"),
    ("quotes and commas", "=\"a\",'b'.png"),
    ("leading dash", "-rf.png"),
    ("shell characters", "$(touch pwned);`touch pwned`|*.png"),
    ("300 characters in one part", "n" * 300 + ".png"),
    ("1,000 bytes in many parts", "/".join(["part" * 4] * 58) + "/a.png"),
]


def _describe_image(status: Status, note: str) -> str:
    rule = "embedded" if status == EMBEDDED else f"quarantined: {status.reason}"
    return f"{rule} ({note})" if note else rule


def _describe_label(malformed: int, note: str) -> str:
    return note or f"{malformed} malformed line counted as an unknown class, the others as usual"


def make_table() -> list[OddInput]:
    """All rows; images and labels have plain names, so that each row is odd in one way."""
    rows = [
        OddInput("image", what, _describe_image(status, note), f"image-{i:02d}{suffix}", draw, status=status)
        for i, (what, suffix, draw, status, note) in enumerate(_IMAGES)
    ]
    rows += [
        OddInput("label", what, _describe_label(bad, note), f"label-{i:02d}.png", rgb, text, EMBEDDED, counts, bad)
        for i, (what, text, counts, bad, note) in enumerate(_LABELS)
    ]
    return rows + [OddInput("name", what, "accepted like any other name", name, rgb) for what, name in _NAMES]
