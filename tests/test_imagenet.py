"""ImageNet's own archives (a sample of them), through the real TFDS builder, one training step and an evaluation."""

import importlib.util
import tarfile
from pathlib import Path

import pytest

from tests.data.helpers import run_python
from tests.test_configs import load
from vir_jax.data import AugmentConfig, decode_image, eval_loader, open_source, prepare, train_loader
from vir_jax.evaluation import evaluate_workdir
from vir_jax.training.loop import train

ARCHIVES = Path(__file__).parents[2] / "shared" / "data" / "ilsvrc"
RUN_PREPARE = "import sys; from vir_jax.data import prepare; prepare.main(sys.argv[1:])"
pytestmark = [
    pytest.mark.skipif(not ARCHIVES.is_dir(), reason=f"no ImageNet archives in {ARCHIVES}"),
    pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="preparing needs TensorFlow"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The data directory, and what the command printed."""
    folder = tmp_path_factory.mktemp("imagenet")
    arguments = "--dataset=imagenet2012", f"--data_dir={folder}", f"--manual_dir={ARCHIVES}"
    return str(folder), run_python(RUN_PREPARE, *arguments, "--allow_partial").stdout


def test_what_the_builder_prepares(prepared):
    data_dir, printed = prepared
    assert "imagenet2012 train: 300 examples, 300 of them checked" in printed
    assert "imagenet2012 validation: 100 examples, 100 of them checked" in printed
    with pytest.raises(SystemExit, match="300 in the metadata, expected 1,281,167"):  # not all of ImageNet
        prepare.main(["--dataset=imagenet2012", f"--data_dir={data_dir}"])

    train, validation = (
        open_source("imagenet2012", split, data_dir=data_dir) for split in ("train", "validation")
    )
    assert (len(train), len(validation)) == (300, 100)
    assert train.num_classes == 1000
    assert list(train.class_names[:3]) == ["n01440764", "n01443537", "n01484850"]
    assert sorted(train[i]["label"] for i in range(300)) == list(range(300))
    with tarfile.open(ARCHIVES / "ILSVRC2012_img_val.tar") as tar:
        stored = {source_name: tar.extractfile(source_name).read() for source_name in tar.getnames()}
    assert {validation.file_name(i): validation[i]["image"] for i in range(100)} == stored
    assert decode_image(validation[0]["image"]).shape[2] == 3

    augment = AugmentConfig(crop="resized", hflip=0.5, randaugment_ops=2, erase=0.25)
    batch = next(train_loader(train, batch_size=64, image_size=224, augment=augment, seed=0))
    assert batch["image"].shape == (64, 224, 224, 3)
    evaluation = eval_loader(validation, batch_size=64, image_size=224)
    assert sum(int(batch["mask"].sum()) for batch in evaluation) == 100
    assert evaluation.skipped == 0


@pytest.mark.usefixtures("two_devices")
def test_train_and_evaluate(prepared, tmp_path):
    config, _ = load("vir_s")
    config.model.name, config.model.image_size = "vir_pico16", (64, 64)
    config.data.data_dir, config.data.threads = prepared[0], 2
    config.batch_size = config.eval_batch_size = 64
    config.epochs, config.optim.warmup_epochs, config.optim.cooldown_epochs = 64 / 300, 0.0, 0.0
    metrics = train(config, tmp_path)
    assert metrics["count"] == 100
    assert metrics["loss"] == pytest.approx(6.9, abs=0.3)  # ln 1000, as one step teaches nothing.
    results = evaluate_workdir(tmp_path, mode="all", image_size=(64, 96))
    assert {result.metrics["count"] for result in results.values()} == {100}
