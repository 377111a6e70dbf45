import json
import logging
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.data.helpers import png, write_tfds
from vir_jax.data import open_source
from vir_jax.data.fingerprint import IMAGES, NAMES, difference, fingerprint


class Numbered:
    """So many examples, each told by its number; `changes` gives names, labels or images of some."""

    class_names, num_classes = ("a", "b"), 2

    def __init__(self, size, changes=None):
        self.size, self.changes = size, changes or {}

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        change = self.changes.get(index, {})
        if "error" in change:
            raise change["error"]
        pixels = np.full((2, 2, 3), index % 256, np.uint8)
        return {"image": change.get("image", pixels), "label": change.get("label", index % 2)}

    def name(self, index):
        return self.changes.get(index, {}).get("name", f"/data/{index}.png")


def compare(size, changes, before=None):
    stored = json.loads(json.dumps(fingerprint(Numbered(size, before))))
    return difference(stored, fingerprint(Numbered(size, changes)))


def test_the_same_data_are_the_same():
    for size in (1, IMAGES, IMAGES + 1, NAMES + 1, 5000):
        assert compare(size, {}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({40: {"name": "/data/other.png"}}, "as many examples (60), but under other names"),
        ({40: {"name": "/data/41.png"}, 41: {"name": "/data/40.png"}}, "or in another order"),
        ({41: {"label": 0}}, "other labels, such as that of example 41"),
        ({i: {"image": b"jpeg"} for i in range(31)}, "other images: 31 of 60 that were compared"),
    ],
)
def test_other_data_of_as_many_examples(changes, message):
    assert message in compare(60, changes)


def test_another_number_of_examples():
    assert difference(fingerprint(Numbered(60)), fingerprint(Numbered(61))) == "60 examples, now 61"


def test_repaired_images_are_logged_and_no_other_data(caplog):
    damaged = {7: {"image": b"damaged"}, 9: {"error": OSError("no such file")}}
    with caplog.at_level(logging.WARNING):
        assert compare(60, {}, before=damaged) is None
    assert "example 9 cannot be read: OSError: no such file" in caplog.text
    assert "these training images have changed, of 60 compared: [7]" in caplog.text


def test_a_large_set_is_sampled_from_its_beginning_to_its_end():
    last = 5000 - 5000 // IMAGES  # In the last gap between two examples that are read.
    assert "other labels" in compare(5000, {i: {"label": 3} for i in range(last - 5000 // IMAGES, 5000)})
    renamed = {i: {"name": f"/data/{i}.jpg"} for i in range(4990, 5000)}
    assert "other names" in compare(5000, renamed)


def write_folder(folder, names, *, seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(folder / name)
    return fingerprint(open_source("folder", "train", data_dir=str(folder)))


def test_folders(tmp_path):
    names = [f"train/{label}/{number}.png" for label in ("cat", "cow") for number in range(4)]
    stored = write_folder(tmp_path / "here", names)
    shutil.copytree(tmp_path / "here", tmp_path / "moved" / "there")
    moved = fingerprint(open_source("folder", "train", data_dir=str(tmp_path / "moved" / "there")))
    assert difference(stored, moved) is None
    assert "other images: 8 of 8" in difference(stored, write_folder(tmp_path / "other", names, seed=1))
    renamed = [*names[:-1], "train/cow/9.png"]
    assert "under other names" in difference(stored, write_folder(tmp_path / "renamed", renamed))


def test_tfds_sets(tmp_path):
    def write(folder, examples):
        write_tfds(tmp_path / folder, "toy", {"train": examples})
        return fingerprint(open_source("toy", "train", data_dir=str(tmp_path / folder)))

    examples = [(png((number, 0, 0)), number % 2, f"{number}.png") for number in range(4)]
    stored = write("one", examples)
    assert difference(stored, write("same", examples)) is None
    other_name = [*examples[:3], (examples[3][0], 1, "other.png")]
    assert "under other names" in difference(stored, write("names", other_name))
    other_label = [*examples[:3], (examples[3][0], 0, "3.png")]
    assert "label" in difference(stored, write("labels", other_label))
