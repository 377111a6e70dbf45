import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.test_configs import load
from vir_jax.parallel.sharding import dotted
from vir_jax.runs.config import default_config
from vir_jax.runs.model import model_functions
from vir_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer, optimizer_options


def test_schedule_by_hand():
    config, _ = load("vir_b")
    schedule = learning_rate_schedule(config, steps_per_epoch=10.0)
    assert schedule(0) == pytest.approx(
        1e-6, abs=5e-3 * 2**-23
    )  # A difference of numbers of the size of the peak.
    assert schedule(100) == pytest.approx((1e-6 + 5e-3) / 2, rel=1e-5)  # Half of 20 warm-up epochs.
    assert schedule(200) == pytest.approx(5e-3, rel=1e-5)
    half_way = 200 + (3100 - 200) // 2
    assert schedule(half_way) == pytest.approx((5e-3 + 5e-6) / 2, rel=1e-4)
    quarter = 200 + (3100 - 200) / 4
    expected = 5e-6 + (5e-3 - 5e-6) * (1 + math.cos(math.pi / 4)) / 2
    assert schedule(quarter) == pytest.approx(expected, rel=1e-4)
    for step in (3100, 3150, 3200):  # Cool-down.
        assert schedule(step) == pytest.approx(5e-6, rel=1e-4)


@pytest.mark.parametrize("name", ["vir_pico1", "vit_pico1"])
def test_only_kernels_decay(name):
    config = default_config()
    config.model.name, config.model.image_size = name, (8, 8)
    config.model.layer_scale = 1e-5 if name.startswith("vir") else None
    params = jax.eval_shape(model_functions(config.model, 10).init, jax.random.key(0))
    decays = {
        dotted(path): decays for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(params))
    }
    off = [path for path, decayed in decays.items() if not decayed]
    assert all(decays[path] for path in decays if path.endswith("kernel"))
    for fragment in ("bias", "norm1.scale", "position.embedding", "class_token", "readout.norm.scale"):
        assert any(fragment in path for path in off), fragment
    assert any("layer_scale" in path for path in off) == name.startswith("vir")
    assert not any("kernel" in path for path in off)


OPTIONS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.05}


def test_adamw_step_by_hand():
    params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
    optimizer = make_optimizer("adamw", clip_norm=5.0, **OPTIONS)
    # Of norm 50, clipped to 5; the first Adam step is the sign of the gradient whatever its size.
    grads = {"kernel": jnp.array([30.0]), "bias": jnp.array([-40.0])}
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    chex.assert_trees_all_close(
        updates, {"kernel": jnp.array([-(1 + 0.05 * 2)]), "bias": jnp.array([1.0])}, rtol=1e-5
    )
    moments = optax.tree_utils.tree_get(state, "mu")
    chex.assert_trees_all_close(moments, {"kernel": jnp.array([0.3]), "bias": jnp.array([-0.4])}, rtol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.05, 0.0])
def test_a_kernel_moves_by_its_norm_under_lamb_and_nothing_else_does(weight_decay):
    params = {
        "kernel": jnp.array([3.0, 4.0]),
        "bias": jnp.array([0.0, 0.0]),
        "class_token": jnp.array([1e-6, -1e-6]),
        "layer_scale1": {"scale": jnp.array([1e-5, 1e-5])},
    }
    optimizer = make_optimizer("lamb", **{**OPTIONS, "weight_decay": weight_decay})
    grads = jax.tree.map(lambda leaf: jnp.array([1e-3, 7.0], leaf.dtype), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(np.linalg.norm(updates.pop("kernel")), 5.0, rtol=1e-5)
    for leaf in jax.tree.leaves(updates):  # Adam's first step.
        np.testing.assert_allclose(leaf, [-1.0, -1.0], rtol=1e-4)


def test_lamb_treats_each_block_as_an_array_of_its_own():
    """To kernels what `optax.lamb` does, had every block arrays of its own; to all else what `optax.adam` does."""
    draw = np.random.default_rng(0).standard_normal
    size = np.array([1.0, 10.0, 0.0])[:, None, None]  # A block of zeros keeps a trust ratio of 1.
    stacked = {
        "blocks": {"kernel": size * draw((3, 4, 5)), "bias": draw((3, 5)), "scale": 1e-5 * draw((3, 5))},
        "stages": {"1": {"blocks": {"kernel": draw((3, 4, 5))}}},
        "head": {"kernel": draw((5, 2)), "bias": draw((2,))},
    }
    stacked = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), stacked)
    grads = jax.tree.map(lambda x: jnp.asarray(draw(x.shape), jnp.float32), stacked)

    def apart(tree):
        return {
            dotted(path): [leaf[i] for i in range(3)] if "blocks" in dotted(path) else leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    def two_steps(optimizer, params, grads):
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, optax.tree.scale(0.1, updates))
        return params

    ours = apart(two_steps(make_optimizer("lamb", **OPTIONS), stacked, grads))
    references = {True: optax.lamb(1.0, **OPTIONS), False: optax.adam(1.0, b1=0.9, b2=0.999, eps=1e-8)}
    for is_kernel, reference in references.items():
        expected = two_steps(reference, apart(stacked), apart(grads))
        chosen = [path for path in ours if path.endswith("kernel") == is_kernel]
        assert len(chosen) == 3
        for path in chosen:
            chex.assert_trees_all_close(ours[path], expected[path], rtol=1e-5)


def test_the_options_are_those_of_the_config():
    config, _ = load("vir_b")
    options = optimizer_options(config.optim)
    assert options == {"name": "lamb", "clip_norm": 5.0, **OPTIONS}
    make_optimizer(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sgd"}, r"'sgd'; expected one of \['adamw', 'lamb'\]"),
        ({"name": "lamb", "beta1": 0.5}, r"config.optim.beta1 is 0.5, and 'lamb' has no such option; it has"),
    ],
)
def test_what_there_is_not_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(**options)
