"""From the bytes of an image file to RGB pixels.

JPEGs go through libjpeg-turbo (simplejpeg), TIFFs through tifffile; whatever these do not take (CMYK, a PNG named
.jpg, files with harmless errors) goes through Pillow. libjpeg-turbo and Pillow release Python's global lock while they
work.
"""

import contextlib
import functools
import io
from typing import Any

import numpy as np
import simplejpeg
from absl import logging
from jaxtyping import UInt8
from PIL import Image

from vir_jax.data.errors import CorruptImageError
from vir_jax.data.image_file import MAX_PIXELS, NPY_MAGIC, ImageFile, Opener, check_pixels, open_npy
from vir_jax.data.pillow_formats import decode_with_pillow
from vir_jax.data.pixels import WHITE, Colour, Warn, oriented
from vir_jax.data.tiff import TIFF_MAGICS, open_tiff

__all__ = ["MAX_PIXELS", "decode_image", "jpeg_size", "open_in_strips"]

_APP1, _START_OF_SCAN = 0xE1, 0xDA
_EXIF_MAGIC = b"Exif\0\0"
_ORIENTATION_TAG = 0x0112


def decode_image(
    data: bytes,
    *,
    min_size: tuple[int, int] | None = None,
    background: Colour = WHITE,
    warn: Warn = logging.warning,
) -> UInt8[np.ndarray, "y x 3"]:
    """Decode a JPEG, PNG, GIF, BMP, WebP, AVIF, TIFF, PPM or .npy file to RGB with its EXIF orientation applied.

    Gray, palette and CMYK images are converted; 16 bits keep their upper 8; transparent pixels are laid over
    `background`; of an animation the first frame is taken, of a TIFF the first page that is no thumbnail.

    Args:
      data: the whole file.
      min_size: (height, width), after orientation, that suffices. A JPEG at least twice as large in both
        directions is then decoded at 1/2, 1/4 or 1/8 of its size, which is several times faster and
        averages the pixels.
      background: RGB, 0 to 255, that shows where the image is transparent.
      warn: told what is doubtful in an image that is decoded all the same.

    Raises:
      CorruptImageError: empty or truncated data, no known format, pixels of unknown meaning, or more than
        `MAX_PIXELS` of them.
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
            return oriented(simplejpeg.decode_jpeg(data, **scaling), orientation)
    image = open_in_strips(functools.partial(io.BytesIO, data), data[:6], background, warn)
    if image is None:
        return decode_with_pillow(data, background, warn)
    check_pixels(image.height, image.width)
    return np.concatenate(list(image.strips()))


def open_in_strips(open_file: Opener, magic: bytes, background: Colour, warn: Warn) -> ImageFile | None:
    """Open a file of a format of which parts can be read, .npy or TIFF; None for any other.

    Args:
      open_file: opens the file; called each time that its pixels are read.
      magic: its first 6 bytes.
      background: as for `decode_image`.
      warn: as for `decode_image`.

    Raises:
      CorruptImageError: as for `decode_image`; an image of any size is opened.
    """
    if magic == NPY_MAGIC:
        return open_npy(open_file, background, warn)
    if magic[:4] in TIFF_MAGICS:
        return open_tiff(open_file, background, warn)
    return None


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return height and width of a JPEG after its EXIF orientation, from its header alone; None for other files.

    Raises:
      CorruptImageError: empty data, or more than `MAX_PIXELS` pixels.
    """
    header = _jpeg_header(data)
    if header is None:
        return None
    height, width, orientation = header
    return (height, width) if orientation < 5 else (width, height)


def _jpeg_header(data: bytes) -> tuple[int, int, int] | None:
    """Return (height, width, EXIF orientation) as stored, or None where libjpeg-turbo cannot give RGB."""
    if not data:
        raise CorruptImageError("the image is empty (0 bytes)")
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except Exception:  # no JPEG, damaged, or a kind that simplejpeg has no name for
        return None
    if colorspace not in ("YCbCr", "RGB", "Gray"):
        return None
    check_pixels(height, width)
    return height, width, _exif_orientation(data)


def _exif_orientation(data: bytes) -> int:
    """Return the EXIF orientation of a JPEG, 1..8; 1 (as stored) where there is none that can be read."""
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
