"""Decode image files to uint8 RGB."""

import io
import struct
import warnings
from contextlib import suppress

import numpy as np
import numpy.typing as npt
from kornia_rs.io import decode_image_png_u8
from PIL import Image, UnidentifiedImageError

from cache_schema import Status

MAX_PIXELS = 64 * 2**20
"""A larger tile is quarantined before any pixel is decompressed (Pillow only warns at 89 Mpx)."""
MAX_FILE_BYTES = 8 * MAX_PIXELS
"""The size of `MAX_PIXELS` in uncompressed 16-bit RGBA: a larger file is quarantined unread."""
_MAX_SCANS = 100
"""Scans of a progressive JPEG. Encoders write about ten; each takes a few bytes and costs time for every pixel."""

_FORMATS = ("PNG", "JPEG", "TIFF")
_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_JPEG_START, _JPEG_SCAN = b"\xff\xd8", b"\xff\xda"
_RGB_8_BIT = (8, 2, 0, 0, 0)
"""Bit depth, colour type, compression, filter and interlace method of the most common kind of PNG tile."""

RGBImage = npt.NDArray[np.uint8]


class UndecodableTileError(Exception):
    """The tile's own bytes cannot be decoded; `status` is what its row gets."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def decode_tile(data: bytes) -> RGBImage:
    """Decode PNG, JPEG or TIFF bytes to (H, W, 3) uint8 RGB.

    Alpha is dropped, grey is repeated, palettes are looked up. 16-bit grey keeps its high byte, as Pillow does for
    16-bit colour. EXIF orientation is ignored, since labels refer to the pixels as stored.

    Plain 8-bit RGB PNG is decoded by Rust's png crate, in 40 % of Pillow's time. Pillow decodes all other files and
    those that the crate refuses. Unlike Pillow, the crate does not check the zlib checksum inside a chunk whose CRC is
    correct, nor whether compressed text chunks can be unpacked.

    Raises:
        UndecodableTileError: not an image, truncated, or over `MAX_PIXELS`.
    """
    if data.startswith(_JPEG_START) and data.count(_JPEG_SCAN) > _MAX_SCANS:  # scan data never contains the marker
        raise UndecodableTileError(Status.UNDECODABLE, f"a JPEG of more than {_MAX_SCANS} scans")
    if size := _read_plain_png(data):
        with suppress(Exception):  # kornia raises nothing narrower
            return np.asarray(decode_image_png_u8(data, size, "rgb"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MAX_PIXELS is stricter than Pillow's warning
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise UndecodableTileError(Status.OVER_LIMIT, f"{image.width} x {image.height} pixels")
        return _to_rgb(image)
    except UndecodableTileError:
        raise
    except Image.DecompressionBombError as error:  # raised by open(), before the check above
        raise UndecodableTileError(Status.OVER_LIMIT, str(error)) from error
    except UnidentifiedImageError as error:  # its text names only the buffer's address
        raise UndecodableTileError(Status.UNDECODABLE, "not a PNG, JPEG or TIFF image") from error
    # On broken files Pillow's plugins raise many types (OSError, SyntaxError, struct.error, …).
    except Exception as error:
        raise UndecodableTileError(Status.UNDECODABLE, f"{type(error).__name__}: {error}") from error


def _read_plain_png(data: bytes) -> tuple[int, int] | None:
    """Return height and width if the header is that of an 8-bit RGB PNG within `MAX_PIXELS`, else None.

    Source: PNG specification, section 11.2.1.
    """
    if len(data) < 29 or not data.startswith(_PNG_START):
        return None
    width, height, *kind = struct.unpack(">IIBBBBB", data[16:29])
    return (height, width) if tuple(kind) == _RGB_8_BIT and 0 < width * height <= MAX_PIXELS else None


def _to_rgb(image: Image.Image) -> RGBImage:
    if image.mode.startswith("I;16"):
        high = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(high[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise UndecodableTileError(Status.UNDECODABLE, f"32-bit pixels (mode {image.mode}) have no 8-bit range")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
