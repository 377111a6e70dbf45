"""From the bytes of an image file to RGB pixels.

JPEGs go through libjpeg-turbo (simplejpeg); whatever that does not take (CMYK, a PNG named .jpg, files with
recoverable errors) goes through Pillow. Both release Python's global lock while they work.
"""

import io
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageOps

from vir_jax.data.source import CorruptExampleError

# Larger images count as decompression bombs: 89 million pixels, 268 MB decoded. Pillow's own limit, so that both
# decoders refuse the same files.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3

# Raster formats that Pillow decodes by itself. Naming them keeps out those that start other programs (EPS).
_PILLOW_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "MPO")

_EXIF_MAGIC = b"Exif\0\0"
_EXIF_SEARCH_BYTES = 1 << 17  # the Exif segment is among the first; each segment is at most 64 KiB
_ORIENTATION_TAG = 0x0112


class CorruptImageError(CorruptExampleError):
    """The bytes are not an image that can be decoded; the message says why."""


def decode_image(data: bytes, *, min_size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "y x 3"]:
    """Decode a JPEG, PNG, GIF, BMP, WebP, TIFF or PPM file to RGB with its EXIF orientation applied.

    Gray, palette and CMYK images are converted; 16-bit gray keeps its upper 8 bits; transparency is dropped; of
    an animation the first frame is taken.

    Args:
      data: the whole file.
      min_size: (height, width), after orientation, that suffices. JPEGs at least twice as large in both directions are then
        decoded at 1/2, 1/4 or 1/8 of their size, which takes a fraction of the time and averages the pixels.

    Raises:
      CorruptImageError: empty or truncated data, no known format, or more than `MAX_PIXELS` pixels.
    """
    header = _jpeg_header(data)
    if header is not None:
        height, width, orientation = header
        kwargs: dict[str, Any] = {}
        if min_size is not None:
            min_height, min_width = min_size if orientation < 5 else min_size[::-1]
            if height >= 2 * min_height and width >= 2 * min_width:
                # Factors between 1 and 2 exist too but have no fast path in libjpeg-turbo.
                kwargs = {"min_height": min_height, "min_width": min_width, "min_factor": 2}
        try:
            return _oriented(simplejpeg.decode_jpeg(data, **kwargs), orientation)
        except ValueError:
            pass  # damaged, perhaps harmlessly: Pillow tells bytes too many from bytes missing
    return _decode_with_pillow(data)


def encoded_size(data: bytes) -> tuple[int, int]:
    """Height and width of an encoded image after its EXIF orientation, from its header alone.

    Raises:
      CorruptImageError: as `decode_image`, as far as the header shows it.
    """
    header = _jpeg_header(data)
    if header is not None:
        height, width, orientation = header
        return (height, width) if orientation < 5 else (width, height)
    return _decode_with_pillow(data).shape[:2]


def _jpeg_header(data: bytes) -> tuple[int, int, int] | None:
    """(height, width, EXIF orientation) as stored, or None where libjpeg-turbo cannot give RGB."""
    if not data:
        raise CorruptImageError("the image is empty (0 bytes)")
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except ValueError:
        return None
    _check_pixels(height, width)
    if colorspace not in ("YCbCr", "RGB", "Gray"):
        return None
    return height, width, _exif_orientation(data)


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise CorruptImageError(f"{width}x{height} pixels: more than the {MAX_PIXELS:,} that are decoded")


def _exif_orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG, 1..8; 1 (as stored) where there is none that can be read."""
    start = data.find(_EXIF_MAGIC, 0, _EXIF_SEARCH_BYTES)
    if start < 0:
        return 1
    length = int.from_bytes(data[start - 2 : start], "big")  # of the segment, its own two bytes included
    exif = Image.Exif()
    try:
        exif.load(data[start : start + length - 2])
        orientation = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata are no reason to lose the image
        return 1
    return orientation if orientation in range(1, 9) else 1


def _oriented(image: UInt8[np.ndarray, "y x 3"], orientation: int) -> UInt8[np.ndarray, "_y _x 3"]:
    """Turn stored pixels upright. EXIF: 5 to 8 are transposed, and each orientation mirrors rows, columns or both."""
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
            try:
                image = ImageOps.exif_transpose(image)
            except Exception:  # damaged metadata are no reason to lose the image
                pass
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
    if "transparency" in image.info:  # a palette's transparent entries need the alpha channel to be resolved
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))
