import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vir_jax.data import randaugment as ra

FILL = (124, 116, 104)


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(params=["noise", "photo", "dark photo", "one colour", "two colours", "one pixel"])
def image(request, photo: np.ndarray) -> np.ndarray:
    match request.param:
        case "noise":
            return random_image(33, 47)
        case "photo":
            return photo[50:274, 100:324]
        case "dark photo":
            return photo[50:274, 100:324] // 3 + 20
        case "one colour":
            return np.full((10, 12, 3), (10, 200, 90), np.uint8)
        case "two colours":
            return np.where(np.arange(120).reshape(10, 12, 1) % 7 < 2, 40, (10, 200, 90)).astype(np.uint8)
        case _:
            return np.full((1, 1, 3), (1, 2, 3), np.uint8)


# --- Against Pillow ---


def test_auto_contrast_equals_pillow(image: np.ndarray):
    expected = np.asarray(ImageOps.autocontrast(Image.fromarray(image)))
    np.testing.assert_array_equal(ra.auto_contrast(image), expected)


def test_equalize_equals_pillow(image: np.ndarray):
    np.testing.assert_array_equal(ra.equalize(image), np.asarray(ImageOps.equalize(Image.fromarray(image))))


def test_invert_equals_pillow(image: np.ndarray):
    np.testing.assert_array_equal(ra.invert(image), np.asarray(ImageOps.invert(Image.fromarray(image))))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_posterize_equals_pillow(image: np.ndarray, bits: int):
    expected = np.asarray(ImageOps.posterize(Image.fromarray(image), bits))
    np.testing.assert_array_equal(ra.posterize(image, bits), expected)


@pytest.mark.parametrize("threshold", [0, 26, 128, 255, 256])
def test_solarize_equals_pillow(image: np.ndarray, threshold: int):
    expected = np.asarray(ImageOps.solarize(Image.fromarray(image), threshold))
    np.testing.assert_array_equal(ra.solarize(image, threshold), expected)


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.5, 1.0, 1.5, 1.9])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ra.brightness, ImageEnhance.Brightness),
        (ra.contrast, ImageEnhance.Contrast),
        (ra.color, ImageEnhance.Color),
    ],
)
def test_enhancing_equals_pillow(image: np.ndarray, ours, theirs, factor: float):
    expected = np.asarray(theirs(Image.fromarray(image)).enhance(factor))
    # Pillow and OpenCV round the gray value, then the blend, differently: one level each, times the factor.
    assert np.abs(ours(image, factor).astype(int) - expected).max() <= (1 if ours is ra.brightness else 2)


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.5, 1.0, 1.5, 1.9])
def test_sharpness_equals_pillow(image: np.ndarray, factor: float):
    if min(image.shape[:2]) < 3:
        np.testing.assert_array_equal(ra.sharpness(image, factor), image)
        return
    expected = np.asarray(ImageEnhance.Sharpness(Image.fromarray(image)).enhance(factor))
    assert np.abs(ra.sharpness(image, factor).astype(int) - expected).max() <= 2


@pytest.mark.parametrize(
    "matrix",
    [ra.shear_x(0.27), ra.shear_y(-0.27), ra.translation(20.4, 0.0), ra.translation(0.0, -7.7)],
    ids=["shear_x", "shear_y", "translation_x", "translation_y"],
)
def test_affine_equals_pillow(photo: np.ndarray, matrix: np.ndarray):
    smooth = np.asarray(Image.fromarray(photo[50:274, 100:324]).filter(ImageFilter.GaussianBlur(2)))
    expected = Image.fromarray(smooth).transform(
        (224, 224), Image.Transform.AFFINE, tuple(matrix.ravel()), Image.Resampling.BILINEAR, fillcolor=FILL
    )
    difference = np.abs(ra.affine(smooth, matrix, cv2.INTER_LINEAR, FILL).astype(int) - np.asarray(expected))
    # OpenCV blends the outermost pixels with the fill, Pillow does not: a line of one or two pixels.
    assert np.mean(difference.max(-1) > 4) < 0.015


@pytest.mark.parametrize("degrees", [27.0, -13.0])
def test_rotation_equals_pillow(photo: np.ndarray, degrees: float):
    smooth = np.asarray(Image.fromarray(photo[50:250, 100:324]).filter(ImageFilter.GaussianBlur(2)))
    expected = np.asarray(Image.fromarray(smooth).rotate(degrees, Image.Resampling.BILINEAR, fillcolor=FILL))
    ours = ra.affine(smooth, ra.rotation(degrees, 200, 224), cv2.INTER_LINEAR, FILL)
    assert np.mean(np.abs(ours.astype(int) - expected).max(-1) > 4) < 0.015


# --- By hand ---


def test_solarize_add_by_hand():
    image = np.array([[[0, 100, 127], [128, 200, 255]]], np.uint8)
    expected = np.array([[[99, 199, 226], [128, 200, 255]]], np.uint8)
    np.testing.assert_array_equal(ra.solarize_add(image, 99), expected)


def test_posterize_to_no_bits_is_black():
    assert not ra.posterize(random_image(5, 5), 0).any()


@pytest.mark.parametrize("interpolation", [cv2.INTER_LINEAR, cv2.INTER_CUBIC])
def test_translation_by_whole_pixels(interpolation: int):
    image = random_image(12, 15)
    shifted = ra.affine(image, ra.translation(3.0, -2.0), interpolation, FILL)
    np.testing.assert_array_equal(shifted[2:, :-3], image[:-2, 3:])
    assert (shifted[:2] == FILL).all()
    assert (shifted[:, -3:] == FILL).all()


@pytest.mark.parametrize("size", [8, 9])
def test_rotation_by_quarter_turns(size: int):
    image = random_image(size, size)
    for quarters in range(4):
        turned = ra.affine(image, ra.rotation(90.0 * quarters, size, size), cv2.INTER_LINEAR, FILL)
        np.testing.assert_array_equal(turned, np.rot90(image, quarters))


def test_levels_of_magnitude_nine():
    """m9: what the tables of timm's "increasing" operations give at a level of 0.9."""
    image = random_image(20, 30)
    for name, expected in {
        "posterize": ra.posterize(image, 1),
        "solarize": ra.solarize(image, 26),
        "solarize_add": ra.solarize_add(image, 99),
    }.items():
        np.testing.assert_array_equal(ra._TABLES[name](image, 0.9), expected)
    for name, expected in {
        "rotate": ra.rotation(-27.0, 20, 30),
        "shear_x": ra.shear_x(-0.27),
        "shear_y": ra.shear_y(-0.27),
        "translate_x": ra.translation(-0.405 * 30, 0.0),
        "translate_y": ra.translation(0.0, -0.405 * 20),
    }.items():
        np.testing.assert_allclose(ra._GEOMETRIC[name](-0.9, 20, 30), expected)


def test_the_fifteen_operations():
    assert len(ra.OPERATIONS) == len(set(ra.OPERATIONS)) == 15


def test_higher_levels_change_more(photo: np.ndarray):
    """ "Increasing": of every operation that has a strength."""
    image = photo[50:114, 100:164]
    for name in ("posterize", "solarize", "solarize_add"):
        changes = [np.abs(ra._TABLES[name](image, v).astype(int) - image).mean() for v in (0.1, 0.5, 0.9)]
        assert changes == sorted(changes), name
        assert changes[0] < changes[-1], name


# --- The policy ---


def policy(image: np.ndarray, seed: int, **changes) -> np.ndarray:
    arguments = {
        "num_ops": 2,
        "magnitude": 9.0,
        "magnitude_std": 0.5,
        "interpolations": (cv2.INTER_LINEAR, cv2.INTER_CUBIC),
        "fill": FILL,
    }
    return ra.randaugment(image, np.random.default_rng(seed), **(arguments | changes))


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**32), st.floats(0.0, 10.0))
def test_policy_keeps_shape_and_dtype_and_its_input(height: int, width: int, seed: int, magnitude: float):
    image = random_image(height, width, seed)
    before = image.copy()
    result = policy(image, seed, num_ops=4, magnitude=magnitude)
    assert result.shape == image.shape
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(policy(image, seed, num_ops=4, magnitude=magnitude), result)


def test_half_of_the_chosen_operations_act():
    image = random_image(16, 16)
    unchanged = [np.array_equal(policy(image, seed, num_ops=1), image) for seed in range(1000)]
    # Besides one half, equalise and auto-contrast may leave noise as it is.
    assert 0.45 < np.mean(unchanged) < 0.6


def test_every_operation_is_drawn(monkeypatch: pytest.MonkeyPatch):
    """Also: magnitudes scatter around the mean, are clipped at 10, and their sign is random."""
    levels: list[float] = []

    def spy(level: float, height: int, width: int) -> np.ndarray:
        levels.append(level)
        return ra.translation(0.0, 0.0)

    drawn = set()
    for name in ra.OPERATIONS:
        if name in ra._GEOMETRIC:
            monkeypatch.setitem(ra._GEOMETRIC, name, spy)
        else:
            table = ra._TABLES if name in ra._TABLES else ra._ENHANCING
            monkeypatch.setitem(table, name, lambda image, _, name=name: drawn.add(name) or image)
    image = random_image(4, 4)
    for seed in range(2000):
        policy(image, seed)
    assert drawn == {*ra._TABLES, *ra._ENHANCING}
    magnitudes = 10 * np.abs(levels)
    assert len(levels) == pytest.approx(2000 * 2 / 2 * 5 / 15, rel=0.15)
    assert magnitudes.mean() == pytest.approx(9, abs=0.1)
    assert magnitudes.std() == pytest.approx(0.5, abs=0.07)
    assert magnitudes.max() <= 10
    assert np.mean(np.array(levels) > 0) == pytest.approx(0.5, abs=0.08)
    assert not math.isclose(magnitudes.min(), magnitudes.max())
