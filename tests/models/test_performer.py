"""Performer's features: positive, orthogonal, unbiased, safe for large numbers, no parameter; and its causal form."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.helpers import abstract, images, relative_error
from vir_jax.models.layout import Layout
from vir_jax.models.mixers.performer import (
    exponents,
    key_features,
    linear_attention,
    orthogonal_projection,
    query_features,
)
from vir_jax.models.mixers.performer_causal import CausalPerformer, causal_key_features
from vir_jax.ops import MODES
from vir_jax.runs.model import model_functions
from vir_jax.runs.state import with_statistics
from vir_jax.training.optimizer import make_optimizer

SHAPE = (2, 20, 2, 8)


def draw(scale=1.0, shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(scale * rng.standard_normal(shape), jnp.float32) for _ in range(3)]


def projection(features=24, dim=8, seed=0):
    return orthogonal_projection(jax.random.key(seed), features, dim)


@jax.jit
def attention(q, k, v, w):
    return linear_attention(query_features(q, w), key_features(k, w), v)


def test_sums_are_the_normalised_matrix_times_the_values():
    q, k, v = draw()
    w = projection()
    weights = np.einsum("bnhr,bmhr->bhnm", query_features(q, w), key_features(k, w))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhnm,bmhd->bnhd", weights, v)
    np.testing.assert_allclose(attention(q, k, v, w), expected, rtol=1e-5, atol=1e-5)


def test_means_of_ones_are_one():
    q, k, v = draw()
    np.testing.assert_allclose(attention(q, k, jnp.ones_like(v), projection()), 1.0, rtol=1e-5)


def test_the_kernel_is_unbiased():
    q, k, _ = draw(0.5, (1, 1, 1, 32))

    @jax.jit
    @jax.vmap
    def kernel(key):
        w = orthogonal_projection(key, 32, 32)
        of_q, of_k = (jnp.exp(products - norms) for products, norms in (exponents(x, w) for x in (q, k)))
        return jnp.mean(of_q * of_k)

    values = np.asarray(kernel(jax.random.split(jax.random.key(1), 2000)), np.float64)
    expected = np.exp(float(jnp.sum(q * k)) / 32**0.5)
    assert abs(values.mean() - expected) < 4 * values.std() / 2000**0.5


def test_more_features_come_nearer_to_softmax_attention():
    q, k, v = draw(0.25, (1, 64, 1, 32))
    expected = jax.nn.dot_product_attention(q, k, v)
    errors = [
        np.mean(
            [
                relative_error(attention(q, k, v, projection(features, 32, seed)), expected)
                for seed in range(8)
            ]
        )
        for features in (32, 110, 256, 1024, 4096)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.03


def test_rows_are_orthogonal_in_blocks_and_as_long_as_normal_vectors():
    w = np.asarray(projection(110, 32))
    for block in (w[:32], w[32:64], w[64:96], w[96:]):
        products = block @ block.T
        np.testing.assert_allclose(products - np.diag(np.diag(products)), 0, atol=1e-4)
    many = np.asarray(projection(3200, 32))
    squares = np.sum(many**2, axis=1)  # Chi-squared of 32 degrees: mean 32, variance 64.
    assert abs(squares.mean() - 32) < 4 * (64 / 3200) ** 0.5
    assert abs(squares.var() / 64 - 1) < 0.25
    assert not np.allclose(many[:32], many[32:64])


def test_examples_do_not_meet():
    q, k, v = draw()
    alone = attention(q, k, v, projection())
    beside = attention(q, k.at[1].multiply(10.0), v, projection())
    np.testing.assert_array_equal(alone[0], beside[0])
    assert jnp.any(alone[1] != beside[1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [8, 128])
def test_large_queries_and_keys_give_finite_outputs_and_gradients(causal, dim):
    q, k, v = draw(30.0, (1, 20, 1, dim))
    w = projection(2 * dim, dim)
    k = k.at[0, 0, 0].set(w[0] * dim**0.25)  # The largest feature that there can be.
    features = causal_key_features if causal else key_features

    def loss(q, k, v):
        return jnp.sum(linear_attention(query_features(q, w), features(k, w), v) ** 2)

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)
    assert all(jnp.all(jnp.isfinite(x)) for x in (value, *gradients))


def test_the_projection_is_no_parameter_and_training_leaves_it():
    options = {"name": "vit_pico1", "mixer": "performer", "image_size": 4}
    model = model_functions(options, 5)
    assert not model.has_statistics
    params = jax.jit(model.init)(jax.random.key(0))
    w = params["stage"]["blocks"]["mixer"]["projection"]
    assert w.shape == (4, 44, 16)
    assert not jnp.array_equal(w[0], w[1]), "each layer has its own"
    trained = nnx.to_pure_dict(nnx.state(abstract(**options), nnx.Param))
    assert "projection" not in trained["stage"]["blocks"]["mixer"]

    def loss(params):
        logits, statistics = model.train(params, images((2, 4, 4, 3)), jax.random.key(0))
        return jnp.sum(logits**2), statistics

    gradients, statistics = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert statistics == {}
    assert not jnp.any(gradients["stage"]["blocks"]["mixer"]["projection"])
    for name in ("adamw", "lamb"):
        optimizer = make_optimizer(name, weight_decay=0.05, clip_norm=1.0)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        assert not jnp.any(updates["stage"]["blocks"]["mixer"]["projection"])
        assert jnp.any(updates["stage"]["blocks"]["mixer"]["qkv"]["kernel"])


@functools.cache
def causal():
    layout = Layout(cols=4, patches=19, class_token="last")
    return CausalPerformer(16, 2, layout, features=24, dtype=jnp.float32, rngs=nnx.Rngs(0)), layout


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_the_causal_form_is_its_masked_matrix_times_the_values(mode):
    mixer, layout = causal()
    q, k, v = draw()
    w = mixer.projection[...]
    weights = np.einsum("bnhr,bmhr->bhnm", query_features(q, w), causal_key_features(k, w)) * np.tri(20)
    weights /= weights.sum(-1, keepdims=True)
    out, state = mixer.mix(q, k, v, layout, mode=mode, state=None)
    np.testing.assert_allclose(out, np.einsum("bhnm,bmhd->bnhd", weights, v), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state[..., -1], jnp.sum(causal_key_features(k, w), axis=1), rtol=1e-5)
    assert state.shape == mixer.initial_state(2, layout).shape


@pytest.mark.parametrize("mixer", ["performer", "performer_causal"])
def test_it_is_drawn_anew_in_training_after_so_many_passes(mixer):
    """And in evaluation it stays the draw of the step that the weights are of, whether they are averaged or not."""
    options = {"name": "vit_pico1", "mixer": mixer, "image_size": 4, "redraw_interval": 2}
    model = model_functions(options, 5)
    params, inputs = jax.jit(model.init)(jax.random.key(0)), images((2, 4, 4, 3))
    evaluate, train = jax.jit(model.apply), jax.jit(model.train)
    outputs = []
    for passes in range(5):
        counted = params["stage"]["blocks"]["mixer"]["passes"]
        np.testing.assert_array_equal(counted, [passes] * 4)
        trained, statistics = train(params, inputs, jax.random.key(1))
        evaluated = evaluate(params, inputs)
        np.testing.assert_allclose(trained, evaluated, rtol=1e-5, atol=1e-6)  # There is no drop path.
        outputs.append(evaluated)
        params = with_statistics(params, statistics)
    same = [bool(jnp.all(a == b)) for a, b in itertools.pairwise(outputs)]
    assert same == [True, False, True, False]
    averaged = with_statistics(params, jax.tree.map(lambda counted: counted - 0.7, statistics))
    np.testing.assert_array_equal(evaluate(averaged, inputs), evaluate(params, inputs))


def test_no_interval_of_redrawing_is_none():
    for interval in (0, -1):
        with pytest.raises(ValueError, match="redraw_interval"):
            abstract(name="vit_pico1", mixer="performer", image_size=4, redraw_interval=interval)
