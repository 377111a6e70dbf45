"""The models that come with the package, and what they say of themselves."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_command_line import ROOT
from vir_jax.data import open_source
from vir_jax.inference.predict import predict_files
from vir_jax.weights import load, open_model, zoo_names
from vir_jax.weights.zoo import FOLDER


def digits():
    source = open_source("digits", "test")
    return np.stack([source[i]["image"] for i in range(len(source))]), np.array(source.labels)


def test_the_digits_model_scores_what_its_card_says():
    model = load("vir_digits")
    images, labels = digits()
    assert model.card.scored_on == {"dataset": "digits", "split": "test"}
    assert model.card.class_names == tuple("0123456789")
    top1 = np.mean(np.argmax(model(images), axis=1) == labels)
    assert top1 == pytest.approx(model.card.score["top1"], abs=1e-9)
    assert top1 > 0.95


@pytest.mark.parametrize("name", zoo_names())
def test_every_model_says_what_it_is(name):
    card, folder = load(name).card, FOLDER / name
    assert "top1" in card.score
    assert card.scored_on.keys() == {"dataset", "split"}
    assert card.exported_with["commit"]
    assert card.mean is not None
    assert card.class_names
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2e6


def test_they_are_in_what_is_installed():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "vir_jax"
    ]
    package = FOLDER.parent
    covered = {file for pattern in patterns for file in package.glob(pattern)}
    assert {file for file in FOLDER.glob("*/*") if file.is_file()} <= covered


def test_a_path_comes_first_and_names_that_are_neither_are_told(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"no model of the zoo \(.*vir_digits.*\); did you mean 'vir_digits'"
    ):
        load("vir_digit")
    monkeypatch.chdir(tmp_path)
    Path("vir_digits").mkdir()
    with pytest.raises(FileNotFoundError, match="holds neither"):
        load("vir_digits")


def test_files_are_classified(tmp_path):
    images, _ = digits()
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, image in zip(files, images, strict=False):
        Image.fromarray(image).save(file)
    model = load("vir_digits")
    expected = np.asarray(model(images[:3]))
    for prediction, logits in zip(predict_files(model.classifier(), files, top=1), expected, strict=True):
        ((name, probability),) = prediction.classes
        assert name == str(np.argmax(logits))
        assert probability == pytest.approx(np.max(np.exp(logits) / np.exp(logits).sum()), rel=1e-4)
    command = [
        sys.executable,
        str(ROOT / "predict.py"),
        "--model=vir_digits",
        "--json",
        "--top=1",
        str(files[0]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["classes"][0]
    assert found["class"] == str(np.argmax(expected[0]))
    for wrong in (["--workdir=x"], ["--checkpoint=best"]):
        done = subprocess.run([*command, *wrong], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode != 0
        assert "--workdir" in done.stdout + done.stderr


def test_a_model_is_opened_wherever_it_lies():
    assert open_model("vir_digits").card == load("vir_digits").card == open_model(FOLDER / "vir_digits").card
