"""From the numbers that image files store to RGB in 8 bits: one rule, whatever the format and its reader.

Of more than 8 bits the upper 8 are kept, fewer are spread over 0..255; gray is repeated; transparent pixels are laid
over a background.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np
from jaxtyping import UInt, UInt8
from PIL import Image

Colour = tuple[int, int, int]
Strip = UInt8[np.ndarray, "y width 3"]
Warn = Callable[[str], None]

# What shows where an image is transparent, unless a caller says otherwise: the colour of the page.
WHITE: Colour = (255, 255, 255)

# Rows that are worked on at a time where nothing else says so.
ROWS = 64


@dataclasses.dataclass(frozen=True)
class Samples:
    """What the numbers of a pixel mean."""

    colours: Literal["gray", "rgb", "palette", "cmyk"]
    bits: int = 8  # Of each number, 1 to 16.
    stored_bits: int = 8  # Of each number in the file, where the decoder has reduced them to `bits`.
    inverted: bool = False  # Gray: 0 is white.
    palette: UInt8[np.ndarray, "entries 3"] | None = None
    alpha: int | None = None  # Which of the numbers is opacity.
    premultiplied: bool = False  # The colours have been multiplied by it.

    @property
    def num_colours(self) -> int:
        """How many of the numbers, the first ones, are colours."""
        return {"gray": 1, "palette": 1, "rgb": 3, "cmyk": 4}[self.colours]


def rgb_strips(
    strips: Iterable[UInt[np.ndarray, "_y width samples"]],
    samples: Samples,
    background: Colour,
    warn: Warn,
) -> Iterator[Strip]:
    """Yield strips of an image as RGB.

    Args:
      strips: rows from top to bottom.
      samples: what the numbers in them mean.
      background: RGB, 0 to 255, that transparent pixels are laid over.
      warn: told, after the last strip, if the image is transparent everywhere, or its numbers so small that they
        probably have fewer bits than the 16 that hold them.
    """
    largest = most_opaque = 0
    for strip in strips:
        colours = _colours(strip[..., : samples.num_colours], samples)
        if samples.stored_bits == 16:
            largest = max(largest, int(strip[..., : samples.num_colours].max()) >> (samples.bits - 8))
        if samples.alpha is not None:
            alpha = _eight_bits(strip[..., samples.alpha], samples.bits)
            most_opaque = max(most_opaque, int(alpha.max()))
            colours = _composite(colours, alpha, background, premultiplied=samples.premultiplied)
        yield colours
    if samples.alpha is not None and most_opaque == 0:
        warn("transparent everywhere: it shows the background alone")
    elif samples.stored_bits == 16 and largest < 64:
        warn(
            "nearly black (white, if inverted): no value exceeds a quarter of the range of its 16 bits. If the values "
            "have 10, 12 or 14 bits, multiply them by 64, 16 or 4 and save the image again"
        )


def rows_of(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """Yield an image in strips of `ROWS` rows."""
    for start in range(0, len(pixels), ROWS):
        yield pixels[start : start + ROWS]


def array_samples(dtype: np.dtype, channels: int) -> Samples:
    """Return what the numbers of a bare array mean: gray, RGB or RGBA, of as many bits as they have.

    Raises:
      ValueError: another number of channels, or other numbers than uint8 and uint16.
    """
    if dtype.kind != "u" or dtype.itemsize > 2 or channels not in (1, 3, 4):
        raise ValueError(
            f"{channels} channels of {dtype}; expected 1 (gray), 3 (RGB) or 4 (RGBA) of uint8 or uint16"
        )
    bits = 8 * dtype.itemsize
    return Samples(
        "gray" if channels == 1 else "rgb", bits, stored_bits=bits, alpha=3 if channels == 4 else None
    )


def _colours(pixels: UInt[np.ndarray, "y x colours"], samples: Samples) -> Strip:
    if samples.palette is not None:
        return samples.palette[pixels[..., 0]]
    eight = _eight_bits(pixels, samples.bits)
    if samples.colours == "cmyk":
        height, width = eight.shape[:2]
        return np.asarray(Image.frombytes("CMYK", (width, height), eight.tobytes()).convert("RGB"))
    if samples.inverted:
        eight = 255 - eight
    return np.repeat(eight, 3, axis=-1) if samples.colours == "gray" else eight


def _eight_bits(values: np.ndarray, bits: int) -> np.ndarray:
    if bits > 8:
        return (values >> (bits - 8)).astype(np.uint8)
    if bits < 8:
        levels = 2**bits
        return np.rint(np.arange(levels) * (255 / (levels - 1))).astype(np.uint8)[values]
    return values


def _composite(
    colours: Strip, alpha: UInt8[np.ndarray, "y width"], background: Colour, *, premultiplied: bool
) -> Strip:
    """Lay colours over a background: `alpha` 255 is opaque, 0 shows the background alone."""
    if (alpha == 255).all():
        return colours
    opaque = alpha[..., None].astype(np.uint16)
    behind = np.array(background, np.uint16) * (255 - opaque)
    if premultiplied:
        return np.minimum(colours + (behind + 127) // 255, 255).astype(np.uint8)
    return ((colours * opaque + behind + 127) // 255).astype(np.uint8)


def oriented(image: UInt8[np.ndarray, "y x 3"], orientation: int) -> UInt8[np.ndarray, "_y _x 3"]:
    """Turn stored pixels upright: EXIF orientations 5 to 8 swap rows and columns, and all but 1 mirror."""
    if orientation == 1:
        return image
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(image[rows, columns])
