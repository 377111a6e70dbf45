import cv2
import numpy as np
import pytest
from PIL import Image

from vir_jax.data import eval_transform
from vir_jax.data.resize import resize, size_pair


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_size_pair():
    assert size_pair(224) == (224, 224)
    assert size_pair((192, 256)) == (192, 256)


@pytest.mark.parametrize("size", [8, (8, 8)])
def test_eval_transform_is_the_identity_at_equal_size(size):
    image = noise(8, 8)
    np.testing.assert_array_equal(eval_transform(image, size, crop_fraction=1.0), image)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (37, 5), (300, 200)])
@pytest.mark.parametrize("size", [1, 7, (32, 48)])
@pytest.mark.parametrize("crop_fraction", [0.875, 1.0, 0.01])
def test_eval_transform_of_one_colour_is_that_colour(shape, size, crop_fraction: float):
    image = np.full((*shape, 3), (10, 100, 200), np.uint8)
    result = eval_transform(image, size, crop_fraction)
    np.testing.assert_array_equal(result, np.full((*size_pair(size), 3), (10, 100, 200), np.uint8))


def test_eval_transform_is_resize_then_central_crop(photo: np.ndarray):
    """Where resizing the shorter side rounds nothing, the usual recipe's two steps give the same image."""
    square = photo[:400, :400]
    usual = np.asarray(Image.fromarray(square).resize((256, 256), Image.Resampling.BICUBIC))[16:240, 16:240]
    ours = eval_transform(square, 224, crop_fraction=0.875)
    assert ours.shape == usual.shape
    # Only the filter's reach at the border differs: the usual recipe looks beyond the crop.
    assert np.abs(ours[4:-4, 4:-4].astype(int) - usual[4:-4, 4:-4]).max() <= 1


def test_eval_transform_takes_the_centre_in_the_targets_aspect_ratio():
    image = np.zeros((100, 300, 3), np.uint8)
    image[25:75, 100:200] = 255  # the central half of the largest box of ratio 1:2, which is 100 x 200
    assert (eval_transform(image, (50, 100), crop_fraction=0.5) == 255).all()
    whole = eval_transform(image, (50, 100), crop_fraction=1.0)
    assert (whole[[0, -1]] == 0).all()
    assert (whole[:, [0, -1]] == 0).all()


@pytest.mark.parametrize("crop_fraction", [0.0, -1.0, 1.01])
def test_eval_transform_refuses_impossible_fractions(crop_fraction: float):
    with pytest.raises(ValueError, match="expected 0 < crop_fraction <= 1"):
        eval_transform(noise(8, 8), 8, crop_fraction)


@pytest.mark.parametrize("interpolation", [cv2.INTER_LINEAR, cv2.INTER_CUBIC])
@pytest.mark.parametrize("factor", [0.5, 1.05, 1.3, 1.6, 2.0, 2.6, 4.0])
def test_resize_is_close_to_pillows_antialiased_filter(photo: np.ndarray, factor: float, interpolation: int):
    side = round(100 * factor)
    crop = photo[20 : 20 + side, 200 : 200 + side]
    filter = {cv2.INTER_LINEAR: Image.Resampling.BILINEAR, cv2.INTER_CUBIC: Image.Resampling.BICUBIC}
    reference = np.asarray(Image.fromarray(crop).resize((100, 100), filter[interpolation]))
    result = resize(crop, (100, 100), interpolation)
    assert result.shape == (100, 100, 3)
    assert result.dtype == np.uint8
    assert psnr(result, reference) > 31  # dB


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_resize_does_not_alias(factor: int):
    """Stripes finer than the result's pixels become gray, not other stripes."""
    stripes = np.zeros((60 * factor, 60 * factor, 3), np.uint8)
    stripes[:, ::2] = 255
    result = resize(stripes, (60, 60), cv2.INTER_LINEAR)
    assert np.abs(result[:, 1:-1].astype(int) - 127).max() < 255 / factor * 0.6


def test_resize_to_the_same_size_is_the_identity():
    image = noise(9, 13)
    np.testing.assert_array_equal(resize(image, (9, 13), cv2.INTER_CUBIC), image)
