import json

import chex
import jax
import numpy as np
import pytest

from vir_jax.data import open_source
from vir_jax.runs.checkpoint_reader import CheckpointReader
from vir_jax.runs.metrics import read_metrics
from vir_jax.training.loop import NonFiniteError, train

pytestmark = pytest.mark.usefixtures("two_devices")
TIMES = ("images_per_second", "eta_seconds")


class Interrupted(BaseException):
    """No Exception, so that nobody takes it for a corrupt example."""


class InterruptedSource:
    """Digits that stop the run when their loader has read `reads` examples."""

    def __init__(self, reads):
        self.source = open_source("digits", "train")
        self.num_classes, self.class_names = self.source.num_classes, self.source.class_names
        self.name = self.source.name
        self.reads = reads

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.reads -= 1
        if self.reads < 0:
            raise Interrupted
        return self.source[index]


def final_state(workdir):
    with CheckpointReader(workdir) as checkpoints:
        step = checkpoints.resolve("last")
        weights = {name: checkpoints.restore_params(step, weights=name) for name in ("raw", "ema")}
        return step, jax.tree.map(np.asarray, weights), checkpoints.metrics(step)


def logged(workdir):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(workdir)]


def test_a_stopped_run_ends_as_one_that_was_never_stopped(tmp_path, digits_config):
    whole = train(digits_config, tmp_path / "whole")

    stopped = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        train(digits_config, stopped, train_source=InterruptedSource(64 * 14))
    with CheckpointReader(stopped) as checkpoints:
        saved = checkpoints.latest_step()
    assert saved is not None
    assert 0 < saved < 23
    resumed = train(digits_config, stopped)

    assert resumed == whole
    assert set(whole) == {"top1", "top5", "loss", "count"}
    assert whole["count"] == 355
    chex.assert_trees_all_equal(final_state(stopped), final_state(tmp_path / "whole"))
    assert final_state(stopped)[0] == 23
    assert logged(stopped) == logged(tmp_path / "whole")
    # Nothing is left to do: a third start trains no step and gives the same result.
    assert train(digits_config, stopped) == whole
    digits_config.epochs = 0.3
    with pytest.raises(ValueError, match=r"holds step 23, beyond the 9 steps .* raise config.epochs"):
        train(digits_config, stopped)


def test_metrics_of_a_run(tmp_path, digits_config):
    digits_config.eval_every, digits_config.model.name = 10, "vir_x4"
    with pytest.raises(ValueError, match="no model is called 'vir_x4'"):
        train(digits_config, tmp_path)
    digits_config.model.name = "vir_pico4"  # A mistake does not claim the workdir.
    train(digits_config, tmp_path)
    lines = read_metrics(tmp_path)
    train_steps = [line["step"] for line in lines if "train/loss" in line]
    eval_steps = [line["step"] for line in lines if "eval/top1" in line]
    assert train_steps == [4, 8, 12, 16, 20, 23]
    assert eval_steps == [10, 20, 23]
    names = {"loss", "top1", "top5", "learning_rate", "gradient_norm", "parameter_norm", "update_norm"}
    assert {f"train/{name}" for name in names} <= lines[0].keys()
    assert {"images_per_second", "eta_seconds", "data/skipped"} <= lines[0].keys()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eval_every"] == 10


def test_values_that_are_not_finite_stop_the_run(tmp_path, digits_config):
    digits_config.optim.lr = 1e30
    digits_config.optim.warmup_epochs = 0.0
    with pytest.raises(NonFiniteError, match=r"step \d+: loss .*, gradient norm .* Last checkpoint: step"):
        train(digits_config, tmp_path)


@pytest.mark.parametrize(("retention", "mode"), [("2d", "chunkwise"), ("1d", "recurrent")])
def test_named_modes_train(tmp_path, digits_config, retention, mode):
    digits_config.model.retention, digits_config.model.mode = retention, mode
    digits_config.epochs, digits_config.optim.cooldown_epochs = 0.2, 0.0
    assert train(digits_config, tmp_path)["count"] == 355


def test_too_few_examples(tmp_path, digits_config):
    digits_config.batch_size = 2048
    with pytest.raises(ValueError, match="1442 examples, fewer than one batch of 2048"):
        train(digits_config, tmp_path)
