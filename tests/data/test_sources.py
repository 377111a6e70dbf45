"""Digits and folders; TFDS sets have a file of their own."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.data.helpers import run_python
from vir_jax.data import Source, decode_image, open_source


def test_digits_split_is_stratified_and_complete():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert isinstance(train, Source)
    assert (len(train), len(test)) == (1442, 355)
    assert train.num_classes == 10
    assert train.class_names == tuple("0123456789")
    counts = {s: np.bincount([s[i]["label"] for i in range(len(s))], minlength=10) for s in (train, test)}
    np.testing.assert_allclose(counts[test] / (counts[train] + counts[test]), 0.2, atol=0.005)

    digits = load_digits()
    numbers = [
        int(s.name(i).removesuffix(" of scikit-learn's)").split("(number ")[1])
        for s in (train, test)
        for i in range(len(s))
    ]
    assert sorted(numbers) == list(range(1797))
    for i in (0, 700, 1441):
        example = train[i]
        np.testing.assert_array_equal(
            np.round(example["image"][..., 1] * (16 / 255)), digits.images[numbers[i]]
        )
        assert example["label"] == digits.target[numbers[i]]
        assert example["image"].shape == (8, 8, 3)
        assert example["image"].dtype == np.uint8


def test_digits_know_their_splits():
    with pytest.raises(ValueError, match="digits has no split 'validation': choose one of train, test"):
        open_source("digits", "validation")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, path in enumerate(
        ["train/cat/b.png", "train/cat/a.PNG", "train/ant/c.jpg", "train/dog/d.jpeg", "test/dog/e.png"]
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (number, 0, 0)).save(tmp_path / path)
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    (tmp_path / "train/.hidden").mkdir()
    return tmp_path


def test_folder(folder: Path):
    source = open_source("folder", "train", data_dir=str(folder))
    assert isinstance(source, Source)
    assert source.class_names == ("ant", "cat", "dog")
    assert source.num_classes == 3
    names = [Path(source.name(i)).relative_to(folder).as_posix() for i in range(len(source))]
    assert names == ["train/ant/c.jpg", "train/cat/a.PNG", "train/cat/b.png", "train/dog/d.jpeg"]
    assert [source[i]["label"] for i in range(4)] == [0, 1, 1, 2]
    assert decode_image(source[2]["image"])[0, 0, 0] == 0


def test_a_split_has_the_classes_of_its_own_folders(folder: Path):
    test = open_source("folder", "test", data_dir=str(folder))
    assert test.class_names == ("dog",)
    assert [test[i]["label"] for i in range(len(test))] == [0]


def test_folder_mistakes_are_named(folder: Path):
    with pytest.raises(ValueError, match="dataset 'folder' needs data_dir"):
        open_source("folder", "train")
    with pytest.raises(FileNotFoundError, match=r"no split 'val' in .*there: test, train"):
        open_source("folder", "val", data_dir=str(folder))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_source("folder", "train", data_dir=str(folder / "nowhere"))
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no class folders in .*empty"):
        open_source("folder", "empty", data_dir=str(folder))
    (folder / "empty/dog").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images in .*empty"):
        open_source("folder", "empty", data_dir=str(folder))
    with pytest.raises(FileNotFoundError, match=r"no class folders in .*train/dog"):
        open_source("folder", "dog", data_dir=str(folder / "train"))


def test_importing_data_is_light():
    """No TensorFlow, no model code; TFDS and scikit-learn only where their sets are opened."""
    run_python(
        """
        import sys
        import vir_jax.data
        loaded = {".".join(name.split(".")[:depth]) for name in sys.modules for depth in (1, 2)}
        heavy = {"tensorflow", "tensorflow_datasets", "sklearn", "flax", "optax", "ml_collections"}
        heavy |= {"vir_jax.ops", "vir_jax.models", "vir_jax.training"}
        assert not heavy & loaded, heavy & loaded
        vir_jax.data.open_source("digits", "train")
        assert "tensorflow" not in sys.modules
        """
    )
