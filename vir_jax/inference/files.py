"""Image files as strips of rows, top to bottom, so that a file larger than memory can be streamed.

A NumPy array (.npy) is read strip by strip, a Zarr array or OME-Zarr image by rows of chunks, and a TIFF by its own
strips or rows of tiles. Whatever else
`decode_image` decodes (JPEG, PNG, ...) is decoded whole, and so is a TIFF that cannot be read in parts: under that
function's limit of pixels, which guards against decompression bombs; above it libvips reads them, where pyvips is
installed. What is read in strips needs no limit.
"""

import functools
import os
import stat
from pathlib import Path

from absl import logging

from vir_jax.data import CorruptImageError, decode_image
from vir_jax.data.decode import MAX_PIXELS, open_in_strips
from vir_jax.data.image_file import ImageFile, windowed
from vir_jax.data.pixels import WHITE, Colour
from vir_jax.data.vips import open_large
from vir_jax.data.zarr import is_zarr, open_zarr

_KINDS = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


Window = tuple[int, int, int, int]
"""Of an image: x, y, width and height in pixels."""


def open_image(
    path: str | os.PathLike[str], *, background: Colour = WHITE, window: Window | None = None
) -> ImageFile:
    """Open an image file of any format of `decode_image`; its pixels are those that that function gives.

    What is doubtful in a file that is read all the same is logged with its name.

    Args:
        path: the file.
        background: RGB, 0 to 255, that shows where the image is transparent.
        window: the part of it that is read; None: all.

    Raises:
        CorruptImageError: not an image that can be read; the message says why.
        OSError: no such file, or it cannot be opened.
    """
    image = _open_whole(Path(path), background)
    return image if window is None else windowed(image, window)


def _open_whole(path: Path, background: Colour) -> ImageFile:
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind in _KINDS:  # Opening it might wait for ever.
        raise CorruptImageError(f"a {_KINDS[kind]}; expected a regular file")
    warn = functools.partial(logging.warning, "%s: %s", path)
    if is_zarr(path):
        return open_zarr(path, background, warn)
    with path.open("rb") as file:
        magic = file.read(6)
    image = open_in_strips(lambda: path.open("rb"), magic, background, warn)
    if image is None or image.obstacle is not None:
        large = open_large(path, background)
        if large is not None:
            return large
    if image is None:
        pixels = decode_image(path.read_bytes(), background=background, warn=warn)
        height, width = pixels.shape[:2]
        return ImageFile(
            height, width, lambda: iter([pixels]), rows_at_once=height, obstacle="another format"
        )
    obstacle = image.obstacle
    if image.rows_at_once * image.width > MAX_PIXELS:
        obstacle = (
            obstacle or f"its strips or tiles are {image.rows_at_once} rows high, and each is decoded whole"
        )
    if obstacle and image.height * image.width > MAX_PIXELS:
        raise CorruptImageError(
            f"{image.width} x {image.height} pixels that cannot be read in strips: {obstacle}. Save it as an "
            "uncompressed or deflate-compressed RGB or gray TIFF."
        )
    return image
