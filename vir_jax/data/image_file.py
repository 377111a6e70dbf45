"""An image of which the pixels are read when asked for, and files that hold them as they are."""

import contextlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from vir_jax.data.errors import CorruptImageError, reason
from vir_jax.data.pixels import ROWS, Colour, Strip, Warn, array_samples, rgb_strips

# Larger images count as decompression bombs: 89 million pixels, 268 MB decoded. It is Pillow's own limit, so that all
# decoders refuse the same files.
MAX_PIXELS = 1024**3 // 4 // 3

NPY_MAGIC = b"\x93NUMPY"

Opener = Callable[[], BinaryIO]


class ImageFile(NamedTuple):
    """An image of which the pixels are read when asked for."""

    height: int
    width: int
    strips: Callable[[], Iterator[Strip]]
    """RGB rows from top to bottom, in strips of any number of them. Raises `CorruptImageError` where they end."""
    rows_at_once: int
    """Most rows that are decoded together."""
    obstacle: str | None = None
    """Why it cannot be read in parts; None if it can."""


def check_pixels(height: int, width: int) -> None:
    """Refuse an image that is too large to be decoded whole.

    Raises:
      CorruptImageError: more than `MAX_PIXELS`.
    """
    if height * width > MAX_PIXELS:
        raise CorruptImageError(
            f"{width} x {height} pixels: more than the {MAX_PIXELS:,} that are decoded whole; vir-predict --stream"
            ' reads more, PNG and JPEG with pip install "vir-jax[pyvips]"'
        )


def windowed(image: ImageFile, window: tuple[int, int, int, int]) -> ImageFile:
    """Return a part of an image; the rows above it are read, and none below.

    Args:
      image: the whole.
      window: (x, y, width, height) in pixels.

    Raises:
      CorruptImageError: the window is not inside of the image.
    """
    x, y, width, height = window
    if min(x, y) < 0 or min(width, height) < 1 or x + width > image.width or y + height > image.height:
        raise CorruptImageError(
            f"{image.width} x {image.height} pixels, of which x={x}, y={y}, width={width}, height={height} is no part"
        )

    def strips() -> Iterator[Strip]:
        top = 0
        for strip in image.strips():
            rows = strip[max(y - top, 0) : y + height - top, x : x + width]
            if rows.size:
                yield rows
            top += len(strip)
            if top >= y + height:
                return

    return image._replace(height=height, width=width, strips=strips)


@contextlib.contextmanager
def as_corrupt() -> Iterator[None]:
    """Turn whatever a decoder raises into `CorruptImageError`: fed with arbitrary bytes it raises nearly anything."""
    try:
        yield
    except CorruptImageError:
        raise
    except Exception as error:
        raise CorruptImageError(reason(error)) from error


def open_npy(open_file: Opener, background: Colour, warn: Warn) -> ImageFile:
    """Open a NumPy array, [y, x], [y, x, 1], [y, x, 3] or [y, x, 4] of uint8 or uint16.

    Raises:
      CorruptImageError: no such array.
    """
    with as_corrupt(), open_file() as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
        else:  # of structured arrays alone
            raise CorruptImageError(f"a .npy file of version {version}; expected (1, 0) or (2, 0)")
        offset = file.tell()
        if len(shape) not in (2, 3) or 0 in shape or fortran_order:
            raise CorruptImageError(
                f"an array of shape {shape}{' in Fortran order' if fortran_order else ''}; "
                "expected [y, x, channels] in C order"
            )
        samples = array_samples(dtype, 1 if len(shape) == 2 else shape[2])

    def strips() -> Iterator[Strip]:
        return rgb_strips(stored_rows(open_file, offset, shape, dtype), samples, background, warn)

    return ImageFile(shape[0], shape[1], strips, rows_at_once=ROWS)


def stored_rows(
    open_file: Opener, offset: int, shape: tuple[int, ...], dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Yield rows that lie in a file as they are, in strips [y, width, samples].

    They are read, not mapped: mapped pages count as resident memory until the system takes them back.

    Raises:
      CorruptImageError: the file ends before the last row.
    """
    height, width, samples = (*shape, 1)[:3]
    row_bytes = width * samples * dtype.itemsize
    with as_corrupt(), open_file() as file:
        file.seek(offset)
        for start in range(0, height, ROWS):
            rows = min(ROWS, height - start)
            data = file.read(rows * row_bytes)
            if len(data) < rows * row_bytes:
                raise CorruptImageError(f"the file ends in row {start + len(data) // row_bytes} of {height}")
            yield np.frombuffer(data, dtype).reshape(rows, width, samples)
