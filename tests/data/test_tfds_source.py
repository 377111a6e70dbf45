import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.data.helpers import HIDE_TENSORFLOW, png, run_python, write_tfds
from vir_jax.data import AugmentConfig, Source, decode_image, open_source, train_loader

EXAMPLES = [(png((i, 0, 0)), i % 2, f"file{i}.png") for i in range(20)]


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    write_tfds(tmp_path, "tiny", {"train": EXAMPLES, "test": EXAMPLES[:3]})
    return str(tmp_path)


def test_images_come_encoded(tiny: str):
    source = open_source("tiny", "train", data_dir=tiny)
    assert isinstance(source, Source)
    assert len(source) == 20
    assert source.class_names == ("cat", "dog")
    assert source.num_classes == 2
    for index in (0, 7, 19):
        image, label, file_name = EXAMPLES[index]
        assert source[index] == {"image": image, "label": label}
        assert type(source[index]["label"]) is int
        assert source.name(index) == f"tiny train[{index}] ({file_name})"


def test_split_strings(tiny: str):
    for split, expected in {
        "test": range(3),
        "train[5:8]": range(5, 8),
        "train[:90%]": range(18),
        "train[90%:]": range(18, 20),
        "train+test": [*range(20), *range(3)],
    }.items():
        source = open_source("tiny", split, data_dir=tiny)
        assert [source[i]["image"] for i in range(len(source))] == [EXAMPLES[i][0] for i in expected]


def test_reading_from_threads(tiny: str):
    source = open_source("tiny", "train", data_dir=tiny)
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda i: source[i % 20]["image"], range(400)))
    assert images == [EXAMPLES[i % 20][0] for i in range(400)]


def test_an_unreadable_record_still_has_a_name(tiny: str):
    source = open_source("tiny", "train", data_dir=tiny)
    assert source.name(1000) == "tiny train[1000]"


def test_mistakes_are_named(tiny: str):
    with pytest.raises(ValueError, match=r"no data set 'cifarr10': .*did you mean cifar10"):
        open_source("cifarr10", "train", data_dir=tiny)
    with pytest.raises(ValueError, match=r"no data set 'digit': .*did you mean digits"):
        open_source("digit", "train")
    with pytest.raises(ValueError, match="Unknown split 'validation'"):
        open_source("tiny", "validation", data_dir=tiny)


def test_a_set_that_is_not_prepared_says_how_to(tmp_path: Path):
    with pytest.raises(FileNotFoundError) as error:
        open_source("cifar10", "train", data_dir=str(tmp_path))
    assert f"cifar10 is not prepared in {tmp_path}" in str(error.value)
    assert f"python -m vir_jax.data.prepare --dataset=cifar10 --data_dir={tmp_path}" in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"--manual_dir=<folder with ILSVRC2012_img_train.tar"):
        open_source("imagenet2012", "train", data_dir=str(tmp_path))


def test_tfrecord_says_how_to_convert(tmp_path: Path):
    old = tmp_path / "old"
    write_tfds(old, "tiny", {"train": EXAMPLES}, file_format="tfrecord")
    with pytest.raises(FileNotFoundError, match="as tfrecord, which has no random access") as error:
        open_source("tiny", "train", data_dir=str(old))
    command = (
        f"python -m vir_jax.data.prepare --dataset=tiny --convert_from={old} --data_dir={old}_array_record"
    )
    assert command in str(error.value)


def test_other_tasks_are_refused(tmp_path: Path):
    folder = write_tfds(tmp_path, "tiny", {"train": EXAMPLES})
    info = json.loads((folder / "dataset_info.json").read_text())
    info["supervisedKeys"]["tuple"]["items"][1]["featureKey"] = "file_name"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"tiny/1.0.0 is not an image classification set"):
        open_source("tiny", "train", data_dir=str(tmp_path))


def test_without_tensorflow_installed(tiny: str):
    """Training and evaluation read, mistakes are named, and only preparing asks for it."""
    result = run_python(
        HIDE_TENSORFLOW
        + """
import sys
from vir_jax.data import AugmentConfig, eval_loader, open_source, train_loader
train = open_source("tiny", "train", data_dir=sys.argv[1])
batch = next(train_loader(train, batch_size=8, image_size=16, augment=AugmentConfig(), seed=0))
assert batch["image"].shape == (8, 16, 16, 3)
batches = list(eval_loader(open_source("tiny", "test", data_dir=sys.argv[1]), batch_size=2, image_size=16))
assert sum(b["mask"].sum() for b in batches) == 3
for name, kind in [("cifarr10", ValueError), ("cifar10", FileNotFoundError)]:
    try:
        open_source(name, "train", data_dir=sys.argv[1])
    except kind:
        continue
    raise AssertionError(name)
from vir_jax.data import prepare
try:
    prepare.main(["--dataset=cifar10", "--data_dir=" + sys.argv[1]])
except SystemExit as error:
    print(error)
assert "tensorflow" not in sys.modules
""",
        tiny,
    )
    assert "error: preparing a TFDS set needs TensorFlow" in result.stdout
    assert "pip install -r requirements-prepare.txt" in result.stdout


def test_real_cifar10(cifar10_dir: str):
    train = open_source("cifar10", "train", data_dir=cifar10_dir)
    test = open_source("cifar10", "test", data_dir=cifar10_dir)
    assert (len(train), len(test)) == (50_000, 10_000)
    assert test.class_names[:3] == ("airplane", "automobile", "bird")
    labels = [test[i]["label"] for i in range(0, 10_000, 10)]
    assert set(np.bincount(labels, minlength=10) > 60) == {True}
    assert test.name(5).startswith("cifar10 test[5] (test_")
    assert {decode_image(train[i]["image"]).shape for i in range(0, 50_000, 5000)} == {(32, 32, 3)}
    config = AugmentConfig(crop="pad", hflip=0.5)
    loader = train_loader(train, batch_size=100, image_size=32, augment=config, seed=0)
    batch = next(loader)
    assert batch["image"].shape == (100, 32, 32, 3)
    assert len(np.unique(batch["label"])) == 10
    loader.close()
