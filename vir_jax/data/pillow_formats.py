"""Images that Pillow decodes: PNG, GIF, BMP, WebP, AVIF, PPM, some JPEGs (CMYK), some TIFFs (LZW)."""

import contextlib
import io
import struct

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from vir_jax.data.errors import CorruptImageError
from vir_jax.data.image_file import as_corrupt, check_pixels
from vir_jax.data.pixels import Colour, Samples, Warn, rgb_strips, rows_of

# Raster formats that Pillow decodes by itself. Naming them keeps out those that start other programs (EPS).
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "AVIF", "PPM")

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Of a PNG: nothing in them changes a pixel, and Pillow refuses a file in which they are damaged or long.
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def decode_with_pillow(data: bytes, background: Colour, warn: Warn) -> UInt8[np.ndarray, "y x 3"]:
    """Decode a file of one of `FORMATS` to RGB, upright, its transparent pixels laid over `background`.

    Raises:
      CorruptImageError: it cannot be decoded; the message says why.
    """
    try:
        return decode_frame(data, FORMATS, background, warn)
    except CorruptImageError:
        plain = _without_text(data)
        if plain == data:
            raise
        return decode_frame(plain, FORMATS, background, warn)


def decode_frame(
    data: bytes,
    formats: tuple[str, ...],
    background: Colour,
    warn: Warn,
    *,
    frame: int = 0,
    stored_bits: int = 8,
) -> UInt8[np.ndarray, "y x 3"]:
    """Decode one image of a file as `decode_with_pillow` does.

    Args:
      data: the whole file.
      formats: of Pillow, that it may have.
      background: RGB under transparent pixels.
      warn: told what is doubtful.
      frame: which of several images.
      stored_bits: of each colour, where the file's format is TIFF.
    """
    with as_corrupt():
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        except UnidentifiedImageError as error:
            expected = ", ".join((*formats, "TIFF", "NPY"))
            raise CorruptImageError(
                f"UnidentifiedImageError: cannot identify the image file: expected {expected}; its first bytes are "
                f"{data[:16]!r}"
            ) from error
        with image:
            if frame:
                image.seek(frame)
            check_pixels(image.height, image.width)
            if image.format == "PNG":
                stored_bits = data[24]
            image.load()
            with contextlib.suppress(Exception):  # damaged metadata are no reason to lose the image
                ImageOps.exif_transpose(image, in_place=True)
            pixels, samples = _samples(image, stored_bits)
        return np.concatenate(list(rgb_strips(rows_of(pixels), samples, background, warn)))


def _samples(image: Image.Image, stored_bits: int) -> tuple[np.ndarray, Samples]:
    """Return a loaded image's numbers [y, x, samples] and what they mean."""
    key = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        gray = np.asarray(image)[..., None]
        if isinstance(key, int):
            gray = np.concatenate([gray, np.where(gray == key, 0, 0xFFFF).astype(gray.dtype)], axis=-1)
        alpha = gray.shape[-1] - 1 or None
        return gray, Samples("gray", bits=16, stored_bits=16, alpha=alpha)
    if image.mode == "I" and image.format == "PPM":  # Pillow spreads its values over 16 bits
        return np.asarray(image).astype(np.uint16)[..., None], Samples("gray", bits=16, stored_bits=16)
    if image.mode in ("I", "F"):
        raise CorruptImageError(f"pixels of mode {image.mode!r} have no known range: expected 8 or 16 bits")
    if image.format == "PNG" and image.mode == "L" and stored_bits < 8 and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2**stored_bits - 1)  # as Pillow has spread the values
    if isinstance(key, tuple) and stored_bits == 16:
        raise CorruptImageError("a transparent colour of 16 bits: expected 8 bits, or an alpha channel")
    if image.has_transparency_data:
        return np.asarray(image.convert("RGBA")), Samples("rgb", stored_bits=stored_bits, alpha=3)
    return np.asarray(image.convert("RGB")), Samples("rgb", stored_bits=stored_bits)


def _without_text(data: bytes) -> bytes:
    """Return a PNG without its texts and colour profile; anything else as it is."""
    if not data.startswith(_PNG_MAGIC):
        return data
    kept, position = [_PNG_MAGIC], len(_PNG_MAGIC)
    while position + 8 <= len(data):  # chunks of length, kind, content and checksum
        length, kind = struct.unpack_from(">I4s", data, position)
        chunk = data[position : position + length + 12]
        if kind not in _PNG_TEXT:
            kept.append(chunk)
        position += len(chunk)
    return b"".join(kept)
