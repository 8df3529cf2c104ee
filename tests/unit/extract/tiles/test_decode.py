"""Every kind of image tiles come as, against the pixels they were made from, and every kind of broken one."""

from __future__ import annotations

import io
import resource
import struct
import zlib
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from cache_schema import Status
from extract.tiles.decode import MAX_PIXELS, UndecodableTileError, decode_tile
from tests.planted import fresh_seed
from tests.tiles import draw_pixels, encode, encode_png

HEIGHT, WIDTH = 21, 34

Case = Callable[[np.random.Generator], tuple[bytes, npt.NDArray[np.uint8]]]


def repeat(grey: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.repeat(grey[:, :, None], 3, axis=2)


def rgb(rng: np.random.Generator, kind: str = "PNG", **options: object) -> tuple[bytes, npt.NDArray[np.uint8]]:
    pixels = draw_pixels(rng, HEIGHT, WIDTH)
    return encode(Image.fromarray(pixels), kind, **options), pixels


def rgba(rng: np.random.Generator, kind: str = "PNG") -> tuple[bytes, npt.NDArray[np.uint8]]:
    pixels = draw_pixels(rng, HEIGHT, WIDTH, 4)
    return encode(Image.fromarray(pixels), kind), pixels[:, :, :3]


def grey(rng: np.random.Generator, kind: str = "PNG") -> tuple[bytes, npt.NDArray[np.uint8]]:
    pixels = draw_pixels(rng, HEIGHT, WIDTH, 1)[:, :, 0]
    return encode(Image.fromarray(pixels), kind), repeat(pixels)


def grey_alpha(rng: np.random.Generator) -> tuple[bytes, npt.NDArray[np.uint8]]:
    pixels = draw_pixels(rng, HEIGHT, WIDTH, 2)
    return encode(Image.fromarray(pixels, "LA")), repeat(pixels[:, :, 0])


def grey_16(rng: np.random.Generator, kind: str = "PNG") -> tuple[bytes, npt.NDArray[np.uint8]]:
    values = rng.integers(0, 2**16, (HEIGHT, WIDTH), np.uint16)
    return encode(Image.fromarray(values), kind), repeat((values // 256).astype(np.uint8))


def grey_16_big_endian_tiff(rng: np.random.Generator) -> tuple[bytes, npt.NDArray[np.uint8]]:
    values = rng.integers(0, 2**16, (HEIGHT, WIDTH), np.uint16)
    image = Image.frombytes("I;16B", (WIDTH, HEIGHT), values.astype(">u2").tobytes())
    return encode(image, "TIFF"), repeat((values // 256).astype(np.uint8))


def rgb_16(rng: np.random.Generator) -> tuple[bytes, npt.NDArray[np.uint8]]:
    values = rng.integers(0, 2**16, (HEIGHT, WIDTH, 3), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return encode_png((WIDTH, HEIGHT, 16, 2), rows), (values // 256).astype(np.uint8)


def make_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def rgb_with_gamma(rng: np.random.Generator) -> tuple[bytes, npt.NDArray[np.uint8]]:
    """A gAMA chunk asks viewers to change colours; a tile's values are taken as they are."""
    data, pixels = rgb(rng)
    return data[:33] + make_chunk(b"gAMA", struct.pack(">I", 45_455 // 4)) + data[33:], pixels


def palette(rng: np.random.Generator, **options: object) -> tuple[bytes, npt.NDArray[np.uint8]]:
    index = rng.integers(0, 256, (HEIGHT, WIDTH), np.uint8)
    colours = rng.integers(0, 256, (256, 3), np.uint8)
    image = Image.fromarray(index, "L").convert("P")
    image.putpalette(colours.tobytes())
    image.putdata(index.reshape(-1).tolist())
    return encode(image, **options), colours[index]


def bilevel(rng: np.random.Generator) -> tuple[bytes, npt.NDArray[np.uint8]]:
    on = rng.random((HEIGHT, WIDTH)) < 0.5
    return encode(Image.fromarray(on)), repeat(on.astype(np.uint8) * 255)


def rotated_by_exif(rng: np.random.Generator) -> tuple[bytes, npt.NDArray[np.uint8]]:
    """Labels refer to the file's pixels, so they stay as they lie."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return rgb(rng, exif=exif)


def one_pixel(rng: np.random.Generator) -> tuple[bytes, npt.NDArray[np.uint8]]:
    pixels = rng.integers(0, 256, (1, 1, 3), np.uint8)
    return encode(Image.fromarray(pixels)), pixels


LOSSLESS: dict[str, Case] = {
    "RGB": rgb,
    "RGB, one colour transparent": lambda rng: rgb(rng, transparency=(40, 90, 160)),
    "RGB with a gamma": rgb_with_gamma,
    "RGB, uncompressed": lambda rng: rgb(rng, compress_level=0),
    "RGBA": rgba,
    "L": grey,
    "LA": grey_alpha,
    "16-bit grey": grey_16,
    "16-bit RGB": rgb_16,
    "palette": palette,
    "palette with transparency": lambda rng: palette(rng, transparency=3),
    "bilevel": bilevel,
    "EXIF rotation": rotated_by_exif,
    "1x1": one_pixel,
    "TIFF": lambda rng: rgb(rng, "TIFF"),
    "TIFF, LZW": lambda rng: rgb(rng, "TIFF", compression="tiff_lzw"),
    "TIFF, RGBA": lambda rng: rgba(rng, "TIFF"),
    "TIFF, 16-bit grey": lambda rng: grey_16(rng, "TIFF"),
    "TIFF, 16-bit grey, big-endian": grey_16_big_endian_tiff,
}


@pytest.mark.parametrize("case", LOSSLESS.values(), ids=LOSSLESS)
def test_pixels_equal_those_encoded(case: Case) -> None:
    data, expected = case(np.random.default_rng(fresh_seed()))
    decoded = decode_tile(data)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, expected)


def filter_rows(rng: np.random.Generator, pixels: npt.NDArray[np.uint8]) -> bytes:
    """Rows as a PNG holds them before compression, each with a filter at random (PNG specification, section 9.2)."""
    rows = b""
    above = np.zeros(pixels.shape[1:], np.int16)
    for row in pixels.astype(np.int16):
        left, corner = (np.pad(line, ((1, 0), (0, 0)))[:-1] for line in (row, above))
        near = np.stack([left, above, corner])
        paeth = np.take_along_axis(near, np.abs(left + above - corner - near).argmin(0)[None], 0)[0]
        kind = int(rng.integers(5))
        rows += (
            bytes([kind]) + (row - [0 * row, left, above, (left + above) // 2, paeth][kind]).astype(np.uint8).tobytes()
        )
        above = row
    return rows


def test_plain_png_of_every_filter_and_level_needs_no_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extract.tiles.decode.Image.open", None)
    rng = np.random.default_rng(fresh_seed())
    for level in range(10):
        size = (int(rng.integers(1, 90)), int(rng.integers(1, 90)))
        pixels = draw_pixels(rng, *size) if level % 2 else rng.integers(0, 256, (*size, 3), np.uint8)
        packed = zlib.compress(filter_rows(rng, pixels), level)
        cuts = [0, *sorted(rng.integers(0, len(packed), 3).tolist()), len(packed)]
        chunks = [(b"IHDR", struct.pack(">IIBBBBB", *size[::-1], 8, 2, 0, 0, 0)), (b"tEXt", b"a\0b")]
        chunks += [(b"IDAT", packed[start:end]) for start, end in pairwise(cuts)] + [(b"IEND", b"")]
        data = b"\x89PNG\r\n\x1a\n" + b"".join(make_chunk(*chunk) for chunk in chunks)
        np.testing.assert_array_equal(decode_tile(data), pixels)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_of_one_colour(mode: str) -> None:
    """Within 4 levels: JPEG rounds, and CMYK is converted by the plain formula, with no colour profile."""
    rng = np.random.default_rng(fresh_seed())
    ink = rng.integers(0, 256, len(Image.new(mode, (1, 1)).getbands()))
    data = encode(Image.new(mode, (WIDTH, HEIGHT), tuple(map(int, ink))), "JPEG", quality=100, subsampling=0)
    colour = (255 - ink[:3]) * (255 - ink[3]) / 255 if mode == "CMYK" else np.broadcast_to(ink, 3)
    assert np.abs(decode_tile(data) - colour).max() <= 4


def truncate(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def float_tiff(rng: np.random.Generator) -> bytes:
    return encode(Image.fromarray(rng.random((HEIGHT, WIDTH), np.float32)), "TIFF")


def multi_band_tiff_header(rng: np.random.Generator) -> bytes:
    return b"II*\0\x08\0\0\0\xff\xff" + rng.bytes(40)


def flip_png_checksum(rng: np.random.Generator) -> bytes:
    data = bytearray(rgb(rng)[0])
    data[data.index(b"IDAT") + 20] ^= 0xFF
    return bytes(data)


BROKEN: dict[str, Callable[[np.random.Generator], bytes]] = {
    "truncated PNG": lambda rng: truncate(rgb(rng)[0]),
    "truncated palette PNG": lambda rng: truncate(palette(rng)[0]),
    "truncated 16-bit PNG": lambda rng: truncate(grey_16(rng)[0]),
    "truncated JPEG": lambda rng: truncate(rgb(rng, "JPEG", quality=95)[0]),
    "truncated TIFF": lambda rng: truncate(rgb(rng, "TIFF")[0]),
    "damaged PNG": flip_png_checksum,
    "PNG header only": lambda rng: rgb(rng)[0][:33],
    "PNG without data": lambda rng: encode_png((WIDTH, HEIGHT, 8, 2), b""),
    "zero bytes": lambda rng: b"",
    "one byte": lambda rng: b"\x89",
    "text": lambda rng: b"<html><body>404 Not Found</body></html>",
    "random bytes": lambda rng: rng.bytes(3000),
    "TIFF of junk": multi_band_tiff_header,
    "32-bit float TIFF": float_tiff,
    "32-bit integer TIFF": lambda rng: encode(
        Image.fromarray(rng.integers(0, 2**31, (HEIGHT, WIDTH), np.int32), "I"), "TIFF"
    ),
    "GIF": lambda rng: encode(Image.fromarray(draw_pixels(rng, 8, 8)), "GIF"),
    "PNG of no height": lambda rng: encode_png((WIDTH, 0, 8, 2), b""),
}


@pytest.mark.parametrize("make", BROKEN.values(), ids=BROKEN)
def test_broken_tile_says_so(make: Callable[[np.random.Generator], bytes]) -> None:
    with pytest.raises(UndecodableTileError) as caught:
        decode_tile(make(np.random.default_rng(fresh_seed())))
    assert caught.value.status == Status.UNDECODABLE
    assert str(caught.value)
    assert " at 0x" not in str(caught.value)


@pytest.mark.parametrize("side", [9_000, 15_000, 20_000, 2**31 - 1])
def test_bomb_is_refused_by_its_header(side: int) -> None:
    """A compressed run of zeros that would fill gigabytes; Pillow's own two limits lie between these sizes."""
    data = encode_png((side, side, 8, 2), bytes(10_000_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UndecodableTileError) as caught:
        decode_tile(data)
    assert caught.value.status == Status.OVER_LIMIT
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_packed_notes_are_not_unpacked_without_end() -> None:
    """A comment or profile of a quarter megabyte that fills 256 MiB."""
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(2**24)) for _ in range(16)) + packer.flush()
    data, pixels = rgb(np.random.default_rng(fresh_seed()))
    for kind, start in ((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        decoded = decode_tile(data[:33] + make_chunk(kind, start + packed) + data[33:])
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
        np.testing.assert_array_equal(decoded, pixels)


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    """Thirty bytes a scan cost time for every pixel."""
    data = rgb(np.random.default_rng(fresh_seed()), "JPEG", progressive=True)[0]
    assert decode_tile(data).shape == (HEIGHT, WIDTH, 3)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(UndecodableTileError, match="more than 100 scans"):
        decode_tile(data[:-2] + data[last:-2] * 200 + data[-2:])


def test_limit_itself_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_PIXELS == 64 * 2**20
    data, pixels = rgb(np.random.default_rng(fresh_seed()))
    monkeypatch.setattr("extract.tiles.decode.MAX_PIXELS", HEIGHT * WIDTH)
    np.testing.assert_array_equal(decode_tile(data), pixels)
    monkeypatch.setattr("extract.tiles.decode.MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(UndecodableTileError, match=f"{WIDTH} x {HEIGHT} pixels"):
        decode_tile(data)


@pytest.mark.parametrize("seed_offset", range(20))
def test_cut_anywhere_is_an_error_or_the_whole_image(seed_offset: int) -> None:
    rng = np.random.default_rng(fresh_seed() + seed_offset)
    data, pixels = rgb(rng, ["PNG", "TIFF"][seed_offset % 2])
    cut = data[: rng.integers(0, len(data))]
    try:
        decoded = decode_tile(cut)
    except UndecodableTileError:
        return
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("seed_offset", range(10))
def test_damage_is_judged_as_pillow_judges_it(seed_offset: int) -> None:
    """Bits flipped, bytes cut out, zeroed or appended: the same pixels, or an error from both."""
    rng = np.random.default_rng(fresh_seed() + seed_offset)
    for _ in range(30):
        data = bytearray(rgb(rng, compress_level=int(rng.integers(10)))[0])
        start = int(rng.integers(8, len(data)))
        stop = min(len(data), start + int(rng.integers(1, 24)))
        match rng.integers(4):
            case 0:
                data[start] ^= 1 << int(rng.integers(8))
            case 1:
                del data[start:stop]
            case 2:
                data[start:stop] = bytes(stop - start)
            case 3:
                data += rng.bytes(stop - start)
        try:
            expected = np.asarray(Image.open(io.BytesIO(data), formats=["PNG"]).convert("RGB"))
        except Exception:  # Pillow's plugins raise what they please
            expected = None
        try:
            np.testing.assert_array_equal(decode_tile(bytes(data)), expected)
        except UndecodableTileError:
            assert expected is None


def test_kind_is_read_from_the_bytes_alone() -> None:
    """Names are not looked at: a JPEG called .png decodes."""
    data, pixels = rgb(np.random.default_rng(fresh_seed()), "JPEG")
    assert Image.open(io.BytesIO(data)).format == "JPEG"
    assert decode_tile(data).shape == pixels.shape
