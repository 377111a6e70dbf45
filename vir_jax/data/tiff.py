"""TIFF: which of its pages is the image, what its numbers mean, and who reads them.

tifffile reads the structure and, where it can, the pixels: uncompressed and deflate by itself, other compressions with
imagecodecs, which is optional. What it cannot decompress goes through Pillow (libtiff), for those kinds of pixels that
Pillow is known to convert rightly. Anything else is refused by name.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import tifffile

from vir_jax.data.errors import CorruptImageError
from vir_jax.data.image_file import ImageFile, Opener, as_corrupt, stored_rows
from vir_jax.data.pillow_formats import decode_frame
from vir_jax.data.pixels import ROWS, Colour, Samples, Strip, Warn, oriented, rgb_strips
from vir_jax.data.tiff_rows import Rows, check_decodable, planes, rows_in_strips

TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_PHOTOMETRIC, _COMPRESSION = tifffile.PHOTOMETRIC, tifffile.COMPRESSION
_COLOURS: dict[int, Literal["gray", "rgb", "palette", "cmyk"]] = {
    _PHOTOMETRIC.MINISWHITE: "gray",
    _PHOTOMETRIC.MINISBLACK: "gray",
    _PHOTOMETRIC.RGB: "rgb",
    _PHOTOMETRIC.PALETTE: "palette",
    _PHOTOMETRIC.SEPARATED: "cmyk",
    # These two are converted to RGB by what decodes them.
    _PHOTOMETRIC.YCBCR: "rgb",
    _PHOTOMETRIC.CIELAB: "rgb",
}
# Bits of the kinds of pixels that Pillow converts rightly.
_PILLOW_BITS: dict[int, tuple[int, ...]] = {
    _PHOTOMETRIC.MINISWHITE: (1, 2, 4, 8),
    _PHOTOMETRIC.MINISBLACK: (1, 2, 4, 8, 16),
    _PHOTOMETRIC.RGB: (8, 16),
    _PHOTOMETRIC.PALETTE: (1, 2, 4, 8),
    _PHOTOMETRIC.SEPARATED: (8, 16),
    _PHOTOMETRIC.YCBCR: (8,),
    _PHOTOMETRIC.CIELAB: (8,),
}
_CCITT = (_COMPRESSION.CCITTRLE, _COMPRESSION.CCITT_T4, _COMPRESSION.CCITT_T6)
_STATED_PHOTOMETRIC, _ORIENTATION, _INK_SET, _EXTRA_SAMPLES, _SUBSAMPLING = 262, 274, 332, 338, 530
_PREMULTIPLIED, _STRAIGHT = tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA


def open_tiff(open_file: Opener, background: Colour, warn: Warn) -> ImageFile:
    """Open a TIFF's first page that is neither a thumbnail nor a mask.

    Raises:
      CorruptImageError: it cannot be read, or it is not known how; the message says why.
    """
    with as_corrupt(), open_file() as raw, tifffile.TiffFile(raw) as file:
        frame, page = _main_page(file)
        samples = _samples(page)
        height, width = page.imagelength, page.imagewidth
        orientation = _orientation(page)
        undecodable = _undecodable(page)
        if undecodable is not None:
            _check_for_pillow(page, frame, samples, undecodable)
        obstacle = undecodable or _obstacle(page)
        stored = None
        rows_at_once = page.tilelength if page.is_tiled else page.rowsperstrip
        if page.is_final and obstacle is None:
            stored = page.dataoffsets[0], np.dtype(page.dtype).newbyteorder(file.byteorder)
            rows_at_once = ROWS

    def strips() -> Iterator[Strip]:
        if stored is None:
            pixels = _numbers(open_file)
        else:
            pixels = stored_rows(open_file, stored[0], (height, width, page.samplesperpixel), stored[1])
        return rgb_strips(pixels, samples, background, warn)

    def whole() -> Iterator[Strip]:
        if undecodable is None:
            yield oriented(np.concatenate(list(strips())), orientation)
        else:
            with open_file() as file:
                data = file.read()
            bits = samples.stored_bits
            yield decode_frame(data, ("TIFF",), background, warn, frame=frame, stored_bits=bits)

    if orientation >= 5:
        height, width = width, height
    return ImageFile(height, width, whole if obstacle else strips, min(rows_at_once, height), obstacle)


def _numbers(open_file: Opener) -> Iterator[Rows]:
    """Yield what the main page stores, decompressed."""
    with as_corrupt(), open_file() as raw, tifffile.TiffFile(raw) as file:
        _, page = _main_page(file)
        if _in_planes(page):
            yield planes(page)
        else:
            yield from rows_in_strips(page)


def _main_page(file: tifffile.TiffFile) -> tuple[int, tifffile.TiffPage]:
    """Return the first page that is neither a smaller version of another nor a mask, and its number.

    The number is -1 where it lies below another page, as the images of cameras lie below their thumbnails.
    """
    for number, found in enumerate(file.pages):
        page = found.aspage()
        if not _is_auxiliary(page):
            return number, page
        for below in page.pages or ():
            if not _is_auxiliary(below.aspage()):
                return -1, below.aspage()
    raise CorruptImageError("all pages are marked as thumbnails or masks: expected an image")


def _is_auxiliary(page: tifffile.TiffPage) -> bool:
    kind, old_kind = page.tags.valueof(254, 0), page.tags.valueof(255, 1)
    flags = tifffile.FILETYPE.REDUCEDIMAGE | tifffile.FILETYPE.MASK
    return bool(kind & flags) or old_kind == tifffile.OFILETYPE.REDUCEDIMAGE


def _orientation(page: tifffile.TiffPage) -> int:
    """Return 1 to 8; 1 (as stored) in place of what is impossible."""
    value = page.tags.valueof(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _in_planes(page: tifffile.TiffPage) -> bool:
    return page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and page.samplesperpixel > 1


def _samples(page: tifffile.TiffPage) -> Samples:
    """Return what the numbers of a page's pixels mean.

    Raises:
      CorruptImageError: it does not say, or says what is not known here.
    """
    photometric, bits = page.photometric, page.bitspersample
    stated = page.tags.valueof(_STATED_PHOTOMETRIC)
    if stated is None or photometric not in _COLOURS:
        raise CorruptImageError(
            f"its PhotometricInterpretation is {stated!r}; expected gray, RGB, palette, CMYK, YCbCr or CIELAB"
        )
    colours = _COLOURS[photometric]
    most_bits = 8 if colours == "palette" else 16
    whole_numbers = page.sampleformat == tifffile.SAMPLEFORMAT.UINT and isinstance(bits, int)
    if not whole_numbers or not 1 <= bits <= most_bits:
        raise CorruptImageError(
            f"samples of {bits} bits and format {page.sampleformat!r}; expected 8 or 16 bits (1 to {most_bits} can be "
            "read), unsigned"
        )
    if page.imagedepth != 1:
        raise CorruptImageError(f"a volume of {page.imagedepth} layers; expected an image")
    if colours == "cmyk" and page.tags.valueof(_INK_SET, 1) != 1:
        raise CorruptImageError(f"inks of set {page.tags.valueof(_INK_SET)}; expected 1 (CMYK)")
    plain = Samples(
        colours,
        bits,
        stored_bits=bits,
        inverted=photometric == _PHOTOMETRIC.MINISWHITE,
        palette=_palette(page) if colours == "palette" else None,
    )
    return _with_alpha(page, plain)


def _with_alpha(page: tifffile.TiffPage, samples: Samples) -> Samples:
    """Return the meaning of a page's samples with that of the ones that are no colours."""
    extra = page.tags.valueof(_EXTRA_SAMPLES, ())
    extra = extra if isinstance(extra, tuple) else (extra,)
    alpha = [
        number
        for number, kind in enumerate(extra, samples.num_colours)
        if kind in (_PREMULTIPLIED, _STRAIGHT)
    ]
    unspecified = extra.count(tifffile.EXTRASAMPLE.UNSPECIFIED)
    premultiplied = _PREMULTIPLIED in extra
    clear = (
        samples.num_colours + len(extra) == page.samplesperpixel
        and len(alpha) + unspecified == len(extra)
        and len(alpha) <= 1
        # Beside one band of gray others without a meaning leave open which of them is the image.
        and not (unspecified and samples.num_colours == 1)
        and not (premultiplied and (samples.inverted or samples.colours not in ("gray", "rgb")))
    )
    if not clear:
        raise CorruptImageError(
            f"{page.samplesperpixel} samples a pixel: {samples.num_colours} for {samples.colours} and, by its "
            f"ExtraSamples, {[int(kind) for kind in extra]}; expected RGB or gray, and at most one of opacity"
        )
    return dataclasses.replace(samples, alpha=alpha[0] if alpha else None, premultiplied=premultiplied)


def _palette(page: tifffile.TiffPage) -> np.ndarray:
    """Return a page's colour map as RGB [entries, 3]."""
    colour_map = np.asarray(page.colormap).T
    if colour_map.shape != (2**page.bitspersample, 3):
        raise CorruptImageError(
            f"a palette of shape {colour_map.shape}; expected {(2**page.bitspersample, 3)}"
        )
    # Of 16 bits by the standard; some writers fill the lower 8 alone, which libtiff takes for what it is, too.
    return (colour_map >> 8 if colour_map.max() > 255 else colour_map).astype(np.uint8)


def _obstacle(page: tifffile.TiffPage) -> str | None:
    """Return why a page that tifffile decompresses cannot be read from top to bottom in parts; None if it can."""
    if _in_planes(page):
        return "its colours lie in separate planes"
    if page.photometric == _PHOTOMETRIC.PALETTE:
        return "its colours are those of a palette"
    if _orientation(page) != 1:
        return "it is stored mirrored or rotated"
    return None


def _undecodable(page: tifffile.TiffPage) -> str | None:
    """Return why tifffile does not give a page's colours; None if it does."""
    jpeg = page.compression == _COMPRESSION.JPEG
    if page.compression in _CCITT:
        return f"its compression is {page.compression!r}"
    if page.photometric == _PHOTOMETRIC.CIELAB or (page.photometric == _PHOTOMETRIC.YCBCR and not jpeg):
        return f"its colours are {page.photometric!r}"
    if jpeg and (_in_planes(page) or page.samplesperpixel not in (1, 3)):
        return f"its compression is JPEG of {page.samplesperpixel} samples a pixel{' in planes' * _in_planes(page)}"
    try:
        check_decodable(page)
    except Exception as error:
        return f"{error} (`pip install imagecodecs` adds LZW, JPEG and other compressions)"
    return None


def _check_for_pillow(page: tifffile.TiffPage, frame: int, samples: Samples, problem: str) -> None:
    """Refuse pixels that tifffile does not decode and Pillow converts wrongly, or not in a way that is known.

    Raises:
      CorruptImageError: such pixels.
    """
    bits, jpeg = page.bitspersample, page.compression == _COMPRESSION.JPEG
    raw_ycbcr = page.photometric == _PHOTOMETRIC.YCBCR and page.compression == _COMPRESSION.NONE
    alpha_bits = {"gray": (8,), "rgb": (8, 16)}.get(samples.colours, ())
    right = (
        frame >= 0
        and bits in _PILLOW_BITS[page.photometric]
        and (samples.alpha is None or (bits in alpha_bits and not samples.inverted))
        and not (_in_planes(page) and (bits != 8 or samples.alpha is not None or samples.colours != "rgb"))
        and not (jpeg and _in_planes(page))
        and not (jpeg and page.photometric == _PHOTOMETRIC.RGB and page.is_jfif)
        and not (raw_ycbcr and page.tags.valueof(_SUBSAMPLING, (2, 2)) != (1, 1))
        and page.compression != _COMPRESSION.OJPEG
        and not (page.colormap is not None and page.colormap.max() < 256)
    )
    if not right:
        raise CorruptImageError(
            f"{problem}, and it has {page.samplesperpixel} samples of {bits} bits, {page.photometric!r}: no reader is "
            "known to read that rightly. Save it as an uncompressed or deflate-compressed RGB or gray TIFF"
        )
