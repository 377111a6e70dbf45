"""From the bytes of an image file to RGB pixels.

JPEGs go through libjpeg-turbo (simplejpeg); whatever that does not take (CMYK, a PNG named .jpg, files with
harmless errors) goes through Pillow. Both release Python's global lock while they work.
"""

import contextlib
import io
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageOps

from vir_jax.data.source import CorruptExampleError

# Larger images count as decompression bombs: 89 million pixels, 268 MB decoded. It is Pillow's own limit, so
# that both decoders refuse the same files.
MAX_PIXELS = 1024**3 // 4 // 3

# Raster formats that Pillow decodes by itself. Naming them keeps out those that start other programs (EPS).
_PILLOW_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")

_APP1, _START_OF_SCAN = 0xE1, 0xDA
_EXIF_MAGIC = b"Exif\0\0"
_ORIENTATION_TAG = 0x0112


class CorruptImageError(CorruptExampleError):
    """The bytes are not an image that can be decoded; the message says why."""


def decode_image(data: bytes, *, min_size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "y x 3"]:
    """Decode a JPEG, PNG, GIF, BMP, WebP, TIFF or PPM file to RGB with its EXIF orientation applied.

    Gray, palette and CMYK images are converted; 16-bit gray keeps its upper 8 bits; transparency is dropped;
    of an animation the first frame is taken.

    Args:
      data: the whole file.
      min_size: (height, width), after orientation, that suffices. A JPEG at least twice as large in both
        directions is then decoded at 1/2, 1/4 or 1/8 of its size, which is several times faster and
        averages the pixels.

    Raises:
      CorruptImageError: empty or truncated data, no known format, or more than `MAX_PIXELS` pixels.
    """
    header = _jpeg_header(data)
    if header is not None:
        height, width, orientation = header
        scaling: dict[str, Any] = {}
        if min_size is not None:
            min_height, min_width = min_size if orientation < 5 else min_size[::-1]
            # Factors between 1 and 2 exist too but have no fast path in libjpeg-turbo.
            if height >= 2 * min_height and width >= 2 * min_width:
                scaling = {"min_height": min_height, "min_width": min_width, "min_factor": 2}
        # An error here may be harmless: Pillow, below, tells surplus bytes from missing ones.
        with contextlib.suppress(Exception):
            return _oriented(simplejpeg.decode_jpeg(data, **scaling), orientation)
    return _decode_with_pillow(data)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG after its EXIF orientation, from its header alone; None for other files.

    Raises:
      CorruptImageError: empty data, or more than `MAX_PIXELS` pixels.
    """
    header = _jpeg_header(data)
    if header is None:
        return None
    height, width, orientation = header
    return (height, width) if orientation < 5 else (width, height)


def _jpeg_header(data: bytes) -> tuple[int, int, int] | None:
    """(height, width, EXIF orientation) as stored, or None where libjpeg-turbo cannot give RGB."""
    if not data:
        raise CorruptImageError("the image is empty (0 bytes)")
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except Exception:  # no JPEG, damaged, or a kind that simplejpeg has no name for
        return None
    if colorspace not in ("YCbCr", "RGB", "Gray"):
        return None
    _check_pixels(height, width)
    return height, width, _exif_orientation(data)


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise CorruptImageError(f"{width} x {height} pixels: more than the {MAX_PIXELS:,} that are decoded")


def _exif_orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG, 1..8; 1 (as stored) where there is none that can be read."""
    position = 2  # after the start-of-image marker: segments of marker, length, content
    while data[position : position + 1] == b"\xff" and data[position + 1] != _START_OF_SCAN:
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if data[position + 1] == _APP1 and data[position + 4 : position + 10] == _EXIF_MAGIC:
            exif = Image.Exif()
            with contextlib.suppress(Exception):  # damaged metadata are no reason to lose the image
                exif.load(data[position + 4 : end])
                orientation = int(exif[_ORIENTATION_TAG])
                return orientation if 1 <= orientation <= 8 else 1
            return 1
        position = end
    return 1


def _oriented(image: UInt8[np.ndarray, "y x 3"], orientation: int) -> UInt8[np.ndarray, "_y _x 3"]:
    """Turn stored pixels upright: EXIF orientations 5 to 8 swap rows and columns, and all but 1 mirror."""
    if orientation == 1:
        return image
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(image[rows, columns])


def _decode_with_pillow(data: bytes) -> UInt8[np.ndarray, "y x 3"]:
    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            _check_pixels(image.height, image.width)
            image.load()
            with contextlib.suppress(Exception):  # damaged metadata are no reason to lose the image
                ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except CorruptImageError:
        raise
    except Exception as error:  # a decoder fed with arbitrary bytes raises nearly anything
        raise CorruptImageError(f"{type(error).__name__}: {error}") from error


def _rgb(image: Image.Image) -> UInt8[np.ndarray, "y x 3"]:
    if image.mode.startswith("I;16"):  # convert() would clip at 255
        gray = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=-1)
    if image.mode in ("I", "F"):
        raise CorruptImageError(f"pixels of mode {image.mode!r} have no known range: expected 8 or 16 bits")
    if "transparency" in image.info:  # convert() wants the alpha channel resolved before it is dropped
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))
