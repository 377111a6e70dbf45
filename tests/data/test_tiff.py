"""TIFF: read as the standard says or refused by name, alike by `decode_image` and `open_image`, with imagecodecs and
without.
"""

import io
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from benchmarks.faults.hostile import encode, mutations
from tests.data.conftest import REAL_DATA
from tests.data.tiffs import (
    CMYK,
    DEFLATE,
    LZW,
    MINISBLACK,
    MINISWHITE,
    NONE,
    NUM_COLOURS,
    PACKBITS,
    PALETTE,
    PREMULTIPLIED,
    RGB,
    STRAIGHT,
    UNSPECIFIED,
    page,
    shown,
    tiff,
)
from vir_jax.data import CorruptImageError, decode_image
from vir_jax.inference.files import open_image

Read = Callable[[bytes], np.ndarray | str]


@pytest.fixture(params=[False, True], ids=["without imagecodecs", "with imagecodecs"])
def codecs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether tifffile has imagecodecs, which users need not install."""
    if not request.param:
        from tifffile import _imagecodecs

        monkeypatch.setattr(tifffile.tifffile, "imagecodecs", _imagecodecs)
        for table in (tifffile.TIFF.DECOMPRESSORS, tifffile.TIFF.UNPREDICTORS):
            monkeypatch.setattr(table, "_codecs", {1: bytes})
    return request.param


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Decode a file in both ways, which must agree: pixels, or why there are none."""

    def read(data: bytes) -> np.ndarray | str:
        path = tmp_path / "image.tif"
        path.write_bytes(data)
        found: list[np.ndarray | str] = []
        for way in (lambda: decode_image(data), lambda: np.concatenate(list(open_image(path).strips()))):
            try:
                found.append(way())
            except CorruptImageError as error:
                found.append(str(error))
        decoded, opened = found
        if isinstance(decoded, str) or isinstance(opened, str):
            assert decoded == opened
            assert " at 0x" not in decoded
            return decoded
        np.testing.assert_array_equal(decoded, opened)
        return decoded

    return read


@pytest.mark.parametrize("photometric", [MINISWHITE, MINISBLACK, RGB, PALETTE, CMYK])
def test_every_kind_is_read_by_the_standard_or_refused(read: Read, codecs: bool, photometric: int):
    rng = np.random.default_rng(photometric)
    extras = (
        (),
        (UNSPECIFIED,),
        (PREMULTIPLIED,),
        (STRAIGHT,),
        (STRAIGHT, UNSPECIFIED),
        (STRAIGHT, STRAIGHT),
    )
    colours = NUM_COLOURS[photometric]
    count = 0
    for bits, order, compression, planar, extra, fill_order in itertools.product(
        (1, 2, 4, 6, 8, 10, 12, 14, 16), "<>", (NONE, DEFLATE, LZW, PACKBITS), (1, 2), extras, (1, 2)
    ):
        samples = colours + len(extra)
        if (planar == 2 and samples == 1) or (order == ">" and (fill_order == 2 or bits != 16)):
            continue
        if compression in (LZW, PACKBITS) and (fill_order == 2 or bits in (2, 6, 10, 14)):
            continue
        pixels = rng.integers(0, 2**bits, (9, 7, samples))
        if extra == (PREMULTIPLIED,):
            pixels[..., :colours] = pixels[..., :colours] * pixels[..., colours:] // (2**bits - 1)
        palette, tags = None, {}
        if photometric == PALETTE:
            palette = rng.integers(256, 65536, (2**bits, 3))
            tags = {320: (3, palette.T.flatten().tolist())} if bits <= 8 else {}
        options = {"order": order, "compression": compression, "planar": planar, "fill_order": fill_order}
        result = read(tiff(page(pixels, photometric, bits, extra=extra, tags=tags, **options), order=order))
        clear = (
            extra.count(STRAIGHT) < 2
            and not (UNSPECIFIED in extra and colours == 1)
            and not (PREMULTIPLIED in extra and photometric not in (MINISBLACK, RGB))
            and not (photometric == PALETTE and bits > 8)
        )
        if isinstance(result, str):
            assert not clear or (compression == LZW and not codecs), result
            continue
        assert clear
        expected = shown(pixels, photometric, bits, extra, palette)
        assert np.abs(result - expected).max() <= 1, (bits, options, extra)
        count += 1
    assert count > 50


@pytest.fixture(scope="module")
def small(photo: np.ndarray) -> Image.Image:
    return Image.fromarray(photo[100:148, 200:264])


@pytest.mark.parametrize(
    "compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "group4"]
)
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "I;16", "RGBA"])
def test_compressions_that_pillow_writes(
    read: Read, codecs: bool, small: Image.Image, mode: str, compression: str
):
    image = small.convert(mode) if mode != "I;16" else small.convert("L").convert("I;16")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
    if mode == "RGBA":
        image.putalpha(small.convert("L"))
    if compression == "group4" and mode != "1":
        pytest.skip("of one bit alone")
    expected = np.asarray(
        small.convert("L").convert("RGB")
        if mode == "I;16"
        else Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        if mode == "RGBA"
        else image.convert("RGB")
    )
    result = read(encode(image, "TIFF", compression=compression))
    assert np.abs(result - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "YCbCr", "CMYK", "RGBA"])
def test_jpeg_in_tiff(read: Read, codecs: bool, small: Image.Image, mode: str):
    image = small.convert(mode)
    result = read(encode(image, "TIFF", compression="jpeg", quality=95))
    assert np.abs(result - np.asarray(image.convert("RGB")).astype(int)).mean() < 3


@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9])
def test_orientation(read: Read, planar: int, orientation: int):
    """By the standard's own words: where row 0 and column 0 of what is stored lie in what is seen."""
    seen = np.random.default_rng(0).integers(0, 256, (9, 7, 3))
    stored = {
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.transpose(1, 0, 2),
        6: seen.transpose(1, 0, 2)[::-1],
        7: seen[::-1, ::-1].transpose(1, 0, 2),
        8: seen.transpose(1, 0, 2)[:, ::-1],
    }.get(orientation, seen)
    data = tiff(page(stored, RGB, 8, planar=planar, tags={274: (3, [orientation])}))
    np.testing.assert_array_equal(read(data), seen)


IMAGE = np.random.default_rng(1).integers(0, 256, (9, 7, 3))
SMALLER = IMAGE[::2, ::2]


@pytest.mark.parametrize("compression", [NONE, LZW])
@pytest.mark.parametrize(
    "tags", [{254: (4, [1])}, {254: (4, [4])}, {254: (4, [5])}, {255: (3, [2])}], ids=str
)
def test_thumbnails_and_masks_are_not_the_image(read: Read, codecs: bool, tags, compression: int):
    options = {"compression": compression}
    thumbnail = page(SMALLER, RGB, 8, tags=tags, **options)
    data = tiff(thumbnail, thumbnail, page(IMAGE, RGB, 8, **options), page(255 - IMAGE, RGB, 8, **options))
    np.testing.assert_array_equal(read(data), IMAGE)
    np.testing.assert_array_equal(read(tiff(page(IMAGE, RGB, 8, **options), thumbnail)), IMAGE)
    assert "all pages are marked as thumbnails or masks" in read(tiff(thumbnail))


def test_an_image_below_its_thumbnail(read: Read):
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(SMALLER.astype(np.uint8), photometric="rgb", subfiletype=1, subifds=1)
        writer.write(IMAGE.astype(np.uint8), photometric="rgb", subfiletype=0)
    np.testing.assert_array_equal(read(buffer.getvalue()), IMAGE)


GRAY = IMAGE[..., :1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (page(GRAY, MINISBLACK, 8, tags={262: None}), "its PhotometricInterpretation is None"),
        (page(GRAY, 32803, 8), "its PhotometricInterpretation is"),
        (page(GRAY, MINISBLACK, 8, tags={339: (3, [2])}), "samples of 8 bits and format"),
        (page(IMAGE, RGB, 8, tags={258: (3, [5, 6, 5])}), "samples of"),
        (
            page(np.repeat(GRAY, 4, 2), RGB, 8),
            "4 samples a pixel: 3 for rgb and, by its ExtraSamples, \\[\\]",
        ),
        (page(IMAGE, MINISBLACK, 8), "3 samples a pixel: 1 for gray"),
        (page(np.repeat(GRAY, 4, 2), RGB, 8, extra=[999]), "ExtraSamples, \\[999\\]"),
        (page(np.repeat(GRAY, 4, 2), CMYK, 8, tags={332: (3, [2])}), "inks of set 2"),
        (page(IMAGE, 6, 8), "no reader is known to read that rightly"),  # YCbCr, its colours at half the size
        (page(IMAGE, 6, 8, tags={530: (3, [2, 1])}), "no reader is known to read that rightly"),
        (page(IMAGE, 8, 16), "no reader is known to read that rightly"),  # CIELAB of 16 bits
        (page(GRAY, PALETTE, 8), "palette"),
        (page(GRAY, MINISBLACK, 8, tags={257: (4, [90])}), "cannot be reshaped"),
        (page(GRAY // 16, MINISBLACK, 4, tags={257: (4, [90])}), "missing"),
    ],
    ids=str,
)
def test_what_is_unknown_or_missing_is_refused(read: Read, codecs: bool, data, message: str):
    with pytest.raises(CorruptImageError, match=message):
        decode_image(tiff(data))
    assert isinstance(read(tiff(data)), str)


def test_a_palette_of_8_bits_is_no_black_image(read: Read):
    palette = np.random.default_rng(2).integers(0, 256, (256, 3))
    data = tiff(page(GRAY, PALETTE, 8, tags={320: (3, palette.T.flatten().tolist())}))
    np.testing.assert_array_equal(read(data), palette[GRAY[..., 0]])


@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_what_tifffile_writes(read: Read, codecs: bool, planar: str, order: str, predictor: bool, tile):
    """The mean error of 16 bits in separate planes was 79 of 255."""
    pixels = np.random.default_rng(3).integers(0, 65536, (37, 29, 3), dtype=np.uint16)
    stored = pixels if planar == "contig" else pixels.transpose(2, 0, 1)
    for compression in (None, "zlib"):
        buffer = io.BytesIO()
        with tifffile.TiffWriter(buffer, byteorder=order, bigtiff=predictor) as writer:
            options = {"predictor": True} if predictor and compression else {}
            options |= {"tile": tile} if tile else {}
            writer.write(stored, photometric="rgb", planarconfig=planar, compression=compression, **options)
        np.testing.assert_array_equal(read(buffer.getvalue()), pixels >> 8)


def test_mutated_files_are_read_alike(read: Read, small: Image.Image):
    originals = [
        encode(small, "TIFF", compression="tiff_lzw"),
        tiff(page(IMAGE, RGB, 8, compression=DEFLATE)),
        tiff(page(IMAGE, RGB, 16, planar=2)),
        tiff(page(GRAY // 16, MINISWHITE, 4, compression=PACKBITS)),
    ]
    found = [isinstance(read(data), str) for data in mutations(originals, 400, seed=0)]
    assert 40 < sum(found) < 390


@pytest.mark.parametrize("name", ["planar16.tif", "g12.tif", "t_thumb_first.tif", "t_rgba_assoc.tif"])
def test_real_files(read: Read, codecs: bool, name: str):
    file = REAL_DATA / "files" / name
    if not file.is_file():
        pytest.skip(f"no {file}")
    with tifffile.TiffFile(file) as stored:
        pages = [p for p in stored.pages if not p.is_reduced]
        try:
            pixels = pages[0].asarray()
        except NotImplementedError as error:
            pytest.skip(str(error))
        planes, bits = pages[0].planarconfig == 2, pages[0].bitspersample
        extra = pages[0].extrasamples
    pixels = np.moveaxis(pixels, 0, -1) if planes else np.atleast_3d(pixels)
    expected = shown(pixels.astype(int), RGB if pixels.shape[2] > 1 else MINISBLACK, bits, extra)
    np.testing.assert_array_equal(read(file.read_bytes()), expected)
