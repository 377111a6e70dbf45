"""Every recipe's optimiser and schedule move every kind of parameter: dry runs of a small model on real images."""

import dataclasses
import functools
import json

import ml_collections
import numpy as np
import pytest

from benchmarks import dynamics
from benchmarks.dynamics import RECIPES, dry_run, load
from benchmarks.timing import RESULTS
from vir_jax.inspection.movement import kind_of

STEPS, AFTER_WARM_UP = 64, 12
# A parameter of this size or more at the start has a size of its own, which a step should not upset.
SIZABLE = 1e-3
KINDS = {"bias", "class token", "head", "kernel", "norm"}


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


# Pyramids compile too long for this, and their biases before a norm have no gradient.
@pytest.mark.parametrize("recipe", [name for name in RECIPES if not name.startswith("vir_h")])
def test_every_parameter_moves_by_a_sensible_share(recipe):
    first, after = run(recipe)
    model = load(recipe).model
    more = {"LayerScale": model.layer_scale is not None, "position embedding": model.position == "learned"}
    assert {kind_of(path) for path in first.size} == KINDS | {kind for kind, there in more.items() if there}
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


def test_pyramids_run_at_their_smallest_size():
    assert {"vir_h_ti", "vir_h_cifar10"} < set(RECIPES)
    for recipe in ("vir_h_ti", "vir_h_cifar10"):
        model = load(recipe).model
        assert (model.name, model.stem_stride, model.image_size) == ("vir_h_nano", 1, (8, 8))


def test_recipes_that_were_not_run_again_stay():
    text = (RESULTS / "dynamics.json").read_text()
    records = [dataclasses.asdict(record) for record in dynamics._written().values()]
    assert json.loads(json.dumps(records)) == json.loads(text)["records"]
