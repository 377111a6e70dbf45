"""Large images of any format, strip by strip, through libvips (pyvips), where that is installed.

For what no other reader here takes in parts: PNG, JPEG and TIFF in one strip above `MAX_PIXELS`.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vir_jax.data.errors import CorruptImageError
from vir_jax.data.image_file import MAX_PIXELS, ImageFile, as_corrupt
from vir_jax.data.pixels import ROWS, Colour, Strip


def open_large(path: Path, background: Colour) -> ImageFile | None:
    """Open an image of more than `MAX_PIXELS`; None where it is smaller, or pyvips is absent or does not know it.

    16 bits keep their upper 8; transparent pixels are laid over `background`.

    Raises:
      CorruptImageError: its EXIF orientation turns it, so that its rows do not come from top to bottom.
    """
    if importlib.util.find_spec("pyvips") is None:
        return None
    import pyvips

    try:
        stored = _opened(path)
    except pyvips.Error:
        return None
    if stored.width * stored.height <= MAX_PIXELS:
        return None
    if "orientation" in stored.get_fields() and stored.get("orientation") != 1:
        raise CorruptImageError(
            f"{stored.width} x {stored.height} pixels that its EXIF orientation turns: they cannot be read row by row."
            " Turn it, and save it without"
        )

    def strips() -> Iterator[Strip]:
        with as_corrupt():
            image = _rgb(_opened(path), background)
            region = pyvips.Region.new(image)
            for y in range(0, image.height, ROWS):
                rows = min(ROWS, image.height - y)
                data = region.fetch(0, y, image.width, rows)
                yield np.frombuffer(data, np.uint8).reshape(rows, image.width, 3)

    return ImageFile(stored.height, stored.width, strips, rows_at_once=ROWS)


def _opened(path: Path) -> Any:
    import pyvips

    # By its descriptor, which libvips copies: a file's name need not be UTF-8.
    with path.open("rb") as file:
        source = pyvips.Source.new_from_descriptor(file.fileno())
    return pyvips.Image.new_from_source(source, "", access="sequential", fail=True)


def _rgb(image: Any, background: Colour) -> Any:
    """Return three bands of 8 bits."""
    if image.format == "ushort":
        image = (image >> 8).cast("uchar").copy(interpretation="srgb" if image.bands > 2 else "b-w")
    if image.format != "uchar":
        raise CorruptImageError(f"numbers of type {image.format}; expected 8 or 16 bits")
    if image.interpretation not in ("srgb", "b-w"):
        image = image.colourspace("srgb")
    if image.hasalpha():
        white = list(background) if image.bands > 2 else [round(sum(background) / 3)]
        image = image.flatten(background=white)
    if image.bands == 1:
        image = image.bandjoin([image, image])
    return image
