"""PNG files row by row: read again by Pillow as what was written; nothing is left of what breaks off."""

import numpy as np
import pytest
from PIL import Image

from vir_jax.data.masks import decode_mask
from vir_jax.inference.png_rows import PngRows
from vir_jax.label_maps import palette


def test_rows_are_read_again(tmp_path):
    rng = np.random.default_rng(0)
    labels, pixels = rng.integers(0, 256, (9, 5), np.uint8), rng.integers(0, 256, (9, 5, 3), np.uint8)
    with (
        PngRows(tmp_path / "mask.png", width=5, height=9, palette=palette()) as mask,
        PngRows(tmp_path / "rgb.png", width=5, height=9) as rgb,
    ):
        for rows in (slice(0, 4), slice(4, 4), slice(4, 9)):
            mask.write(labels[rows])
            rgb.write(pixels[rows])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "rgb.png")), pixels)
    np.testing.assert_array_equal(decode_mask((tmp_path / "mask.png").read_bytes()), labels)
    shown = np.asarray(Image.open(tmp_path / "mask.png").convert("RGB"))
    np.testing.assert_array_equal(shown, palette()[labels])


def test_what_breaks_off_leaves_nothing(tmp_path):
    def write(*shapes):
        with PngRows(tmp_path / "mask.png", width=5, height=3, palette=palette()) as png:
            for shape in shapes:
                png.write(np.zeros(shape, np.uint8))

    with pytest.raises(ValueError, match=r"mask.png: 2 rows were written; expected 3"):
        write((2, 5))
    with pytest.raises(
        ValueError, match=r"rows of shape \(2, 5\) after 2 of 3; expected \[n, 5\], n at most 1"
    ):
        write((2, 5), (2, 5))
    with pytest.raises(ValueError, match=r"rows of shape \(1, 4\) after 0 of 3"):
        write((1, 4))
    assert list(tmp_path.iterdir()) == []
    write((3, 5))
    assert [path.name for path in tmp_path.iterdir()] == ["mask.png"]
