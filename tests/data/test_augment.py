import dataclasses
import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vir_jax.data import AugmentConfig, CorruptImageError, augment_image
from vir_jax.data.augment import color_jitter, random_box, random_erase, random_pad_crop

OFF = AugmentConfig(crop="none", hflip=0.0, randaugment_ops=0, color_jitter=0.0, erase=0.0)
RECIPE = AugmentConfig(crop="resized", hflip=0.5, randaugment_ops=2, erase=0.25)  # ImageNet's


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(height: int, width: int) -> np.ndarray:
    return rng(7).integers(0, 256, (height, width, 3), np.uint8)


def test_by_default_all_is_off():
    assert AugmentConfig() == OFF


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("crop", "center", "crop is 'center': expected one of resized, pad, none"),
        ("interpolation", "nearest", "expected one of bilinear, bicubic, random"),
        ("hflip", 1.5, "hflip is 1.5: expected a probability"),
        ("erase", -0.1, "erase is -0.1: expected a probability"),
        ("crop_scale", (0.0, 1.0), "expected 0 < low <= high"),
        ("crop_scale", (0.5, 1.5), "cannot be larger than the image"),
        ("crop_ratio", (2.0, 1.0), "expected 0 < low <= high"),
        ("randaugment_magnitude", 11.0, "expected 0 to 10"),
        ("randaugment_ops", -1, "expected 0 (off) or more"),
        ("crop_padding", -1, "expected 0 (off) or more"),
        ("color_jitter", -0.4, "expected 0 (off) or more"),
    ],
)
def test_impossible_values_are_refused(field: str, value, message: str):
    # The constructor's own check, without the type checker in front of it.
    config = object.__new__(AugmentConfig)
    for name, default in dataclasses.asdict(AugmentConfig()).items():
        object.__setattr__(config, name, default)
    object.__setattr__(config, field, value)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        config.__post_init__()


# --- Everything off, or one thing on ---


def test_everything_off_is_the_identity():
    image = noise(8, 8)
    np.testing.assert_array_equal(augment_image(image, 8, OFF, rng()), image)


def test_flip():
    image = noise(8, 12)
    flipped = augment_image(image, (8, 12), dataclasses.replace(OFF, hflip=1.0), rng())
    np.testing.assert_array_equal(flipped, image[:, ::-1])
    half = dataclasses.replace(OFF, hflip=0.5)
    share = np.mean(
        [not np.array_equal(augment_image(image, (8, 12), half, rng(s)), image) for s in range(500)]
    )
    assert share == pytest.approx(0.5, abs=0.07)


def test_color_jitter_acts_only_without_randaugment(photo: np.ndarray):
    def view(**changes) -> np.ndarray:
        return augment_image(photo, 64, dataclasses.replace(OFF, **changes), rng(3))

    np.testing.assert_array_equal(
        view(randaugment_ops=2, color_jitter=0.4), view(randaugment_ops=2, color_jitter=0.0)
    )
    assert not np.array_equal(view(color_jitter=0.4), view(color_jitter=0.0))


# --- Crops ---


@settings(deadline=None)
@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 2**32))
def test_random_box_lies_inside(height: int, width: int, seed: int):
    top, left, h, w = random_box(height, width, (0.08, 1.0), (3 / 4, 4 / 3), rng(seed))
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h > 0
    assert w > 0


def test_random_box_has_the_distribution_asked_for():
    boxes = np.array([random_box(375, 500, (0.08, 1.0), (3 / 4, 4 / 3), rng(s)) for s in range(3000)])
    areas = boxes[:, 2] * boxes[:, 3] / (375 * 500)
    ratios = boxes[:, 3] / boxes[:, 2]
    assert areas.min() == pytest.approx(0.08, abs=0.01)
    assert areas.max() > 0.95
    # Uniform, but that large boxes often do not fit and are drawn again.
    assert np.mean(areas < 0.3) == pytest.approx((0.3 - 0.08) / 0.92, abs=0.1)
    assert ratios.min() == pytest.approx(3 / 4, abs=0.02)
    assert ratios.max() == pytest.approx(4 / 3, abs=0.02)
    assert np.median(ratios) == pytest.approx(1, abs=0.06)
    assert len(np.unique(boxes[:, 0])) > 200
    assert len(np.unique(boxes[:, 1])) > 200


@pytest.mark.parametrize(("height", "width", "h", "w"), [(10, 1000, 10, 13), (1000, 10, 13, 10)])
def test_random_box_falls_back_to_the_centre(height: int, width: int, h: int, w: int):
    """Boxes of at least 90 % of the area cannot have a ratio near 1 here."""
    top, left, box_h, box_w = random_box(height, width, (0.9, 1.0), (3 / 4, 4 / 3), rng())
    assert (box_h, box_w) == (h, w)
    assert (top, left) == ((height - h) // 2, (width - w) // 2)


def test_pad_crop_reaches_every_shift():
    image = noise(6, 5)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y : y + 6, x : x + 5].tobytes() for y in range(5) for x in range(5)}
    assert len(windows) == 25
    assert {random_pad_crop(image, 2, rng(s)).tobytes() for s in range(400)} == windows
    np.testing.assert_array_equal(random_pad_crop(image, 0, rng()), image)


def test_shrinking_in_the_decoder_does_not_move_the_box():
    """Views of a large JPEG, most decoded at a half or a quarter, show the same place as views of its pixels.

    Red is the column, green the row: a displacement by 10 pixels changes a value by 1.
    """
    y, x = np.mgrid[:1708, :2560]
    pixels = np.stack([x // 10, y // 10, np.full_like(x, 128)], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=98, subsampling=0)
    config = dataclasses.replace(OFF, crop="resized", interpolation="bilinear")
    for seed in range(12):
        from_file = augment_image(buffer.getvalue(), 96, config, rng(seed)).astype(int)
        from_pixels = augment_image(pixels, 96, config, rng(seed))
        assert np.ptp(from_pixels[..., 0]) > 50
        assert np.abs(from_file - from_pixels).max() <= 4


# --- Erasing ---


def test_erasing_fills_a_rectangle_with_normalised_noise():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = np.zeros((100, 120, 3), np.uint8)
    values = []
    for seed in range(200):
        erased = random_erase(image, mean, std, rng(seed))
        assert erased is not image
        rows, columns = np.nonzero(erased.any(-1))
        h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert 0.018 < h * w / (100 * 120) < 0.345
        assert 0.28 < h / w < 3.6
        inside = erased[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        values.append((inside.reshape(-1, 3) / 255 - mean) / std)
    assert not image.any()
    normalised = np.concatenate(values)
    # Standard normal, clipped to [-2.1, 2.2] and more: a little narrower.
    np.testing.assert_allclose(normalised.mean(0), 0, atol=0.03)
    assert ((normalised.std(0) > 0.94) & (normalised.std(0) < 1.0)).all()
    correlation = np.corrcoef(normalised.T)[np.triu_indices(3, 1)]
    np.testing.assert_allclose(correlation, 0, atol=0.02)  # every channel on its own


def test_erasing_has_its_probability():
    image = noise(32, 32)
    config = dataclasses.replace(OFF, erase=0.25)
    changed = [not np.array_equal(augment_image(image, 32, config, rng(s)), image) for s in range(1000)]
    assert np.mean(changed) == pytest.approx(0.25, abs=0.05)


# --- Colour jitter ---


def test_color_jitter_stays_within_its_strength():
    gray = np.full((8, 8, 3), 100, np.uint8)  # contrast and saturation leave it; brightness scales it
    values = [int(color_jitter(gray, 0.4, rng(s))[0, 0, 0]) for s in range(300)]
    assert 59 <= min(values) < 65
    assert 135 < max(values) <= 140


# --- All of it ---


@pytest.mark.parametrize("encoded", [True, False])
@pytest.mark.parametrize("size", [224, (32, 48), 1])
def test_full_recipe(photo_jpeg: bytes, photo: np.ndarray, encoded: bool, size):
    shape = (size, size, 3) if isinstance(size, int) else (*size, 3)
    views = [augment_image(photo_jpeg if encoded else photo, size, RECIPE, rng(s)) for s in range(20)]
    for seed, view in enumerate(views):
        assert view.shape == shape
        assert view.dtype == np.uint8
        again = augment_image(photo_jpeg if encoded else photo, size, RECIPE, rng(seed))
        np.testing.assert_array_equal(again, view)
    assert len({view.tobytes() for view in views}) > 15 or math.prod(shape) == 3


def test_corrupt_images_raise(photo_jpeg: bytes):
    for crop in ("resized", "pad", "none"):
        with pytest.raises(CorruptImageError):
            augment_image(photo_jpeg[:5000], 32, AugmentConfig(crop=crop), rng())


def inverted(image, rng):
    return 255 - image


def test_a_transform_of_ones_own_comes_last():
    image = np.random.default_rng(0).integers(256, size=(6, 8, 3), dtype=np.uint8)
    plain = augment_image(image, 4, AugmentConfig(hflip=0.5), np.random.default_rng(1))
    for transform in (inverted, f"{__name__}:inverted"):
        config = AugmentConfig(hflip=0.5, transform=transform)
        np.testing.assert_array_equal(augment_image(image, 4, config, np.random.default_rng(1)), 255 - plain)


def test_a_transform_draws_from_the_generator_of_the_example():
    image = np.zeros((4, 4, 3), np.uint8)
    config = AugmentConfig(transform=lambda view, rng: rng.integers(256, size=view.shape, dtype=np.uint8))
    first, again, other = (augment_image(image, 4, config, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_what_a_transform_may_not_do():
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(
        ValueError, match=r"augment.transform gave float64 \(4, 4, 3\): expected uint8 \(4, 4, 3\)"
    ):
        augment_image(
            image, 4, AugmentConfig(transform=lambda view, rng: view / 255), np.random.default_rng(0)
        )
    with pytest.raises(ValueError, match=r"augment\.transform is 'no\.such:thing', which cannot be imported"):
        AugmentConfig(transform="no.such:thing")
