"""A run of an earlier version is read, evaluated, used and gone on with; `old_run/README.md` says what it is."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from vir_jax.data import open_source
from vir_jax.evaluation import evaluate_workdir
from vir_jax.inference.predict import predict_files
from vir_jax.inspection.workdir import load_model
from vir_jax.parallel.mesh import make_mesh
from vir_jax.runs.load import load_run
from vir_jax.runs.metrics import read_metrics
from vir_jax.runs.migrations import migrate
from vir_jax.training.loop import train

OLD_RUN = Path(__file__).parent / "old_run"
# The program is another one, and rounds otherwise; the losses were the same to 1e-6 when this was written.
TOLERANCE = 1e-4


@pytest.fixture
def workdir(tmp_path):
    shutil.copytree(OLD_RUN, tmp_path / "run")
    return tmp_path / "run"


def recorded():
    lines = map(json.loads, (OLD_RUN / "uninterrupted.jsonl").read_text().splitlines())
    return {(line["step"], name): value for line in lines for name, value in line.items()}


def test_it_is_read():
    run = load_run(OLD_RUN)
    assert (run.step, run.weights, run.class_names) == (128, "raw", tuple("0123456789"))
    assert run.metrics["top1"] == pytest.approx(0.79155, abs=1e-5)
    assert run.config.optim.lr == 3e-3
    assert run.config.is_locked


def test_it_is_evaluated_as_it_was_then():
    metrics = evaluate_workdir(OLD_RUN, checkpoint="best")["auto"].metrics
    assert metrics == pytest.approx(load_run(OLD_RUN).metrics, rel=TOLERANCE)
    losses = [result.metrics["loss"] for result in evaluate_workdir(OLD_RUN, mode="all").values()]
    assert losses == pytest.approx([metrics["loss"]] * 3, rel=TOLERANCE)


def test_it_predicts_and_is_inspected(tmp_path):
    source = open_source("digits", "test")
    pixels, labels = zip(*((source[i]["image"], source[i]["label"]) for i in range(40)), strict=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number:02}.png")
    named = [found.classes[0][0] for found in predict_files(OLD_RUN, [tmp_path], top=1)]
    assert np.mean([int(name) == label for name, label in zip(named, labels, strict=True)]) > 0.6
    trained = load_model(OLD_RUN)
    seen = np.argmax(trained.logits(trained.normalize(np.stack(pixels))), axis=-1)
    assert [trained.class_names[label] for label in seen] == named


def test_it_goes_on_as_it_would_have(workdir, caplog, monkeypatch):
    on_one = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr("vir_jax.training.loop.make_mesh", lambda **sizes: on_one)
    # Drop path draws by example since; with the draws of then, all else must come out as it did.
    monkeypatch.setattr("vir_jax.training.gradients.example_key", lambda key, **place: key)
    stored = json.loads((workdir / "config.json").read_text())
    with caplog.at_level("INFO"):
        metrics = train(migrate(stored, where="the old run"), workdir)
    assert "going on from step 128 of 135" in caplog.text
    assert "which kept the class names and no more of its data" in caplog.text
    expected = recorded()
    for name, value in metrics.items():
        assert value == pytest.approx(expected[135, f"eval/{name}"], rel=TOLERANCE)
    lines = [line for line in read_metrics(workdir) if line["step"] > 128 and "train/loss" in line]
    assert [line["step"] for line in lines] == [130, 132, 134, 135]
    for line in lines:
        for name in ("loss", "gradient_norm", "parameter_norm", "update_norm", "learning_rate"):
            assert line[f"train/{name}"] == pytest.approx(expected[line["step"], f"train/{name}"], rel=1e-3)
    # What it writes is of this version: fields by today's names, and what its data were.
    written = json.loads((workdir / "config.json").read_text())
    assert written == json.loads(load_run(workdir, "last").config.to_json())
