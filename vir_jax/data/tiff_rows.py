"""The numbers of a TIFF's page, strip by strip, as tifffile decompresses them."""

from collections.abc import Iterator
from typing import cast

import numpy as np
import tifffile
from jaxtyping import UInt, UInt8, UInt16

from vir_jax.data.errors import CorruptImageError
from vir_jax.data.pixels import ROWS

# Bytes of a file read ahead of decoding.
BUFFER_BYTES = 2**22

# Of every byte, the one with its bits in the opposite order.
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

Rows = UInt[np.ndarray, "_y width samples"]
Segment = tuple[UInt[np.ndarray, "_y _x _samples"] | None, int, int, int]
"""Numbers of a strip or tile (None: not in the file), their plane, first row and first column."""


def check_decodable(page: tifffile.TiffPage) -> None:
    """Raise an error that says why a page's numbers cannot be decompressed here."""
    if _is_packed(page) and page.predictor != tifffile.PREDICTOR.NONE:
        raise ValueError(f"{page.bitspersample} bits with predictor {page.predictor!r}")
    page.decode(None, 0)
    if page.compression != tifffile.COMPRESSION.NONE:
        try:
            tifffile.TIFF.DECOMPRESSORS[page.compression](b"")
        except ImportError:
            raise ValueError(
                f"{tifffile.COMPRESSION(page.compression)!r} requires the 'imagecodecs' package"
            ) from None
        except Exception:  # it is there, and nothing is not what it expects
            return


def rows_in_strips(page: tifffile.TiffPage) -> Iterator[Rows]:
    """Yield each strip, or each row of tiles, one after another in the order of the file.

    Raises:
      CorruptImageError: some are missing. Beside it whatever a decoder raises.
    """
    height, width = page.imagelength, page.imagewidth
    band: np.ndarray | None = None
    first = 0
    for pixels, _, y, x in _segments(page):
        if pixels is None:
            raise CorruptImageError(f"the pixels at row {y}, column {x} are missing")
        rows, columns = pixels.shape[:2]
        if band is not None and y != first:
            yield band
            band = None
        if band is None:
            first = y
            band = np.empty((min(rows, height - y), width, pixels.shape[2]), pixels.dtype)
        band[:, x : x + columns] = pixels[: height - y, : width - x]
    if band is None or first + len(band) != height:
        raise CorruptImageError(f"the file ends before row {height}")
    yield band


def planes(page: tifffile.TiffPage) -> Rows:
    """Return a whole page whose samples lie in separate planes.

    Raises:
      CorruptImageError: some are missing. Beside it whatever a decoder raises.
    """
    height, width, samples = page.imagelength, page.imagewidth, page.samplesperpixel
    image = np.empty((height, width, samples), _dtype(page))
    missing = height * width * samples
    for pixels, plane, y, x in _segments(page):
        if pixels is None:
            raise CorruptImageError(f"the pixels at row {y}, column {x} are missing")
        cut = pixels[: height - y, : width - x, 0]
        image[y : y + cut.shape[0], x : x + cut.shape[1], plane] = cut
        missing -= cut.size
    if missing:
        raise CorruptImageError(f"the file ends before row {height}")
    return image


def _is_packed(page: tifffile.TiffPage) -> bool:
    """Return whether numbers begin in the middle of a byte."""
    return page.bitspersample not in (8, 16)


def _dtype(page: tifffile.TiffPage) -> type[np.unsignedinteger]:
    return np.uint8 if page.bitspersample <= 8 else np.uint16


def _segments(page: tifffile.TiffPage) -> Iterator[Segment]:
    if _is_packed(page):
        yield from _packed_segments(page)
        return
    for pixels, (plane, _, y, x, _), _ in page.segments(maxworkers=1, buffersize=BUFFER_BYTES):
        yield None if pixels is None else pixels[0], plane, y, x


def _packed_segments(page: tifffile.TiffPage) -> Iterator[Segment]:
    """Unpack here what tifffile leaves to imagecodecs, so that it is read with and without."""
    decompress = None if page.compression == 1 else tifffile.TIFF.DECOMPRESSORS[page.compression]
    count = int(np.prod(page.chunked))
    segments = page.parent.filehandle.read_segments(
        page.dataoffsets, page.databytecounts, length=count, buffersize=BUFFER_BYTES, flat=True
    )
    for data, index in cast(Iterator[tuple[bytes | None, int]], segments):
        _, (plane, _, y, x, _), (_, rows, columns, samples) = page.decode(None, index)
        if data is None:
            yield None, plane, y, x
            continue
        if page.fillorder == tifffile.FILLORDER.LSB2MSB:
            data = data.translate(_REVERSED)
        packed = np.frombuffer(data if decompress is None else decompress(data), np.uint8)
        row_bytes = -(-columns * samples * page.bitspersample // 8)
        if packed.size < rows * row_bytes:
            raise CorruptImageError(f"the strip or tile at row {y}, column {x} ends too early")
        packed = packed[: rows * row_bytes].reshape(rows, row_bytes)
        unpacked = [_unpack(packed[i : i + ROWS], page.bitspersample) for i in range(0, rows, ROWS)]
        pixels = np.concatenate(unpacked)[:, : columns * samples]
        yield pixels.reshape(rows, columns, samples).astype(_dtype(page)), plane, y, x


def _unpack(packed: UInt8[np.ndarray, "y bytes"], bits: int) -> UInt16[np.ndarray, "y numbers"]:
    """Split rows of bytes into numbers of `bits` bits, the highest bit first."""
    digits = np.unpackbits(packed, axis=1)
    digits = digits[:, : digits.shape[1] // bits * bits].reshape(len(packed), -1, bits)
    numbers = np.zeros(digits.shape[:2], np.uint16)
    for digit in range(bits):
        numbers = numbers << 1 | digits[..., digit]
    return numbers
