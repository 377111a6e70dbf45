"""A task is one file: found by name, trained, resumed, evaluated, its best chosen, with no other line changed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vir_jax.tasks
from tests.tasks.brightness import Brightness
from vir_jax.data import open_source
from vir_jax.inference.predict import predict_files
from vir_jax.runs.checkpoint_reader import CheckpointReader
from vir_jax.runs.config import default_config
from vir_jax.runs.metrics import read_metrics
from vir_jax.runs.validate import validate
from vir_jax.tasks import Task, find_task, known_tasks, make_task
from vir_jax.tasks.classification import Classification
from vir_jax.tasks.next_patch import NextPatch
from vir_jax.tasks.pixels import Pixels
from vir_jax.tasks.segmentation import Segmentation
from vir_jax.training.evaluate import check_task, evaluation_sums
from vir_jax.training.loop import train

ROOT = Path(__file__).parents[2]
TOY = "tests.tasks.brightness:Brightness"


def without_mixing(config):
    config.label_smoothing = config.mixing.mixup_alpha = config.mixing.cutmix_alpha = 0.0
    return config


# --- The registry ---


def test_tasks_are_found_by_name():
    assert known_tasks() == {
        "classification": Classification,
        "next_patch": NextPatch,
        "pixels": Pixels,
        "segmentation": Segmentation,
    }
    assert find_task(TOY) is Brightness
    with pytest.raises(
        ValueError,
        match=r"config.task is 'clasification'; expected one of \['classification', 'next_patch', 'pixels', 'segment",
    ):
        find_task("clasification")
    with pytest.raises(ValueError, match=r"'no.such:Task', which cannot be imported: No module named 'no'"):
        find_task("no.such:Task")
    with pytest.raises(ValueError, match=r"cannot be imported: module .* has no attribute 'Darkness'"):
        find_task("tests.tasks.brightness:Darkness")
    with pytest.raises(ValueError, match="no subclass of"):
        find_task("tests.tasks.test_tasks:ROOT")
    with pytest.raises(
        ValueError, match="does not define evaluate, loss, num_outputs, best, higher_is_better"
    ):
        find_task("vir_jax.tasks:Task")


def test_a_file_in_the_package_is_a_task(tmp_path, monkeypatch):
    (tmp_path / "new_task.py").write_text((ROOT / "tests/tasks/brightness.py").read_text())
    (tmp_path / "two_tasks.py").write_text("")
    monkeypatch.setattr(vir_jax.tasks, "__path__", [*vir_jax.tasks.__path__, str(tmp_path)])
    known_tasks.cache_clear()
    try:
        assert set(known_tasks()) == {"classification", "new_task", "next_patch", "pixels", "segmentation"}
    finally:
        known_tasks.cache_clear()


def test_fields_of_another_task_are_refused():
    config = default_config()
    config.task, config.label_smoothing, config.mixing.cutmix_alpha = TOY, 0.1, 1.0
    with pytest.raises(
        ValueError, match=r"config.label_smoothing is 0.1, which the task .* does not use; expected 0"
    ):
        validate(config)
    config.label_smoothing = 0.0
    with pytest.raises(ValueError, match=r"config.mixing.cutmix_alpha is 1.0"):
        validate(config)
    validate(without_mixing(config))
    assert make_task(config, "0123456789").num_outputs == 1
    config.task = "clasification"
    with pytest.raises(ValueError, match=r"config\.task is 'clasification'; expected one of"):
        validate(config)


# --- The contract ---


def test_a_mistake_is_seen_on_shapes_alone():
    def check(**methods):
        kind = type("Mistaken", (Brightness,), methods)
        config = without_mixing(default_config())
        batch = {
            "image": jax.ShapeDtypeStruct((8, 4, 4, 3), "uint8"),
            "label": jax.ShapeDtypeStruct((8,), "int32"),
        }
        check_task(kind(config, "01"), lambda params, images: jnp.mean(images, axis=(1, 2)), {}, batch)

    check()
    with pytest.raises(
        ValueError, match=r"Mistaken.best is 'top1'; expected one of its metrics, \['error'\]"
    ):
        check(best="top1")
    with pytest.raises(
        ValueError, match=r"gives squared of shape \(\); expected one for each of the 8 examples"
    ):
        check(evaluate=lambda self, outputs, batch: {"squared": jnp.mean(outputs)})
    with pytest.raises(ValueError, match="gives count, which is taken"):
        check(evaluate=lambda self, outputs, batch: {"count": outputs[:, 0]})


def test_values_may_be_arrays():
    """A confusion matrix: counted over the examples whose mask is True, and turned into metrics at the end."""

    class Confusion(Classification):
        def evaluate(self, outputs, batch):
            told = jax.nn.one_hot(jnp.argmax(outputs, axis=1), 2)
            return {"confusion": jax.nn.one_hot(batch["label"], 2)[:, :, None] * told[:, None, :]}

    task = Confusion(default_config(), "01")
    outputs = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [np.nan, np.nan]])
    batch = {"label": jnp.array([0, 0, 1, 0]), "mask": jnp.array([True, True, True, False])}
    sums = evaluation_sums(task, outputs, outputs, batch)
    np.testing.assert_array_equal(sums["confusion"], [[1, 1], [1, 0]])
    assert sums["count"] == 3


def test_the_score_is_higher_for_the_better():
    task = Brightness(default_config(), "01")
    assert task.score({"error": 0.1}) > task.score({"error": 0.2})
    assert Classification(default_config(), "01").score({"top1": 0.1}) == 0.1
    assert issubclass(Brightness, Task)


# --- A run ---


@pytest.mark.usefixtures("two_devices")
def test_the_best_is_chosen_by_the_figure_of_the_task(tmp_path, digits_config):
    config = without_mixing(digits_config)
    config.task, config.eval_every, config.keep_checkpoints = TOY, 3, 1
    config.optim.lr = 3e-3  # Between evaluations the error goes up and down.
    results = train(config, tmp_path)
    assert set(results) == {"error", "count"}
    errors = {line["step"]: line["eval/error"] for line in read_metrics(tmp_path) if "eval/error" in line}
    with CheckpointReader(tmp_path) as checkpoints:
        assert checkpoints.resolve("best") == min(errors, key=lambda step: errors[step])
        assert checkpoints.metrics(checkpoints.resolve("last")) == results
    assert "train/top1" not in read_metrics(tmp_path)[0]
    with pytest.raises(ValueError, match="task is Brightness, whose outputs are no classes"):
        next(predict_files(tmp_path, [ROOT / "docs/figures/widths.png"]))
    config.task = "classification"
    with pytest.raises(ValueError, match=r"task: 'tests.tasks.brightness:Brightness' -> 'classification'"):
        train(config, tmp_path)


def test_from_the_command_line(tmp_path):
    def run(*arguments):
        environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        return result

    off = ["--config.label_smoothing=0", "--config.mixing.mixup_alpha=0"]
    workdir = f"--workdir={tmp_path}"
    command = ["train.py", "--config=configs/vir_digits.py", f"--config.task={TOY}", *off, workdir]
    average = "--config.model.readout=average"
    small = ["--config.model.name=vir_pico4", average]
    short = ["--config.optim.warmup_epochs=1", "--config.eval_every=30", "--config.optim.lr=3e-3", *small]
    run(*command, *short, "--config.epochs=2")
    longer = run(*command, *short, "--config.epochs=13")
    assert "going on from step 23 of 146" in longer.stderr
    error = float(re.fullmatch(r"error (\S+)\n", longer.stdout).group(1))
    digits = open_source("digits", "test")
    # The error of the best guess without looking.
    blind = np.std([digits[index]["image"].mean() / 255 for index in range(len(digits))])
    assert error < blind / 2
    evaluated = run("eval.py", workdir, "--mode=all", "--checkpoint=best").stdout.splitlines()
    assert evaluated[0].split() == ["mode", "error", "images", "images/s", "difference"]
    with CheckpointReader(tmp_path) as checkpoints:
        best = checkpoints.metrics(checkpoints.resolve("best"))["error"]
    assert [line.split()[1] for line in evaluated[1:]] == [f"{best:.4f}"] * 3
