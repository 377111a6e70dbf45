import inspect
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
from vir_jax.runs.validate import OPTIMIZERS
from vir_jax.training.optimizer import learning_rate_schedule, make_optimizer, optimizer_options
from vir_jax.training.optimizers import MAKERS, decay_mask


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


def one_step(name, params, grads, **options):
    optimizer = make_optimizer(name, **options)
    return optimizer.update(grads, optimizer.init(params), params)[0]


def test_first_steps_by_hand():
    params, grads = {"kernel": jnp.array([2.0, 2.0])}, {"kernel": jnp.array([3.0, -0.5])}
    decayed = 0.1 * params["kernel"]
    # Lion: the sign; SGD: the gradient with the decay in it, once more by Nesterov's momentum.
    step = one_step("lion", params, grads, b1=0.9, b2=0.99, weight_decay=0.1)
    np.testing.assert_allclose(step["kernel"], -(jnp.sign(grads["kernel"]) + decayed), rtol=1e-6)
    step = one_step("sgd", params, grads, b1=0.9, weight_decay=0.1)
    np.testing.assert_allclose(step["kernel"], -1.9 * (grads["kernel"] + decayed), rtol=1e-6)
    # Adafactor: g / |g| at first, of RMS 1, a tenth of it into the momentum.
    step = one_step("adafactor", params, grads, b1=0.9, weight_decay=0.1)
    np.testing.assert_allclose(step["kernel"], -(0.1 * jnp.sign(grads["kernel"]) + decayed), rtol=1e-5)


def test_muon_makes_each_matrix_of_the_blocks_orthogonal():
    keys = iter(jax.random.split(jax.random.key(0), 9))
    shapes = {
        "stage": {"blocks": {"mixer": {"qkv": {"kernel": (2, 8, 3, 4, 2)}, "out": {"kernel": (2, 4, 2, 8)}},
                             "mlp": {"up": {"kernel": (2, 8, 32), "bias": (2, 32)}}}},
        "readout": {"head": {"kernel": (8, 3)}},
    }  # fmt: skip
    params = jax.tree.map(
        lambda shape: jax.random.normal(next(keys), shape), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    step = one_step("muon", params, params, b1=0.95, b2=0.999, eps=1e-8, weight_decay=0.0)
    blocks = step["stage"]["blocks"]
    matrices = [blocks["mixer"]["qkv"]["kernel"][1, :, i].reshape(8, 8) for i in range(3)]
    matrices += [blocks["mixer"]["out"]["kernel"][0].reshape(8, 8), blocks["mlp"]["up"]["kernel"][0]]
    given = params["stage"]["blocks"]
    gradients = [given["mixer"]["qkv"]["kernel"][1, :, i].reshape(8, 8) for i in range(3)]
    gradients += [given["mixer"]["out"]["kernel"][0].reshape(8, 8), given["mlp"]["up"]["kernel"][0]]
    for matrix, gradient in zip(matrices, gradients, strict=True):
        x = np.asarray(gradient, np.float64)
        x /= np.linalg.norm(x)
        for _ in range(5):  # Of Newton and Schulz.
            a = x @ x.T
            x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
        np.testing.assert_allclose(matrix, -0.2 * np.sqrt(max(x.shape)) * x, rtol=1e-3, atol=1e-4)
    for adams in (blocks["mlp"]["up"]["bias"], step["readout"]["head"]["kernel"]):
        # Signs, lengthened by Nesterov's momentum.
        np.testing.assert_allclose(jnp.abs(adams), 1 + 0.95 * (1 - 0.95) / (1 - 0.95**2), rtol=1e-4)
    decayed = one_step("muon", params, params, b1=0.95, b2=0.999, eps=1e-8, weight_decay=0.1)
    kernel = params["readout"]["head"]["kernel"]
    np.testing.assert_allclose(
        decayed["readout"]["head"]["kernel"], step["readout"]["head"]["kernel"] - 0.1 * kernel, rtol=1e-5
    )


def test_the_config_knows_what_each_optimizer_reads():
    assert OPTIMIZERS.keys() == MAKERS.keys()
    for name, maker in MAKERS.items():
        assert {*OPTIMIZERS[name], "weight_decay"} == inspect.signature(maker).parameters.keys()


@pytest.mark.parametrize("name", MAKERS)
def test_the_options_of_each_are_taken_from_the_config(name):
    config = default_config()
    config.optim.name, config.optim.weight_decay = name, 0.05
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    step = one_step(params=params, grads=params, **optimizer_options(config.optim))
    assert all(jnp.all(update < 0) for update in jax.tree.leaves(step))


def test_the_options_are_those_of_the_config():
    config, _ = load("vir_b")
    options = optimizer_options(config.optim)
    assert options == {"name": "lamb", "clip_norm": 5.0, "layer_decay": 1.0, "freeze": "", **OPTIONS}
    make_optimizer(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "adam"},
            r"'adam'; expected one of \['adafactor', 'adamw', 'lamb', 'lion', 'muon', 'sgd'\]",
        ),
        ({"name": "sgd", "b2": 0.9}, r"config.optim.b2 is 0.9, and 'sgd' has no such option; it has"),
        ({"name": "lamb", "beta1": 0.5}, r"config.optim.beta1 is 0.5, and 'lamb' has no such option; it has"),
    ],
)
def test_what_there_is_not_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(**options)
