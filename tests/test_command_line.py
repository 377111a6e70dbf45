"""Training and evaluation as a user starts them."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from PIL import Image

from tests.forked import run_forked
from vir_jax import command_line
from vir_jax.data import decode_image, open_source
from vir_jax.runs.validate import validate

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
    # Where libtpu is installed, it says itself that there is no TPU.
    if importlib.util.find_spec("libtpu") is None:
        assert not re.search(r"\btpu\b", trained.stderr, re.IGNORECASE)
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


TRAIN = ["train.py", "--config=configs/vir_digits.py"]


MISTAKES = [
    ([*TRAIN, "--config.optim.lrr=1"], 'no field "lrr". Did you mean "lr"?'),
    ([*TRAIN, "--config.optim.lr=-1"], "config.optim.lr is -1.0; expected a positive number"),
    (
        [*TRAIN, "--config.data.background=(0,0)"],
        "config.data.background is (0, 0); expected 3 values, each an integer in [0, 255]",
    ),
    (
        [*TRAIN, "--config.data.max_corrupt_fraction=2."],
        "config.data.max_corrupt_fraction is 2.0; expected",
    ),
    ([*TRAIN, "--config.data.train_split=validation"], "digits has no split 'validation'"),
    (["train.py", "--config=configs/absent.py"], "No such file or directory: 'configs/absent.py'"),
    (["train.py", "--config=configs/vir_cifar10.py:modle=1"], "unknown config argument 'modle'"),
    (["eval.py"], "no checkpoints in"),
    (["predict.py", "a.png"], "no checkpoints in"),
]
SIZES = ["0", "8,0", "-8", "abc", "8,8,8", ""]
TRACED, SURPLUS = ["eval.py", "--traceback"], [*TRAIN, "digits"]
NO_WORKDIR = ["eval.py", "--mode=all"]


def sized(size):
    return ["eval.py", f"--image_size={size}"]


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """What became of the commands that are refused, by their arguments."""
    folder = tmp_path_factory.mktemp("refused")
    commands = [arguments for arguments, _ in MISTAKES] + [*map(sized, SIZES), TRACED, SURPLUS, NO_WORKDIR]
    given = [
        arguments if arguments == NO_WORKDIR else [*arguments, f"--workdir={folder / str(index)}"]
        for index, arguments in enumerate(commands)
    ]
    ended = run_forked(given, folder)
    return {tuple(arguments): done for arguments, done in zip(commands, ended, strict=True)}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_told_in_a_sentence(refused, arguments, message):
    result = refused[*arguments]
    assert result.returncode == 1
    assert result.stdout == ""
    (told,) = [line for line in result.stderr.splitlines() if line.startswith(f"{arguments[0]}: ")]
    assert message in told
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("size", SIZES)
def test_sizes_to_evaluate_at(refused, size):
    result = refused[*sized(size)]
    assert result.returncode != 0
    assert (
        f"--image_size={size}: expected a positive number, or height,width" in result.stderr + result.stdout
    )


def test_where_a_mistake_arose_is_told_if_asked(refused):
    result = refused[*TRACED]
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "FileNotFoundError: no checkpoints in" in result.stderr


def test_surplus_arguments_are_refused(refused):
    result = refused[*SURPLUS]
    assert result.returncode == 1
    assert result.stderr == "train.py: unexpected arguments ['digits']; every option begins with --\n"


def raise_from_numpy():
    np.stack([np.zeros(1), np.zeros(2)])


def foreseen(action):
    try:
        action()
    except Exception as error:
        return command_line.is_foreseen(error)
    raise AssertionError("nothing was raised")


def test_what_is_foreseen():
    """What was raised on purpose; what failed by itself keeps its traceback."""
    assert foreseen(lambda: validate(ml_collections.ConfigDict({"epochs": -1})))
    assert foreseen(lambda: os.stat("/nowhere"))
    assert foreseen(lambda: decode_image(b"no image"))
    assert not foreseen(raise_from_numpy)
    assert not foreseen(lambda: decode_image(None))


def test_names_that_the_output_lacks_are_printed_somehow():
    code = """
import sys
from vir_jax import command_line
command_line.run(lambda _: command_line.write_line("a\\udcff \\u4e00 \\u00e9"))
"""
    for encoding, expected in {
        "ascii": b"a\\udcff \\u4e00 \\xe9\n",
        "utf-8": b"a\xff \xe4\xb8\x80 \xc3\xa9\n",
    }.items():
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout in (expected, b"a\xff \\u4e00 \\xe9\n")


def test_what_is_required_is_asked_for(refused):
    """In one line, not with all of the help; no library says that there is no TPU."""
    result = refused[*NO_WORKDIR]
    assert result.returncode == 1
    assert result.stderr == "eval.py: --workdir must be given; --help shows all flags\n"
