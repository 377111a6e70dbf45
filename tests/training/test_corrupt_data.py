"""Corrupt images of a run's own data: few are borne, too many are told before the first step."""

import pytest
from PIL import Image

from vir_jax.data import TooManyCorruptError, open_source
from vir_jax.runs.metrics import has_metrics
from vir_jax.training.loop import train


@pytest.fixture
def folder_config(digits_config, tmp_path):
    """A run of four steps on files: 128 digits to train on, 20 to evaluate on."""
    for split, count in (("train", 128), ("val", 20)):
        digits = open_source("digits", "train")
        for i in range(count):
            example = digits[i]
            folder = tmp_path / "data" / split / str(example["label"])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(example["image"]).save(folder / f"{i:03}.png")
    digits_config.epochs, digits_config.optim.cooldown_epochs = 2.0, 0.0
    digits_config.data.dataset, digits_config.data.data_dir = "folder", str(tmp_path / "data")
    digits_config.data.eval_split = "val"
    return digits_config


def damage(tmp_path, split, count):
    for file in sorted((tmp_path / "data" / split).rglob("*.png"))[:count]:
        file.write_bytes(file.read_bytes()[:40])


@pytest.mark.usefixtures("two_devices")
def test_one_damaged_file_of_a_few_stops_no_run(folder_config, tmp_path):
    damage(tmp_path, "train", 1)
    damage(tmp_path, "val", 1)
    assert train(folder_config, tmp_path / "run")["count"] == 19


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("split", ["train", "val"])
def test_too_many_are_told_before_the_first_step(folder_config, tmp_path, split):
    damage(tmp_path, split, 11)
    with pytest.raises(TooManyCorruptError, match=r"11 of .* examples were corrupt"):
        train(folder_config, tmp_path / "run")
    assert not has_metrics(tmp_path / "run")
    folder_config.data.max_corrupt_fraction = 0.0
    with pytest.raises(TooManyCorruptError, match="max_corrupt_fraction = 0 bears 0"):
        train(folder_config, tmp_path / "run")
