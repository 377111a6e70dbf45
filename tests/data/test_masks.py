"""Masks: read as numbers, cut and turned as their images, their classes matched by name, wrong ones left out."""

import dataclasses
import io

import cv2
import numpy as np
import pytest
from PIL import Image

from vir_jax.data import (
    AugmentConfig,
    augment_image,
    augment_with_mask,
    check_labels,
    eval_loader,
    train_loader,
)
from vir_jax.data.classes import match_classes, select_classes
from vir_jax.data.corrupt import check_examples, read_example
from vir_jax.data.errors import CorruptExampleError, CorruptImageError, TooManyCorruptError
from vir_jax.data.fingerprint import difference, fingerprint
from vir_jax.data.masks import decode_mask, eval_mask, resize_mask
from vir_jax.data.resize import eval_transform
from vir_jax.label_maps import palette

NUMBERS = np.arange(12, dtype=np.uint8).reshape(3, 4)


def png(pixels, mode=None, **options):
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette(palette().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


@dataclasses.dataclass
class Masked:
    """Images whose colour is the number of the class, ten times; all pixels from column 4 on have none."""

    count: int = 8
    class_names: tuple[str, ...] = ("sky", "tree", "road")
    per_pixel: bool = True
    changed: dict[int, dict] = dataclasses.field(default_factory=dict)

    num_classes = property(lambda self: len(self.class_names))

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        mask = np.random.default_rng(index).integers(0, 3, (6, 8), np.uint8)
        mask[:, 4:] = 255
        image = np.repeat((10 * mask)[..., None], 3, axis=-1)
        return {"image": image, "label": mask, **self.changed.get(index, {})}

    def name(self, index):
        return f"masked {index}"


# --- Files ---


@pytest.mark.parametrize("mode", [None, "P"])
def test_a_mask_is_its_numbers(mode):
    np.testing.assert_array_equal(decode_mask(png(NUMBERS, mode)), NUMBERS)


def test_a_mask_of_one_bit():
    np.testing.assert_array_equal(decode_mask(png(NUMBERS > 4)), NUMBERS > 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(np.zeros((3, 4, 3), np.uint8)), "a mask of Pillow's mode RGB: expected a PNG of one number"),
        (png(np.zeros((3, 4), np.uint16)), "a mask of Pillow's mode I;16"),
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\nrest", "PNG|truncated|identify"),
    ],
)
def test_what_is_no_mask_is_said(data, message):
    with pytest.raises(CorruptImageError, match=message):
        decode_mask(data)


# --- Geometry ---


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(crop="resized", crop_scale=(0.2, 1.0), hflip=0.5),
        AugmentConfig(crop="pad", crop_padding=3, hflip=0.5, color_jitter=0.4),
        AugmentConfig(hflip=0.5),
    ],
    ids=lambda config: config.crop,
)
def test_an_image_with_a_mask_is_seen_as_without(config):
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (24, 20, 3), np.uint8), rng.integers(0, 5, (24, 20), np.uint8)
    for seed in range(6):
        expected = augment_image(image, (8, 12), config, np.random.default_rng(seed))
        view, labels = augment_with_mask(image, mask, (8, 12), config, np.random.default_rng(seed))
        np.testing.assert_array_equal(view, expected)
        assert (labels.shape, labels.dtype) == ((8, 12), np.uint8)
        assert set(np.unique(labels)) <= {0, 1, 2, 3, 4, *([255] if config.crop == "pad" else [])}


@pytest.mark.parametrize("crop", ["resized", "pad", "none"])
def test_a_mask_goes_where_its_image_goes(crop):
    """Blocks of one colour, whose class is the colour: but for interpolated edges each pixel has its own."""
    blocks = np.random.default_rng(0).integers(0, 4, (4, 5), np.uint8)
    mask = np.kron(blocks, np.ones((16, 16), np.uint8))
    image = np.repeat((60 * mask + 30)[..., None], 3, axis=-1)
    scale = {"crop_scale": (0.3, 1.0)} if crop == "resized" else {}
    config = AugmentConfig(crop=crop, hflip=0.5, crop_padding=8, interpolation="bilinear", **scale)
    flips = 0
    for seed in range(8):
        view, labels = augment_with_mask(image, mask, (64, 80), config, np.random.default_rng(seed))
        inside = cv2.erode(np.where(labels == 255, 0, 1).astype(np.uint8), np.ones((3, 3))) > 0
        edges = cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8)) > 0
        sure = inside & ~edges
        assert sure.mean() > 0.3
        np.testing.assert_array_equal((view[..., 0][sure].astype(int) - 30 + 30) // 60, labels[sure])
        black = view[..., 0] == 0
        np.testing.assert_array_equal(black, labels == 255)
        flips += crop == "none" and not np.array_equal(labels, mask)
    assert crop != "none" or 0 < flips < 8


def test_masks_are_resized_to_the_nearest():
    np.testing.assert_array_equal(resize_mask(NUMBERS, (6, 8)), np.kron(NUMBERS, np.ones((2, 2))))
    np.testing.assert_array_equal(resize_mask(NUMBERS, (1, 1)), [[6]])
    np.testing.assert_array_equal(resize_mask(NUMBERS, (3, 2), (1, 0, 3, 3)), NUMBERS[:, 1:3])
    wide = np.random.default_rng(0).integers(0, 3, (40, 90), np.uint8)
    image = np.repeat((100 * wide)[..., None], 3, axis=-1)
    # Not resized, the central crop alone.
    np.testing.assert_array_equal(100 * eval_mask(wide, 20, 0.5), eval_transform(image, 20, 0.5)[..., 0])
    assert eval_mask(wide, (40, 90), 1.0) is wide


@pytest.mark.parametrize(
    ("field", "value"), [("randaugment_ops", 2), ("erase", 0.25), ("transform", lambda view, rng: view)]
)
def test_what_masks_cannot_follow_is_refused(field, value):
    image, mask = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match=f"augment.{field} is .*, which changes images and not their masks"):
        augment_with_mask(image, mask, 4, AugmentConfig(**{field: value}), np.random.default_rng(0))


# --- Loaders and what judges examples ---


def test_batches_have_a_label_for_each_pixel():
    config = AugmentConfig(hflip=0.5)
    batches = train_loader(Masked(), batch_size=4, image_size=(6, 8), augment=config, seed=0, num_threads=2)
    batch = next(batches)
    batches.close()
    assert sorted(batch) == ["image", "label"]
    assert (batch["label"].shape, batch["label"].dtype) == ((4, 6, 8), np.uint8)
    known = batch["label"] != 255
    assert known.mean() == 0.5
    np.testing.assert_array_equal(batch["image"][known][:, 0], 10 * batch["label"][known])
    corrupt = Masked(3, changed={1: {"label": np.zeros((5, 8), np.uint8)}})
    first, last = eval_loader(corrupt, batch_size=2, image_size=(6, 8), crop_fraction=1.0, num_threads=2)
    np.testing.assert_array_equal(first["mask"], [True, False])
    np.testing.assert_array_equal(first["label"][0], corrupt[0]["label"])
    assert (last["label"][1] == 255).all()
    assert last["label"].dtype == np.uint8


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.full((6, 8), 3, np.uint8), "the mask has the number 3, not one of 3 classes, nor 255 for none"),
        (np.zeros((6, 8), np.int32), r"mask \(6, 8\) of int32: expected uint8 \[height, width\]"),
        (np.zeros((6, 8, 1), np.uint8), r"mask \(6, 8, 1\) of uint8"),
        (2, "mask int of no dtype"),
    ],
)
def test_wrong_masks_are_corrupt(label, message):
    with pytest.raises(CorruptExampleError, match=message):
        read_example(Masked(changed={1: {"label": label}}), 1)


def test_masks_of_another_size_are_found_before_training():
    source = Masked(changed={i: {"label": np.zeros((8, 6), np.uint8)} for i in range(2)})
    check_examples(source, max_corrupt_fraction=0.01, num_threads=2)
    with pytest.raises(TooManyCorruptError, match="2 of 8 examples were corrupt"):
        check_examples(source, max_corrupt_fraction=0.001, num_threads=2)


def test_classes_of_masks_are_matched_by_name():
    source = Masked()
    matched = match_classes(source, ("road", "car", "sky", "tree"), "the data")
    assert matched.per_pixel
    table = np.full(256, 255, np.uint8)
    table[:3] = 2, 3, 0
    np.testing.assert_array_equal(matched[0]["label"], table[source[0]["label"]])
    with pytest.raises(ValueError, match="classes that the model does not know: 'tree'"):
        match_classes(source, ("road", "sky"), "the data")
    with pytest.raises(CorruptExampleError, match="number 9"):
        match_classes(
            Masked(changed={0: {"label": np.full((6, 8), 9, np.uint8)}}), ("road", "sky", "tree"), "them"
        )[0]
    with pytest.raises(ValueError, match="the data has a class for each pixel"):
        select_classes(source, ["road"], "the data")


def test_other_masks_are_other_data():
    stored = fingerprint(Masked())
    assert difference(stored, fingerprint(Masked())) is None
    changed = Masked(changed={3: {"label": np.zeros((6, 8), np.uint8)}})
    assert "other labels, such as that of example 3" in difference(stored, fingerprint(changed))


def test_labels_are_of_the_kind_that_is_wanted():
    check_labels(Masked(), True, "these")
    with pytest.raises(ValueError, match="these has a class for each pixel; expected one for each image"):
        check_labels(Masked(), False, "these")


def test_colours_of_classes_are_those_of_voc():
    assert palette()[[0, 1, 2, 15, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [224, 224, 192],
    ]  # fmt: skip
    assert len({tuple(colour) for colour in palette().tolist()}) == 256
