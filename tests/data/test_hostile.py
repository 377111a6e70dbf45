"""A folder of everything that is wrong with images found in the wild, through the loaders."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.faults.hostile import write_hostile_folder
from vir_jax.data import AugmentConfig, eval_loader, open_source, train_loader

SIDE = 32


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="absl")
    return caplog


@pytest.fixture
def folder(tmp_path: Path, photo: np.ndarray) -> Path:
    write_hostile_folder(tmp_path, Image.fromarray(photo))
    return tmp_path


def test_each_file_is_read_right_or_skipped_counted_and_named(folder: Path, log):
    source = open_source("folder", "train", data_dir=str(folder))
    names = [Path(source.name(i)).name for i in range(len(source))]
    loader = eval_loader(source, batch_size=1, image_size=SIDE, crop_fraction=1.0, max_corrupt_fraction=1.0)
    batches = list(loader)
    images = {name: batch["image"][0] for name, batch in zip(names, batches, strict=True)}
    read = {name for name, batch in zip(names, batches, strict=True) if batch["mask"][0]}

    assert read == {name for name in names if name.startswith("good_")}
    assert loader.skipped == len(names) - len(read)
    for name in set(names) - read:
        assert any(f"{name}: " in message for message in log.messages), name
    # All show the photograph, upright and, but for the grey ones, in its colours.
    for name in ("good_png_named.jpg", "good_cmyk.jpg", "good_palette.png", "good_rotated.jpg"):
        assert np.abs(images[name].astype(int) - images["good_photo.jpg"]).mean() < 8, name
    assert np.abs(images["good_gray.jpg"].astype(int) - images["good_gray.png"]).mean() < 2
    np.testing.assert_array_equal(images["good_one_pixel.png"], np.full((SIDE, SIDE, 3), 200))


@pytest.mark.parametrize("crop", ["resized", "pad"])
def test_training_goes_through_the_folder(folder: Path, crop: str):
    source = open_source("folder", "train", data_dir=str(folder))
    good = sum("good_" in source.name(i) for i in range(len(source)))
    loader = train_loader(
        source,
        batch_size=len(source),
        image_size=SIDE,
        augment=AugmentConfig(crop=crop, hflip=0.5, randaugment_ops=2, erase=0.25),
        seed=0,
        num_threads=2,
        prefetch=1,
        max_corrupt_fraction=1.0,
    )
    for _ in range(3):
        batch = next(loader)
        assert batch["image"].shape == (len(source), SIDE, SIDE, 3)
    loader.close()
    # Each bad file once an epoch, and those that were drawn in the place of another.
    assert loader.skipped >= 3 * (len(source) - good)
