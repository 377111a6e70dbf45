"""Image files as strips of rows, top to bottom, so that a file larger than memory can be streamed.

A NumPy array (.npy) is read strip by strip, and so is a TIFF, by its own strips or rows of tiles. Whatever else
`decode_image` decodes (JPEG, PNG, ...) is decoded whole, and so is a TIFF that cannot be read in parts: under that
function's limit of pixels, which guards against decompression bombs. What is read in strips needs none.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from jaxtyping import Num, UInt8

from vir_jax.data import CorruptImageError, decode_image
from vir_jax.data.decode import MAX_PIXELS

Strip = UInt8[np.ndarray, "y width 3"]

# Rows read at a time where the file does not say.
ROWS = 64
# Bytes of a TIFF read ahead of decoding.
BUFFER_BYTES = 2**22


class ImageFile(NamedTuple):
    """An image of which the pixels are read when asked for."""

    height: int
    width: int
    strips: Callable[[], Iterator[Strip]]
    """RGB rows from top to bottom, in strips of any number of them. Raises `CorruptImageError` where they end."""


def open_image(path: str | os.PathLike[str]) -> ImageFile:
    """Open an image file: .npy [y, x], [y, x, 1], [y, x, 3] or [y, x, 4], TIFF, or any format of `decode_image`.

    8 bits are kept of 16; gray is repeated and transparency dropped. Of a TIFF the first page is read.

    Raises:
        CorruptImageError: not an image that can be read; the message says why.
        OSError: no such file, or it cannot be opened.
    """
    path = Path(path)
    with path.open("rb") as file:
        magic = file.read(6)
    if magic == b"\x93NUMPY":
        return _open_npy(path)
    if magic[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _open_tiff(path)
    return _decoded(path)


def _decoded(path: Path) -> ImageFile:
    image = decode_image(path.read_bytes())
    return ImageFile(image.shape[0], image.shape[1], lambda: iter([image]))


def _open_npy(path: Path) -> ImageFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header raises nearly anything
        raise CorruptImageError(f"{type(error).__name__}: {error}") from error
    if array.ndim not in (2, 3) or 0 in array.shape or not array.flags.c_contiguous:
        raise CorruptImageError(
            f"an array of shape {array.shape}{'' if array.flags.c_contiguous else ' in Fortran order'}; "
            "expected [y, x, channels] in C order"
        )
    _check_samples(array.dtype, 1 if array.ndim == 2 else array.shape[2])
    return _raw(path, array.offset, array.shape, array.dtype)


def _raw(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> ImageFile:
    """Rows that lie in the file as they are.

    They are read, not mapped: mapped pages count as resident memory until the system takes them back.
    """

    def strips() -> Iterator[Strip]:
        row_items = int(np.prod(shape[1:]))
        for start in range(0, shape[0], ROWS):
            rows = min(ROWS, shape[0] - start)
            position = offset + start * row_items * dtype.itemsize
            pixels = np.fromfile(path, dtype, rows * row_items, offset=position)
            if pixels.size < rows * row_items:
                raise CorruptImageError(
                    f"the file ends in row {start + pixels.size // row_items} of {shape[0]}"
                )
            yield _rgb(pixels.reshape(rows, *shape[1:]))

    return ImageFile(shape[0], shape[1], strips)


def _open_tiff(path: Path) -> ImageFile:
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            height, width = page.imagelength, page.imagewidth
            obstacle = _obstacle(page)
            shape = (height, width, page.samplesperpixel)
            dtype = np.dtype(page.dtype or "V").newbyteorder(file.byteorder)
            offset = page.dataoffsets[0] if page.is_memmappable else None
    except CorruptImageError:
        raise
    except Exception as error:  # damaged metadata raise nearly anything
        raise CorruptImageError(f"{type(error).__name__}: {error}") from error
    if obstacle:
        if height * width > MAX_PIXELS:
            raise CorruptImageError(
                f"{width} x {height} pixels that cannot be read in strips: {obstacle}. Save it as an uncompressed or "
                "deflate-compressed RGB or gray TIFF."
            )
        return _decoded(path)
    _check_samples(dtype, shape[2])
    if offset is not None:
        return _raw(path, offset, shape, dtype)
    return ImageFile(height, width, lambda: _tiff_strips(path, height, width))


def _obstacle(page: tifffile.TiffPage) -> str | None:
    """Why a page cannot be read from top to bottom in parts; None if it can."""
    plain = (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB)
    jpeg = page.compression == tifffile.COMPRESSION.JPEG
    if page.photometric not in plain and not (page.photometric == tifffile.PHOTOMETRIC.YCBCR and jpeg):
        return f"its colours are {page.photometric!r}"
    if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and page.samplesperpixel > 1:
        return "its colours lie in separate planes"
    if page.tags.valueof("Orientation", 1) != 1:
        return "it is stored mirrored or rotated"
    if page.chunks[0] * page.imagewidth > MAX_PIXELS:
        return f"its strips or tiles are {page.chunks[0]} rows high, and each is decoded whole"
    try:
        page.decode(None, 0)
    except Exception as error:
        return f"{error} (`pip install imagecodecs` adds LZW, JPEG and other compressions)"
    return None


def _tiff_strips(path: Path, height: int, width: int) -> Iterator[Strip]:
    """The rows of each strip, or each row of tiles, decoded one after another in the order of the file."""
    band: np.ndarray | None = None
    first = 0
    try:
        with tifffile.TiffFile(path) as file:
            for pixels, (_, _, y, x, _), _ in file.pages.first.segments(
                maxworkers=1, buffersize=BUFFER_BYTES
            ):
                if pixels is None:
                    raise CorruptImageError(f"the pixels at row {y}, column {x} are missing")
                rows, columns = pixels.shape[1:3]
                if band is not None and y != first:
                    yield _rgb(band)
                    band = None
                if band is None:
                    first = y
                    band = np.empty((min(rows, height - y), width, pixels.shape[3]), pixels.dtype)
                band[:, x : x + columns] = pixels[0, : height - y, : width - x]
    except CorruptImageError:
        raise
    except Exception as error:  # a decoder fed with arbitrary bytes raises nearly anything
        raise CorruptImageError(f"{type(error).__name__}: {error}") from error
    if band is None or first + len(band) != height:
        raise CorruptImageError(f"the file ends before row {height}")
    yield _rgb(band)


def _check_samples(dtype: np.dtype, channels: int) -> None:
    if dtype.kind != "u" or dtype.itemsize > 2 or channels not in (1, 3, 4):
        raise CorruptImageError(
            f"{channels} channels of {dtype}; expected 1 (gray), 3 (RGB) or 4 (RGBA) of uint8 or uint16"
        )


def _rgb(rows: Num[np.ndarray, "y x *channels"]) -> Strip:
    if rows.dtype.itemsize == 2:
        rows = (rows >> 8).astype(np.uint8)
    rows = rows.reshape(*rows.shape[:2], -1)[..., :3]
    return np.repeat(rows, 3, axis=2) if rows.shape[2] == 1 else rows
