import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vir_jax.runs.config import default_config
from vir_jax.runs.model import model_functions
from vir_jax.runs.state import create_train_state
from vir_jax.tasks import make_task
from vir_jax.training.step import StepConfig, make_train_step

CLASSES = 5
PLAIN = StepConfig(seed=0, accumulation_steps=1, reduce_dtype="float32", ema_decay=0.9)


def make_batch(size=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (size, 8, 8, 3)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, CLASSES, size), jnp.int32),
    }


def make_model(name="vir_pico4", drop_path=0.0):
    config = default_config()
    config.model.name, config.model.image_size = name, (8, 8)
    config.model.layer_scale, config.model.drop_path_rate = 1e-5, drop_path
    return model_functions(config.model, CLASSES)


def make_classification(mixup=0.0, cutmix=0.0):
    config = default_config()
    config.label_smoothing, config.mixing.mixup_alpha, config.mixing.cutmix_alpha = 0.0, mixup, cutmix
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    return make_task(config, [str(number) for number in range(CLASSES)])


def make_step(model, config=PLAIN, learning_rate=1e-3, task=None):
    schedule, optimizer = optax.constant_schedule(learning_rate), optax.adamw(1.0)
    state = create_train_state(model.init(jax.random.key(0)), optimizer, ema=True)
    return state, jax.jit(
        make_train_step(model.train, task or make_classification(), optimizer, schedule, config)
    )


def test_one_batch_is_overfitted():
    state, step = make_step(make_model(), learning_rate=3e-3)
    batch = make_batch()
    for _ in range(150):
        state, metrics = step(state, batch)
    assert float(metrics["loss"]) < 0.01
    assert float(metrics["top1"]) == 1.0
    assert int(state.step) == 150


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    """Drop path included: an example draws the same in whatever slice it is."""
    model = make_model(drop_path=0.5)
    whole_state, whole = make_step(model)
    sliced_state, sliced = make_step(model, dataclasses.replace(PLAIN, accumulation_steps=4))
    batch = make_batch(16)
    for _ in range(2):
        whole_state, whole_metrics = whole(whole_state, batch)
        sliced_state, sliced_metrics = sliced(sliced_state, batch)
    for name in ("loss", "top1", "top5", "gradient_norm"):
        np.testing.assert_allclose(sliced_metrics[name], whole_metrics[name], rtol=1e-5)
    # Adam divides by the gradient's size, so a parameter moves by the learning rate whatever the size:
    # compare the moments, which carry the gradients, and not only the parameters.
    # By relative RMS of each leaf, as single entries may cancel to nearly nothing.
    moments = (optax.tree_utils.tree_get(state.opt_state, "mu") for state in (sliced_state, whole_state))
    errors = jax.tree.map(lambda x, y: jnp.linalg.norm(x - y) / jnp.linalg.norm(y), *moments)
    assert max(jax.tree.leaves(errors)) < 1e-4


def test_randomness_is_a_function_of_seed_and_step():
    mixing = make_classification(mixup=0.8, cutmix=1.0)
    model = make_model(drop_path=0.5)
    state, step = make_step(model, task=mixing)
    _, again_step = make_step(model, task=mixing)
    batch = make_batch()
    # The loss of a fresh model is ln 5 whatever it sees.
    norm = float(step(state, batch)[1]["gradient_norm"])
    assert norm == float(again_step(state, batch)[1]["gradient_norm"])
    later = dataclasses.replace(state, step=state.step + 1)
    assert norm != float(step(later, batch)[1]["gradient_norm"])
    _, other_seed = make_step(model, dataclasses.replace(PLAIN, seed=1), task=mixing)
    assert norm != float(other_seed(state, batch)[1]["gradient_norm"])


def test_a_step_that_is_not_finite_changes_nothing_but_the_counter():
    state, step = make_step(make_model())
    head = state.params["readout"]["head"]
    head["kernel"] = head["kernel"].at[0, 0].set(jnp.nan)
    stepped, metrics = step(state, make_batch())
    assert not bool(metrics["finite"])
    assert int(stepped.step) == int(state.step) + 1
    chex.assert_trees_all_equal(dataclasses.replace(stepped, step=state.step), state)


def test_the_learning_rate_is_that_of_the_step_whatever_was_skipped():
    """What is logged is what is applied, and the schedule ends with the run."""
    schedule, optimizer = optax.linear_schedule(1.0, 0.0, 10), optax.sgd(1.0)
    params = {"kernel": jnp.ones((3, CLASSES))}

    def apply(params, images, key):
        pixels = images.mean((1, 2)) @ params["kernel"]
        return jnp.where(jnp.any(images != images[0, 0, 0, 0]), pixels, jnp.nan), {}

    step = jax.jit(make_train_step(apply, make_classification(), optimizer, schedule, PLAIN))
    state = create_train_state(params, optimizer, ema=False)
    good = make_batch()
    bad = {**good, "image": jnp.zeros_like(good["image"])}
    for number, batch in enumerate([good, bad, bad, good, bad, good]):
        before = state.params
        state, metrics = step(state, batch)
        assert int(state.step) == number + 1
        assert float(metrics["learning_rate"]) == pytest.approx(schedule(number))
        assert bool(metrics["finite"]) == (batch is good)
        if batch is good:
            moved = optax.tree.norm(optax.tree.sub(state.params, before))
            expected = schedule(number) * metrics["gradient_norm"]
            np.testing.assert_allclose(moved, expected, rtol=1e-3)
            np.testing.assert_allclose(metrics["update_norm"], expected, rtol=1e-5)


def test_norms_and_ema():
    state, step = make_step(make_model())
    stepped, metrics = step(state, make_batch())
    difference = optax.tree.sub(stepped.params, state.params)
    np.testing.assert_allclose(metrics["update_norm"], optax.tree.norm(difference), rtol=1e-3)
    np.testing.assert_allclose(metrics["parameter_norm"], optax.tree.norm(stepped.params), rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], 1e-3, rtol=1e-6)
    expected = jax.tree.map(lambda old, new: 0.1 * old + 0.9 * new, state.params, stepped.params)
    chex.assert_trees_all_close(stepped.ema, expected, atol=1e-7)
