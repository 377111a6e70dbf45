"""ImageNet's own archives (a sample of them), through the real TFDS builder, one training step and an evaluation."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from vir_jax.evaluation import evaluate_workdir
from vir_jax.training.config import default_config
from vir_jax.training.loop import train

ROOT = Path(__file__).parents[1]
ARCHIVES = ROOT.parent / "shared" / "data" / "ilsvrc"


@pytest.mark.skipif(not ARCHIVES.is_dir(), reason=f"no ImageNet archives in {ARCHIVES}")
@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="preparing needs TensorFlow")
def test_prepare_train_and_evaluate(tmp_path):
    data_dir, workdir = tmp_path / "data", tmp_path / "run"
    command = ["-m", "vir_jax.data.prepare", "--dataset=imagenet2012", "--allow_partial"]
    places = [f"--data_dir={data_dir}", f"--manual_dir={ARCHIVES}"]
    prepared = subprocess.run(
        [sys.executable, *command, *places], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert prepared.returncode == 0, prepared.stderr
    assert "imagenet2012 validation: 100 examples" in prepared.stdout

    config = default_config()
    config.model.name, config.model.image_size = "vir_mu16", (64, 64)
    config.data.data_dir, config.data.threads = str(data_dir), 2
    config.batch_size = config.eval_batch_size = 64
    config.epochs, config.optim.warmup_epochs, config.optim.cooldown_epochs = 64 / 300, 0.0, 0.0
    metrics = train(config, workdir)
    assert metrics["count"] == 100
    assert metrics["loss"] == pytest.approx(6.9, abs=0.3)  # ln 1000, as one step teaches nothing.
    results = evaluate_workdir(workdir, mode="all", size=(64, 96))
    assert {result.metrics["count"] for result in results.values()} == {100}
