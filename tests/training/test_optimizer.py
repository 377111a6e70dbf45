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
from vir_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer


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
    for fragment in ("bias", "norm1.scale", "position_embedding", "class_token", "final_norm.scale"):
        assert any(fragment in path for path in off), fragment
    assert any("layer_scale" in path for path in off) == name.startswith("vir")
    assert not any("kernel" in path for path in off)


def test_adamw_step_by_hand():
    config = default_config()
    config.optim.name, config.optim.clip_norm, config.optim.weight_decay = "adamw", 5.0, 0.05
    params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
    optimizer = make_optimizer(config.optim, optax.constant_schedule(0.1))
    # Of norm 50, clipped to 5; the first Adam step is the sign of the gradient whatever its size.
    grads = {"kernel": jnp.array([30.0]), "bias": jnp.array([-40.0])}
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    chex.assert_trees_all_close(
        updates, {"kernel": jnp.array([-0.1 * (1 + 0.05 * 2)]), "bias": jnp.array([0.1])}, rtol=1e-5
    )
    moments = optax.tree_utils.tree_get(state, "mu")
    chex.assert_trees_all_close(moments, {"kernel": jnp.array([0.3]), "bias": jnp.array([-0.4])}, rtol=1e-5)


def test_lamb_step_has_the_norm_of_the_parameter():
    config = default_config()
    config.optim.name, config.optim.weight_decay = "lamb", 0.05
    params = {"kernel": jnp.array([3.0, 4.0])}
    optimizer = make_optimizer(config.optim, optax.constant_schedule(0.1))
    updates, _ = optimizer.update({"kernel": jnp.array([1e-3, 7.0])}, optimizer.init(params), params)
    np.testing.assert_allclose(np.linalg.norm(updates["kernel"]), 0.1 * 5.0, rtol=1e-5)


def test_lamb_treats_each_block_as_an_array_of_its_own():
    """What `optax.lamb` does to the same parameters, had every block arrays of its own."""
    config = default_config()
    config.optim.name, config.optim.weight_decay = "lamb", 0.05
    schedule = optax.constant_schedule(0.1)
    draw = np.random.default_rng(0).standard_normal
    size = np.array([1.0, 10.0, 0.0])[:, None, None]  # A block of zeros keeps a trust ratio of 1.
    stacked = {
        "blocks": {"kernel": size * draw((3, 4, 5)), "bias": draw((3, 5))},
        "head": {"kernel": draw((5, 2))},
    }
    stacked = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), stacked)
    grads = jax.tree.map(lambda x: jnp.asarray(draw(x.shape), jnp.float32), stacked)

    def apart(tree):
        blocks = [jax.tree.map(lambda leaf, i=i: leaf[i], tree["blocks"]) for i in range(3)]
        return {**tree, "blocks": blocks}

    def two_steps(optimizer, params, grads):
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    optim = config.optim
    reference = optax.lamb(
        schedule, b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay, mask=decay_mask
    )
    ours = two_steps(make_optimizer(optim, schedule), stacked, grads)
    expected = two_steps(reference, apart(stacked), apart(grads))
    chex.assert_trees_all_close(apart(ours), expected, rtol=1e-5)


def test_unknown_optimizer():
    config = default_config()
    config.optim.name = "sgd"
    with pytest.raises(ValueError, match=r"'sgd'; expected one of \['adamw', 'lamb'\]"):
        make_optimizer(config.optim, optax.constant_schedule(0.1))
