"""Sources with a class for each pixel: folders, TFDS sets, and scenes of digits."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data.helpers import png, write_tfds
from tests.data.test_masks import png as png_of
from vir_jax.data import Source, open_source
from vir_jax.data.digits_scenes import DIGIT, INK, DigitsScenesSource
from vir_jax.data.source import is_per_pixel

MASK = np.array([[0, 1, 2, 255], [1, 1, 1, 1], [3, 3, 3, 2]], np.uint8)


# --- Folders ---


@pytest.fixture
def folder(tmp_path):
    for name in ("images/a.png", "images/deep/b.png", "masks/a.png", "masks/deep/b.png"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png((7, 0, 0)) if name.startswith("images") else png_of(MASK % 3))
    (tmp_path / "classes.txt").write_text("sky\ntree\nroad\n\n")
    return tmp_path


def open_folder(folder, split="train"):
    return open_source("folder", split, data_dir=str(folder), per_pixel=True)


def test_a_folder_of_images_and_masks(folder):
    source = open_folder(folder)
    assert isinstance(source, Source)
    assert is_per_pixel(source)
    assert (source.class_names, source.num_classes, len(source)) == (("sky", "tree", "road"), 3, 2)
    assert source.name(1) == str(folder / "train/images/deep/b.png")
    example = source[1]
    assert example["image"] == png((7, 0, 0))
    np.testing.assert_array_equal(example["label"], MASK % 3)


def test_what_is_missing_in_a_folder_is_named(folder):
    with pytest.raises(
        FileNotFoundError, match=r"no folder .*test/images. Expected images as .*NAME.jpg, their"
    ):
        open_folder(folder, "test")
    with pytest.raises(FileNotFoundError, match="no split 'train' in"):
        open_source("folder", "train", data_dir=str(folder / "train" / "images"))
    (folder / "train/masks/a.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 masks that are not there in .*: a.png. Expected for each"
    ):
        open_folder(folder)
    (folder / "train/masks/a.png").write_bytes(b"")
    (folder / "train/images/a.jpg").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"1 masks that several images would share in .*: a.png"):
        open_folder(folder)
    (folder / "classes.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no .*classes.txt: expected the names of the classes, one on"
    ):
        open_folder(folder)
    with pytest.raises(
        ValueError, match=r"'folder' needs data_dir: the folder that holds classes.txt, <split>/im"
    ):
        open_source("folder", "train", per_pixel=True)


# --- TFDS ---

LABELED = tfds.features.LabeledImage(labels=["sky", "tree", "road", "sea"], shape=(None, None, 1))
PLAIN = tfds.features.Image(shape=(None, None, 1), use_colormap=True)


def write(tmp_path, name, feature):
    examples = [(png((i, 0, 0)), i % 2, f"file{i}.png", png_of(MASK)) for i in range(4)]
    write_tfds(tmp_path, name, {"train": examples}, mask=feature)


def test_a_set_whose_masks_say_their_classes(tmp_path):
    write(tmp_path, "tiny", LABELED)
    source = open_source("tiny", "train[1:]", data_dir=str(tmp_path), per_pixel=True)
    assert (source.class_names, source.num_classes, len(source)) == (("sky", "tree", "road", "sea"), 4, 3)
    assert source[0]["image"] == png((1, 0, 0))
    np.testing.assert_array_equal(source[0]["label"], MASK)
    assert source.name(0) == "tiny train[1:][0] (file1.png)"
    # Its images have classes, too.
    assert open_source("tiny", "train", data_dir=str(tmp_path)).class_names == ("cat", "dog")


def test_pets(tmp_path):
    """TFDS stores 1, 2 and 3; 0 would be none."""
    write(tmp_path, "oxford_iiit_pet", PLAIN)
    source = open_source("oxford_iiit_pet", "train", data_dir=str(tmp_path), per_pixel=True)
    assert source.class_names == ("pet", "background", "border")
    expected = [[255, 0, 1, 255], [0, 0, 0, 0], [2, 2, 2, 1]]
    np.testing.assert_array_equal(source[0]["label"], expected)
    assert source[0]["label"].dtype == np.uint8


def test_sets_without_masks_or_names_are_refused(tmp_path):
    write(tmp_path, "nameless", PLAIN)
    with pytest.raises(ValueError, match=r"nameless/1.0.0 does not say what the numbers in its masks mean"):
        open_source("nameless", "train", data_dir=str(tmp_path), per_pixel=True)
    write_tfds(tmp_path, "maskless", {"train": [(png((0, 0, 0)), 0, "x")]})
    with pytest.raises(
        ValueError, match=r"maskless/1.0.0 has no masks: expected the features image and segm"
    ):
        open_source("maskless", "train", data_dir=str(tmp_path), per_pixel=True)


# --- Scenes of digits ---


@pytest.fixture(scope="module")
def scenes():
    return DigitsScenesSource("test")


def test_scenes_are_always_the_same_and_hold_real_digits(scenes):
    again = open_source("digits_scenes", "test", per_pixel=True)
    assert isinstance(scenes, Source)
    assert (len(scenes), len(DigitsScenesSource("train")), scenes.num_classes) == (500, 10_000, 11)
    assert scenes.class_names[:3] == ("background", "0", "1")
    digits = open_source("digits", "test")
    known = {digits[i]["image"][..., 0].tobytes(): digits[i]["label"] for i in range(len(digits))}
    found = 0
    for index in (0, 3, 499):
        scene = scenes.scene(index)
        np.testing.assert_array_equal(scene.image, again[index]["image"])
        assert (scene.image.shape, scene.mask.shape) == ((32, 32, 3), (32, 32))
        rest = scene.mask.copy()
        for top, left, digit in scene.places:
            there = slice(top, top + DIGIT), slice(left, left + DIGIT)
            of_class = [np.frombuffer(ink, np.uint8).reshape(8, 8) for ink in known if known[ink] == digit]
            drawn = [ink for ink in of_class if np.array_equal((ink >= INK) * (1 + digit), scene.mask[there])]
            # Nothing that was laid over it darkens a digit.
            assert any((scene.image[there][..., 0] >= ink).all() for ink in drawn)
            rest[there], found = 0, found + 1
        assert not rest.any()
    assert found >= 9


def test_splits_and_numbers_differ(scenes):
    train = DigitsScenesSource("train")
    assert not np.array_equal(train[0]["image"], scenes[0]["image"])
    assert not np.array_equal(scenes[0]["image"], scenes[1]["image"])
    assert scenes.name(7) == "digits_scenes test[7]"
    with pytest.raises(IndexError, match="scene 500: test has 0 to 499"):
        scenes.scene(500)
    with pytest.raises(
        ValueError, match="digits_scenes has no split 'validation': choose one of train, test"
    ):
        open_source("digits_scenes", "validation", per_pixel=True)


def test_the_other_kind_of_labels_is_refused_by_name():
    with pytest.raises(
        ValueError, match="the data set 'digits' has a class for each image; expected one for each"
    ):
        open_source("digits", "test", per_pixel=True)
    with pytest.raises(
        ValueError, match="the data set 'digits_scenes' has a class for each pixel; expected one"
    ):
        open_source("digits_scenes", "test")
