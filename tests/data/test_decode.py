import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from benchmarks.faults.hostile import encode, mutations, oriented_exif, originals, with_jpeg_size
from vir_jax.data import CorruptImageError, decode_image
from vir_jax.data.decode import MAX_PIXELS, jpeg_size


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
    np.testing.assert_array_equal(decode_image(data), np.asarray(image.convert("RGB")))


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
    with pytest.raises(CorruptImageError, match="cannot identify"):
        decode_image(b"<html>404 not found</html>")


def test_formats_that_start_programs_are_refused():
    with pytest.raises(CorruptImageError, match="cannot identify"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


def test_unknown_range_is_refused():
    data = encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with pytest.raises(CorruptImageError, match="expected 8 or 16 bits"):
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
