"""Zarr arrays and OME-Zarr images, as tensorstore writes them."""

import json

import numpy as np
import pytest
import tensorstore

from vir_jax.data import CorruptImageError
from vir_jax.inference.files import open_image
from vir_jax.inference.predict import find_images

PIXELS = np.random.default_rng(0).integers(256, size=(150, 40, 3), dtype=np.uint8)


def write(path, pixels, driver="zarr", chunks=(32, 16)):
    path.mkdir(parents=True)
    store = tensorstore.open(
        {"driver": driver, "kvstore": {"driver": "file", "path": str(path)}},
        create=True,
        dtype=pixels.dtype,
        shape=pixels.shape,
        chunk_layout=tensorstore.ChunkLayout(
            chunk_shape=[min(c, n) for c, n in zip((*chunks, 4, 4, 4), pixels.shape, strict=False)]
        ),
    ).result()
    store[...] = pixels
    return path


def read(path, **options):
    image = open_image(path, **options)
    assert image.obstacle is None
    pixels = np.concatenate(list(image.strips()))
    assert pixels.shape == (image.height, image.width, 3)
    return pixels


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
def test_an_array(tmp_path, driver):
    path = write(tmp_path / "x.zarr", PIXELS, driver)
    np.testing.assert_array_equal(read(path), PIXELS)
    np.testing.assert_array_equal(read(path, window=(7, 30, 9, 100)), PIXELS[30:130, 7:16])
    assert list(find_images(path)) == [path]


def test_gray_alpha_and_sixteen_bits(tmp_path):
    gray = write(tmp_path / "gray", PIXELS[..., 0])
    np.testing.assert_array_equal(read(gray), np.repeat(PIXELS[..., :1], 3, axis=2))
    clear = write(tmp_path / "alpha", np.dstack([PIXELS, np.zeros((150, 40), np.uint8)]))
    np.testing.assert_array_equal(read(clear, background=(1, 2, 3))[0, 0], (1, 2, 3))
    deep = write(tmp_path / "deep", PIXELS.astype(np.uint16) << 8)
    np.testing.assert_array_equal(read(deep), PIXELS)


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
def test_the_largest_image_of_an_ome_zarr(tmp_path, driver):
    path = tmp_path / "slide.zarr"
    write(path / "0", np.moveaxis(PIXELS, -1, 0)[None, :, None], driver, chunks=(1, 3, 1))
    write(path / "1", np.moveaxis(PIXELS[::2, ::2], -1, 0)[None, :, None], driver, chunks=(1, 3, 1))
    scales = [{"axes": [{"name": x} for x in "tczyx"], "datasets": [{"path": "0"}, {"path": "1"}]}]
    if driver == "zarr":
        (path / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
        (path / ".zattrs").write_text(json.dumps({"multiscales": scales}))
    else:
        attributes = {"ome": {"version": "0.5", "multiscales": scales}}
        told = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        (path / "zarr.json").write_text(json.dumps(told))
    np.testing.assert_array_equal(read(path), PIXELS)


def test_what_is_no_image(tmp_path):
    with pytest.raises(CorruptImageError, match=r"shape \(2, 150, 40, 3\) with the axes 'yxc'"):
        open_image(write(tmp_path / "frames", np.stack([PIXELS, PIXELS])))
    with pytest.raises(CorruptImageError, match="float32"):
        open_image(write(tmp_path / "floats", PIXELS.astype(np.float32)))
    (tmp_path / "group").mkdir()
    (tmp_path / "group" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    (tmp_path / "group" / ".zattrs").write_text("{}")
    with pytest.raises(CorruptImageError, match="no OME-Zarr image"):
        open_image(tmp_path / "group")
    damaged = write(tmp_path / "damaged", PIXELS)
    (damaged / "2.1.0").write_bytes(b"nonsense")
    with pytest.raises(CorruptImageError):
        read(damaged)
