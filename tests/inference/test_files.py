"""Image files in strips: the same pixels as decoded whole, no more of them in memory than a strip, damage told."""

import io
import logging
import os

import numpy as np
import pytest
import tifffile
from PIL import Image

from vir_jax.data import CorruptImageError, decode_image
from vir_jax.inference import files
from vir_jax.inference.files import open_image

PIXELS = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (70, 50, 1), dtype=np.uint8)


def read(path):
    image = open_image(path)
    strips = list(image.strips())
    pixels = np.concatenate(strips)
    assert pixels.shape == (image.height, image.width, 3)
    assert pixels.dtype == np.uint8
    return pixels, len(strips)


TIFFS = {
    "uncompressed": {},
    "strips": {"rowsperstrip": 8, "compression": "zlib"},
    "predictor": {"rowsperstrip": 8, "compression": "zlib", "predictor": True},
    "tiles": {"tile": (16, 32), "compression": "zlib"},
    "uncompressed tiles": {"tile": (32, 16)},
    "big-endian BigTIFF": {"rowsperstrip": 33, "bigtiff": True, "byteorder": ">"},
}


@pytest.mark.parametrize("name", TIFFS)
def test_tiff_in_strips(tmp_path, name):
    path = tmp_path / "image.tif"
    options = dict(TIFFS[name])
    file = {key: options.pop(key) for key in ("bigtiff", "byteorder") if key in options}
    with tifffile.TiffWriter(path, **file) as writer:
        writer.write(PIXELS, photometric="rgb", **options)
    pixels, strips = read(path)
    np.testing.assert_array_equal(pixels, PIXELS)
    assert strips > 1


@pytest.mark.parametrize(
    ("pixels", "rgb"),
    [
        (PIXELS[..., 0], np.repeat(PIXELS[..., :1], 3, 2)),
        (PIXELS.astype(np.uint16) * 256 + 255, PIXELS),
        (np.dstack([PIXELS, ALPHA]), np.rint(PIXELS * (ALPHA / 255) + (255 - ALPHA.astype(float)))),
    ],
    ids=["gray", "16 bit", "with transparency"],
)
@pytest.mark.parametrize("kind", ["npy", "tif", "zlib.tif"])
def test_kinds_of_pixels(tmp_path, pixels, rgb, kind):
    path = tmp_path / f"image.{kind}"
    if kind == "npy":
        np.save(path, pixels)
    else:
        colours = {"photometric": "minisblack" if pixels.ndim == 2 else "rgb"}
        extra = {"extrasamples": ["unassalpha"]} if pixels.shape[2:] == (4,) else {}
        packed = {"compression": "zlib", "rowsperstrip": 16} if kind == "zlib.tif" else {}
        tifffile.imwrite(path, pixels, **colours, **extra, **packed)
    np.testing.assert_array_equal(read(path)[0], rgb)


@pytest.mark.parametrize("kind", ["npy", "tif", "zlib.tif", "png"])
def test_background(tmp_path, kind):
    path = tmp_path / f"image.{kind}"
    pixels = np.dstack([PIXELS, np.zeros_like(ALPHA)])
    if kind == "npy":
        np.save(path, pixels)
    elif kind == "png":
        Image.fromarray(pixels).save(path)
    else:
        compression = "zlib" if kind == "zlib.tif" else None
        tifffile.imwrite(
            path, pixels, photometric="rgb", extrasamples=["unassalpha"], compression=compression
        )
    strips = open_image(path, background=(1, 2, 3)).strips()
    np.testing.assert_array_equal(np.concatenate(list(strips)), np.broadcast_to([1, 2, 3], (70, 50, 3)))


def test_strips_of_inks_and_of_inverted_gray(tmp_path):
    """Colours that need a conversion are read in strips, too."""
    inks = np.dstack([PIXELS, ALPHA])
    tifffile.imwrite(tmp_path / "cmyk.tif", inks, photometric="separated", compression="zlib", rowsperstrip=8)
    pixels, strips = read(tmp_path / "cmyk.tif")
    expected = np.asarray(Image.frombytes("CMYK", (50, 70), inks.tobytes()).convert("RGB"))
    np.testing.assert_array_equal(pixels, expected)
    assert strips == 9
    tifffile.imwrite(tmp_path / "white.tif", ALPHA[..., 0], photometric="miniswhite", rowsperstrip=8)
    np.testing.assert_array_equal(read(tmp_path / "white.tif")[0], np.repeat(255 - ALPHA, 3, 2))


def test_what_is_doubtful_is_told_with_its_name(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="absl")
    for kind in ("npy", "tif", "png"):
        path = tmp_path / f"dark.{kind}"
        gray = PIXELS[..., 0].astype(np.uint16) * 16
        if kind == "npy":
            np.save(path, gray)
        elif kind == "tif":
            tifffile.imwrite(path, gray, photometric="minisblack", rowsperstrip=8)
        else:
            Image.fromarray(gray).save(path)
        read(path)
        assert f"{path}: nearly black" in caplog.messages[-1]
    assert len(caplog.messages) == 3


def test_only_regular_files_are_opened(tmp_path):
    """A pipe would be waited for, a device read for ever."""
    os.mkfifo(tmp_path / "pipe.tif")
    for path, kind in ((tmp_path / "pipe.tif", "pipe"), ("/dev/zero", "device")):
        with pytest.raises(CorruptImageError, match=f"a {kind}; expected a regular file"):
            open_image(path)
    with pytest.raises(IsADirectoryError):
        open_image(tmp_path)
    np.save(tmp_path / "a.npy", PIXELS)
    (tmp_path / "link.npy").symlink_to("a.npy")
    np.testing.assert_array_equal(read(tmp_path / "link.npy")[0], PIXELS)


def test_a_big_endian_array(tmp_path):
    np.save(tmp_path / "image.npy", (PIXELS.astype(">u2") * 256))
    np.testing.assert_array_equal(read(tmp_path / "image.npy")[0], PIXELS)


def test_formats_that_are_decoded_whole(tmp_path):
    for name in ("image.png", "image.jpg", "palette.tif", "turned.tif"):
        image = Image.fromarray(PIXELS)
        options = {}
        if name == "palette.tif":
            image = image.quantize(16)
        if name == "turned.tif":
            options = {"tiffinfo": {274: 6}}
        image.save(tmp_path / name, **options)
        pixels, strips = read(tmp_path / name)
        np.testing.assert_array_equal(pixels, decode_image((tmp_path / name).read_bytes()))
        assert strips == 1
    assert pixels.shape == (50, 70, 3), "orientation is applied"


def test_no_limit_of_pixels_for_strips_and_one_for_whole_images(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_PIXELS", 3000)
    tifffile.imwrite(tmp_path / "strips.tif", PIXELS, photometric="rgb", compression="zlib", rowsperstrip=8)
    np.testing.assert_array_equal(read(tmp_path / "strips.tif")[0], PIXELS)
    tifffile.imwrite(
        tmp_path / "one_strip.tif", PIXELS, photometric="rgb", compression="zlib", rowsperstrip=70
    )
    with pytest.raises(
        CorruptImageError, match="50 x 70 pixels that cannot be read in strips: its strips or"
    ):
        open_image(tmp_path / "one_strip.tif")
    tifffile.imwrite(
        tmp_path / "planes.tif", PIXELS.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"
    )
    with pytest.raises(CorruptImageError, match="colours lie in separate planes"):
        open_image(tmp_path / "planes.tif")


def test_damaged_files(tmp_path):
    def damaged(name, data):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(CorruptImageError) as error:
            read(path)
        return str(error.value)

    buffer = io.BytesIO()
    np.save(buffer, PIXELS)
    damaged("short.npy", buffer.getvalue()[:-1])
    damaged("header.npy", buffer.getvalue()[:20])
    damaged("object.npy", b"\x93NUMPY\x01\0" + buffer.getvalue()[8:].replace(b"|u1", b"|O "))
    np.save(tmp_path / "order.npy", np.asfortranarray(PIXELS))
    assert "Fortran order" in damaged("order.npy", (tmp_path / "order.npy").read_bytes())
    np.save(tmp_path / "float.npy", PIXELS.astype(np.float32))
    assert "3 channels of float32" in damaged("float.npy", (tmp_path / "float.npy").read_bytes())

    for options in ({"compression": "zlib", "rowsperstrip": 8}, {}):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, PIXELS, photometric="rgb", **options)
        data = bytearray(buffer.getvalue())
        assert damaged("short.tif", data[: len(data) * 2 // 3])
        damaged("header.tif", data[:30])
        if options:
            data[-len(data) // 2 : -len(data) // 4] = bytes(len(data) // 4)
            damaged("garbled.tif", data)
    damaged("empty.jpg", b"")
    damaged("text.png", b"no image")
    assert " at 0x" not in damaged("html.jpg", b"<html>404 not found</html>")
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "absent.tif")
