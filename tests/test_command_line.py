"""Training and evaluation as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vir_jax.data import open_source

ROOT = Path(__file__).parents[1]
SHORT = ["--config.epochs=8", "--config.optim.warmup_epochs=1"]


def run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_train_resume_evaluate_and_predict(tmp_path):
    command = ["train.py", "--config=configs/vir_digits.py", f"--workdir={tmp_path}", *SHORT]
    trained = run(*command)
    assert trained.returncode == 0, trained.stderr
    assert "203,146" in trained.stderr  # The summary comes before the first step.
    assert trained.stderr.index("203,146") < trained.stderr.index("step 50:")
    top1 = float(trained.stdout.split()[1])
    assert top1 > 0.5  # Chance is 0.1.

    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert again.stdout == trained.stdout
    assert "going on from step 90 of 90" in again.stderr

    evaluated = run("eval.py", f"--workdir={tmp_path}", "--mode=all")
    assert evaluated.returncode == 0, evaluated.stderr
    rows = [line.split() for line in evaluated.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["parallel", "recurrent", "chunkwise"]
    for row in rows:
        assert float(row[1].rstrip("%")) == pytest.approx(100 * top1, abs=0.01)

    digits = open_source("digits", "test")
    for index in range(20):
        Image.fromarray(digits[index]["image"]).save(tmp_path / f"{index:02}.png")
    files = [tmp_path / f"{index:02}.png" for index in range(20)]
    predicted = run("predict.py", f"--workdir={tmp_path}", "--stream", "--top=3", tmp_path / "no.png", *files)
    assert predicted.returncode == 1  # One file is not there.
    assert f"{tmp_path / 'no.png'}: No such file or directory" in predicted.stderr
    lines = predicted.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == list(map(str, files))
    assert all(line.count("%") == 3 for line in lines)
    named = [line.split(": ")[1].split()[0] for line in lines]
    right = [name == digits.class_names[digits[i]["label"]] for i, name in enumerate(named)]
    assert sum(right) > 10  # Chance is 2.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optim.lrr=1"], 'Did you mean "lr"'),
        (["--config.optim.lr=-1"], "config.optim.lr is -1.0; expected a positive number"),
        (["digits"], "unexpected arguments"),
    ],
)
def test_mistakes_are_explained(tmp_path, arguments, message):
    result = run("train.py", "--config=configs/vir_digits.py", f"--workdir={tmp_path}", *arguments)
    assert result.returncode != 0
    assert message in result.stderr + result.stdout


@pytest.mark.parametrize("size", ["0", "8,0", "-8", "abc", "8,8,8", ""])
def test_sizes_to_evaluate_at(tmp_path, size):
    result = run("eval.py", f"--workdir={tmp_path}", f"--image_size={size}")
    assert result.returncode != 0
    assert (
        f"--image_size={size}: expected a positive number, or height,width" in result.stderr + result.stdout
    )
