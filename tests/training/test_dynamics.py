"""Every recipe's optimiser and schedule move every kind of parameter: dry runs of a small model on real images."""

import functools
import json

import ml_collections
import numpy as np
import pytest

from benchmarks.dynamics import RECIPES, dry_run, load
from vir_jax.inspection.movement import kind_of

STEPS, AFTER_WARM_UP = 64, 12
# A parameter of this size or more at the start has a size of its own, which a step should not upset.
SIZABLE = 1e-3
KINDS = {"bias", "class token", "head", "kernel", "norm", "position embedding"}


@functools.cache
def steps_of(config_json, first, last):
    config = ml_collections.ConfigDict(json.loads(config_json))
    return list(dry_run(config, steps=STEPS, stop=last, group_of=str))[first:]


def run(recipe):
    """(before the first step, the steps after warm-up).

    Recipes that differ in what makes no difference here (drop path, precision, what is kept for the backward pass, the
    mesh) share one run.
    """
    config, base = load(recipe), load("vir_b")
    config.batch_size, config.model.dtype = 32, "float32"
    config.model.remat, config.model.drop_path_rate = "elementwise", 0.0
    config.mesh = base.mesh
    epochs = config.epochs + config.optim.cooldown_epochs
    peak = round(config.optim.warmup_epochs / epochs * STEPS)
    steps = steps_of(config.to_json(), 0, peak + AFTER_WARM_UP)
    assert steps[peak].learning_rate == pytest.approx(config.optim.lr)
    return steps[0], steps[peak:]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_parameter_moves_by_a_sensible_share(recipe):
    first, after = run(recipe)
    kinds = KINDS | ({"LayerScale"} if recipe.startswith("vir") else set())
    assert {kind_of(path) for path in first.size} == kinds
    for path, start in first.size.items():
        size, moved, rate = (
            np.array(values)
            for values in zip(*((s.size[path], s.moved[path], s.learning_rate) for s in after), strict=True)
        )
        if start >= SIZABLE:
            share = np.mean(moved / size)
            assert 1e-3 * (0.1 if kind_of(path) == "norm" else 1) < share < 0.3, (path, share)
        else:
            # From nothing, or next to it, as Adam moves: by about the learning rate, whatever the size.
            share = np.mean(moved / rate)
            assert 0.02 < share < 2, (path, share)
            assert size[-1] > max(100 * start, 1e-3), (path, start, size[-1])
