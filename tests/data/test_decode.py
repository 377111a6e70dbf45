import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from benchmarks.faults.hostile import encode, mutations, oriented_exif, originals, with_jpeg_size
from tests.data.conftest import REAL_DATA
from tests.data.tiffs import MINISBLACK, MINISWHITE, RGB, page, tiff
from vir_jax.data import CorruptImageError, decode_image
from vir_jax.data.decode import MAX_PIXELS, jpeg_size


def over(image: Image.Image, colour: str | tuple[int, int, int]) -> np.ndarray:
    """An image laid over a colour, by Pillow."""
    return np.asarray(
        Image.alpha_composite(Image.new("RGBA", image.size, colour), image.convert("RGBA")).convert("RGB")
    )


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with(data: bytes, *chunks: bytes) -> bytes:
    """A PNG with more chunks, behind its header."""
    return data[:33] + b"".join(chunks) + data[33:]


def packed_png(pixels: np.ndarray, bits: int, *chunks: bytes) -> bytes:
    """A PNG of gray [y, x] or RGB [y, x, 3] of any number of bits, which Pillow does not write."""
    height, width = pixels.shape[:2]
    digits = (pixels.reshape(height, -1, 1) >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(digits.astype(np.uint8).reshape(height, -1), axis=1)
    filtered = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", width, height, bits, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", filtered) + chunk(b"IEND", b"")
    return png_with(whole, *chunks)


def pillow_rgb(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture(scope="module")
def small(photo: np.ndarray) -> Image.Image:
    return Image.fromarray(photo[100:148, 200:264])  # 48 x 64, so that rows and columns cannot be confused


def test_jpeg_is_decoded_as_by_pillow(photo_jpeg: bytes):
    ours, theirs = decode_image(photo_jpeg), pillow_rgb(photo_jpeg)
    assert ours.shape == theirs.shape == (427, 640, 3)
    assert ours.dtype == np.uint8
    # Both use libjpeg-turbo, perhaps in different versions.
    assert np.abs(ours.astype(int) - theirs).max() <= 2


@pytest.mark.parametrize("format", ["PNG", "BMP", "PPM", "TIFF"])
def test_lossless_formats_come_back_exactly(small: Image.Image, format: str):
    np.testing.assert_array_equal(decode_image(encode(small, format)), np.asarray(small))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(small: Image.Image, format: str):
    second = ImageOps.invert(small)
    data = encode(small, format, save_all=True, append_images=[second])
    error = np.abs(decode_image(data).astype(int) - np.asarray(small)).mean()
    assert error < 12  # GIF has 256 colours, WebP loses a little; the second frame is 100 away


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"])
def test_every_mode_becomes_rgb(small: Image.Image, mode: str):
    if mode == "I;16":
        image = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
        assert image.mode == mode
        expected = np.asarray(small.convert("L").convert("RGB"))
    else:
        image = small.convert(mode)
        expected = np.asarray(image.convert("RGB"))
    format = "TIFF" if mode in ("CMYK", "YCbCr", "LAB") else "PNG"
    np.testing.assert_array_equal(decode_image(encode(image, format)), expected)


def test_gray_jpeg(small: Image.Image):
    data = encode(small.convert("L"), "JPEG", quality=95)
    pixels = decode_image(data)
    assert pixels.shape == (48, 64, 3)
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 1])
    assert np.abs(pixels.astype(int) - pillow_rgb(data)).max() <= 1


def test_cmyk_jpeg(small: Image.Image):
    data = encode(small.convert("CMYK"), "JPEG", quality=95)
    np.testing.assert_array_equal(decode_image(data), pillow_rgb(data))
    assert np.abs(decode_image(data).astype(int) - np.asarray(small)).mean() < 5


@pytest.mark.parametrize("transparency", [0, bytes(range(256))])
def test_transparent_palette(small: Image.Image, transparency: int | bytes):
    image = small.convert("P", palette=Image.Palette.ADAPTIVE)
    data = encode(image, "PNG", transparency=transparency)
    expected = over(Image.open(io.BytesIO(data)), "white")
    assert np.abs(decode_image(data).astype(int) - expected).max() <= 1
    assert not np.array_equal(expected, np.asarray(image.convert("RGB")))


BACKGROUNDS = [(255, 255, 255), (0, 0, 0), (12, 200, 99)]


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_show_the_background(small: Image.Image, mode: str, format: str, background):
    """And not what lies under them, which no viewer shows."""
    image = small.convert(mode)
    alpha = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    image.putalpha(Image.fromarray(alpha))
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(format, {})
    pixels = decode_image(encode(image, format, **options), background=background)
    error = np.abs(pixels.astype(int) - over(image, background))
    assert error.max() <= 1 if format != "AVIF" else error.mean() < 2
    assert (np.abs(pixels[:, 0].astype(int) - background) <= (3 if format == "AVIF" else 0)).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_gray_of_any_number_of_bits(bits: int):
    gray = np.random.default_rng(bits).integers(0, 2**bits, (9, 7))
    key = int(gray[0, 0])
    data = packed_png(gray, bits, chunk(b"tRNS", struct.pack(">H", key)))
    eight = gray >> 8 if bits == 16 else gray * 255 // (2**bits - 1)
    expected = np.where(gray == key, 77, eight)
    np.testing.assert_array_equal(decode_image(data, background=(77, 77, 77))[..., 1], expected)


def test_a_transparent_colour():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3))
    key = chunk(b"tRNS", struct.pack(">HHH", *pixels[2, 3]))
    expected = pixels.copy()
    expected[2, 3] = 255
    np.testing.assert_array_equal(decode_image(packed_png(pixels, 8, key)), expected)
    with pytest.raises(CorruptImageError, match="a transparent colour of 16 bits"):
        decode_image(packed_png(pixels * 257, 16, key))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2"])
def test_arrays(channels: int, dtype: str):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, channels))
    buffer = io.BytesIO()
    np.save(buffer, (pixels * (257 if dtype != "u1" else 1)).astype(dtype))
    expected = np.broadcast_to(pixels[..., :3], (9, 7, 3))
    if channels == 4:
        expected = over(Image.fromarray(pixels.astype(np.uint8)), "white")
    assert np.abs(decode_image(buffer.getvalue()).astype(int) - expected).max() <= (channels == 4)


# --- Bits ---


@pytest.mark.parametrize("largest", [255, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", [b"P5", b"P6"])
def test_pnm_of_any_range(kind: bytes, largest: int):
    values = np.random.default_rng(0).integers(0, largest + 1, (9, 7, 1 if kind == b"P5" else 3))
    stored = values.astype(np.uint8 if largest < 256 else ">u2").tobytes()
    pixels = decode_image(b"%s 7 9 %d\n" % (kind, largest) + stored)
    assert np.abs(pixels - values * (255 / largest)).max() < 1


def files_of_16_bits(values: np.ndarray) -> dict[str, bytes]:
    gray = values[..., 0].astype(np.uint16)
    array = io.BytesIO()
    np.save(array, values.astype(np.uint16))
    return {
        "PNG gray": encode(Image.fromarray(gray), "PNG"),
        "PNG RGB": packed_png(values, 16),
        "array": array.getvalue(),
        "TIFF gray": tiff(page(values[..., :1], MINISBLACK, 16)),
        "TIFF RGB": tiff(page(values, RGB, 16)),
    }


@pytest.mark.parametrize("kind", ["PNG gray", "PNG RGB", "array", "TIFF gray", "TIFF RGB"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_fewer_bits_than_16_that_hold_them_are_told(kind: str, bits: int):
    values = np.random.default_rng(0).integers(0, 2**bits, (9, 7, 3))
    values[0, 0] = 2**bits - 1
    told: list[str] = []
    pixels = decode_image(files_of_16_bits(values)[kind], warn=told.append)
    assert np.array_equal(pixels[..., 0], values[..., 0] >> 8)
    assert len(told) == (bits < 16)
    assert all("nearly black" in doubt for doubt in told)


def test_inverted_values_of_fewer_bits_are_told_too():
    told: list[str] = []
    values = np.random.default_rng(0).integers(0, 4096, (9, 7, 1))
    pixels = decode_image(tiff(page(values, MINISWHITE, 16)), warn=told.append)
    assert pixels.min() >= 240
    assert len(told) == 1
    decode_image(tiff(page(values, MINISWHITE, 12)), warn=told.append)
    assert len(told) == 1


@pytest.mark.parametrize("opacity", [0, 1])
def test_an_image_that_is_transparent_everywhere_is_told(small: Image.Image, opacity: int):
    told: list[str] = []
    image = small.convert("RGBA")
    image.putalpha(opacity)
    decode_image(encode(image, "PNG"), warn=told.append)
    assert told == ["transparent everywhere: it shows the background alone"][opacity:]


# --- Texts and profiles of a PNG ---


LONG = zlib.compress(b"a" * 2_000_000)
TEXTS = {
    "zTXt": chunk(b"zTXt", b"prompt\0\0" + LONG),
    "iTXt": chunk(b"iTXt", b"prompt\0\1\0\0\0" + LONG),
    "iCCP": chunk(b"iCCP", b"profile\0\0" + LONG),
    "tEXt": chunk(b"tEXt", b"prompt\0" + b"a" * 70_000_000),
    "many": chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b"a" * 900_000)) * 80,
    "damaged": chunk(b"tEXt", b"prompt\0text")[:-1] + b"!",
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("behind", [False, True])
def test_texts_lose_no_image(small: Image.Image, kind: str, behind: bool):
    """As image generators write them: settings and prompts of more than a megabyte."""
    data = encode(small, "PNG", exif=oriented_exif(6))
    text = TEXTS[kind]
    data = data[:-12] + text + data[-12:] if behind else png_with(data, text)
    np.testing.assert_array_equal(decode_image(data), np.rot90(np.asarray(small), -1))


def test_a_real_png_with_a_long_text():
    file = REAL_DATA / "files" / "big_ztxt.png"
    if not file.is_file():
        pytest.skip(f"no {file}")
    assert decode_image(file.read_bytes()).shape == (64, 48, 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_one_pixel(format: str):
    pixels = decode_image(encode(Image.new("RGB", (1, 1), (200, 200, 200)), format))
    np.testing.assert_array_equal(pixels, np.full((1, 1, 3), 200, np.uint8))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(small: Image.Image, format: str, orientation: int):
    data = encode(small, format, exif=oriented_exif(orientation))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((64, 48) if orientation < 5 else (48, 64))
    expected = np.asarray(upright.convert("RGB"))
    assert decode_image(data).shape == expected.shape
    assert np.abs(decode_image(data).astype(int) - expected).max() <= 2
    if format == "JPEG":
        assert jpeg_size(data) == expected.shape[:2]


def test_orientation_is_found_behind_other_segments(small: Image.Image):
    data = encode(small, "JPEG", exif=oriented_exif(6))
    comment = b"\xff\xfe" + struct.pack(">H", 1002) + b"\xff" * 1000
    assert jpeg_size(data[:2] + comment + data[2:]) == (64, 48)


@pytest.mark.parametrize("orientation", [0, 9, 70])
def test_impossible_orientation_is_ignored(small: Image.Image, orientation: int):
    assert decode_image(encode(small, "JPEG", exif=oriented_exif(orientation))).shape == (48, 64, 3)


def test_damaged_exif_is_ignored(small: Image.Image):
    data = bytearray(encode(small, "JPEG", exif=oriented_exif(6)))
    start = data.index(b"Exif\0\0") + 6
    data[start : start + 8] = b"garbage!"
    np.testing.assert_array_equal(decode_image(bytes(data)), decode_image(encode(small, "JPEG")))


@pytest.mark.parametrize(
    ("min_size", "shape"),
    [
        ((427, 640), (427, 640)),
        ((214, 100), (427, 640)),  # 427 < 2 * 214
        ((213, 320), (214, 320)),
        ((100, 160), (107, 160)),
        ((10, 10), (54, 80)),  # an eighth is the least
    ],
)
def test_min_size_shrinks_while_decoding(photo_jpeg: bytes, photo: np.ndarray, min_size, shape):
    pixels = decode_image(photo_jpeg, min_size=min_size)
    assert pixels.shape == (*shape, 3)
    k = round(640 / shape[1])
    whole = np.pad(photo, ((0, shape[0] * k - 427), (0, shape[1] * k - 640), (0, 0)), mode="edge")
    averaged = whole.reshape(shape[0], k, shape[1], k, 3).mean((1, 3))
    assert np.abs(pixels - averaged).mean() < 0.6  # rounding, of colour conversion too


def test_min_size_counts_after_orientation(photo: np.ndarray):
    data = encode(Image.fromarray(photo), "JPEG", exif=oriented_exif(6))  # 640 x 427 upright
    assert decode_image(data, min_size=(320, 213)).shape == (320, 214, 3)
    assert decode_image(data, min_size=(213, 320)).shape == (640, 427, 3)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_truncated_files_are_corrupt(photo: np.ndarray, format: str, fraction: float):
    data = encode(Image.fromarray(photo), format)
    with pytest.raises(CorruptImageError):
        decode_image(data[: int(fraction * len(data))])


def test_surplus_bytes_are_harmless(photo_jpeg: bytes, photo: np.ndarray):
    """A camera's trailing data, or bytes before the end marker, lose no pixel."""
    np.testing.assert_array_equal(decode_image(photo_jpeg + b"trailer"), photo)
    padded = photo_jpeg[:-2] + b"\0" * 16 + photo_jpeg[-2:]
    assert np.abs(decode_image(padded).astype(int) - photo).max() <= 2


def test_empty_and_unknown_data():
    with pytest.raises(CorruptImageError, match="0 bytes"):
        decode_image(b"")
    with pytest.raises(
        CorruptImageError, match=r"cannot identify .* its first bytes are b'<html>404 not fo'"
    ) as error:
        decode_image(b"<html>404 not found</html>")
    assert "0x" not in str(error.value)


def test_formats_that_start_programs_are_refused():
    with pytest.raises(CorruptImageError, match="cannot identify"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


def test_unknown_range_is_refused():
    data = encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with pytest.raises(CorruptImageError, match=r"samples of 32 bits .* expected 8 or 16 bits"):
        decode_image(data)


def test_decompression_bombs_are_refused_from_the_header(small: Image.Image):
    side = 20_000
    assert side * side > MAX_PIXELS
    jpeg = with_jpeg_size(encode(small, "JPEG"), side, side)
    with pytest.raises(CorruptImageError, match="20000 x 20000 pixels: more than"):
        decode_image(jpeg)
    with pytest.raises(CorruptImageError, match="20000 x 20000 pixels: more than"):
        jpeg_size(jpeg)
    png = encode(Image.new("1", (side, side)), "PNG")
    assert len(png) < 100_000
    with pytest.raises(CorruptImageError, match="pixels"):
        decode_image(png)


def test_fuzz_never_fails_in_another_way(small: Image.Image):
    """Mutated files decode or are corrupt: nothing else is raised, and nothing hangs."""
    decoded = corrupt = 0
    for data in mutations(originals(small), 2000, seed=0):
        try:
            pixels = decode_image(data)
        except CorruptImageError:
            corrupt += 1
        else:
            decoded += 1
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
            assert pixels.size > 0
    assert decoded > 200
    assert corrupt > 200
