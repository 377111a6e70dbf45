"""Parts of large images, and images that libvips reads."""

import numpy as np
import pytest
from PIL import Image

from vir_jax.data import CorruptImageError, vips
from vir_jax.inference import files
from vir_jax.inference.files import open_image

PIXELS = np.random.default_rng(0).integers(256, size=(300, 40, 3), dtype=np.uint8)


def save(path, pixels=PIXELS):
    if path.suffix == ".npy":
        np.save(path, pixels)
    else:
        Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("name", ["x.png", "x.npy", "x.tif"])
@pytest.mark.parametrize("window", [(0, 0, 40, 300), (7, 130, 9, 150), (39, 299, 1, 1), (0, 0, 1, 1)])
def test_a_window(tmp_path, name, window):
    x, y, width, height = window
    image = open_image(save(tmp_path / name), window=window)
    assert (image.height, image.width) == (height, width)
    np.testing.assert_array_equal(np.concatenate(list(image.strips())), PIXELS[y : y + height, x : x + width])


@pytest.mark.parametrize("window", [(-1, 0, 4, 4), (0, 0, 41, 4), (0, 297, 4, 4), (0, 0, 4, 0)])
def test_a_window_is_inside(tmp_path, window):
    with pytest.raises(CorruptImageError, match=r"40 x 300 pixels, of which x=.* is no part"):
        open_image(save(tmp_path / "x.npy"), window=window)


@pytest.fixture
def large(monkeypatch):
    """Images of more than 5,000 pixels count as large."""
    pytest.importorskip("pyvips")
    monkeypatch.setattr(vips, "MAX_PIXELS", 5000)
    monkeypatch.setattr(files, "decode_image", None)  # Nothing is decoded whole.


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("window", [None, (7, 130, 9, 150)])
@pytest.mark.parametrize("kind", ["rgb", "gray", "alpha"])
def test_large_images_of_any_format(tmp_path, kind, window):
    pixels = {
        "rgb": PIXELS,
        "gray": PIXELS[..., 0],
        "alpha": np.dstack([PIXELS, np.zeros((300, 40), np.uint8)]),
    }[kind]
    image = open_image(save(tmp_path / "x.png", pixels), background=(1, 2, 3), window=window)
    assert image.obstacle is None
    expected = {
        "rgb": PIXELS,
        "gray": np.repeat(PIXELS[..., :1], 3, axis=2),
        "alpha": np.broadcast_to(np.array([1, 2, 3], np.uint8), PIXELS.shape),
    }[kind]
    x, y, width, height = window or (0, 0, 40, 300)
    for _ in range(2):  # They can be read again.
        read = np.concatenate(list(image.strips()))
        np.testing.assert_array_equal(read, expected[y : y + height, x : x + width])


@pytest.mark.usefixtures("large")
def test_large_images_that_end_too_early(tmp_path):
    path = save(tmp_path / "x.png")
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(CorruptImageError):
        list(open_image(path).strips())


@pytest.mark.usefixtures("large")
def test_large_images_that_are_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "x.jpg", exif=exif)
    with pytest.raises(CorruptImageError, match="EXIF orientation turns"):
        open_image(tmp_path / "x.jpg")
