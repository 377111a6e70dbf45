"""The worked examples of CONTRIBUTING.md are right: each is added as the text says, and used."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from tests.models import test_mixers
from vir_jax.models.mixers import mixer
from vir_jax.runs.metrics import read_metrics
from vir_jax.runs.recipes import load_recipe
from vir_jax.training.loop import train

ROOT = Path(__file__).parents[1]
EXAMPLES = dict(
    re.findall(
        r"<!-- example: ([\w ]+) -->\n```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL
    )
)


def imported(name, folder, monkeypatch):
    path = folder / f"{name.replace(' ', '_')}_example.py"
    path.write_text(EXAMPLES[name])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested():
    assert set(EXAMPLES) == {"mixer", "task", "data set"}


def test_a_mixer(tmp_path, monkeypatch):
    """Every part of the contract that the tests of mixers look at."""
    monkeypatch.setattr(mixer, "_MIXERS", dict(mixer._MIXERS))
    imported("mixer", tmp_path, monkeypatch)
    assert "average" not in test_mixers.MIXERS
    test_mixers.test_all_modes_agree("average")
    test_mixers.test_gradients_are_finite_and_none_is_lost("average")
    test_mixers.test_any_size_of_image_and_both_dtypes("average")
    test_mixers.test_streams_or_says_why_not("average")
    test_mixers.test_a_causal_mixer_sees_no_later_token_and_the_others_all("average")
    test_mixers.test_cost_and_intermediates_are_told("average")


def test_a_task():
    """It is the one that the tests of tasks train, resume and evaluate."""
    assert EXAMPLES["task"] == (ROOT / "tests/tasks/brightness.py").read_text()


@pytest.mark.usefixtures("two_devices")
def test_a_data_set(tmp_path, monkeypatch):
    stripes = imported("data set", tmp_path, monkeypatch).Stripes
    config = load_recipe("vir_digits")
    config.epochs, config.optim.warmup_epochs, config.eval_batch_size = 2.0, 0.5, 64
    metrics = train(config, tmp_path / "run", train_source=stripes(512), eval_source=stripes(64))
    assert metrics["count"] == 64
    assert len(read_metrics(tmp_path / "run")) > 0
